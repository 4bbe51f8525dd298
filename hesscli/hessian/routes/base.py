"""What every route does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from hesscli.errors import is_out_of_memory
from hesscli.hessian.applicability import explained
from hesscli.hessian.batch import Batch
from hesscli.hessian.blocks import Block
from hesscli.hessian.layout import Layout
from hesscli.hessian.problem import Problem

Result = TypeVar("Result")


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


def fitting(route: Route, work: Callable[[], Result]) -> Result:
    """What the work of a route gives; it is done again in smaller chunks where a device's memory runs out.

    Raises:
        NotApplicable: as the work does; and where an operator lacks a derivative that it takes.
    """
    while True:
        try:
            return work()
        except (RuntimeError, NotImplementedError) as error:
            if not is_out_of_memory(error) or not route.shrink():
                raise explained(error) from error
        # Outside the handler, which holds on to the failed pass.
        torch.cuda.empty_cache()
