"""A weight and the bias that enters with it, taken together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.hessian.blocks import Block
from hesscli.hessian.layout import Piece
from hesscli.hessian.proofs.uses import BIAS, LINEAR, Use
from hesscli.hessian.routes.probes import Probed


@dataclass(frozen=True)
class Layer:
    """The parameters that enter at one value z: a weight, and perhaps its bias, as a weight of the constant 1."""

    weight: Use
    bias: Use | None

    @property
    def uses(self) -> list[Use]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

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
        return self.weight.is_layer and self.weight.positions == 1

    def inputs(self, probed: Probed) -> Tensor:
        """What each parameter of a neuron is multiplied by: [B, T, width]."""
        return torch.cat([probed.columns(use) for use in self.uses], -1)

    def pieces(self, block: Block) -> list[Piece]:
        """Its rows of a block, neuron by neuron."""
        sections = self.weight.sections
        parts = [use.parts(block.rows[use.parameter].start, sections) for use in self.uses]
        return [Piece(self.weight.n // sections, each) for each in zip(*parts, strict=True)]


def plain_layer(uses: Sequence[Use]) -> Layer | None:
    """What these uses are, if they are a plain layer: a weight, and perhaps its bias."""
    weights = [use for use in uses if use.kind == LINEAR]
    biases = [use for use in uses if use.kind == BIAS]
    if len(weights) != 1 or len(biases) > 1 or len(uses) != len(weights) + len(biases):
        return None
    layer = Layer(weights[0], biases[0] if biases else None)
    together = all((bias.z, bias.n) == (layer.z, layer.weight.n) for bias in biases)
    return layer if together and layer.plain else None
