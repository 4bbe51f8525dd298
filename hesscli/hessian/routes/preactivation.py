"""Derivatives along the pre-activations z of affine layers instead of along their parameters.

With z = W a at a layer and delta = dL/dz, in each sample (samples do not mix, so one direction serves all of them at
once),

    H[(k,p,q), (l,i,j)] = sum_b a_k[q] ( S_l[i;p] a_l[j] + delta_l[i] a'_l[j;p] )

where S_l and a'_l are the derivatives of delta_l and a_l along z_k,p. For a layer's own block a' is zero. A layer has
as many directions as neurons (times positions, where it is shared over them), not as many as parameters.

Source: C. Bishop, Exact calculation of the Hessian matrix for the multilayer perceptron, 1992; here on any graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hesscli.hessian.assembly import WORKSPACE, Layer, add_layer, put
from hesscli.hessian.autodiff import batched_grad
from hesscli.hessian.blocks import Block
from hesscli.hessian.chain import Step, chain_diagonals, curved_outputs, find_chain
from hesscli.hessian.kronecker import mirror_
from hesscli.hessian.probes import Analyses, Analysis, Probed
from hesscli.hessian.problem import Batch, Problem
from hesscli.hessian.routes.base import NotApplicable
from hesscli.hessian.uses import BIAS, CONVOLUTION, LINEAR, SCALE, Use


class Preactivation:
    name = "preactivation"
    symmetric = True

    def __init__(self, problem: Problem, analyses: Analyses) -> None:
        self.problem = problem
        self.analyses = analyses
        self.workspace = WORKSPACE

    def shrink(self) -> bool:
        self.workspace //= 2
        return self.workspace >= 1 << 16

    def add(
        self, batch: Batch, blocks: Sequence[Block], sums: Mapping[str, Tensor], diagonal: bool
    ) -> None:
        analysis = self.analyses.of(batch)
        if diagonal:
            blocks = self._add_chain(batch, analysis, blocks, sums)
        done: set[str] = set()
        for block in sorted(blocks, key=lambda block: -block.size):  # weights before their biases
            if block.name in done:
                continue
            layers, others = split(analysis, block)
            out = sums[block.name]
            if len(layers) == 1 and layers[0].bias is None and not others:
                # A bias that is a block of its own needs nothing but its weight's derivatives.
                layer, bias = layers[0], _bias_at(analysis, layers[0].z, blocks)
                if bias is not None:
                    done.add(bias.parameter)
                    layer = replace(layer, bias=bias, bias_at=0)
                bias_out = sums[bias.parameter] if bias else out
                self._add_layers(batch, analysis, block, [layer], [], out, bias_out, diagonal)
            elif layers:
                self._add_layers(batch, analysis, block, layers, others, out, out, diagonal)
            else:
                self._add_alone(batch, analysis, block, out, diagonal)

    def finish(self, matrix: Tensor) -> None:
        mirror_(matrix)

    def _add_chain(
        self, batch: Batch, analysis: Analysis, blocks: Sequence[Block], sums: Mapping[str, Tensor]
    ) -> list[Block]:
        """Diagonals along a chain of layers, all in one sweep; returns the blocks that are not on it."""
        uses = {block.name: analysis.use(block.parameters[0]) for block in blocks}
        steps, mine = chain_of(analysis, uses)
        if mine:
            probed = Probed(self.problem, batch, analysis, curved_outputs(steps))
            output = analysis.tape.output
            found = chain_diagonals(probed, output, steps, {use.z for use in mine.values()})
            for name, use in mine.items():
                d = found[use.z]  # [B, n]
                if use.kind == BIAS:
                    sums[name].add_(d.sum(0))
                    continue
                a = probed.columns(use)[:, 0]
                product = (d * a**2).sum(0) if use.kind == SCALE else (d.T @ a**2)
                sums[name].add_((product.T if use.transposed else product).reshape(-1))
        return [block for block in blocks if block.name not in mine]

    def _add_alone(
        self, batch: Batch, analysis: Analysis, block: Block, out: Tensor, diagonal: bool
    ) -> None:
        """A parameter with no more entries than directions along z: u = A e_r for each entry r."""
        use = analysis.use(block.parameters[0])
        probed = Probed(self.problem, batch, analysis, [use.z])
        probe = probed.probes[use.z]
        (delta,) = torch.autograd.grad(probed.value, [probe], create_graph=True)
        if not delta.requires_grad:
            return
        a = probed.columns(use)
        chunk = max(1, min(128, self.workspace // (8 * delta.numel())))
        for start in range(0, use.size, chunk):
            entries = range(start, min(start + chunk, use.size))
            seeds = use.spread(_directions_of(use, a, entries, probed.samples), delta.shape)
            (found,) = batched_grad(delta, [probe], seeds)
            if found is None:
                return
            rows = _summed_pull(use, use.rows(found), a)
            if diagonal:
                out[start : start + len(entries)] += rows.diagonal(offset=start)
            else:
                out[start : start + len(entries)] += rows

    def _add_layers(
        self,
        batch: Batch,
        analysis: Analysis,
        block: Block,
        layers: Sequence[Layer],
        others: Sequence[str],
        out: Tensor,
        bias_out: Tensor,
        diagonal: bool,
    ) -> None:
        """A block of layers, and of parameters that are no part of one."""
        zs = [layer.z for layer in layers]
        probed = Probed(
            self.problem,
            batch,
            analysis,
            zs,
            leaves=block.parameters if others else (),
            activations={layer.weight.a for layer in layers[1:] if layer.weight.a is not None},
        )
        others = [name for name in others if name in probed.leaves]  # the rest are unused
        wanted = [probed.probes[z] for z in zs] + [probed.leaves[name] for name in others]
        grads = torch.autograd.grad(probed.phi, wanted, create_graph=True, allow_unused=True)
        deltas = dict(zip(zs, grads, strict=False))
        for index in range(len(layers)):
            add_layer(probed, layers[index:], deltas, out, bias_out, diagonal, self.workspace)
        for name, gradient in zip(others, grads[len(zs) :], strict=True):
            if gradient is not None and gradient.requires_grad:
                _add_rows(probed, block, set(others), name, gradient, out, self.workspace)


def chain_of(analysis: Analysis, uses: Mapping[str, Use]) -> tuple[list[Step], dict[str, Use]]:
    """The chain from the output to the first of these uses, and those whose diagonal a sweep along it gives."""
    fit = {n: u for n, u in uses.items() if u.positions == 1 and u.kind != CONVOLUTION}
    steps, reached = find_chain(analysis, {use.z for use in fit.values()})
    return steps, {name: use for name, use in fit.items() if use.z in reached}


def _bias_at(analysis: Analysis, z: int, blocks: Sequence[Block]) -> Use | None:
    for block in blocks:
        use = analysis.uses.get(block.name)
        if use is not None and use.kind == BIAS and use.z == z:
            return use
    return None


def split(analysis: Analysis, block: Block) -> tuple[list[Layer], list[str]]:
    """A block's layers in the order of execution, and its parameters that are no part of one.

    A layer is a weight with fewer directions along z than entries, and the bias that enters with it. A block of one
    parameter that enters once needs none.

    Raises:
        NotApplicable: with the reason.
    """
    offsets = dict(zip(block.parameters, _starts(block.sizes), strict=True))
    uses = {name: analysis.uses[name] for name in block.parameters if name in analysis.uses}
    biases = {use.z: use for use in uses.values() if use.kind == BIAS}
    order = {n: i for i, call in enumerate(analysis.tape.calls) for n in call.outputs}
    layers = []
    for name, use in uses.items():
        if use.kind in (LINEAR, CONVOLUTION) and not use.transposed and use.positions < use.m:
            bias = biases.get(use.z)
            at = offsets[bias.parameter] if bias else -1
            layers.append(Layer(use, bias, offsets[name], at))
    layers.sort(key=lambda layer: order[layer.z])
    if not layers:
        if len(block.parameters) > 1:
            raise NotApplicable("parameters enter at several places")
        analysis.use(block.parameters[0])
    taken = {u.parameter for layer in layers for u in (layer.weight, layer.bias) if u}
    return layers, [name for name in block.parameters if name not in taken]


def directions(use: Use) -> int:
    """How many directions the parameter's own block takes."""
    return use.n * min(use.positions, use.m) if use.kind in (LINEAR, CONVOLUTION) else use.size


def _directions_of(use: Use, a: Tensor, entries: range, samples: int) -> Tensor:
    """A e_r for each of these entries r of the parameter: [entries, B, T, n]."""
    u = a.new_zeros(len(entries), samples, use.positions, use.n)
    for row, entry in enumerate(entries):
        if use.kind in (LINEAR, CONVOLUTION):
            p, q = divmod(entry, use.m)
            if use.transposed:
                q, p = divmod(entry, use.n)
            u[row, :, :, p] = a[:, :, q]
        else:
            u[row, :, :, entry] = 1 if use.kind == BIAS else a[:, :, entry]
    return u


def _summed_pull(use: Use, u: Tensor, a: Tensor) -> Tensor:
    """sum_b A_b^T u_b: [rows, B, T, n] -> [rows, size], without the samples' own shares."""
    if use.kind == BIAS:
        return u.sum((1, 2))
    if use.kind == SCALE:
        return (u * a).sum((1, 2))
    product = u.flatten(1, 2).transpose(1, 2) @ a.flatten(0, 1)  # [rows, n, m]
    return (product.transpose(1, 2) if use.transposed else product).flatten(1)


def _add_rows(
    probed: Probed,
    block: Block,
    others: set[str],
    name: str,
    gradient: Tensor,
    out: Tensor,
    workspace: int,
) -> None:
    """Rows of a parameter that is no part of a layer, by Hessian-vector products."""
    offsets = dict(zip(block.parameters, _starts(block.sizes), strict=True))
    names = [n for n in block.parameters if n in probed.leaves]
    leaves = [probed.leaves[n] for n in names]
    size = gradient.numel()
    chunk = max(1, min(128, workspace // (8 * probed.output.numel() + sum(block.sizes))))
    for start in range(0, size, chunk):
        count = min(chunk, size - start)
        seeds = gradient.new_zeros(count, size)
        seeds[:, start : start + count].fill_diagonal_(1)
        parts = batched_grad(gradient, leaves, seeds.view(count, *gradient.shape))
        mine = slice(offsets[name] + start, offsets[name] + start + count)
        for other, part in zip(names, parts, strict=True):
            if part is None:
                continue
            columns = slice(offsets[other], offsets[other] + part[0].numel())
            values = part.reshape(count, -1)
            if other in others:
                out[mine, columns] += values  # its mirror image is a row of `other`
            else:
                put(out, mine, columns, values)


def _starts(sizes: Sequence[int]) -> list[int]:
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += size
    return starts
