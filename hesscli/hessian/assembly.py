"""Rows of the Hessian from derivatives along pre-activations, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.hessian.autodiff import batched_grad
from hesscli.hessian.kronecker import add_kronecker_rows
from hesscli.hessian.probes import Probed
from hesscli.hessian.uses import CONVOLUTION, LINEAR, Use

WORKSPACE = 1 << 25  # numbers that one chunk of directions may make


@dataclass(frozen=True)
class Layer:
    """The parameters that enter at one value z: a weight, and perhaps its bias.

    `weight_at` and `bias_at` are where they start in their block's matrix.
    """

    weight: Use
    bias: Use | None
    weight_at: int
    bias_at: int

    @property
    def z(self) -> int:
        return self.weight.z

    @property
    def plain(self) -> bool:
        """Whether the Kronecker form holds."""
        return (
            self.weight.kind == LINEAR and self.weight.positions == 1 and not self.weight.transposed
        )


def add_layer(
    probed: Probed,
    layers: Sequence[Layer],
    deltas: Mapping[int, Tensor | None],
    out: Tensor,
    bias_out: Tensor,
    diagonal: bool,
    workspace: int,
) -> None:
    """The rows of the first layer, and its columns from there on to the last.

    Args:
        probed: a pass with probes at every layer, and duals at the inputs of all but the first.
        layers: in the order of execution.
        deltas: dPhi / dz of each, with its graph.
        out: the weight's block.
        bias_out: the bias's; the same one, or a block of its own.
        diagonal: only the diagonals of the first layer's own blocks: `out` [n m], `bias_out` [n].
        workspace: how many numbers a chunk of directions may make.
    """
    layer = layers[0]
    use, delta = layer.weight, deltas[layer.z]
    if delta is None or not delta.requires_grad:
        return
    a = probed.columns(use)  # [B, T, m]
    inputs = [probed.probes[other.z] for other in layers]
    inputs += [probed.duals[other.weight.a] for other in layers[1:] if other.weight.a is not None]
    per_direction = 4 * delta.numel() * len(inputs)
    if not layer.plain:
        per_direction += probed.samples * use.size
    for t, first, seeds in _directions(use, delta, max(1, workspace // per_direction)):
        found = batched_grad(delta, inputs, seeds)
        curvature, tangents = found[: len(layers)], found[len(layers) :]
        if curvature[0] is not None:
            s = use.rows(curvature[0])  # [directions, B, T, n]
            _add_own(layer, t, first, s, a, out, bias_out, diagonal)
        at = a[:, t].T.contiguous()  # [m, B]
        for other, s_other, tangent in zip(layers[1:], curvature[1:], tangents, strict=True):
            _add_cross(probed, layer, other, first, at, s_other, tangent, deltas[other.z], out)


def _directions(use: Use, delta: Tensor, chunk: int) -> Iterator[tuple[int, int, Tensor]]:
    """Unit vectors of z, the same in every sample: (position, first neuron, [directions, *z.shape])."""
    for t in range(use.positions):
        for first in range(0, use.n, chunk):
            count = min(chunk, use.n - first)
            seeds = delta.new_zeros(count, *delta.shape)
            index = _position_index(use, delta.shape, t)
            for row in range(count):
                place = list(index)
                place[use.channels[0]] = first + row
                seeds[row][tuple(place)] = 1
            yield t, first, seeds


def _position_index(use: Use, shape: Sequence[int], t: int) -> list[int | slice]:
    """The index of position t in z, over all samples, as `Use.rows` counts positions."""
    axis = use.axis
    if use.kind == CONVOLUTION:
        index: list[int | slice] = [slice(None), 0]
        for length in reversed(shape[2:]):
            t, place = divmod(t, length)
            index.insert(2, place)
        return index
    outer, inner = divmod(t, axis.inner)
    samples = shape[0] // (axis.outer * axis.inner)
    start = outer * samples * axis.inner + inner
    return [slice(start, start + samples * axis.inner, axis.inner), 0]


def _add_own(
    layer: Layer,
    t: int,
    first: int,
    s: Tensor,
    a: Tensor,
    out: Tensor,
    bias_out: Tensor,
    diagonal: bool,
) -> None:
    """The layer's own blocks, from its directions (t, first), (t, first + 1), ...; s [directions, B, T, n]."""
    use, count = layer.weight, s.shape[0]
    at = a[:, t]  # [B, m]
    neurons = range(first, first + count)
    if diagonal:
        for row, p in enumerate(neurons):
            same = torch.einsum("bt,btq->bq", s[row, :, :, p], a)
            out[p * use.m : (p + 1) * use.m] += (same * at).sum(0)
            if layer.bias is not None:
                bias_out[p] += s[row, :, :, p].sum()
        return
    w, b = layer.weight_at, layer.bias_at
    rows = slice(w + first * use.m, w + (first + count) * use.m)
    if layer.plain:
        block = out[w : w + use.size, w : w + use.size]
        add_kronecker_rows(block, first, s[:, :, 0, first:], at)
    else:
        out[rows, w : w + use.size] += (at.T @ use.pull(s, a)).flatten(0, 1)
    if layer.bias is None:
        return
    summed = s.sum(2)  # [directions, B, n]
    bias_out[b + first : b + first + count, b : b + use.n] += summed.sum(1)
    if out is bias_out:
        put(out, rows, slice(b, b + use.n), (at.T @ summed).flatten(0, 1))


def _add_cross(
    probed: Probed,
    layer: Layer,
    other: Layer,
    first: int,
    at: Tensor,
    s: Tensor | None,
    tangent: Tensor | None,
    delta: Tensor | None,
    out: Tensor,
) -> None:
    """Rows of one layer, columns of a later one: each sample's derivative of the later gradient, times a."""
    use, m = other.weight, layer.weight.m
    columns = slice(other.weight_at, other.weight_at + use.size)
    bias_columns = slice(other.bias_at, other.bias_at + use.n)
    with torch.no_grad():
        a = probed.columns(use)
        d = None if delta is None else use.rows(delta.detach())
        u = None if s is None else use.rows(s)
        if tangent is None or d is None:
            count, tangents = 0 if u is None else len(u), None
        else:
            count, tangents = len(tangent), tangent
        for row in range(count):
            pulled = None if u is None else _pulled(use, u[row], a)
            if tangents is not None and d is not None:
                moved = use.columns({**probed.known, use.a: tangents[row]})  # type: ignore[dict-item]
                pulled = _pulled(use, d, moved, pulled)
            assert pulled is not None
            rows = slice(
                layer.weight_at + (first + row) * m, layer.weight_at + (first + row + 1) * m
            )
            _put_product(out, rows, columns, at, pulled)
            mine = slice(layer.bias_at + first + row, layer.bias_at + first + row + 1)
            if layer.bias is not None:
                put(out, mine, columns, pulled.sum(0, keepdim=True))
            if other.bias is not None and u is not None:
                summed = u[row].sum(1)  # [B, n]
                _put_product(out, rows, bias_columns, at, summed)
                if layer.bias is not None:
                    put(out, mine, bias_columns, summed.sum(0, keepdim=True))


def _pulled(use: Use, u: Tensor, a: Tensor, onto: Tensor | None = None) -> Tensor:
    """Each sample's A^T u, [B, size], added to `onto` in place if given."""
    if use.positions > 1 or use.transposed or use.kind not in (LINEAR, CONVOLUTION):
        pulled = use.pull(u, a)
        return pulled if onto is None else onto.add_(pulled)
    column, row = u.transpose(1, 2), a  # [B, n, 1], [B, 1, m]
    if onto is None:
        return (column * row).flatten(1)
    onto.view(*onto.shape[:1], use.n, use.m).addcmul_(column, row)
    return onto


def put(out: Tensor, rows: slice, columns: slice, values: Tensor) -> None:
    """Adds an off-diagonal block to the upper triangle, which alone counts."""
    if rows.start <= columns.start:
        out[rows, columns] += values
    else:
        out[columns, rows] += values.T


def _put_product(out: Tensor, rows: slice, columns: slice, left: Tensor, right: Tensor) -> None:
    """Adds left @ right, as `_put` does, without a copy where the rows lie as they are."""
    if rows.start <= columns.start:
        out[rows, columns].addmm_(left, right)
    else:
        out[columns, rows].addmm_(right.T, left.T)
