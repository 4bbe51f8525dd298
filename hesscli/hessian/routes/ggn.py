"""Blocks of the generalised Gauss-Newton and of the empirical Fisher matrix; see `operator.py` for the two.

Where every parameter has an affine use and samples do not mix, per-sample Jacobians J give a block as the sum of
J^T Lambda J over the samples, by the code of the gauss-newton route, without its proof that the rest is piecewise
linear. Lambda is the loss's Hessian at the output [C, C] and J has C rows; or, for Fisher, J has one row, the sample's
gradient, and Lambda = 1 / D. Elsewhere the rows are products with unit vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.aten.definitions import exact_derivatives
from hesscli.hessian.blocks import Block
from hesscli.hessian.operator import loss_gradient
from hesscli.hessian.proofs.analysis import Analysis
from hesscli.hessian.proofs.uses import Use
from hesscli.hessian.routes.base import Choice
from hesscli.hessian.routes.first_batch import FirstBatch
from hesscli.hessian.routes.gauss_newton import GaussNewton, jacobian_work
from hesscli.hessian.routes.probes import Probed


class GeneralisedGaussNewton(GaussNewton):
    """sum_b J^T Lambda J of any model."""

    curved = False

    def choice(self, first: FirstBatch, block: Block, diagonal: bool) -> Choice:
        analysis, costs = first.proven()
        work = jacobian_work(analysis, costs, block, diagonal)
        return Choice(self, f"{costs.classes} classes", first.in_all(work))

    def uses(self, analysis: Analysis, block: Block) -> list[Use]:
        return [use for name in block.parameters for use in analysis.uses_of(name)]

    def bend(self, analysis: Analysis, uses: Sequence[Use]) -> None:
        """None: whatever follows, these matrices have no such term."""


class EmpiricalFisher(GeneralisedGaussNewton):
    """sum_b g_b g_b^T / D, g_b being the gradient of a sample's own loss terms."""

    def choice(self, first: FirstBatch, block: Block, diagonal: bool) -> Choice:
        if self.problem.one_sample:
            raise NotApplicable("one sample without a sample axis")
        return replace(super().choice(first, block, diagonal), reason="1 gradient per sample")

    def at_output(self, probed: Probed) -> tuple[Tensor, Tensor]:
        """The gradient of each sample's own loss terms, and 1 / D."""
        with exact_derivatives():
            delta = loss_gradient(probed.problem, probed.batch, probed.output.detach())
        curvature = delta.new_full((probed.samples, 1, 1), 1 / probed.problem.denominator)
        return delta.unsqueeze(0), curvature
