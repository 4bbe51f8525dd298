"""What every route does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from hesscli.hessian.blocks import Block
from hesscli.hessian.problem import Batch, Problem


class NotApplicable(Exception):  # noqa: N818 - an answer, not an error
    """This route cannot give the exact result; the message says why."""


class Route(Protocol):
    """A way to compute blocks.

    `add(batch, blocks, sums, diagonal)` adds the batch's share of each block's Hessian (in d^2 loss / d theta^2) to
    `sums[block.name]`, of shape [n, n], or of its diagonal, of shape [n]. A route that is `symmetric` by construction
    may fill the upper triangle alone; `finish` then completes a matrix when all batches are in. `shrink` makes it take
    less memory at a time, and says whether that was possible.

    Raises:
        NotApplicable: this route would be wrong or impossible here; nothing in `sums` is to be used.
    """

    name: str
    problem: Problem
    symmetric: bool

    def add(
        self, batch: Batch, blocks: Sequence[Block], sums: Mapping[str, Tensor], diagonal: bool
    ) -> None: ...

    def finish(self, matrix: Tensor) -> None: ...

    def shrink(self) -> bool: ...
