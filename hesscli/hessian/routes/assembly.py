"""Rows of the Hessian from derivatives along pre-activations, one layer at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.hessian.autodiff import batched_grad
from hesscli.hessian.chunk_sizes import chunk_sizes, grouped, ranges
from hesscli.hessian.proofs.uses import Use
from hesscli.hessian.routes.base import Diagonal
from hesscli.hessian.routes.kronecker import FEWEST, add_kronecker_rows
from hesscli.hessian.routes.layers import Layer
from hesscli.hessian.routes.probes import Probed
from hesscli.hessian.routes.sums import add_product, add_products
from hesscli.hessian.workers import side_by_side, workers

_COLUMNS = 512  # of gradients, at least, for as many samples as fit beside


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
        probed: a pass with probes at every layer, and duals at the inputs of all but the first; of that too, if it is
            shared.
        layers: in the order of execution.
        deltas: dPhi / dz of each, with its graph.
        neurons: which of the first layer.
        out: [neurons * width, columns], layer after layer, neuron after neuron.
        bias_out: where the own block of a bias goes that is no part of the layer: [neurons, n - first neuron].
        workspace: how many numbers a chunk of directions may make.
    """
    layer = layers[0]
    if layer.again:
        _add_shared(probed, layers, deltas, neurons, out, workspace)
        return
    use, delta = layer.weight, deltas[layer.z]
    if delta is None or not delta.requires_grad:
        return
    a = layer.inputs(probed)
    gradients = _Gradients(probed, layers[1:], deltas)
    inputs = [probed.probes[layer.z], *gradients.variables]
    per_direction = 4 * delta.numel() * len(inputs)
    if not layer.plain:
        per_direction += len(a) * layer.size
    later = _Later(gradients)
    own = (use.n - neurons.start) * layer.width  # columns
    for t, chunk, seeds in _directions(use, delta, neurons, workspace // per_direction):
        curvature, *found = probed.along(delta, inputs, seeds)
        skipped = (chunk.start - neurons.start) * layer.width
        rows = out[skipped : skipped + len(chunk) * layer.width]
        at = a[:, t]  # [B, width]
        if curvature is not None:
            s = use.rows(curvature)[..., chunk.start :]  # [directions, B, T, n - first]
            mine = rows[:, skipped:own]
            if layer.plain:
                add_kronecker_rows(mine, s[:, :, 0], at)
            else:
                pulled = s.transpose(-1, -2) @ a  # [directions, B, n - first, width]
                add_products(_by_neuron(layer, mine), at.T, pulled.flatten(2))
            if bias_out is not None:
                first = chunk.start - neurons.start
                bias_out[first : first + len(chunk), first:] += s.sum((1, 2))
        if later.tiles:
            later.add(_by_neuron(layer, rows[:, own:]), at, gradients.along(found, len(chunk)))


def _add_shared(
    probed: Probed,
    layers: Sequence[Layer],
    deltas: Mapping[int, Tensor | None],
    neurons: range,
    out: Tensor,
    workspace: int,
) -> None:
    """The same where the first layer is shared: every pair of its values, and of one with another layer's, counts.

    For an earlier value z' = W' a' and a later one z = W a

        d^2 L / dW[p, q] dW'[i, j] = sum_b a[q] S'[i; p] a'[j] + delta[p] d a[q] / d z'[i] a'[j]

    where S' is the derivative of delta' along z_p; and likewise with the two exchanged.
    """
    layer, gradients = layers[0], _Gradients(probed, layers, deltas)
    behind = _Later(gradients, neurons.start)
    by_neuron = _by_neuron(layer, out)
    for place in layer.places:
        use, delta = place.weight, deltas[place.z]
        if delta is None:
            continue
        if delta.requires_grad:
            a = place.inputs(probed)
            chunk = workspace // (4 * delta.numel() * len(gradients.variables))
            for t, part, seeds in _directions(use, delta, neurons, chunk):
                found = probed.along(delta, gradients.variables, seeds)
                mine = by_neuron[part.start - neurons.start : part.stop - neurons.start]
                behind.add(mine, a[:, t], gradients.along(found, len(part)))
        inputs = use.columns(probed.known)  # which move with earlier values
        if inputs.requires_grad:
            rows = use.rows(delta.detach())[..., neurons.start : neurons.stop]
            chunk = workspace // (4 * sum(probe.numel() for probe in gradients.probes))
            for t, part in itertools.product(range(use.positions), ranges(use.m, chunk)):
                seeds = inputs.new_zeros(len(part), *inputs.shape)
                seeds[:, :, t, part.start : part.stop].diagonal(dim1=0, dim2=2).fill_(1)
                found = batched_grad(inputs, gradients.probes, seeds)
                mine = by_neuron[:, part.start : part.stop].transpose(0, 1)
                behind.add(mine, rows[:, t], gradients.along(found, len(part)))


def _by_neuron(layer: Layer, rows: Tensor) -> Tensor:
    """[neurons * width, columns] -> [neurons, width, columns]."""
    return rows.unflatten(0, (-1, layer.width))


def add_layer_diagonal(
    probed: Probed,
    layer: Layer,
    deltas: Mapping[int, Tensor | None],
    wanted: Diagonal,
    bias_out: Tensor | None,
    workspace: int,
) -> None:
    """The diagonal of a layer's own block, and of its bias's, [n].

    Two values of a shared layer give the same, seen from either: from the earlier one it counts twice.
    """
    for index, place in enumerate(layer.places):
        use, delta = place.weight, deltas[place.z]
        if delta is None or not delta.requires_grad:
            continue
        own = _Gradients(probed, [Layer.shared(layer.places[index:])], deltas)
        (a,), (delta_rows,) = own.inputs, own.deltas
        twice = a.new_full((a.shape[1],), 2.0)
        twice[: use.positions] = 1
        per_direction = 4 * delta.numel() * len(own.variables)
        if not layer.plain:
            per_direction += len(a) * use.size
        chunk = workspace // per_direction
        for t, part, seeds in _directions(use, delta, wanted.neurons(use), chunk):
            found = probed.along(delta, own.variables, seeds)
            motion = own.along(found, len(part))
            (s,), (shifts,) = motion.deltas, motion.inputs
            for row, p in enumerate(part):
                sums = [] if s is None else [(s[row], a)]
                if delta_rows is not None and shifts is not None:
                    sums.append((delta_rows, shifts[row]))
                for u, columns in sums:
                    same = torch.einsum("bt,btq->bq", u[:, :, p] * twice, columns)
                    wanted.add_neuron(use, p, a[:, t], same)
                if bias_out is not None and s is not None:
                    bias_out[p] += s[row, :, :, p].sum()


@dataclass(frozen=True)
class _Motion:
    """How deltas and inputs of some layers move along some directions; None is not at all.

    Attributes:
        deltas: of each layer, [directions, B, T, n].
        inputs: of each layer, for each direction [B, T, m].
    """

    deltas: list[Tensor | None]
    inputs: list[list[Tensor] | None]


class _Gradients:
    """The gradients of some layers' parameters in each sample, sum over positions of delta a^T, as a z moves.

    The positions of a shared layer are those at all its values, one after the other.

    Attributes:
        probes: at every value of every layer.
        variables: what a direction's derivatives are asked for: probes, then duals.
        inputs: a of each layer, [B, T, width].
        deltas: dPhi / dz of each, [B, T, n].
    """

    def __init__(
        self, probed: Probed, layers: Sequence[Layer], deltas: Mapping[int, Tensor | None]
    ) -> None:
        self.probed, self.layers = probed, layers
        places = [place for layer in layers for place in layer.places]
        self.moving = [place.weight.moving for place in places]
        self.probes = [probed.probes[place.z] for place in places]
        duals = [probed.duals[a] for a in self.moving if a in probed.duals]
        self.variables = [*self.probes, *duals]
        self.inputs = [layer.inputs(probed) for layer in layers]
        known = {z: None if delta is None else delta.detach() for z, delta in deltas.items()}
        self.deltas = [layer.rows([known[x.z] for x in layer.places]) for layer in layers]

    @torch.no_grad()
    def along(self, found: Sequence[Tensor | None], count: int) -> _Motion:
        """How they move along each direction, by the derivatives of the variables, or of the probes alone."""
        parts = iter(found)
        deltas = [layer.rows([next(parts) for _ in layer.places]) for layer in self.layers]
        known = [next(parts, None) if a in self.probed.duals else None for a in self.moving]
        tangents, inputs = iter(known), list[list[Tensor] | None]()
        for layer, delta in zip(self.layers, self.deltas, strict=True):
            mine = [next(tangents) for _ in layer.places]
            if delta is None or all(tangent is None for tangent in mine):
                inputs.append(None)
                continue
            rows = [[x if x is None else x[row] for x in mine] for row in range(count)]
            inputs.append([layer.moved(each, self.probed) for each in rows])
        return _Motion(deltas, inputs)


class _Later:
    """The layers behind one: each sample's derivative of their gradients, times the inputs of the first.

    The gradients of some samples, by some columns, are made and multiplied at a time, in the cache.

    Args:
        gradients: of the layers.
        skipped: how many neurons of the first of them have no columns.
    """

    def __init__(self, gradients: _Gradients, skipped: int = 0) -> None:
        self.layers, self.inputs, self.deltas = gradients.layers, gradients.inputs, gradients.deltas
        self.samples: list[range] = []
        self.tiles: list[list[tuple[int, range]]] = []  # neurons of layers, by the layers' numbers
        self.sizes: list[int] = []  # columns of each tile
        self.buffers: list[Tensor] = []  # one of each worker
        if self.layers:
            most = chunk_sizes(gradients.probed.output.device).gradients
            widest = max(_COLUMNS, *(layer.width for layer in self.layers))
            self.samples = ranges(len(self.inputs[0]), max(FEWEST, most // widest))
            columns = most // len(self.samples[0])
            neurons = [
                (index, each)
                for index, layer in enumerate(self.layers)
                for each in ranges(layer.weight.n, columns // layer.width, 0 if index else skipped)
            ]
            self.tiles = grouped(neurons, self._columns, columns)
            self.sizes = [sum(map(self._columns, tile)) for tile in self.tiles]

    def _columns(self, neurons: tuple[int, range]) -> int:
        return len(neurons[1]) * self.layers[neurons[0]].width

    @torch.no_grad()
    def add(self, out: Tensor, left: Tensor, motion: _Motion) -> None:
        """out[r, i, :] += sum_b left[b, i] d g_b, for every direction r.

        Args:
            out: [directions, width, columns].
            left: [B, width].
            motion: of the layers, along the directions.
        """
        threads = workers(out.device, len(out))
        while len(self.buffers) < threads:
            self.buffers.append(out.new_empty(len(self.samples[0]) * max(self.sizes)))

        def add(worker: int, rows: Iterator[int]) -> None:
            for row in rows:
                start = 0
                for tile, size in zip(self.tiles, self.sizes, strict=True):
                    made = self.buffers[worker][: turned.shape[1] * size].view(-1, size)
                    self._make(made, tile, part, motion, row)
                    add_product(out[row, :, start : start + size], turned, made)
                    start += size

        for samples in self.samples:
            part = slice(samples.start, samples.stop)
            turned = left[part].T.contiguous()
            side_by_side(range(len(out)), threads, add)

    def _make(
        self,
        out: Tensor,
        tile: Sequence[tuple[int, range]],
        part: slice,
        motion: _Motion,
        row: int,
    ) -> None:
        """The derivatives of some samples' gradients along one direction, by these neurons: [samples, columns]."""
        column = 0
        for index, neurons in tile:
            layer, mine = self.layers[index], slice(neurons.start, neurons.stop)
            u, shift, delta = motion.deltas[index], motion.inputs[index], self.deltas[index]
            size = self._columns((index, neurons))
            _fill(
                out[:, column : column + size].unflatten(1, (-1, layer.width)),
                layer,
                None if u is None else u[row, part, :, mine],
                self.inputs[index][part],
                None if shift is None else shift[row][part],
                None if delta is None else delta[part, :, mine],
            )
            column += size


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
        torch.baddbmm(target, u.transpose(1, 2), a, beta=0, out=target)
    if shift is not None and delta is not None:
        weights = target[..., : layer.weight.m]
        if layer.plain:
            weights.addcmul_(delta.transpose(1, 2), shift)
        else:
            weights.baddbmm_(delta.transpose(1, 2), shift)


def _directions(
    use: Use, delta: Tensor, neurons: range, chunk: int
) -> Iterator[tuple[int, range, Tensor]]:
    """Unit vectors of z, the same in every sample: (position, neurons, [directions, *z.shape])."""
    samples = delta.numel() // (use.positions * use.n)
    for t in range(use.positions):
        for part in ranges(neurons.stop, chunk, neurons.start):
            u = delta.new_zeros(len(part), samples, use.positions, use.n)
            u[:, :, t, part.start : part.stop].diagonal(dim1=0, dim2=2).fill_(1)
            yield t, part, use.spread(u, delta.shape)
