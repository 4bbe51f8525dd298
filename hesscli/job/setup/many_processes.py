"""Data that lies on several processes: one leads, and the others answer what it asks of theirs.

What a command needs of the data are sums over batches: gradients, products, and what checks these. The first process
runs the command as if it were alone. Where a sum is needed, it sends the question and a vector; each process answers
for its own batches, and the answers are added up in float64. So the processes cannot get out of step, whatever the
rounding of each, and the others hold neither a basis nor a result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hesscli.errors import HesscliError, MismatchError
from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.curvatures import CURVATURES
from hesscli.hessian.differences.check import Certificate
from hesscli.hessian.differences.here import Here
from hesscli.hessian.objective.batch import Batches
from hesscli.hessian.objective.problem import Problem, parameters_at
from hesscli.hessian.operator import LinearMap, Products
from hesscli.job.options import Listener, ProblemOptions
from hesscli.job.setup.batches import free_memory
from hesscli.job.setup.opening import Opened, open_problem
from hesscli.job.setup.processes import Processes
from hesscli.job.setup.shared_problem import (
    Gradient,
    Question,
    Quotient,
    SharedDifference,
    SharedProblem,
    SharedProducts,
)
from hesscli.job.setup.team import ProcessLost, Team, ranks_here


class ManyProcesses(Processes):
    """One of several processes: its share of the data, and what it asks of the others."""

    def __init__(self) -> None:
        super().__init__(team=Team(), side_by_side=False)
        self.size = self.team.size
        self.opened: list[Opened] = []
        self.kept: tuple[object, Products] | None = None  # those of the last question
        self.asking = False
        self.heard: Exception | None = None  # on its way up, and all know of it

    def __enter__(self) -> ManyProcesses:
        self.team.__enter__()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """The others are told that this is the end; where they cannot be, they see this process end."""
        if self.team.rank == 0 and not self.asking:
            with contextlib.suppress(ProcessLost):
                self.team.broadcast(None)
                kind = error = traceback = None  # all leave together
        self.team.__exit__(kind, error, traceback)

    def serve(self) -> bool:
        """Answers until there are no more questions; False at once for the process that asks.

        Raises:
            ProcessLost: another has ended.
        """
        if self.team.rank == 0:
            return False
        while (question := self.team.broadcast(None)) is not None:
            try:
                if isinstance(question, ProblemOptions):
                    self._open(question, Listener())
                elif isinstance(question, Question):
                    dtype, device = question.dtype, self.opened[0].problem.device
                    tensor = torch.empty(question.shape, dtype=dtype, device=device)
                    self._answered(question, self.team.broadcast_tensor(tensor))
                else:
                    self.kept = None
            except _SAID as error:
                if error is not self.heard:
                    raise
                self.heard = None  # by the first process too, which says it
        return True

    # What the first process asks

    def open(self, options: ProblemOptions, listener: Listener) -> Opened:
        """The problem with all the data, as every process opens it."""
        with self._asking():
            self.team.broadcast(options)
            return self._open(options, listener)

    def ask(self, question: Question, tensor: Tensor) -> Tensor:
        """The sum of all processes' answers.

        Raises:
            HesscliError: of any kind, on any process.
            NotApplicable: an operator lacks a derivative.
        """
        with self._asking():
            self.team.broadcast(question)
            return self._answered(question, self.team.broadcast_tensor(tensor.contiguous()))

    def let_go(self) -> None:
        with self._asking():
            self.team.broadcast(_LET_GO)
            self.kept = None

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Knows when the others are in the middle of something: they cannot be told anything else then."""
        self.asking = True
        try:
            yield
            self.asking = False
        except _SAID as error:
            self.asking, self.heard = error is not self.heard, None
            raise

    def problem(self, opened: Opened, index: int = 0) -> SharedProblem:
        return SharedProblem.of(opened.problem, self, index)

    def double(self, opened: Opened) -> Problem | None:
        return self.problem(opened).double()

    def products(self, problem: Problem, curvature: str, rows: int) -> LinearMap:
        assert isinstance(problem, SharedProblem)
        return SharedProducts(problem, curvature)

    def certificate(
        self, problem: Problem, dtype: torch.dtype, seed: int, curvature: str
    ) -> Certificate:
        checked = super().certificate(problem, dtype, seed, curvature)
        return replace(checked, difference=partial(SharedDifference, curvature=curvature))

    # What each process does

    def share_of(self, problem: Problem) -> Problem:
        rank, size, batches = self.team.rank, self.team.size, problem.batches
        first, stop = (len(batches) * place // size for place in (rank, rank + 1))
        mine = Batches(stop - first, lambda i: batches[first + i])
        original = problem.original and self.share_of(problem.original)
        return replace(problem, batches=mine, original=original)

    def totals(self, total: float, denominator: float) -> tuple[float, float]:
        """The sums of both over all processes, the same bits on each."""
        found = self.agreed((total, denominator))
        return sum(pair[0] for pair in found), sum(pair[1] for pair in found)

    def in_float64(self, index: int) -> Problem | None:
        """The problem with all the data in float64, or None."""
        opened = self.opened[index]
        return opened.problem if opened.problem.dtype == torch.float64 else opened.double

    def _open(self, options: ProblemOptions, listener: Listener) -> Opened:
        try:
            opened = open_problem(options, listener, self)
        except ProcessLost:
            raise
        except _SAID as error:
            if error is not self.heard:
                self.agreed(error)
            raise
        self.opened.append(opened)
        return opened

    def _answered(self, question: Question, tensor: Tensor) -> Tensor:
        answer, failure = tensor, None
        try:
            answer = self._answer(question, tensor)
        except _SAID as error:
            failure = error
        self.agreed(failure)
        return self.team.reduce(answer)

    def agreed(self, said: Any) -> list[Any]:
        """What each process says; if one says an exception, all raise it."""
        found = super().agreed(said)
        for each in found:
            if isinstance(each, Exception):
                self.heard = each
                raise each
        return found

    def _answer(self, question: Question, tensor: Tensor) -> Tensor:
        opened = self.opened[question.index]
        same = question.dtype == opened.problem.dtype
        problem = opened.problem if same else self.in_float64(question.index)
        if problem is None:
            raise MismatchError("the model runs in float64 on some of the processes only")
        problem = self.share_of(problem.restricted(question.parameters))
        what = question.what
        if isinstance(what, Gradient):
            leaves = list(problem.parameters.values())
            with parameters_at(leaves, tensor.split([leaf.numel() for leaf in leaves])):
                return problem.flat_gradient(what.names)
        curvature = CURVATURES[what.curvature]
        if isinstance(what, Quotient):
            difference = curvature.difference(problem, what.block, tensor, Here(problem))
            if not what.held:
                return difference.quotient(what.step)
            held = difference.held_quotient(what.step, what.by_original)
            return torch.full_like(tensor, torch.nan) if held is None else held
        key = replace(question, shape=())
        if self.kept is None or self.kept[0] != key:
            self.kept = None  # its graphs give way
            memory = free_memory(problem.device) // (2 * ranks_here())
            self.kept = key, curvature.products(problem, memory, opened.passes.rows)
        return self.kept[1](tensor)


_SAID = (HesscliError, NotApplicable, MemoryError, torch.OutOfMemoryError)
"""What one process can say to the others, so that all know."""
_LET_GO = "let go"
