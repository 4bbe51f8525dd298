"""Gauss-Newton blocks: the Hessian's own, exactly, behind a piecewise linear tail; and, anywhere, those of the
generalised Gauss-Newton and of the empirical Fisher matrix.

If the output f is piecewise linear in z, d^2 L / dz^2 = V^T Lambda V per sample, with V = df/dz and Lambda the loss's
Hessian at the output; one curved function right after z adds a diagonal (see `bend.py`). All V come out of one batched
backward pass with C = dim f seeds. A linear layer's block is the Kronecker form sum_b (V^T Lambda V)_b (x) a_b a_b^T,
where a_b ends with a one if the bias belongs to the block; elsewhere J = V A per sample, and the block is
sum_b J^T Lambda J. So it is, with J = sum over z of V A, for parameters that enter at several values of which none is
behind another: f is piecewise linear in all of them together.

The other two matrices (see `operator.py`) have such blocks without that proof, wherever every parameter has an affine
use and samples do not mix. For Fisher, J has one row, the sample's gradient, and Lambda = 1 / D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.aten.definitions import exact_derivatives
from hesscli.hessian.autodiff import batched_grad
from hesscli.hessian.blocks import Block
from hesscli.hessian.chunk_sizes import chunk_sizes, ranges
from hesscli.hessian.layout import Layout
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.operator import loss_gradient
from hesscli.hessian.proofs.analysis import Analysis
from hesscli.hessian.proofs.uses import Use, values_of
from hesscli.hessian.routes.affine import AffineRoute
from hesscli.hessian.routes.base import Choice, Diagonal, Rows, Wanted
from hesscli.hessian.routes.bend import add_bend, add_bend_diagonal, bend_diagonal, find_bend
from hesscli.hessian.routes.chain import Step
from hesscli.hessian.routes.costs import Costs, Work
from hesscli.hessian.routes.first_batch import FirstBatch
from hesscli.hessian.routes.kronecker import add_kronecker_rows
from hesscli.hessian.routes.layers import Layer, plain_layer
from hesscli.hessian.routes.output_hessian import OutputHessian
from hesscli.hessian.routes.probes import Probed
from hesscli.hessian.routes.sums import add_product
from hesscli.hessian.routes.sweep import add_chain_diagonals, choice_along_chain
from hesscli.hessian.words import GAUSS_NEWTON

_SUMMED = 1 << 11  # samples at most whose Jacobians one product sums: it rounds as often


@dataclass(frozen=True)
class Factors:
    """What a block is made of."""

    uses: list[Use]  # its parameters', in their order; several of one that enters several times
    inputs: list[Tensor]  # of each use, [B, T, m]
    vs: list[Tensor]  # df/dz at each use, [B, C, T, n]
    curvature: OutputHessian  # Lambda
    # What a curved function right after z, the same for all uses, adds, [B, T, n]; None where there is none.
    d: Tensor | None

    def jacobians(self) -> Iterator[tuple[Tensor, OutputHessian]]:
        """df/dtheta of some samples after the other, [samples, C, size], with their Lambda."""
        samples, classes, *_ = self.vs[0].shape
        most = chunk_sizes(self.vs[0].device).jacobians
        step = min(_SUMMED, most // (classes * sum(use.size for use in self.uses)))
        for some in ranges(samples, step):
            mine = slice(some.start, some.stop)
            parts: dict[str, Tensor] = {}
            for use, v, a in zip(self.uses, self.vs, self.inputs, strict=True):
                part = use.pull(v[mine], a[mine])
                known = parts.get(use.parameter)
                parts[use.parameter] = part if known is None else known.add_(part)
            every = list(parts.values())
            jacobian = every[0] if len(every) == 1 else torch.cat(every, -1)
            yield jacobian, self.curvature.of(mine)

    def of(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """df/dz of a plain layer, [B, C, n], and its inputs, [B, width]."""
        names = [use.parameter for use in self.uses]
        places = [names.index(use.parameter) for use in layer.uses]
        a = torch.cat([self.inputs[place] for place in places], -1)
        return self.vs[places[0]].squeeze(2), a.squeeze(1)


class Jacobians(AffineRoute):
    """sum_b J^T M J of any model; M is Lambda, unless said otherwise."""

    method = GAUSS_NEWTON
    curved = False

    def uses(self, analysis: Analysis, block: Block) -> list[Use]:
        """The uses of a block's parameters."""
        return [use for name in block.parameters for use in analysis.uses_of(name)]

    def choice(self, first: FirstBatch, block: Block, diagonal: bool) -> Choice:
        analysis, costs = first.proven()
        uses, classes, work = self.uses(analysis, block), self.classes(costs), Work()
        for name in block.parameters:
            mine = analysis.uses_of(name)
            at_all = replace(mine[0], positions=sum(use.positions for use in mine))
            work += costs.gauss_newton(at_all, diagonal, classes)
        if self.bend(analysis, uses) is not None:
            for use in uses:
                work += costs.bend(use, diagonal)
        zs, held = values_of(uses), costs.held_of_classes(uses, classes)
        passes = first.in_all(costs.class_passes(zs, classes))
        reached = {z: classes * costs.tape.shapes[z].numel() for z in zs}
        return Choice(self, f"{classes} classes", first.in_all(work), passes, held, reached)

    def classes(self, costs: Costs) -> int:
        """How many directions there are at the output."""
        return costs.classes

    def bend(self, analysis: Analysis, uses: Sequence[Use]) -> Step | None:
        """The curved function right after some uses, where it adds to the matrix."""
        return None

    def at_output(self, probed: Probed) -> tuple[Tensor, OutputHessian]:
        """Directions of the output [C, *output.shape], and each sample's curvature along them."""
        return probed.output_seeds(), probed.output_hessian(probed.analysis.of_sample)

    def layout_in(self, analysis: Analysis, block: Block) -> Layout:
        """Neuron by neuron where the block is a plain layer."""
        layer = plain_layer(self.uses(analysis, block))
        return Layout.plain(block.size) if layer is None else Layout(tuple(layer.pieces(block)))

    def add(self, batch: Batch, parts: Sequence[Wanted]) -> None:
        factors = self.factors(batch, [part.block for part in parts])
        for part in parts:  # the factors of all would be as large as the passes again, and more
            if isinstance(part, Diagonal):
                _add_diagonal(part, factors(part.block))
                continue
            self._demand_layout(self.analyses.of(batch), part.block)
            _add(part, factors(part.block))

    def factors(self, batch: Batch, blocks: Sequence[Block]) -> Callable[[Block], Factors]:
        """What makes the factors of any of these blocks, by passes for all of them."""
        analysis = self._analysis(batch, blocks)
        if analysis.tape.output in analysis.tape.complex:
            raise NotApplicable("the output is complex")
        uses = {block.name: self.uses(analysis, block) for block in blocks}
        bends = {name: self.bend(analysis, mine) for name, mine in uses.items()}
        zs = values_of(use for mine in uses.values() for use in mine)
        ys = list(dict.fromkeys(bend.after for bend in bends.values() if bend is not None))
        probed = Probed(self.analyses, batch, {*zs, *ys})
        slopes = probed.gradients(ys)
        probes = [probed.probes[z] for z in zs]
        seeds, curvature = self.at_output(probed)
        of = dict(zip(zs, batched_grad(probed.output, probes, seeds), strict=True))

        def made(block: Block) -> Factors:
            mine, vs, bend = uses[block.name], [], bends[block.name]
            for use in mine:
                jacobian = of[use.z]
                if jacobian is None:
                    jacobian = seeds.new_zeros(len(seeds), *probed.probes[use.z].shape)
                vs.append(use.rows(jacobian).transpose(0, 1))
            inputs = [probed.inputs(use) for use in mine]
            d = None if bend is None else bend_diagonal(bend, probed, slopes[bend.after], mine[0])
            return Factors(mine, inputs, vs, curvature, d)

        return made


class GaussNewton(Jacobians):
    """The Hessian's own, with the bend: exact where the output is piecewise linear in z."""

    curved = True

    def uses(self, analysis: Analysis, block: Block) -> list[Use]:
        """Of these none may be behind another: z is linear in all of them together.

        Raises:
            NotApplicable: one is.
        """
        uses = super().uses(analysis, block)
        moving = analysis.tape.dependent(values_of(uses))
        if any(use.a in moving for use in uses):
            raise NotApplicable("parameters enter one behind another")
        return uses

    def bend(self, analysis: Analysis, uses: Sequence[Use]) -> Step | None:
        return find_bend(analysis.tape, values_of(uses))


class GeneralisedGaussNewton(Jacobians):
    """sum_b J^T Lambda J."""

    def choice(self, first: FirstBatch, block: Block, diagonal: bool) -> Choice:
        chosen = choice_along_chain(self, first, block) if diagonal else None
        return chosen or super().choice(first, block, diagonal)

    def add(self, batch: Batch, parts: Sequence[Wanted]) -> None:
        diagonals = [part for part in parts if isinstance(part, Diagonal)]
        if diagonals:
            self._analysis(batch, [part.block for part in diagonals])
            parts = add_chain_diagonals(self.analyses, batch, diagonals, self.curved)
        if parts:
            super().add(batch, parts)


class EmpiricalFisher(Jacobians):
    """sum_b g_b g_b^T / D, g_b being the gradient of a sample's own loss terms."""

    def choice(self, first: FirstBatch, block: Block, diagonal: bool) -> Choice:
        if self.problem.one_sample:
            raise NotApplicable("one sample without a sample axis")
        return replace(super().choice(first, block, diagonal), reason="1 gradient per sample")

    def classes(self, costs: Costs) -> int:
        return 1

    def at_output(self, probed: Probed) -> tuple[Tensor, OutputHessian]:
        """The gradient of each sample's own loss terms, and 1 / D."""
        with exact_derivatives():
            delta = loss_gradient(probed.problem, probed.batch, probed.output.detach())
        curvature = delta.new_full((probed.samples, 1), 1 / probed.problem.denominator)
        return delta.unsqueeze(0), OutputHessian.elementwise(curvature)


def _add(part: Rows, factors: Factors) -> None:
    layer = plain_layer(factors.uses)
    if layer is not None:
        v, a = factors.of(layer)
        width = layer.width
        curved_v = factors.curvature @ v  # [B, C, n]
        step = chunk_sizes(v.device).curvature // (v.shape[0] * layer.weight.n)
        for neurons in ranges(part.stop // width, step, part.start // width):
            first, last = neurons.start, neurons.stop
            s = v[:, :, first:last].transpose(1, 2) @ curved_v[:, :, first:]
            if factors.d is not None:
                s.diagonal(dim1=1, dim2=2).add_(factors.d[:, 0, first:last])
            add_kronecker_rows(part.upper(first * width, last * width), s.transpose(0, 1), a)
        return
    for jacobian, curvature in factors.jacobians():
        curved_jacobian = curvature @ jacobian[..., part.start :]
        mine = jacobian[..., part.start : part.stop].flatten(0, 1)
        add_product(part.out, mine.T, curved_jacobian.flatten(0, 1))
    if factors.d is not None:
        add_bend(part, factors.uses, factors.inputs, factors.d)


def _add_diagonal(part: Diagonal, factors: Factors) -> None:
    layer = plain_layer(factors.uses)
    if layer is not None:
        v, a = factors.of(layer)
        part.add_weighted(layer.weight, (v * (factors.curvature @ v)).sum(1), a)
    else:
        for jacobian, curvature in factors.jacobians():
            part.add_pairs(jacobian.flatten(0, 1), (curvature @ jacobian).flatten(0, 1))
    if factors.d is not None:
        (use,), (inputs,) = factors.uses, factors.inputs
        add_bend_diagonal(part, use, inputs, factors.d)
