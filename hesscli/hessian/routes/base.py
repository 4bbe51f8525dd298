"""What every route does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hesscli.hessian.blocks import Block
from hesscli.hessian.layout import Layout
from hesscli.hessian.problem import Batch, Problem


class NotApplicable(Exception):  # noqa: N818 - an answer, not an error
    """This route cannot give the exact result; the message says why."""


@dataclass(frozen=True)
class Rows:
    """Rows of a block in the order of its route's layout, from `start` to `stop`, and where they are added up.

    `out` is [stop - start, block.size - start]: an entry left of the rows' own square is the mirror image of one in the
    rows before.
    """

    block: Block
    start: int
    stop: int
    out: Tensor

    @classmethod
    def whole(cls, block: Block, like: Tensor) -> Rows:
        """All rows of a block, of the dtype and on the device of `like`."""
        out = torch.zeros(block.size, block.size, dtype=like.dtype, device=like.device)
        return cls(block, 0, block.size, out)


class Route(Protocol):
    """A way to compute blocks.

    `add(batch, rows)` adds the batch's share of rows of each block's Hessian, d^2 loss / d theta^2, to their `out`;
    `add_diagonal(batch, blocks, sums)` the diagonals' to `sums[block.name]`, [n]. A route that is `symmetric` by
    construction may fill the upper triangle alone; `finish` then completes a matrix when all batches are in. `layout`
    is the order of a block's rows, and where they may be cut. `shrink` makes it take less memory at a time, and says
    whether that was possible.

    Raises:
        NotApplicable: this route would be wrong or impossible here; nothing that was added is to be used.
    """

    name: str

    @property
    def problem(self) -> Problem: ...

    symmetric: bool

    def layout(self, block: Block) -> Layout: ...

    def add(self, batch: Batch, rows: Sequence[Rows]) -> None: ...

    def add_diagonal(
        self, batch: Batch, blocks: Sequence[Block], sums: Mapping[str, Tensor]
    ) -> None: ...

    def finish(self, matrix: Tensor) -> None: ...

    def shrink(self) -> bool: ...
