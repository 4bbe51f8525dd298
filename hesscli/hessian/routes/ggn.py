"""Blocks of the generalised Gauss-Newton and of the empirical Fisher matrix; see `operator.py` for the two.

Where every parameter has an affine use and samples do not mix, per-sample Jacobians J give a block as the sum of
J^T Lambda J over the samples, by the code of the gauss-newton route, without its proof that the rest is piecewise
linear. Lambda is the loss's Hessian at the output [C, C] and J has C rows; or, for Fisher, J has one row, the sample's
gradient, and Lambda = 1 / D. Elsewhere the rows are products with unit vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hesscli.hessian.autodiff import batched_grad
from hesscli.hessian.batch import Batch
from hesscli.hessian.blocks import Block
from hesscli.hessian.layout import Layout
from hesscli.hessian.operator import Products
from hesscli.hessian.probes import Analyses, Analysis, Probed
from hesscli.hessian.problem import Problem
from hesscli.hessian.routes.base import Rows
from hesscli.hessian.routes.gauss_newton import Factors, GaussNewton
from hesscli.hessian.uses import Use


class GeneralisedGaussNewton(GaussNewton):
    def uses(self, analysis: Analysis, block: Block) -> list[Use]:
        return [analysis.use(name) for name in block.parameters]

    def at_output(self, probed: Probed) -> tuple[Tensor, Tensor]:
        """Directions of the output [C, *output.shape], and each sample's curvature along them [B, C, C]."""
        return probed.output_seeds(), probed.output_hessian().contiguous()

    def factors(self, batch: Batch, blocks: Sequence[Block]) -> dict[str, Factors | None]:
        analysis = self.analyses.of(batch)
        uses = {block.name: self.uses(analysis, block) for block in blocks}
        zs = list(dict.fromkeys(use.z for mine in uses.values() for use in mine))
        probed = Probed(self.problem, batch, analysis, zs)
        seeds, curvature = self.at_output(probed)
        probes = [probed.probes[z] for z in zs]
        of = dict(zip(zs, batched_grad(probed.output, probes, seeds), strict=True))
        found: dict[str, Factors | None] = {}
        for name, mine in uses.items():
            if all(of[use.z] is None for use in mine):
                found[name] = None
                continue
            vs = []
            for use in mine:
                jacobian = of[use.z]
                if jacobian is None:
                    jacobian = seeds.new_zeros(len(seeds), *probed.probes[use.z].shape)
                vs.append(use.rows(jacobian).transpose(0, 1))
            inputs = [probed.columns(use) for use in mine]
            found[name] = Factors(mine, inputs, vs, curvature)
        return found


class EmpiricalFisher(GeneralisedGaussNewton):
    def at_output(self, probed: Probed) -> tuple[Tensor, Tensor]:
        """The gradient of each sample's own loss terms, and 1 / D."""
        f = probed.output.detach().requires_grad_()
        batch = probed.batch
        total, _ = self.problem.loss.total(f, batch.target, batch.loss_arguments)
        delta = torch.autograd.grad(total, f)[0] if total.requires_grad else torch.zeros_like(f)
        curvature = f.new_full((probed.samples, 1, 1), 1 / self.problem.denominator)
        return delta.unsqueeze(0), curvature.detach()


class ProductRows:
    """Rows as products with unit vectors: exact wherever a product is."""

    name = "hvp"
    symmetric = False

    def __init__(self, problem: Problem, curvature: str, chunk: int) -> None:
        """
        Args:
            problem: what is differentiated; for Fisher, one whose samples were shown not to mix.
            curvature: "ggn" or "fisher".
            chunk: how many rows share one pass.
        """
        self.problem, self.curvature, self.chunk = problem, curvature, chunk

    def layout(self, block: Block) -> Layout:
        return Layout.plain(block.size)

    def add(self, batch: Batch, rows: Sequence[Rows]) -> None:
        for part in rows:
            products = self._products(batch, part.block)
            for first in range(part.start, part.stop, self.chunk):
                last = min(first + self.chunk, part.stop)
                out = part.out[first - part.start : last - part.start]
                out += products.columns(first, last)[:, part.start :]

    def add_diagonal(
        self, batch: Batch, blocks: Sequence[Block], sums: Mapping[str, Tensor]
    ) -> None:
        for block in blocks:
            products = self._products(batch, block)
            for first in range(0, block.size, self.chunk):
                last = min(first + self.chunk, block.size)
                sums[block.name][first:last] += products.columns(first, last).diagonal(first)

    def _products(self, batch: Batch, block: Block) -> Products:
        mine = {name: self.problem.parameters[name] for name in block.parameters}
        problem = replace(self.problem, parameters=mine, batches=[batch])
        return Products(problem, self.curvature, rows=self.chunk, proven=True)

    def finish(self, matrix: Tensor) -> None:
        pass

    def shrink(self) -> bool:
        self.chunk //= 2
        return self.chunk >= 1


def curvature_routes(
    problem: Problem, analyses: Analyses, curvature: str, chunk: int
) -> list[GaussNewton | ProductRows]:
    """The routes of a curvature other than the Hessian."""
    kind = {"ggn": GeneralisedGaussNewton, "fisher": EmpiricalFisher}[curvature]
    return [kind(problem, analyses), ProductRows(problem, curvature, chunk)]
