"""Hessian-vector products by double backward: the generic route, one product per parameter of a block.

For the rows r of a block with parameters theta_B, `H[r, :] = d(g[r]) / d theta_B` where `g = dL / d theta_B` was
computed with its own graph. Chunks of rows go through one batched backward pass; an operator without a batching rule
makes it one row at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from hesscli.hessian.autodiff import batched_rows, unit_rows
from hesscli.hessian.chunk_sizes import ranges
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.operator import gradient_graph
from hesscli.hessian.routes.base import ByRows, Wanted


class HessianVectorProducts(ByRows):
    """d(g[r]) / d theta_B for each row r."""

    def add(self, batch: Batch, parts: Sequence[Wanted]) -> None:
        """Adds the rows that can differ from zero, in chunks."""
        parameters = self.problem.parameters
        names = list(dict.fromkeys(name for part in parts for name in part.block.parameters))
        grads = gradient_graph(self.problem, batch, [parameters[name] for name in names])
        gradient = dict(zip(names, grads, strict=True))
        for part in parts:
            leaves = [parameters[name] for name in part.block.parameters]
            for name, own in part.block.rows.items():
                g = gradient[name]
                if g is None or not g.requires_grad:
                    continue
                flat, last = g.reshape(-1), min(part.stop, own.stop)
                for some in ranges(last, self.chunk, max(part.start, own.start)):
                    seeds = unit_rows(flat, some.start - own.start, len(some), len(own))
                    part.add(some.start, batched_rows(flat, leaves, seeds))
