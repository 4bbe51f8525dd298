"""The diagonal of d^2 L / dz^2 at every layer of a chain, in one backward sweep.

Where a model is a chain of linear layers and elementwise functions, each sample's S = d^2 L / dz^2 goes from a value
to the one before it by

    S_u = diag(phi') S_y diag(phi') + diag(phi'' dL/dy)      y = phi(u)
    S_x = M S_z M^T                                          z = x M

starting from the loss's own Hessian at the output, which may be a diagonal. S is never needed whole: it is kept as a
sum of terms L^T R with few rows (as many as outputs), V^T diag(w) V (as many as neurons of a layer behind), and a
diagonal, which passes one linear layer without being spread out: diag(M diag(d) M^T) = (M * M) d. In a deep chain the
rows would add up, so they are multiplied out now and then.

Source: the recursion is that of A. Botev et al., Practical Gauss-Newton optimisation, 2017, eq. 28-31, kept factored
as in F. Dangel et al., BackPACK, 2020.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from hesscli.hessian.blocks import Block
from hesscli.hessian.chunk_sizes import chunk_sizes, ranges
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.proofs.analysis import Analyses
from hesscli.hessian.recording.tape import Ref
from hesscli.hessian.routes.affine import AffineRoute
from hesscli.hessian.routes.base import Choice, Diagonal
from hesscli.hessian.routes.chain import (
    PRODUCTS,
    UNARY,
    Step,
    find_chain,
    last_product,
    most_numbers,
)
from hesscli.hessian.routes.factored_hessian import FactoredHessian
from hesscli.hessian.routes.first_batch import FirstBatch
from hesscli.hessian.routes.probes import Probed


def choice_along_chain(route: AffineRoute, first: FirstBatch, block: Block) -> Choice | None:
    """What the diagonal of a block takes that is on a chain."""
    analysis, costs = first.proven()
    steps, uses = find_chain(analysis, [block.name])
    if block.name not in uses:
        return None
    own, sweep = costs.own(uses[block.name], diagonal=True), costs.chain(steps, route.curved)
    most = chunk_sizes(route.problem.device).chain
    held = costs.held_of_chain(steps, route.curved, most)
    return Choice(route, "chain", first.in_all(own), first.in_all(sweep), held)


def add_chain_diagonals(
    analyses: Analyses, batch: Batch, parts: Sequence[Diagonal], curved: bool
) -> list[Diagonal]:
    """Adds the diagonals along a chain of layers, all in one sweep; returns the parts that are not on it.

    Args:
        analyses: of the batches.
        batch: one of them.
        parts: whose diagonals are wanted.
        curved: of the Hessian; else of the generalised Gauss-Newton matrix, without the second term above.
    """
    steps, uses = find_chain(analyses.of(batch), [part.block.name for part in parts])
    if not uses:
        return list(parts)
    ys = [step.after for step in steps if step.call.name in UNARY] if curved else []
    probed = Probed(analyses, batch, ys)
    output = analyses.of(batch).tape.output
    found = _diagonals(probed, output, steps, {use.z for use in uses.values()}, curved)
    if not all(bool(torch.isfinite(d).all()) for d in found.values()):
        # phi'' is infinite where a ReLU before it is off: backward passes mask that.
        return list(parts)
    for part in (part for part in parts if part.block.name in uses):
        use = uses[part.block.name]
        d, a = found[use.z], probed.inputs(use)[:, 0]
        if use.is_layer:
            part.add_weighted(use, d, a)
        else:
            part.add_pairs(d * a, a)
    return [part for part in parts if part.block.name not in uses]


def _diagonals(
    probed: Probed, output: int, steps: Sequence[Step], zs: Collection[int], curved: bool
) -> dict[int, Tensor]:
    """diag(d^2 L / dz^2) of each sample: [B, n] for each z of the chain.

    Args:
        probed: a pass with probes at what curved steps give.
        output: the number of the model's output.
        steps: of `find_chain`.
        zs: where it is wanted.
        curved: whether the steps' second derivatives add to it.
    """
    gradients = probed.gradients(list(probed.probes))
    start = probed.output_hessian()
    last = last_product(steps)

    def size(value: int) -> int:
        return probed.known[value][0].numel()

    each = most_numbers(steps, size, start.right.shape[1], curved)
    count = chunk_sizes(start.right.device).chain // each
    found: dict[int, list[Tensor]] = {z: [] for z in zs}
    with torch.no_grad():
        for some in ranges(probed.samples, count):
            part = slice(some.start, some.stop)
            curvature = FactoredHessian(start.of(part))
            value = output
            for index, step in enumerate(steps):
                if value in found:
                    found[value].append(curvature.diagonal().expand(len(some), -1))
                gradient = gradients.get(step.after)
                _back(curvature, step, probed.known, part, gradient, index >= last)
                value = step.before
            found[value].append(curvature.diagonal().expand(len(some), -1))
    return {z: torch.cat(parts) for z, parts in found.items()}


def _back(
    curvature: FactoredHessian,
    step: Step,
    known: Mapping[int, Tensor],
    part: slice,
    gradient: Tensor | None,
    last: bool,
) -> None:
    """S of some samples from the value after a step to the one before; `gradient` is dL/dy there, None where zero."""
    call, before = step.call, known[step.before].detach()[part]
    if call.name in PRODUCTS:
        curvature.linear(known[call.arguments[-1].value].detach(), last)
    elif call.name in UNARY:
        slope, bend = step.derivatives(before)
        curvature.scale(slope.reshape(len(slope), -1))
        if bend is not None and gradient is not None:
            curvature.add_diagonal((bend * gradient[part]).reshape(len(bend), -1))
    elif call.name in ("mul", "div"):
        other = next(a for a in call.arguments if a != Ref(step.before))
        factor = known[other.value].detach() if isinstance(other, Ref) else other
        ones = torch.ones_like(before)
        factor = ones * factor if call.name == "mul" else ones / factor
        curvature.scale(factor.reshape(len(factor), -1))
    # Of the others, shapes and sums, the derivative is one, or minus one, which S does not feel.
