"""Rows of the Hessian from derivatives along the pre-activations of one layer.

With theta the parameters of a layer z = W a and of those behind it, and g each sample's gradient by theta,

    d^2 L / dW[p, q] d theta = sum_{b,t} a[t, q] dg / dz[t, p] + delta[t, p] da[t, q] / d theta

in each sample b and position t. The last term is zero, unless the layer is behind itself. Of dg, see
`sample_gradients.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hesscli.hessian.autodiff import batched_grad
from hesscli.hessian.chunk_sizes import ranges
from hesscli.hessian.routes.base import Diagonal
from hesscli.hessian.routes.kronecker import add_kronecker_rows
from hesscli.hessian.routes.layers import Layer
from hesscli.hessian.routes.probes import Probed
from hesscli.hessian.routes.sample_gradients import SampleGradients
from hesscli.hessian.routes.sums import add_products


def add_layer(
    probed: Probed,
    layers: Sequence[Layer],
    neurons: range,
    out: Tensor,
    bias_out: Tensor | None,
    workspace: int,
) -> None:
    """The rows of some neurons of the first layer: their columns from their own on, and those of all later layers.

    Args:
        probed: a pass with probes at every layer, and duals at the inputs of all but the first; of that too, if it is
            shared; differentiated.
        layers: in the order of execution.
        neurons: which of the first layer.
        out: [neurons * width, columns], layer after layer, neuron after neuron.
        bias_out: where the own block of a bias goes that is no part of the layer: [neurons, n - first neuron].
        workspace: how many numbers a chunk of directions may make.
    """
    layer = layers[0]
    if layer.is_shared:
        _add_shared(probed, layers, neurons, out, workspace)
        return
    use, delta = layer.weight, probed.deltas[layer.weight.z]
    if not delta.requires_grad:
        return
    a, later = layer.inputs(probed), SampleGradients(probed, layers[1:])
    inputs = [probed.probes[use.z], *later.variables]
    per_direction = probed.numbers(use.z, len(inputs)) + later.patches
    if not layer.plain:
        per_direction += len(a) * layer.size
    own = (use.n - neurons.start) * layer.width  # columns
    z = use.rows(delta.detach())
    for t, chunk, units in _unit_vectors(z, neurons, workspace // per_direction):
        curvature, *found = probed.along(delta, inputs, use.spread(units, delta.shape))
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
        if later.layers:
            later.add(_by_neuron(layer, rows[:, own:]), at, later.along(found))


def _add_shared(
    probed: Probed, layers: Sequence[Layer], neurons: range, out: Tensor, workspace: int
) -> None:
    """The same where the first layer is shared: every pair of its values, and of one with another layer's, counts.

    For an earlier value z' = W' a' and a later one z = W a

        d^2 L / dW[p, q] dW'[i, j] = sum_b a[q] S'[i; p] a'[j] + delta[p] d a[q] / d z'[i] a'[j]

    where S' is the derivative of delta' along z_p; and likewise with the two exchanged.
    """
    layer, gradients = layers[0], SampleGradients(probed, layers, neurons.start)
    by_neuron = _by_neuron(layer, out)
    inputs = gradients.inputs[0].split([use.positions for use in layer.weights], 1)
    for use, a in zip(layer.weights, inputs, strict=True):
        delta = probed.deltas[use.z]
        rows = use.rows(delta.detach())
        if delta.requires_grad:
            each = probed.numbers(use.z, len(gradients.variables)) + gradients.patches
            chunk = workspace // each
            for t, part, units in _unit_vectors(rows, neurons, chunk):
                seeds = use.spread(units, delta.shape)
                found = probed.along(delta, gradients.variables, seeds)
                mine = by_neuron[part.start - neurons.start : part.stop - neurons.start]
                gradients.add(mine, a[:, t], gradients.along(found))
        if probed.linearised:
            continue
        with torch.enable_grad():
            moving = use.inputs(probed.known)  # with earlier values
        if moving.requires_grad:
            left = rows[..., neurons.start : neurons.stop]
            chunk = workspace // (4 * sum(probe.numel() for probe in gradients.probes))
            for t, part, seeds in _unit_vectors(moving, range(use.m), chunk):
                found = batched_grad(moving, gradients.probes, seeds)
                mine = by_neuron[:, part.start : part.stop].transpose(0, 1)
                gradients.add(mine, left[:, t], gradients.along(found))


def add_layer_diagonal(
    probed: Probed,
    layer: Layer,
    neurons: range,
    wanted: Diagonal,
    bias_out: Tensor | None,
    workspace: int,
) -> None:
    """The diagonal of some neurons in a weight's own block, and of their biases', in [n].

    Two values of a shared layer give the same, seen from either: from the earlier one it counts twice.
    """
    for index, use in enumerate(layer.weights):
        delta = probed.deltas[use.z]
        if not delta.requires_grad:
            continue
        own = SampleGradients(probed, [Layer(layer.weights[index:])])
        (a,), (delta_rows,) = own.inputs, own.deltas
        twice = a.new_full((a.shape[1],), 2.0)
        twice[: use.positions] = 1
        per_direction = probed.numbers(use.z, len(own.variables))
        if layer.is_shared:
            per_direction += own.patches
        if not layer.plain:
            per_direction += len(a) * use.size
        chunk, z = workspace // per_direction, delta_rows[:, : use.positions]
        for t, part, units in _unit_vectors(z, neurons, chunk):
            seeds = use.spread(units, delta.shape)
            ((s, moved),) = own.along(probed.along(delta, own.variables, seeds))
            for row, p in enumerate(part):
                sums = [] if s is None else [(s[row], a)]
                if moved is not None:
                    sums.append((delta_rows, moved[row]))
                for u, columns in sums:
                    same = torch.einsum("bt,btq->bq", u[:, :, p] * twice, columns)
                    wanted.add_neuron(use, p, a[:, t], same)
                if bias_out is not None and s is not None:
                    bias_out[p] += s[row, :, :, p].sum()


def _by_neuron(layer: Layer, rows: Tensor) -> Tensor:
    """[neurons * width, columns] -> [neurons, width, columns]."""
    return rows.unflatten(0, (-1, layer.width))


def _unit_vectors(rows: Tensor, entries: range, chunk: int) -> Iterator[tuple[int, range, Tensor]]:
    """Those of some entries of [B, T, n] at each position, the same in every sample.

    Yields:
        a position, some of the entries, and their unit vectors, [entries, B, T, n].
    """
    parts = ranges(entries.stop, chunk, entries.start)
    for t, part in itertools.product(range(rows.shape[1]), parts):
        units = rows.new_zeros(len(part), *rows.shape)
        units[:, :, t, part.start : part.stop].diagonal(dim1=0, dim2=2).fill_(1)
        yield t, part, units
