"""Each sample's gradient of some layers, and how it moves as a pre-activation does.

In one sample, a layer's gradient is g[i, j] = sum over positions of delta[i] a[j]. As some z moves, both do, and

    g'[i, j] = sum over positions of delta'[i] a[j] + delta[i] a'[j].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from hesscli.hessian.chunk_sizes import chunk_sizes, grouped, ranges
from hesscli.hessian.routes.kronecker import FEWEST
from hesscli.hessian.routes.layers import Layer
from hesscli.hessian.routes.probes import Probed
from hesscli.hessian.routes.sums import add_product
from hesscli.hessian.workers import side_by_side, workers

_COLUMNS = 512  # of gradients, at least, for as many samples as fit beside

Motion = list[tuple[Tensor | None, Tensor | None]]
"""Of each layer: delta' [directions, B, T, n], and a' [directions, B, T, m]; None is zero."""


class SampleGradients:
    """Those of layers, one after the other, neuron by neuron; positions of a shared one are those at all its values.

    Args:
        probed: a pass with probes at every value of every layer, and duals at the inputs that move; differentiated.
        layers: in the order of execution.
        skipped: how many neurons of the first layer have no columns.
    """

    def __init__(self, probed: Probed, layers: Sequence[Layer], skipped: int = 0) -> None:
        self.probed, self.layers, self.skipped = probed, layers, skipped
        uses = [use for layer in layers for use in layer.weights]
        duals = [probed.duals[use.moving] for use in uses if use.moving in probed.duals]
        self.probes = [probed.probes[use.z] for use in uses]  # at every value of every layer
        self.variables = [*self.probes, *duals]  # what a direction's derivatives are asked for
        self.inputs = [layer.inputs(probed) for layer in layers]  # a of each, [B, T, width]
        self.deltas = [  # of each layer, [B, T, n]
            torch.cat([use.rows(probed.deltas[use.z].detach()) for use in layer.weights], -2)
            for layer in layers
        ]
        self._buffers: list[Tensor] = []  # one of each worker

    @property
    def patches(self) -> int:
        """Numbers in all patches of moved operands, along one direction."""
        return self.probed.samples * sum(layer.patches for layer in self.layers)

    @torch.no_grad()
    def along(self, found: Sequence[Tensor | None]) -> Motion:
        """How they move along directions, by the derivatives of the variables, or of the probes alone."""
        parts = iter(found)
        deltas = [layer.rows([next(parts) for _ in layer.zs]) for layer in self.layers]
        duals = self.probed.duals
        tangents = [
            [next(parts, None) if use.moving in duals else None for use in layer.weights]
            for layer in self.layers
        ]
        moved = [x.moved(mine, self.probed) for x, mine in zip(self.layers, tangents, strict=True)]
        return list(zip(deltas, moved, strict=True))

    @torch.no_grad()
    def add(self, out: Tensor, left: Tensor, motion: Motion) -> None:
        """out[r, i, :] += sum_b left[b, i] g'_b, for every direction r: [directions, width, columns] and [B, width].

        The gradients of some samples, by some columns, are made and multiplied at a time, in the cache.
        """
        threads = workers(out.device, len(out))
        while len(self._buffers) < threads:
            largest = max(size for _, size in self._tiles)
            self._buffers.append(out.new_empty(len(self._samples[0]) * largest))

        def add(worker: int, rows: Iterator[int]) -> None:
            for row in rows:
                start = 0
                for tile, size in self._tiles:
                    made = self._buffers[worker][: turned.shape[1] * size].view(-1, size)
                    self._make(made, tile, part, motion, row)
                    add_product(out[row, :, start : start + size], turned, made)
                    start += size

        for samples in self._samples:
            part = slice(samples.start, samples.stop)
            turned = left[part].T.contiguous()
            side_by_side(range(len(out)), threads, add)

    @cached_property
    def _most(self) -> int:
        """Numbers made at a time."""
        return chunk_sizes(self.probed.output.device).gradients

    @cached_property
    def _samples(self) -> list[range]:
        widest = max(_COLUMNS, *(layer.width for layer in self.layers))
        return ranges(len(self.inputs[0]), max(FEWEST, self._most // widest))

    @cached_property
    def _tiles(self) -> list[tuple[list[tuple[int, range]], int]]:
        """Neurons of layers, by the layers' numbers, and how many columns they are."""
        columns = self._most // len(self._samples[0])
        neurons = [
            (index, each)
            for index, layer in enumerate(self.layers)
            for each in ranges(layer.weight.n, columns // layer.width, 0 if index else self.skipped)
        ]
        tiles = grouped(neurons, self._columns, columns)
        return [(tile, sum(map(self._columns, tile))) for tile in tiles]

    def _columns(self, neurons: tuple[int, range]) -> int:
        return len(neurons[1]) * self.layers[neurons[0]].width

    def _make(
        self, out: Tensor, tile: Sequence[tuple[int, range]], part: slice, motion: Motion, row: int
    ) -> None:
        """g' of some samples along one direction, by these neurons: [samples, columns]."""
        column = 0
        for index, neurons in tile:
            layer, mine = self.layers[index], slice(neurons.start, neurons.stop)
            (u, moved), delta, a = motion[index], self.deltas[index], self.inputs[index]
            size = self._columns((index, neurons))
            target = out[:, column : column + size].unflatten(1, (-1, layer.width))
            column += size
            if u is None:
                target.zero_()
            else:
                _multiply(target, u[row, part, :, mine], a[part], beta=0)
            if moved is not None:
                weights = target[..., : layer.weight.m]
                _multiply(weights, delta[part, :, mine], moved[row, part], beta=1)


def _multiply(target: Tensor, left: Tensor, right: Tensor, beta: int) -> None:
    """target <- beta target + left^T right, [B, n, m], for left [B, T, n] and right [B, T, m]."""
    left = left.transpose(1, 2)
    if left.shape[2] > 1:
        torch.baddbmm(target, left, right, beta=beta, out=target)
    elif beta:
        target.addcmul_(left, right)
    else:
        torch.mul(left, right, out=target)
