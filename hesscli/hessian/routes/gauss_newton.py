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
from hesscli.hessian.piecewise import curved
from hesscli.hessian.probes import Analyses, Analysis, Probed
from hesscli.hessian.problem import Batch, Problem
from hesscli.hessian.routes.base import NotApplicable
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

    def add(
        self, batch: Batch, blocks: Sequence[Block], sums: Mapping[str, Tensor], diagonal: bool
    ) -> None:
        analysis = self.analyses.of(batch)
        uses = {block.name: block_uses(analysis, block) for block in blocks}
        for block in blocks:
            operator = curved(analysis.tape, uses[block.name][0].z)
            if operator is not None:
                raise NotApplicable(f"{operator} is not piecewise linear")
        probed = Probed(self.problem, batch, analysis, {u[0].z for u in uses.values()})
        zs = list(probed.probes)
        curvature = probed.output_hessian()  # [B, C, C]
        probes = [probed.probes[z] for z in zs]
        jacobians = batched_grad(probed.output, probes, probed.output_seeds())
        of = dict(zip(zs, jacobians, strict=True))
        for block in blocks:
            jacobian = of[uses[block.name][0].z]
            if jacobian is not None:
                v = uses[block.name][0].rows(jacobian).transpose(0, 1)  # [B, C, T, n]
                _add(sums[block.name], probed, uses[block.name], v, curvature, diagonal)

    def shrink(self) -> bool:
        return False

    def finish(self, matrix: Tensor) -> None:
        mirror_(matrix)


def _add(
    out: Tensor, probed: Probed, uses: Sequence[Use], v: Tensor, curvature: Tensor, diagonal: bool
) -> None:
    use, columns = uses[0], probed.columns(uses[0])
    if len(uses) == 1 and use.kind == LINEAR and use.positions == 1 and not use.transposed:
        v, a = v.squeeze(2), columns.squeeze(1)
        curved_v = curvature @ v  # [B, C, n]
        if diagonal:
            out += ((v * curved_v).sum(1).T @ a**2).reshape(-1)
            return
        step = max(1, (1 << 23) // (v.shape[0] * use.n))
        for first in range(0, use.n, step):
            s = v[:, :, first : first + step].transpose(1, 2) @ curved_v[:, :, first:]
            add_kronecker_rows(out, first, s.transpose(0, 1), a)
        return
    parts = [u.pull(v, probed.columns(u).unsqueeze(1)) for u in uses]
    jacobian = parts[0] if len(parts) == 1 else torch.cat(parts, -1)  # [B, C, size]
    curved_jacobian = curvature @ jacobian
    if diagonal:
        out += (jacobian * curved_jacobian).sum((0, 1))
    else:
        out += jacobian.flatten(0, 1).T @ curved_jacobian.flatten(0, 1)
