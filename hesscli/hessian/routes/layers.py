"""Layers: a weight and the bias that enters with it, taken together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import Block
from hesscli.hessian.layout import Layout, Part, Piece
from hesscli.hessian.proofs.analysis import Analysis
from hesscli.hessian.proofs.uses import BIAS, CONVOLUTION, LINEAR, Use, values_of
from hesscli.hessian.routes.probes import Probed


@dataclass(frozen=True)
class Layer:
    """What enters at one value z, or at several: a weight, and perhaps its bias, a weight of the constant 1."""

    weights: tuple[Use, ...]  # the uses of the weight, in the order of execution
    bias: Use | None = None  # the first use of the bias, which enters at the same values

    @property
    def weight(self) -> Use:
        """The first use of the weight."""
        return self.weights[0]

    @property
    def uses(self) -> list[Use]:
        """The first of each parameter."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def is_shared(self) -> bool:
        """Whether it enters at several values."""
        return len(self.weights) > 1

    @property
    def zs(self) -> list[int]:
        return [use.z for use in self.weights]

    @cached_property
    def positions(self) -> int:
        """At how many places of one sample the weight is applied, at all values."""
        return sum(use.positions for use in self.weights)

    @property
    def width(self) -> int:
        """Parameters per neuron."""
        return self.weight.m + (self.bias is not None)

    @property
    def size(self) -> int:
        return self.weight.n * self.width

    @property
    def patches(self) -> int:
        """Numbers in the patches of one sample that it makes of its operands; other layers take these as they are."""
        is_convolution = self.weight.kind == CONVOLUTION
        return is_convolution * self.positions * self.weight.apart * self.weight.m

    @property
    def plain(self) -> bool:
        """Whether the weight is applied at one place of each sample."""
        return self.weight.is_layer and self.positions == 1

    def inputs(self, probed: Probed) -> Tensor:
        """What each parameter of a neuron is multiplied by, value after value: [B, T, width]."""
        a = torch.cat([probed.inputs(use) for use in self.weights], -2)
        return a if self.bias is None else torch.nn.functional.pad(a, (0, 1), value=1.0)

    def rows(self, found: Sequence[Tensor | None]) -> Tensor | None:
        """[..., *z.shape] of each value -> [..., B, T, n], value after value; None is zero."""
        pairs = zip(self.weights, found, strict=True)
        return self._joined([None if u is None else use.rows(u) for use, u in pairs])

    def moved(self, tangents: Sequence[Tensor | None], probed: Probed) -> Tensor | None:
        """How the inputs of the weight move where the operand moves at each value: [..., *a.shape] of each value ->
        [..., B, T, m], value after value; None is zero.
        """
        pairs = zip(self.weights, tangents, strict=True)
        return self._joined(
            [None if a is None else use.inputs_of(a, probed.known) for use, a in pairs]
        )

    def _joined(self, parts: Sequence[Tensor | None]) -> Tensor | None:
        """[..., B, T, k] of each value, one after the other along the positions; None is zero."""
        like = next((part for part in parts if part is not None), None)
        if like is None or len(parts) == 1:
            return like
        lead, width = like.shape[:-2], like.shape[-1]
        zeros = (like.new_zeros(*lead, use.positions, width) for use in self.weights)
        return torch.cat([z if x is None else x for x, z in zip(parts, zeros, strict=True)], -2)

    def pieces(self, block: Block) -> list[Piece]:
        """Its rows of a block, neuron by neuron."""
        sections = self.weight.storage.sections
        starts = [block.rows[use.parameter].start for use in self.uses]
        parts = [u.storage.parts(at, sections) for u, at in zip(self.uses, starts, strict=True)]
        return [Piece(self.weight.n // sections, each) for each in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Layers:
    """A block's layers in the order of execution, and its parameters that are no part of one, whose rows come first."""

    block: Block
    every: list[Layer]
    others: dict[str, range]  # the rows of each

    @property
    def firsts(self) -> list[int]:
        """The first row of each layer, and the end of the last."""
        sizes = (layer.size for layer in self.every)
        return list(itertools.accumulate(sizes, initial=sum(map(len, self.others.values()))))

    @property
    def are_alone(self) -> bool:
        """Whether it is one layer, at one value, beside parameters of none: its directions end at the next cut."""
        return len(self.every) == 1 and not self.every[0].is_shared and not self.others

    @property
    def layout(self) -> Layout:
        """The others, whose rows have all columns; then layer by layer, neuron by neuron."""
        starts = (self.block.rows[name].start for name in self.others)
        rows = zip(self.others.values(), starts, strict=True)
        pieces = [Piece(len(mine), (Part(start, 1),)) for mine, start in rows]
        pieces += [piece for layer in self.every for piece in layer.pieces(self.block)]
        return Layout(tuple(pieces))


def layers_of(analysis: Analysis, block: Block) -> Layers:
    """The layers of a block.

    A layer is a weight with fewer directions along z than entries, and the bias that enters with it, at one value or at
    several. A block of one parameter that enters once needs none.
    """
    every = [analysis.all_uses[x] for x in block.parameters if x in analysis.all_uses]
    if not any(len(uses) > 1 and _are_layer(uses) for uses in every):
        apart = analysis.uses_apart(block.parameters)  # else positions stay positions
        every = [(apart[uses[0].parameter],) if len(uses) == 1 else uses for uses in every]
    biases = {values_of(uses): uses[0] for uses in every if uses[0].kind == BIAS}
    layers = [Layer(uses, biases.get(values_of(uses))) for uses in every if _are_layer(uses)]
    layers.sort(key=lambda layer: analysis.tape.maker[layer.weight.z])
    if not layers:
        if len(block.parameters) > 1:
            raise NotApplicable("parameters enter at several places")
        analysis.use(block.parameters[0])
    taken = {use.parameter for layer in layers for use in layer.uses}
    left = [name for name in block.parameters if name not in taken]
    ends = itertools.accumulate((len(block.rows[name]) for name in left), initial=0)
    rows = itertools.starmap(range, itertools.pairwise(ends))
    return Layers(block, layers, dict(zip(left, rows, strict=True)))


def _are_layer(uses: Sequence[Use]) -> bool:
    """Whether they are a weight's, all in one way, with fewer directions along z than entries."""
    first = uses[0]
    alike = all(map(first.enters_as, uses))
    return alike and first.is_layer and sum(use.positions for use in uses) < first.m


def plain_layer(uses: Sequence[Use]) -> Layer | None:
    """What these uses are, if they are a plain layer: a weight, and perhaps its bias."""
    bias = next((use for use in uses if use.kind == BIAS), None)
    weights = tuple(use for use in uses if use is not bias)
    if [use.kind for use in weights] != [LINEAR]:
        return None
    layer = Layer(weights, bias)
    together = all((use.z, use.n) == (layer.weight.z, layer.weight.n) for use in layer.uses)
    return layer if together and layer.plain else None
