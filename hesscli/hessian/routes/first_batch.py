"""The first batch, by which routes are ranked: what is proven of it, and what passes over all batches cost."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import Block
from hesscli.hessian.proofs.analysis import Analysis
from hesscli.hessian.proofs.uses import Use
from hesscli.hessian.recording.recorder import record
from hesscli.hessian.routes.costs import PASSES, Costs, Work
from hesscli.hessian.routes.cuts import Cuts


class FirstBatch:
    """What routes know when they say what a block takes."""

    def __init__(self, cuts: Cuts) -> None:
        self.cuts, self.batch = cuts, cuts.problem.batches[0]
        self.refused = ""  # why nothing is proven; empty where something is
        self._analysis: Analysis | None = None
        self.costs: Costs | None = None  # of the batch; None where it cannot be recorded
        try:
            analysis = self._analysis = cuts.analyses.of(self.batch)
            self.costs = cuts.costs(analysis.tape, analysis.loss_rank(analysis.of_sample))
        except NotApplicable as reason:
            self.refused = str(reason)
            with suppress(NotApplicable):  # what nothing is proven of still has a cost
                self.costs = cuts.costs(record(cuts.problem, self.batch))

    def proven(self) -> tuple[Analysis, Costs]:
        """What is proven of the batch, and what its passes cost; raises NotApplicable where nothing is proven."""
        if self._analysis is None or self.costs is None:
            raise NotApplicable(self.refused)
        return self._analysis, self.costs

    @cached_property
    def behind_weights(self) -> FirstBatch:
        """The same of the problem as a function of its weights."""
        return FirstBatch(self.cuts.behind_weights)

    def along(self, use: Use, count: int) -> Work:
        """Derivatives along directions of one layer alone, which end at the next cut."""
        _, costs = self.proven()
        return self.cuts.plan(self.batch).work(costs, use.z, count)

    def rows(self, block: Block) -> Work:
        """A block as products with unit vectors, in all batches."""
        if self.costs is None:
            return Work(calls=PASSES * block.size)
        return self.in_all(self.costs.hvp(block.parameters, block.size))

    def product(self) -> Work:
        """One product of all parameters in all batches, made alone by a gradient's graph that is kept."""
        if self.costs is None:
            return Work(calls=PASSES)
        return self.in_all(self.costs.product())

    def in_all(self, work: Work) -> Work:
        """The work of this batch, in every one."""
        return work.times(len(self.cuts.problem.batches))
