"""Hessian-vector products by double backward: the generic route, one product per parameter of a block.

For the rows r of a block with parameters theta_B, `H[r, :] = d(g[r]) / d theta_B` where `g = dL / d theta_B` was
computed with its own graph. Chunks of rows go through one batched backward pass; an operator without a batching rule
makes it one row at a time. Where there are two threads, each takes half as many rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from hesscli.hessian.autodiff import batched_rows, unit_rows
from hesscli.hessian.blocks import Block
from hesscli.hessian.chunk_sizes import shared_ranges
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.operator import gradient_graph
from hesscli.hessian.routes.base import ByRows, Choice, Wanted
from hesscli.hessian.routes.first_batch import FirstBatch
from hesscli.hessian.workers import ABREAST, each_with, graphs_for, share_of_time

Chunk = tuple[Wanted, str, int, range]  # of what, by which parameter, its first row, which rows


class HessianVectorProducts(ByRows):
    """d(g[r]) / d theta_B for each row r: `chunk` of them share one pass, and there is room for so many graphs."""

    def __init__(self, problem: Problem, chunk: int, graphs: int = ABREAST) -> None:
        super().__init__(problem, chunk)
        self.graphs = graphs

    @property
    def _threads(self) -> int:
        return graphs_for(self.problem.device, self.chunk, self.graphs)

    def choice(self, first: FirstBatch, block: Block, diagonal: bool) -> Choice:
        choice = super().choice(first, block, diagonal)
        return replace(choice, own=choice.own.times(share_of_time(self._threads)))

    def add(self, batch: Batch, parts: Sequence[Wanted]) -> None:
        """Adds the rows that can differ from zero, in chunks."""
        parameters = self.problem.parameters
        threads = self._threads
        chunks = list(_chunks(parts, self.chunk, threads))
        names = list(dict.fromkeys(name for part in parts for name in part.block.parameters))
        graphs = [self._gradient(batch, names) for _ in range(threads)]

        def add(graph: dict[str, Tensor], chunk: Chunk) -> None:
            part, name, first, rows = chunk
            if (g := graph.get(name)) is not None:
                leaves = [parameters[name] for name in part.block.parameters]
                seeds = unit_rows(g, rows.start - first, len(rows), len(g))
                part.add(rows.start, batched_rows(g, leaves, seeds))

        each_with(graphs, chunks, add)

    def _gradient(self, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
        """A batch's share of that by each parameter [n], with its graph, where it has one."""
        grads = gradient_graph(self.problem, batch, [self.problem.parameters[n] for n in names])
        found = zip(names, grads, strict=True)
        return {name: g.reshape(-1) for name, g in found if g is not None and g.requires_grad}


def _chunks(parts: Sequence[Wanted], most: int, threads: int) -> Iterator[Chunk]:
    """All rows, so many at a time on all threads together."""
    for part in parts:
        for name, own in part.block.rows.items():
            first, last = max(part.start, own.start), min(part.stop, own.stop)
            for rows in shared_ranges(range(first, last), most, threads):
                yield part, name, own.start, rows
