"""The diagonal of d^2 L / dz^2 at every layer of a chain, in one backward sweep.

Where a model is a chain of linear layers and elementwise functions, S = d^2 L / dz^2 of each site, a sample or one of
its positions, goes from a value to the one before it by

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

from collections.abc import Sequence

import torch
from torch import Tensor

from hesscli.hessian.blocks import Block
from hesscli.hessian.chunk_sizes import chunk_sizes, ranges
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.proofs.analysis import Analyses
from hesscli.hessian.proofs.uses import CONVOLUTION
from hesscli.hessian.routes.affine import AffineRoute
from hesscli.hessian.routes.base import Choice, Diagonal
from hesscli.hessian.routes.chain import (
    PRODUCTS,
    UNARY,
    Chain,
    Step,
    find_chains,
    last_product,
    most_numbers,
)
from hesscli.hessian.routes.factored_hessian import FactoredHessian
from hesscli.hessian.routes.first_batch import FirstBatch
from hesscli.hessian.routes.probes import Probed


def choice_along_chain(route: AffineRoute, first: FirstBatch, block: Block) -> Choice | None:
    """What the diagonal of a block takes that is on a chain."""
    analysis, costs = first.proven()
    chain = next(find_chains(analysis, [block.name]), None)
    if chain is None:
        return None
    use, most = chain.uses[block.name], chunk_sizes(route.problem.device).chain
    own, sweep = costs.own(use, diagonal=True), costs.chain(chain, route.curved)
    held = costs.held_of_chain(chain, route.curved, most)
    if use.kind == CONVOLUTION:  # patches are copies
        held += chain.sites * use.m
    return Choice(route, "chain", first.in_all(own), first.in_all(sweep), held)


def add_chain_diagonals(
    analyses: Analyses, batch: Batch, parts: Sequence[Diagonal], curved: bool
) -> list[Diagonal]:
    """Adds the diagonals along chains of layers, those of a chain in one sweep; returns the parts that are on none.

    Args:
        analyses: of the batches.
        batch: one of them.
        parts: whose diagonals are wanted.
        curved: of the Hessian; else of the generalised Gauss-Newton matrix, without the second term above.
    """
    left = {part.block.name: part for part in parts}
    for chain in find_chains(analyses.of(batch), list(left)):
        ys = [step.after for step in chain.steps if step.call.name in UNARY] if curved else []
        probed = Probed(analyses, batch, ys)
        found = _diagonals(probed, chain, curved)
        if not all(bool(torch.isfinite(d).all()) for d in found.values()):
            # phi'' is infinite where a ReLU before it is off: backward passes mask that.
            continue
        for name, use in chain.uses.items():
            part, z = left.pop(name), probed.known[use.z]
            d = use.rows(chain.channels[use.z].spread(found[use.z], z.shape))[:, 0]
            a = probed.inputs(use)[:, 0]
            if use.is_layer:
                part.add_weighted(use, d, a)
            else:
                part.add_pairs(d * a, a)
    return list(left.values())


def _diagonals(probed: Probed, chain: Chain, curved: bool) -> dict[int, Tensor]:
    """diag(d^2 L / dz^2) of each site: [sites, n] for each z of the chain.

    Args:
        probed: a pass with probes at what curved steps give.
        chain: to the values where it is wanted.
        curved: whether the steps' second derivatives add to it.
    """
    slopes = probed.gradients(list(probed.probes))
    gradients = {y: chain.channels[y].by_site(g) for y, g in slopes.items() if g is not None}
    operands = [s.operand(probed.known, chain.channels[s.before]) for s in chain.steps]
    start = probed.output_hessian(chain.channels[chain.output])
    last = last_product(chain.steps)
    count = chunk_sizes(start.right.device).chain // most_numbers(chain, curved)
    found: dict[int, list[Tensor]] = {use.z: [] for use in chain.uses.values()}
    with torch.no_grad():
        for some in ranges(chain.sites, count):
            part = slice(some.start, some.stop)
            curvature = FactoredHessian(start.of(part))
            value = chain.output
            for index, (step, operand) in enumerate(zip(chain.steps, operands, strict=True)):
                if value in found:
                    found[value].append(curvature.diagonal().expand(len(some), -1))
                gradient = gradients.get(step.after)
                _back(curvature, step, operand, part, gradient, index >= last)
                value = step.before
            found[value].append(curvature.diagonal().expand(len(some), -1))
    return {z: torch.cat(parts) for z, parts in found.items()}


def _back(
    curvature: FactoredHessian,
    step: Step,
    operand: Tensor | None,
    part: slice,
    gradient: Tensor | None,
    last: bool,
) -> None:
    """S of some sites from the value after a step to the one before; `gradient` is dL/dy there, None where zero."""
    if operand is None:  # of a shape, or a sum: its derivative, one or minus one, S does not feel
        return
    if step.call.name in PRODUCTS:
        curvature.linear(operand, last)
    elif step.call.name in UNARY:
        slope, bend = step.derivatives(operand[part])
        curvature.scale(slope)
        if bend is not None and gradient is not None:
            curvature.add_diagonal(bend * gradient[part])
    else:
        curvature.scale(operand[part])
