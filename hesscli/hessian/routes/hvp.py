"""Hessian-vector products by double backward: the generic route, one product per parameter of a block.

For the rows r of a block with parameters theta_B, `H[r, :] = d(g[r]) / d theta_B` where `g = dL / d theta_B` was
computed with its own graph. Chunks of rows go through one batched backward pass; an operator without a batching rule
makes it one row at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hesscli.hessian.aten.definitions import exact_derivatives
from hesscli.hessian.autodiff import batched_rows, unit_rows
from hesscli.hessian.blocks import Block
from hesscli.hessian.chunk_sizes import ranges
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.routes.base import ByRows, Wanted


class HessianVectorProducts(ByRows):
    def add(self, batch: Batch, parts: Sequence[Wanted]) -> None:
        gradient = self._gradient(batch, [part.block for part in parts])
        for part in parts:
            self._add(part, gradient)

    def _gradient(self, batch: Batch, blocks: Sequence[Block]) -> Mapping[str, Tensor | None]:
        """dL/dtheta of the blocks' parameters, with its graph; empty where L has none."""
        parameters = self.problem.parameters
        names = list(dict.fromkeys(name for block in blocks for name in block.parameters))
        with exact_derivatives():
            value = self.problem.value(batch)
            if not value.requires_grad:
                return {}
            grads = torch.autograd.grad(
                value, [parameters[n] for n in names], create_graph=True, allow_unused=True
            )
        return dict(zip(names, grads, strict=True))

    def _add(self, part: Wanted, gradient: Mapping[str, Tensor | None]) -> None:
        """The rows that can differ from zero, in chunks."""
        leaves = [self.problem.parameters[name] for name in part.block.parameters]
        for name, own in part.block.rows.items():
            g = gradient.get(name)
            if g is None or not g.requires_grad:
                continue
            flat, last = g.reshape(-1), min(part.stop, own.stop)
            for some in ranges(last, self.chunk, max(part.start, own.start)):
                seeds = unit_rows(flat, some.start - own.start, len(some), len(own))
                part.add(some.start, batched_rows(flat, leaves, seeds))
