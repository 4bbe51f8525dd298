"""What a command computes, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import Block, partition
from hesscli.hessian.curvatures import CURVATURES
from hesscli.hessian.differences.check import Certificate
from hesscli.hessian.planner import Planner
from hesscli.hessian.proofs.analysis import Analyses
from hesscli.hessian.routes.base import Choice, seconds_of
from hesscli.hessian.routes.cuts import Cuts
from hesscli.hessian.routes.rates import usual_rates
from hesscli.hessian.words import STRUCTURES
from hesscli.job.matrix.memory import Memory
from hesscli.job.options import ComputeOptions
from hesscli.job.remedies import inexact
from hesscli.job.setup.opening import Opened

Advance = Callable[[int, str], None]  # is told how many rows more are done, and of what

LARGE = 4096
"""Blocks of more rows than this are computed in bands, each written while the next one is computed."""


class Plan:
    """The blocks of a Hessian, and the routes of each; NumericalError where the method asked for would not be exact."""

    def __init__(self, options: ComputeOptions, opened: Opened, divided: bool = False) -> None:
        self.options, self.opened = options, opened
        self.divided = divided  # other processes compute parts of it
        self.problem = opened.problem
        self.rates = usual_rates(self.problem.device)
        self.structure = STRUCTURES[options.blocks]
        self.diagonal = self.structure == "elements"
        self.shapes = {name: tuple(p.shape) for name, p in self.problem.parameters.items()}
        self.blocks = partition(self.shapes, self.structure)
        self.large = [b for b in self.blocks if not self.diagonal and b.size > LARGE]
        self.small = [b for b in self.blocks if b not in self.large]
        entries = sum(block.entries(self.diagonal) for block in self.blocks)
        self.bytes = entries * self.problem.dtype.itemsize
        curvature, analyses = CURVATURES[options.curvature], Analyses(self.problem)
        cuts = Cuts(analyses, opened.passes)
        # Without the plan itself, which holds the routes: a cycle would keep model and data.
        routes = curvature.routes(cuts, lambda: opened.reference)
        curvature.require(analyses)
        planner = Planner(cuts, routes)
        self.choices = self._choices(planner)
        self.product = planner.first.product().seconds(self.rates)  # by the measure of `work`
        self.cut_bytes = cuts.bytes  # that are kept where a deep model is cut
        self.cut_rows = cuts.rows  # that are made there together, at most

    def _choices(self, planner: Planner) -> dict[str, list[Choice]]:
        """The routes of each block, the one that is tried first in front."""
        found, method = dict[str, list[Choice]](), self.options.method
        for block in self.blocks:
            try:
                found[block.name] = planner.choices(block, self.diagonal, method)
            except NotApplicable as reason:
                raise inexact(self.options, block, method, reason) from None
        if planner.first.refused and method == "auto":
            refused = planner.first.refused
            if self.problem.loss.whole:  # which is recorded with it
                refused = refused.replace("the model ", "the model, or the loss, ")
            self.opened.listener.note(f"no fast route: {refused}; hvp takes one pass per parameter")
        return found

    def first_choices(self, blocks: Sequence[Block]) -> list[Choice]:
        """The route that is tried first for each of some blocks."""
        return [self.choices[block.name][0] for block in blocks]

    def replan(self, choices: dict[str, list[Choice]]) -> None:
        """Goes on with these routes of each block."""
        self.choices = choices
        self.memory = Memory(self)

    def by_rows(self, method: str) -> float:
        """Seconds of the whole as products with unit vectors by a method, one per row, by the measure of `work`."""
        every = [choice for ranked in self.choices.values() for choice in ranked]
        return seconds_of([choice for choice in every if choice.method == method], self.rates)

    @cached_property
    def memory(self) -> Memory:
        """The memory that it may use."""
        return Memory(self)

    @cached_property
    def certificate(self) -> Certificate | None:
        """What checks the blocks, if that is asked for."""
        if not self.options.check:
            return None
        curvature, reference = CURVATURES[self.options.curvature], self.opened.reference
        return curvature.certificate(reference, self.problem.dtype, self.options.seed)

    def work(self, blocks: Sequence[Block]) -> float:
        """Seconds that some blocks take on a machine of no particular speed, to compare parts by."""
        return seconds_of(self.first_choices(blocks), self.rates)
