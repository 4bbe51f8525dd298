"""A weight and the bias that enters with it, taken together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hesscli.hessian.blocks import Block
from hesscli.hessian.layout import Piece
from hesscli.hessian.proofs.uses import BIAS, LINEAR, Use
from hesscli.hessian.routes.probes import Probed


@dataclass(frozen=True)
class Layer:
    """The parameters that enter at one value z: a weight, and perhaps its bias, as a weight of the constant 1.

    Attributes:
        weight: the use of the weight.
        bias: that of the bias.
        again: the same parameters at further values, in the order of execution.
    """

    weight: Use
    bias: Use | None
    again: tuple[Layer, ...] = ()

    @classmethod
    def shared(cls, places: Sequence[Layer]) -> Layer:
        """That of the same parameters at these values."""
        return replace(places[0], again=tuple(places[1:]))

    @property
    def uses(self) -> list[Use]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @cached_property
    def places(self) -> list[Layer]:
        """Itself at each of its values."""
        return [replace(self, again=()), *self.again]

    @cached_property
    def positions(self) -> int:
        """At how many places of one sample the weight is applied, at all its values."""
        return sum(place.weight.positions for place in self.places)

    @property
    def z(self) -> int:
        return self.weight.z

    @property
    def width(self) -> int:
        """Parameters per neuron."""
        return self.weight.m + (self.bias is not None)

    @property
    def size(self) -> int:
        return self.weight.n * self.width

    @property
    def plain(self) -> bool:
        """Whether the weight is applied at one place of each sample."""
        return self.weight.is_layer and self.positions == 1

    def inputs(self, probed: Probed) -> Tensor:
        """What each parameter of a neuron is multiplied by, value after value: [B, T, width]."""
        places = [torch.cat([probed.columns(use) for use in x.uses], -1) for x in self.places]
        return _joined(places)

    def rows(self, found: Sequence[Tensor | None]) -> Tensor | None:
        """[..., *z.shape] of each value -> [..., B, T, n], value after value; None is zero."""
        uses = [place.weight for place in self.places]
        parts = [None if u is None else x.rows(u) for x, u in zip(uses, found, strict=True)]
        like = next((x for x in parts if x is not None), None)
        if like is None:
            return None
        shapes = ((*like.shape[:-2], use.positions, use.n) for use in uses)
        pairs = zip(parts, shapes, strict=True)
        return _joined([like.new_zeros(s) if x is None else x for x, s in pairs])

    def moved(self, tangents: Sequence[Tensor | None], probed: Probed) -> Tensor:
        """How the inputs of the weight move, value after value: [B, T, m].

        Args:
            tangents: how the operand moves at each value; None is zero.
            probed: the pass.
        """
        parts = []
        for use, tangent in zip((x.weight for x in self.places), tangents, strict=True):
            if tangent is None or use.a is None:
                parts.append(torch.zeros_like(probed.columns(use)))
            else:
                parts.append(use.columns({**probed.known, use.a: tangent}))
        return _joined(parts)

    def pieces(self, block: Block) -> list[Piece]:
        """Its rows of a block, neuron by neuron."""
        sections = self.weight.storage.sections
        starts = [block.rows[use.parameter].start for use in self.uses]
        parts = [u.storage.parts(at, sections) for u, at in zip(self.uses, starts, strict=True)]
        return [Piece(self.weight.n // sections, each) for each in zip(*parts, strict=True)]


def _joined(values: Sequence[Tensor]) -> Tensor:
    """[..., T, n] each, one after the other along the positions."""
    return values[0] if len(values) == 1 else torch.cat(list(values), -2)


def plain_layer(uses: Sequence[Use]) -> Layer | None:
    """What these uses are, if they are a plain layer: a weight, and perhaps its bias."""
    weights = [use for use in uses if use.kind == LINEAR]
    biases = [use for use in uses if use.kind == BIAS]
    if len(weights) != 1 or len(biases) > 1 or len(uses) != len(weights) + len(biases):
        return None
    layer = Layer(weights[0], biases[0] if biases else None)
    together = all((bias.z, bias.n) == (layer.z, layer.weight.n) for bias in biases)
    return layer if together and layer.plain else None
