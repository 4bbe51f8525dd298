"""What the routes share that differentiate by what enters at each parameter's affine use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hesscli.hessian.analysis import Analyses, Analysis
from hesscli.hessian.batch import Batch
from hesscli.hessian.blocks import Block
from hesscli.hessian.multipliers import Multipliers
from hesscli.hessian.problem import Problem
from hesscli.hessian.routes.base import Route, Rows


class AffineRoute(Route):
    """Blocks by what enters, c theta; constants c are multiplied in when all batches are summed up.

    Args:
        problem: what is differentiated.
        analyses: of its batches.
    """

    symmetric = True

    def __init__(self, problem: Problem, analyses: Analyses) -> None:
        super().__init__(problem)
        self.analyses = analyses
        self.multipliers = Multipliers()

    def sum(self, rows: Sequence[Rows]) -> None:
        super().sum(rows)
        for part in rows:
            parameters, first = self._by_use(part.block)
            self.multipliers.multiply(part, self.layout(part.block), parameters, first)

    def sum_diagonal(self, blocks: Sequence[Block], sums: Mapping[str, Tensor]) -> None:
        super().sum_diagonal(blocks, sums)
        self.multipliers.multiply_diagonals(blocks, sums)

    def _by_use(self, block: Block) -> tuple[Sequence[str], int]:
        """The parameters whose rows are derivatives by what enters, and the first of these rows."""
        return block.parameters, 0

    def _analysis(self, batch: Batch, blocks: Sequence[Block]) -> Analysis:
        """What is proven of a batch, once it is noted what multiplies the parameters of these blocks there."""
        analysis = self.analyses.of(batch)
        self.multipliers.see(analysis, [name for block in blocks for name in block.parameters])
        return analysis
