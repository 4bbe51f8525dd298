"""Blocks behind a piecewise linear tail: there the Hessian's own block is the Gauss-Newton block, exactly.

If the output f is piecewise linear in z, d^2 L / dz^2 = V^T Lambda V per sample, with V = df/dz and Lambda the loss's
Hessian at the output. All V come out of one batched backward pass with C = dim f seeds. A linear layer's block is the
Kronecker form sum_b (V^T Lambda V)_b (x) a_b a_b^T; elsewhere J = V A per sample, and the block is sum_b J^T Lambda J.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hesscli.hessian.autodiff import batched_grad
from hesscli.hessian.blocks import Block
from hesscli.hessian.kronecker import add_kronecker_rows, mirror_
from hesscli.hessian.layout import Layout, Piece
from hesscli.hessian.piecewise import curved
from hesscli.hessian.probes import Analyses, Analysis, Probed
from hesscli.hessian.problem import Batch, Problem
from hesscli.hessian.routes.base import NotApplicable, Rows
from hesscli.hessian.uses import LINEAR, Use


def block_uses(analysis: Analysis, block: Block) -> list[Use]:
    """The uses of a block's parameters, which must all enter at the same value.

    Raises:
        NotApplicable: they do not.
    """
    uses = [analysis.use(name) for name in block.parameters]
    if len({use.z for use in uses}) != 1:
        raise NotApplicable("parameters enter at several places")
    return uses


class GaussNewton:
    name = "gauss-newton"
    symmetric = True

    def __init__(self, problem: Problem, analyses: Analyses) -> None:
        self.problem = problem
        self.analyses = analyses

    def layout(self, block: Block) -> Layout:
        uses = block_uses(self.analyses.of(self.problem.batches[0]), block)
        if _is_kronecker(uses):
            return Layout((Piece(uses[0].n, ((0, uses[0].m),)),))
        return Layout.plain(block.size)

    def add(self, batch: Batch, rows: Sequence[Rows]) -> None:
        probed, curvature, factors = self._factors(batch, [part.block for part in rows])
        for part in rows:
            uses, v = factors[part.block.name]
            if v is not None:
                _add(part, probed, uses, v, curvature)

    def add_diagonal(
        self, batch: Batch, blocks: Sequence[Block], sums: Mapping[str, Tensor]
    ) -> None:
        probed, curvature, factors = self._factors(batch, blocks)
        for block in blocks:
            uses, v = factors[block.name]
            if v is not None:
                _add_diagonal(sums[block.name], probed, uses, v, curvature)

    def _factors(
        self, batch: Batch, blocks: Sequence[Block]
    ) -> tuple[Probed, Tensor, dict[str, tuple[list[Use], Tensor | None]]]:
        """The pass, Lambda [B, C, C], and each block's uses with V [B, C, T, n] there (None: zero)."""
        analysis = self.analyses.of(batch)
        uses = {block.name: block_uses(analysis, block) for block in blocks}
        for block in blocks:
            operator = curved(analysis.tape, uses[block.name][0].z)
            if operator is not None:
                raise NotApplicable(f"{operator} is not piecewise linear")
        probed = Probed(self.problem, batch, analysis, {u[0].z for u in uses.values()})
        zs = list(probed.probes)
        probes = [probed.probes[z] for z in zs]
        jacobians = batched_grad(probed.output, probes, probed.output_seeds())
        of = dict(zip(zs, jacobians, strict=True))
        factors: dict[str, tuple[list[Use], Tensor | None]] = {}
        for name, mine in uses.items():
            jacobian = of[mine[0].z]
            v = None if jacobian is None else mine[0].rows(jacobian).transpose(0, 1)
            factors[name] = (mine, v)
        return probed, probed.output_hessian(), factors

    def shrink(self) -> bool:
        return False

    def finish(self, matrix: Tensor) -> None:
        mirror_(matrix)


def _is_kronecker(uses: Sequence[Use]) -> bool:
    use = uses[0]
    return len(uses) == 1 and use.kind == LINEAR and use.positions == 1 and not use.transposed


def _add(part: Rows, probed: Probed, uses: Sequence[Use], v: Tensor, curvature: Tensor) -> None:
    use = uses[0]
    if _is_kronecker(uses):
        v, a = v.squeeze(2), probed.columns(use).squeeze(1)
        curved_v = curvature @ v  # [B, C, n]
        step = max(1, (1 << 23) // (v.shape[0] * use.n))
        last = part.stop // use.m
        for first in range(part.start // use.m, last, step):
            s = v[:, :, first : min(first + step, last)].transpose(1, 2) @ curved_v[:, :, first:]
            skipped = first * use.m - part.start
            out = part.out[skipped : skipped + s.shape[1] * use.m, skipped:]
            add_kronecker_rows(out, s.transpose(0, 1), a)
        return
    jacobian, out = _jacobian(probed, uses, v), part.out
    curved_jacobian = curvature @ jacobian[..., part.start :]
    out += jacobian[..., part.start : part.stop].flatten(0, 1).T @ curved_jacobian.flatten(0, 1)


def _add_diagonal(
    out: Tensor, probed: Probed, uses: Sequence[Use], v: Tensor, curvature: Tensor
) -> None:
    if _is_kronecker(uses):
        v, a = v.squeeze(2), probed.columns(uses[0]).squeeze(1)
        out += ((v * (curvature @ v)).sum(1).T @ a**2).reshape(-1)
        return
    jacobian = _jacobian(probed, uses, v)
    out += (jacobian * (curvature @ jacobian)).sum((0, 1))


def _jacobian(probed: Probed, uses: Sequence[Use], v: Tensor) -> Tensor:
    """df/dtheta of each sample: [B, C, size]."""
    parts = [u.pull(v, probed.columns(u).unsqueeze(1)) for u in uses]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
