"""What every route does, and what it takes for a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from hesscli.errors import is_out_of_memory
from hesscli.hessian.applicability import NotApplicable, explained
from hesscli.hessian.blocks import Block
from hesscli.hessian.chunk_sizes import ranges
from hesscli.hessian.layout import Layout
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.operator import Middle, Products
from hesscli.hessian.proofs.uses import Use
from hesscli.hessian.routes.costs import Work
from hesscli.hessian.routes.first_batch import FirstBatch
from hesscli.hessian.routes.rates import Rates
from hesscli.hessian.routes.sums import product
from hesscli.hessian.words import HVP

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

    def add(self, first: int, found: Tensor) -> None:
        """Adds some of them, with all columns [rows, block.size], of which the first has this number."""
        at = first - self.start
        self.out[at : at + len(found)] += found[:, self.start :]

    def upper(self, start: int, stop: int) -> Tensor:
        """A view of some of them, with the columns from their own square on."""
        return self.out[start - self.start : stop - self.start, start - self.start :]

    @classmethod
    def of(cls, block: Block, like: Tensor) -> Rows:
        """All rows of a block, of the dtype and on the device of `like`."""
        return cls(block, 0, block.size, like.new_zeros(block.size, block.size))


@dataclass(frozen=True)
class Diagonal:
    """The diagonal of a block, in the block's own order, and where it is added up: `out` is [block.size]."""

    block: Block
    out: Tensor
    start = 0

    @property
    def stop(self) -> int:
        return self.block.size

    def add(self, first: int, found: Tensor) -> None:
        """Adds what some rows have of it: with all columns [rows, block.size], the first with this number."""
        self.out[first : first + len(found)] += found.diagonal(offset=first)

    def neurons(self, use: Use) -> range:
        """The neurons of a weight that it has entries of."""
        return range(use.n)

    def add_neuron(self, use: Use, p: int, left: Tensor, right: Tensor) -> None:
        """Adds what neuron p of a weight has of it, with the rows sum_b left[b]^T right[b], both [B, m]."""
        entries = use.storage.entries(self.out, p)
        entries += (left * right).sum(0).view_as(entries)

    def add_weighted(self, use: Use, d: Tensor, a: Tensor) -> None:
        """The same of every neuron p, with the rows sum_b d[b, p] a[b]^T a[b]: [B, n] and [B, m]."""
        self.out.add_(use.storage.stored(product(d.T, a**2)))

    def add_pairs(self, left: Tensor, right: Tensor) -> None:
        """Adds the diagonal of left^T right, both [B, size]."""
        self.out.add_((left * right).sum(0))

    @classmethod
    def of(cls, block: Block, like: Tensor) -> Diagonal:
        """That of a block, of the dtype and on the device of `like`."""
        return cls(block, like.new_zeros(block.size))


Wanted = Rows | Diagonal  # what a route is asked for, one kind at a time


class Route:
    """A way to compute blocks.

    Raises:
        NotApplicable: this route would be wrong or impossible here; nothing that was added is to be used.
    """

    method: str  # what `--method` calls it
    symmetric = False
    """Whether rows may be filled right of the diagonal alone: they are mirrored when all batches are in."""
    # Whether all rows of a block are made together, so that some take as long as all.
    at_once = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @property
    def name(self) -> str:
        """Its own: that of the method, but for a route that leads through another of the same."""
        return self.method

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of the sums that it fills."""
        return next(iter(self.problem.parameters.values())).detach()

    def choice(self, first: FirstBatch, block: Block, diagonal: bool) -> Choice:
        """What a block takes, or its diagonal alone."""
        raise NotImplementedError

    def layout(self, block: Block) -> Layout:
        """The order of a block's rows, and where they may be cut."""
        return Layout.plain(block.size)

    def sum(self, parts: Sequence[Wanted]) -> None:
        """Fills parts of each block's Hessian, d^2 loss / d theta^2, over all batches; `out` is zero before."""
        for batch in self.problem.batches:
            self.add(batch, parts)

    def add(self, batch: Batch, parts: Sequence[Wanted]) -> None:
        """Adds the batch's share of each to its `out`."""
        raise NotImplementedError

    def shrink(self) -> bool:
        """Takes less memory at a time from now on; says whether that was possible."""
        return False


@dataclass(frozen=True)
class Choice:
    """A route for a block."""

    route: Route
    reason: str  # "64 seeds"; for hvp, why nothing better is exact
    own: Work  # the work that this block alone needs
    # The work that serves all blocks of this route at once, if they are computed together.
    common: Work = Work()  # noqa: RUF009 - immutable
    held: int = 0  # numbers that the route keeps beside the block
    # Numbers that it keeps at each value, for all blocks that are computed together.
    reached: Mapping[int, int] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return self.route.method

    @property
    def work(self) -> Work:
        return self.own + self.common

    def __str__(self) -> str:
        if not self.reason:
            return self.method
        if self.method == HVP:
            return f"{self.method}: {self.reason}"
        return f"{self.method} ({self.reason})"


def seconds_of(choices: Sequence[Choice], rates: Rates) -> float:
    """Seconds of a plan: what routes share counts once, for the block that needs most of it."""
    seconds = sum(choice.own.seconds(rates) for choice in choices)
    for route in {choice.route for choice in choices}:
        mine = [choice.common.seconds(rates) for choice in choices if choice.route == route]
        seconds += max(mine)
    return seconds


class ByRows(Route):
    """Row after row, as products with unit vectors: exact wherever a product is.

    For the empirical Fisher matrix, that is where samples were shown not to mix. So many rows share one pass as a chunk
    has; `middle` is M, where the matrix is J^T M J.
    """

    method = HVP

    def __init__(self, problem: Problem, chunk: int, middle: Middle | None = None) -> None:
        super().__init__(problem)
        self.chunk, self.middle = chunk, middle

    def choice(self, first: FirstBatch, block: Block, diagonal: bool) -> Choice:
        return Choice(self, "", first.rows(block))

    def shrink(self) -> bool:
        self.chunk //= 2
        return self.chunk >= 1

    def product(self, block: Block, v: Tensor) -> Tensor:
        """H v [n] of a block, by the derivatives that its rows are made of."""
        return self.products(block, self.problem.batches)(v.to(self.problem.dtype))

    def products(self, block: Block, batches: Sequence[Batch]) -> Products:
        """Products with a block's share of some batches."""
        problem = replace(self.problem.restricted(block.parameters), batches=batches)
        return Products(problem, self.middle, rows=self.chunk)

    def add(self, batch: Batch, parts: Sequence[Wanted]) -> None:
        for part in parts:
            products = self.products(part.block, [batch])
            for some in ranges(part.stop, self.chunk, part.start):
                part.add(some.start, products.matrix_rows(some.start, some.stop))


def fitting(route: Route, work: Callable[[], Result]) -> Result:
    """What the work of a route gives; it is done again in smaller chunks where a device's memory runs out.

    Raises:
        NotApplicable: as the work does; and where an operator lacks a derivative that it takes.
    """
    while True:
        try:
            return work()
        except NotApplicable:  # as its own cause, it would hold on to the failed pass
            raise
        except Exception as error:
            if not is_out_of_memory(error) or not route.shrink():
                raise explained(error) from error
        # Outside the handler, which holds on to the failed pass.
        torch.cuda.empty_cache()
