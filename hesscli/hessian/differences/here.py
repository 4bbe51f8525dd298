"""What differences have in common, whatever their direction: gradient and output at theta, and the output's kinks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property

import torch
from torch import Tensor

from hesscli.hessian.aten.definitions import exact_derivatives, right_gradients
from hesscli.hessian.differences.kinks import Kinks
from hesscli.hessian.differences.repeats import Repeats
from hesscli.hessian.objective.problem import Problem


class Here:
    """These of a problem, made when they are first asked for."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.noted = 0  # batches of whose gradients the convolutions are kept, if it is said before these are made
        self.repeats = Repeats()  # knows them

    def gradient(self, names: Sequence[str]) -> Tensor:
        """g(theta) of some parameters, one after the other, [n]."""
        return torch.cat([self._gradient[name].reshape(-1) for name in names])

    def output(self, problem: Problem) -> Tensor:
        """f(theta) of one batch of the problem, with its graph: kept where there is no other batch."""
        return self._only if len(self.problem.batches) == 1 else _output(problem)

    def kinks(self, problem: Problem) -> Kinks:
        """Those that one batch's output has for the result, to be held: noted once where there is no other batch.

        By the operators of the result's own pass: a definition may have more kinks than what it defines.
        """
        return Kinks(self._noted if len(self.problem.batches) == 1 else _noted(problem))

    @cached_property
    def _gradient(self) -> dict[str, Tensor]:
        names = list(self.problem.parameters)
        sums = {name: torch.zeros_like(leaf) for name, leaf in self.problem.parameters.items()}
        for place, problem in enumerate(self.problem.by_batch()):
            with self.repeats.noting() if place < self.noted else nullcontext():
                gradient = problem.gradient(names)
            for name in names:
                sums[name] += gradient[name]
        return sums

    @cached_property
    def _only(self) -> Tensor:
        return _output(self.problem)

    @cached_property
    def _noted(self) -> Sequence[Tensor]:
        return _noted(self.problem)


def _output(problem: Problem) -> Tensor:
    """f(theta) of a problem's only batch, by operators of PyTorch's own that have right gradients."""
    (batch,) = problem.batches
    with right_gradients():
        return problem.output(batch)


def _noted(problem: Problem) -> Sequence[Tensor]:
    """On which side of each kink it is, by the operators' definitions: those of the problem that this is a copy of."""
    problem = problem.original or problem
    (batch,) = problem.batches
    with (kinks := Kinks()), exact_derivatives():
        problem.output(batch)
    return kinks.sides.noted
