"""Derivatives along the pre-activations z of affine layers instead of along their parameters.

With z = W a at a layer and delta = dL/dz, in each sample (samples do not mix, so one direction serves all of them at once),

    H[(k,p,q), (l,i,j)] = sum_b a_k[q] ( S_l[i;p] a_l[j] + delta_l[i] a'_l[j;p] )

where S_l and a'_l are the derivatives of delta_l and a_l along z_k,p. For a layer's own block a' is zero. A layer has as many
directions as neurons (times positions, where it is shared over them), not as many as parameters.

Source: C. Bishop, Exact calculation of the Hessian matrix for the multilayer perceptron, 1992; here on any graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.hessian.blocks import Block
from hesscli.hessian.kronecker import add_kronecker_rows, mirror_
from hesscli.hessian.probes import Analyses, Analysis, Probed
from hesscli.hessian.problem import Batch, Problem
from hesscli.hessian.routes.base import NotApplicable
from hesscli.hessian.uses import BIAS, CONVOLUTION, LINEAR, SCALE, Use

_WORKSPACE = 1 << 25  # numbers that one chunk of directions may make


@dataclass(frozen=True)
class _Layer:
    """The parameters of a block that enter at one value z: a weight, and perhaps its bias."""

    weight: Use
    bias: Use | None
    weight_at: int  # where they start in the block
    bias_at: int

    @property
    def z(self) -> int:
        return self.weight.z

    @property
    def plain(self) -> bool:
        """Whether the Kronecker form holds."""
        return self.weight.kind == LINEAR and self.weight.positions == 1 and not self.weight.transposed


class Preactivation:
    name = "preactivation"
    symmetric = True

    def __init__(self, problem: Problem, analyses: Analyses) -> None:
        self.problem = problem
        self.analyses = analyses

    def add(
        self, batch: Batch, blocks: Sequence[Block], sums: Mapping[str, Tensor], diagonal: bool
    ) -> None:
        analysis = self.analyses.of(batch)
        for block in blocks:
            layers, others = split(analysis, block)
            if layers:
                self._add_block(batch, analysis, block, layers, others, sums[block.name], diagonal)
            else:
                self._add_alone(batch, analysis, block, sums[block.name], diagonal)

    def finish(self, matrix: Tensor) -> None:
        mirror_(matrix)

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
        chunk = max(1, min(128, _WORKSPACE // (8 * delta.numel())))
        for start in range(0, use.size, chunk):
            entries = range(start, min(start + chunk, use.size))
            seeds = use.spread(_directions_of(use, a, entries, probed.samples), delta.shape)
            (found,) = torch.autograd.grad(
                delta, [probe], seeds, is_grads_batched=True, retain_graph=True, allow_unused=True
            )
            if found is None:
                return
            rows = _summed_pull(use, use.rows(found), a)
            if diagonal:
                out[start : start + len(entries)] += rows.diagonal(offset=start)
            else:
                out[start : start + len(entries)] += rows

    def _add_block(
        self,
        batch: Batch,
        analysis: Analysis,
        block: Block,
        layers: Sequence[_Layer],
        others: Sequence[str],
        out: Tensor,
        diagonal: bool,
    ) -> None:
        later = {layer.weight.a for layer in layers[1:] if layer.weight.a is not None}
        probed = Probed(
            self.problem,
            batch,
            analysis,
            [layer.z for layer in layers],
            leaves=block.parameters if others else (),
            activations=later,
        )
        zs = [layer.z for layer in layers]
        others = [name for name in others if name in probed.leaves]  # the rest are unused
        wanted = [probed.probes[z] for z in zs] + [probed.leaves[name] for name in others]
        grads = torch.autograd.grad(probed.phi, wanted, create_graph=True, allow_unused=True)
        deltas = dict(zip(zs, grads, strict=False))
        for index, layer in enumerate(layers):
            _add_layer(probed, layers[index:], deltas, out, diagonal)
        offsets = dict(zip(block.parameters, _starts(block.sizes), strict=True))
        for name, gradient in zip(others, grads[len(zs) :], strict=True):
            if gradient is not None and gradient.requires_grad:
                _add_rows(probed, block, offsets, set(others), name, gradient, out)


def split(analysis: Analysis, block: Block) -> tuple[list[_Layer], list[str]]:
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
            layers.append(_Layer(use, bias, offsets[name], at))
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


def _add_layer(
    probed: Probed,
    layers: Sequence[_Layer],
    deltas: Mapping[int, Tensor | None],
    out: Tensor,
    diagonal: bool,
) -> None:
    """The rows of the first layer, and its columns from there on to the last."""
    layer = layers[0]
    use, delta = layer.weight, deltas[layer.z]
    if delta is None or not delta.requires_grad:
        return
    a = probed.columns(use)  # [B, T, m]
    inputs = [probed.probes[other.z] for other in layers]
    inputs += [probed.duals[other.weight.a] for other in layers[1:] if other.weight.a is not None]
    cross = sum(other.weight.size + other.weight.n for other in layers[1:])
    per_direction = 4 * delta.numel() * len(inputs) + probed.samples * cross
    for t, first, seeds in _directions(use, delta, max(1, _WORKSPACE // per_direction)):
        found = torch.autograd.grad(
            delta, inputs, seeds, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
        curvature, tangents = found[: len(layers)], found[len(layers) :]
        if curvature[0] is not None:
            s = use.rows(curvature[0].detach())  # [directions, B, T, n]
            _add_own(layer, t, first, s, a, out, diagonal)
        at = a[:, t].T.contiguous()  # [m, B]
        for other, s_other, tangent in zip(layers[1:], curvature[1:], tangents, strict=True):
            d = deltas[other.z]
            _add_cross(probed, layer, other, first, at, s_other, tangent, d, out)


def _directions(use: Use, delta: Tensor, chunk: int) -> Iterator[tuple[int, int, Tensor]]:
    """Unit vectors of z, the same in every sample: (position, first neuron, [directions, *z.shape])."""
    for t in range(use.positions):
        for first in range(0, use.n, chunk):
            count = min(chunk, use.n - first)
            seeds = delta.new_zeros(count, *delta.shape)
            index = _position_index(use, delta.shape, t)
            for row in range(count):
                place: list[object] = list(index)
                place[use.channels[0]] = first + row
                seeds[(row, *place)] = 1
            yield t, first, seeds


def _position_index(use: Use, shape: Sequence[int], t: int) -> list[object]:
    """The index of position t in z, over all samples, as `Use.rows` counts positions."""
    axis = use.axis
    if use.kind == CONVOLUTION:
        index: list[object] = [slice(None), 0]
        for length in reversed(shape[2:]):
            t, place = divmod(t, length)
            index.insert(2, place)
        return index
    outer, inner = divmod(t, axis.inner)
    samples = shape[0] // (axis.outer * axis.inner)
    start = outer * samples * axis.inner + inner
    return [slice(start, start + samples * axis.inner, axis.inner), 0]


def _add_own(
    layer: _Layer, t: int, first: int, s: Tensor, a: Tensor, out: Tensor, diagonal: bool
) -> None:
    use, count = layer.weight, s.shape[0]
    at = a[:, t]  # [B, m]
    if diagonal:
        for row in range(count):
            p = first + row
            same = torch.einsum("bt,btq->bq", s[row, :, :, p], a)
            out[p * use.m : (p + 1) * use.m] += (same * at).sum(0)
        return
    w, b = layer.weight_at, layer.bias_at
    if layer.plain:
        s = s.squeeze(2)
        block = out[w : w + use.size, w : w + use.size]
        add_kronecker_rows(block, first, s[:, :, first:], at)
        pulled = None
    else:
        pulled = use.pull(s, a)  # [directions, B, n m]
        rows = slice(w + first * use.m, w + (first + count) * use.m)
        out[rows, w : w + use.size] += (at.T @ pulled).flatten(0, 1)
    if layer.bias is None:
        return
    summed = s if s.dim() == 3 else s.sum(2)  # [directions, B, n]
    out[b + first : b + first + count, b : b + use.n] += summed.sum(1)
    mixed = (at.T @ summed).flatten(0, 1)  # [directions m, n]
    rows = slice(w + first * use.m, w + (first + count) * use.m)
    _put(out, rows, slice(b, b + use.n), mixed)


def _add_cross(
    probed: Probed,
    layer: _Layer,
    other: _Layer,
    first: int,
    at: Tensor,
    s: Tensor | None,
    tangent: Tensor | None,
    delta: Tensor | None,
    out: Tensor,
) -> None:
    """Rows of one layer, columns of a later one: each sample's derivative of the later gradient, times a."""
    use = other.weight
    with torch.no_grad():
        a = probed.columns(use)
        pulled = bias = None
        if s is not None:
            u = use.rows(s)
            pulled = use.pull(u, a)
            bias = u.sum(2)
        if tangent is not None and delta is not None:
            d = use.rows(delta)
            for_tangent = torch.stack([use.columns({**probed.known, use.a: x}) for x in tangent])  # type: ignore[dict-item]
            product = use.pull(d, for_tangent)
            pulled = product if pulled is None else pulled.add_(product)
        if pulled is None:
            return
        m, w = layer.weight.m, layer.weight_at
        rows = slice(w + first * m, w + (first + len(pulled)) * m)
        columns = slice(other.weight_at, other.weight_at + use.size)
        _put(out, rows, columns, (at @ pulled).flatten(0, 1))
        if layer.bias is not None:
            mine = slice(layer.bias_at + first, layer.bias_at + first + len(pulled))
            _put(out, mine, columns, pulled.sum(1))
        if other.bias is not None and bias is not None:
            columns = slice(other.bias_at, other.bias_at + use.n)
            _put(out, rows, columns, (at @ bias).flatten(0, 1))
            if layer.bias is not None:
                _put(out, mine, columns, bias.sum(1))


def _add_rows(
    probed: Probed,
    block: Block,
    offsets: Mapping[str, int],
    others: set[str],
    name: str,
    gradient: Tensor,
    out: Tensor,
) -> None:
    """Rows of a parameter that is no part of a layer, by Hessian-vector products."""
    names = [n for n in block.parameters if n in probed.leaves]
    leaves = [probed.leaves[n] for n in names]
    size = gradient.numel()
    chunk = max(1, min(128, _WORKSPACE // (8 * probed.output.numel() + sum(block.sizes))))
    for start in range(0, size, chunk):
        count = min(chunk, size - start)
        seeds = gradient.new_zeros(count, size)
        seeds[:, start : start + count].fill_diagonal_(1)
        parts = torch.autograd.grad(
            gradient,
            leaves,
            seeds.view(count, *gradient.shape),
            is_grads_batched=True,
            retain_graph=True,
            allow_unused=True,
        )
        mine = slice(offsets[name] + start, offsets[name] + start + count)
        for other, part in zip(names, parts, strict=True):
            if part is None:
                continue
            columns = slice(offsets[other], offsets[other] + part[0].numel())
            values = part.reshape(count, -1)
            if other in others:
                out[mine, columns] += values  # its mirror image is a row of `other`
            else:
                _put(out, mine, columns, values)


def _put(out: Tensor, rows: slice, columns: slice, values: Tensor) -> None:
    """Adds an off-diagonal block to the upper triangle, which alone counts."""
    if rows.start <= columns.start:
        out[rows, columns] += values
    else:
        out[columns, rows] += values.T


def _starts(sizes: Sequence[int]) -> list[int]:
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += size
    return starts
