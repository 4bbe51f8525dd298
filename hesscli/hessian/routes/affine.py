"""What the routes share that differentiate by what enters at each parameter's affine use.

Constants may multiply a parameter before it enters: a mask of what is pruned, or fixed scales. The routes differentiate
by what enters, c theta, entry by entry: with H that Hessian and C = diag(c), d^2 L / d theta^2 = C H C.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import Block
from hesscli.hessian.layout import Layout
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.proofs.affine import multiplier
from hesscli.hessian.proofs.analysis import Analysis
from hesscli.hessian.routes.base import Diagonal, Route, Wanted
from hesscli.hessian.routes.cuts import Cuts


class AffineRoute(Route):
    """Blocks by what enters; c is multiplied in when all batches are summed up."""

    symmetric = True
    curved = True  # whether the matrix has a term of the second derivatives of what parameters go through

    def __init__(self, cuts: Cuts) -> None:
        super().__init__(cuts.problem)
        self.cuts, self.analyses = cuts, cuts.analyses
        self._layouts: dict[Block, Layout] = {}  # of the first batch, and the same in all
        self._multipliers: dict[str, Tensor | None] = {}  # seen in each batch, the same in all
        self._firsts: dict[Block, int] = {}  # rows by what enters; those before are by parameters

    def layout(self, block: Block) -> Layout:
        if block not in self._layouts:
            first = self.analyses.of(self.problem.batches[0])
            self._layouts[block] = self.layout_in(first, block)
        return self._layouts[block]

    def layout_in(self, analysis: Analysis, block: Block) -> Layout:
        """The order in which a batch gives a block's rows."""
        raise NotImplementedError

    def _demand_layout(self, analysis: Analysis, block: Block) -> None:
        """Raises NotApplicable where a batch gives a block's rows in another order."""
        if self.layout_in(analysis, block) != self.layout(block):
            raise other_path()

    def sum(self, parts: Sequence[Wanted]) -> None:
        super().sum(parts)
        self.multiply(parts)

    def multiply(self, parts: Sequence[Wanted]) -> None:
        """C H C of the H that `add` has made."""
        for part in parts:
            every = [self._multipliers[name] for name in part.block.parameters]
            if all(c is None for c in every):
                continue
            sizes = zip(every, part.block.sizes, strict=True)
            c = torch.cat([self.like.new_ones(size) if c is None else c for c, size in sizes])
            if isinstance(part, Diagonal):
                part.out.mul_(c * c)
                continue
            first = max(self._firsts.get(part.block, 0), part.start)
            c = self.layout(part.block).from_block(c)[first:]
            mine = part.upper(first, part.stop)
            mine.mul_(c[: len(mine)].unsqueeze(1)).mul_(c)

    def _analysis(self, batch: Batch, blocks: Sequence[Block]) -> Analysis:
        """What is proven of a batch, once it is noted what multiplies the parameters of these blocks there.

        Raises:
            NotApplicable: c differs between batches.
        """
        analysis = self.analyses.of(batch)
        for name in (name for block in blocks for name in block.parameters):
            use = analysis.uses.get(name)
            c = None if use is None else multiplier(analysis.tape, use)
            if not _same(self._multipliers.setdefault(name, c), c):
                raise other_path()
        return analysis


def other_path() -> NotApplicable:
    """The refusal of batches that must not be added up."""
    return NotApplicable("the batches take different paths through the model")


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
