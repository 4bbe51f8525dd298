"""Parameters that are multiplied by constants before they enter: by masks of what is pruned, or fixed scales.

The routes differentiate by what enters, c theta, entry by entry: with H that Hessian and C = diag(c),
d^2 L / d theta^2 = C H C.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hesscli.hessian.affine import multiplier
from hesscli.hessian.analysis import Analysis
from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import Block
from hesscli.hessian.layout import Layout
from hesscli.hessian.routes.base import Rows


class Multipliers:
    """What multiplies the parameters of a problem: seen in each batch, and the same in all."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor | None] = {}

    def see(self, analysis: Analysis, parameters: Iterable[str]) -> None:
        """Notes what multiplies them in a batch.

        Raises:
            NotApplicable: c differs between batches.
        """
        for name in parameters:
            use = analysis.uses.get(name)
            c = None if use is None else multiplier(analysis.tape, use)
            if not _same(self.seen.setdefault(name, c), c):
                raise NotApplicable("the batches take different paths through the model")

    def multiply(
        self, part: Rows, layout: Layout, parameters: Iterable[str], first: int = 0
    ) -> None:
        """H -> C H C, from row `first` on, which is where the rows of these parameters begin in the layout."""
        c = self._of(part.block, parameters)
        skipped = max(0, first - part.start)
        if c is not None and skipped < len(part.out):
            c = layout.from_block(c)[part.start + skipped :]
            mine = part.out[skipped:, skipped:]
            mine.mul_(c[: len(mine)].unsqueeze(1)).mul_(c)

    def multiply_diagonals(self, blocks: Sequence[Block], sums: Mapping[str, Tensor]) -> None:
        """The same for the diagonals, `sums[block.name]`, [n]."""
        for block in blocks:
            c = self._of(block, block.parameters)
            if c is not None:
                sums[block.name].mul_(c * c)

    def _of(self, block: Block, parameters: Iterable[str]) -> Tensor | None:
        """c [block.size], in the block's order: ones for other parameters. None if it is one for all."""
        found: Tensor | None = None
        for name in parameters:
            mine = self.seen[name]
            if mine is not None:
                found = mine.new_ones(block.size) if found is None else found
                found[block.rows[name].start : block.rows[name].stop] = mine
        return found


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
