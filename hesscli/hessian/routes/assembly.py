"""Rows of the Hessian from derivatives along pre-activations, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hesscli.hessian.chunk_sizes import chunk_sizes
from hesscli.hessian.proofs.uses import Use
from hesscli.hessian.routes.kronecker import FEWEST, add_kronecker_rows
from hesscli.hessian.routes.layers import Layer
from hesscli.hessian.routes.probes import Probed
from hesscli.hessian.workers import side_by_side, workers


def add_layer(
    probed: Probed,
    layers: Sequence[Layer],
    deltas: Mapping[int, Tensor | None],
    neurons: range,
    out: Tensor,
    bias_out: Tensor | None,
    workspace: int,
) -> None:
    """The rows of some neurons of the first layer: their columns from their own on, and those of all later layers.

    Args:
        probed: a pass with probes at every layer, and duals at the inputs of all but the first.
        layers: in the order of execution.
        deltas: dPhi / dz of each, with its graph.
        neurons: which of the first layer.
        out: [neurons * width, columns], layer after layer, neuron after neuron.
        bias_out: where the own block of a bias goes that is no part of the layer: [neurons, n - first neuron].
        workspace: how many numbers a chunk of directions may make.
    """
    layer = layers[0]
    use, delta = layer.weight, deltas[layer.z]
    if delta is None or not delta.requires_grad:
        return
    a = layer.inputs(probed)
    inputs = [probed.probes[other.z] for other in layers]
    moving = [other.weight.moving for other in layers[1:]]
    inputs += [probed.duals[a] for a in moving if a is not None]
    per_direction = 4 * delta.numel() * len(inputs)
    if not layer.plain:
        per_direction += len(a) * layer.size
    later = _Later(probed, layers[1:], deltas)
    own = (use.n - neurons.start) * layer.width  # columns
    for t, chunk, seeds in _directions(use, delta, neurons, max(1, workspace // per_direction)):
        found = probed.along(delta, inputs, seeds)
        curvature, tangents = found[: len(layers)], found[len(layers) :]
        skipped = (chunk.start - neurons.start) * layer.width
        rows = out[skipped : skipped + len(chunk) * layer.width]
        at = a[:, t]  # [B, width]
        if curvature[0] is not None:
            s = use.rows(curvature[0])[..., chunk.start :]  # [directions, B, T, n - first]
            mine = rows[:, skipped:own]
            if layer.plain:
                add_kronecker_rows(mine, s[:, :, 0], at)
            else:
                pulled = s.transpose(-1, -2) @ a  # [directions, B, n - first, width]
                mine += (at.T @ pulled.flatten(2)).flatten(0, 1)
            if bias_out is not None:
                first = chunk.start - neurons.start
                bias_out[first : first + len(chunk), first:] += s.sum((1, 2))
        if later.size:
            later.add(rows[:, own:], at, curvature[1:], tangents)


def add_layer_diagonal(
    probed: Probed,
    layer: Layer,
    delta: Tensor | None,
    out: Tensor,
    bias_out: Tensor | None,
    workspace: int,
) -> None:
    """The diagonal of a layer's own block: `out` [n * m], and of its bias's, [n]."""
    use = layer.weight
    if delta is None or not delta.requires_grad:
        return
    a = probed.columns(use)
    per_direction = 4 * delta.numel()
    if not layer.plain:
        per_direction += len(a) * use.size
    for t, chunk, seeds in _directions(
        use, delta, range(use.n), max(1, workspace // per_direction)
    ):
        (curvature,) = probed.along(delta, [probed.probes[layer.z]], seeds)
        if curvature is None:
            return
        s = use.rows(curvature)  # [directions, B, T, n]
        for row, p in enumerate(chunk):
            same = torch.einsum("bt,btq->bq", s[row, :, :, p], a)
            entries = use.entries(out, p)
            entries += (same * a[:, t]).sum(0).view_as(entries)
            if bias_out is not None:
                bias_out[p] += s[row, :, :, p].sum()


class _Later:
    """The layers behind one: each sample's derivative of their gradients, times the inputs of the first."""

    def __init__(
        self, probed: Probed, layers: Sequence[Layer], deltas: Mapping[int, Tensor | None]
    ) -> None:
        self.probed, self.layers = probed, layers
        self.size = sum(layer.size for layer in layers)
        self.inputs = [layer.inputs(probed) for layer in layers]
        self.deltas = [
            None if delta is None else layer.weight.rows(delta.detach())
            for layer, delta in ((layer, deltas[layer.z]) for layer in layers)
        ]
        together = chunk_sizes(probed.output.device).gradients
        step = max(FEWEST, together // max(1, self.size))
        samples = len(self.inputs[0]) if layers else 0
        self.parts = [slice(start, min(start + step, samples)) for start in range(0, samples, step)]
        self.buffers: list[Tensor] = []  # one of each worker

    @torch.no_grad()
    def add(
        self,
        out: Tensor,
        at: Tensor,
        curvature: Sequence[Tensor | None],
        tangents: Sequence[Tensor | None],
    ) -> None:
        """out[(p, q), :] += sum_b at[b, q] d g_b / d z_p, for every direction p.

        Args:
            out: [directions * width, columns].
            at: the first layer's inputs where the directions are, [B, width].
            curvature: the derivative of each later delta, [directions, *z.shape].
            tangents: that of each later layer's input, [directions, *a.shape].
        """
        width = at.shape[1]
        count = out.shape[0] // width
        moved = [
            None if u is None else x.weight.rows(u)
            for x, u in zip(self.layers, curvature, strict=True)
        ]
        shifts = self._shifts(tangents, count)
        threads = workers(out.device, count)
        while len(self.buffers) < threads:
            self.buffers.append(out.new_empty(len(at[self.parts[0]]), self.size))

        def add(worker: int, rows: Iterator[int]) -> None:
            buffer = self.buffers[worker][: part.stop - part.start]
            for row in rows:
                column = 0
                for index, layer in enumerate(self.layers):
                    u, shift, delta = moved[index], shifts[index], self.deltas[index]
                    _fill(
                        buffer[:, column : column + layer.size].unflatten(1, (-1, layer.width)),
                        layer,
                        None if u is None else u[row, part],
                        self.inputs[index][part],
                        None if shift is None else shift[row][part],
                        None if delta is None else delta[part],
                    )
                    column += layer.size
                out[row * width : (row + 1) * width].addmm_(left, buffer)

        for part in self.parts:
            left = at[part].T.contiguous()
            side_by_side(range(count), threads, add)

    def _shifts(self, tangents: Sequence[Tensor | None], count: int) -> list[list[Tensor] | None]:
        """How the inputs of each later layer move along each direction: [B, T, m] each."""
        found = iter(tangents)
        shifts: list[list[Tensor] | None] = []
        for layer, delta in zip(self.layers, self.deltas, strict=True):
            use = layer.weight
            tangent = None if use.moving is None else next(found)
            if use.a is None or tangent is None or delta is None:
                shifts.append(None)
                continue
            shifts.append(
                [use.columns({**self.probed.known, use.a: tangent[row]}) for row in range(count)]
            )
        return shifts


def _fill(
    target: Tensor,
    layer: Layer,
    u: Tensor | None,
    a: Tensor,
    shift: Tensor | None,
    delta: Tensor | None,
) -> None:
    """Each sample's u a^T + delta a'^T: [B, n, width]; u and delta [B, T, n], a [B, T, width], a' [B, T, m]."""
    if u is None:
        target.zero_()
    elif layer.plain:
        torch.mul(u.transpose(1, 2), a, out=target)
    else:
        target.copy_(u.transpose(1, 2) @ a)
    if shift is not None and delta is not None:
        weights = target[..., : layer.weight.m]
        if layer.plain:
            weights.addcmul_(delta.transpose(1, 2), shift)
        else:
            weights += delta.transpose(1, 2) @ shift


def _directions(
    use: Use, delta: Tensor, neurons: range, chunk: int
) -> Iterator[tuple[int, range, Tensor]]:
    """Unit vectors of z, the same in every sample: (position, neurons, [directions, *z.shape])."""
    samples = delta.numel() // (use.positions * use.n)
    for t in range(use.positions):
        for first in range(neurons.start, neurons.stop, chunk):
            part = range(first, min(first + chunk, neurons.stop))
            u = delta.new_zeros(len(part), samples, use.positions, use.n)
            u[:, :, t, part.start : part.stop].diagonal(dim1=0, dim2=2).fill_(1)
            yield t, part, use.spread(u, delta.shape)
