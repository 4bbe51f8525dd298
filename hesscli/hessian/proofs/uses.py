"""A place where a parameter enters a tape, in an affine way.

At such a use, z = A(a) theta with some activation a. Where it is the only one, everything after z sees the parameter
through z alone. Then, with delta = dL/dz and S = d^2 L / dz^2 of each sample, its own block of the Hessian is the sum
over samples of A^T S A.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.hessian.proofs.patches import convolved
from hesscli.hessian.proofs.sample_axis import SampleAxis
from hesscli.hessian.proofs.storage import Storage
from hesscli.hessian.recording.tape import Call

LINEAR, CONVOLUTION, SCALE, BIAS = "linear", "convolution", "scale", "bias"

_OF_CONVOLUTION = ("stride", "padding", "dilation", "transposed", "output_padding")


def values_of(uses: Iterable[Use]) -> tuple[int, ...]:
    """Where some uses enter, each value once."""
    return tuple(dict.fromkeys(use.z for use in uses))


@dataclass(frozen=True)
class Use:
    """An affine use of a parameter."""

    parameter: str  # its name
    value: int  # the number of what enters
    # The views, copies, and products with constants that make it of the parameter.
    moves: tuple[Call, ...]
    kind: str  # linear (z = a W^T), convolution, scale (z = a * w) or bias (z = ... + b)
    call: Call  # the operator
    z: int  # the number of the value that it gives; of rows looked up for all samples alike, of the sum they go into
    a: int | None  # the number of the other operand; None for a bias
    axis: SampleAxis  # the sample axis of z
    channels: tuple[int, ...]  # the axes of z that the parameter's outputs lie along
    rank: int  # the number of axes of z
    positions: int  # at how many places of one sample the parameter is applied
    storage: Storage  # how its entries lie in it
    apart: int = 1  # at how many further places, each of which counts as a sample

    @property
    def n(self) -> int:
        """Outputs per position."""
        return self.storage.n

    @property
    def m(self) -> int:
        """Inputs per output (fan-in); 1 for scale and bias."""
        return self.storage.m

    @property
    def size(self) -> int:
        return self.storage.size

    def enters_as(self, other: Use) -> bool:
        """Whether a parameter that has both enters in the same way."""
        return (self.kind, self.storage) == (other.kind, other.storage)

    def rows(self, u: Tensor) -> Tensor:
        """[..., *z.shape] -> [..., samples, positions, n]."""
        lead = u.dim() - self.rank
        shape = u.shape[lead:]
        samples = self.axis.samples(shape)
        u = u.reshape(*u.shape[:lead], *self._split(shape, samples))
        u = u.permute(*range(lead), *(lead + i for i in self._order))
        return u.reshape(*u.shape[:lead], samples * self.apart, self.positions, -1)

    def spread(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `rows`: [..., samples, positions, n] -> [..., *shape], the shape of z."""
        lead, order = u.dim() - 3, self._order
        split = self._split(shape, u.shape[lead] // self.apart)
        u = u.reshape(*u.shape[:lead], *(split[i] for i in order))
        back = sorted(range(len(order)), key=order.__getitem__)
        u = u.permute(*range(lead), *(lead + i for i in back))
        return u.reshape(*u.shape[:lead], *shape)

    def _split(self, shape: Sequence[int], samples: int) -> list[int]:
        """The shape of z with the sample axis split into (outer, samples, inner)."""
        at, axis = self.axis.axis, self.axis
        return [*shape[:at], axis.outer, samples, axis.inner, *shape[at + 1 :]]

    @property
    def _order(self) -> list[int]:
        """The axes of that in canonical order: samples, positions, channels."""
        first = self.axis.axis + 1
        last = [c + 2 * (c >= first) for c in self.channels]
        others = (i for i in range(self.rank + 2) if i != first and i not in last)
        return [first, *others, *last]

    def inputs(self, known: Mapping[int, Tensor]) -> Tensor:
        """The inputs of the affine map: [samples, positions, groups m]; for a bias all ones."""
        if self.a is None:
            z = known[self.z]
            return z.new_ones(self.axis.samples(z.shape) * self.apart, self.positions, 1)
        return self.inputs_of(known[self.a], known)

    def inputs_of(self, a: Tensor, known: Mapping[int, Tensor]) -> Tensor:
        """The same of an operand, [..., *a.shape] -> [..., samples, positions, groups m]; of tokens, of those alone."""
        if self.kind == SCALE:
            return self.rows(a.expand(known[self.z].shape))
        if self.kind == CONVOLUTION:
            kernel, lead = known[self.value].shape[2:], a.shape[: a.dim() - self.rank]
            images = a.reshape(-1, *a.shape[len(lead) + 1 :])
            patches = convolved(images, kernel, *map(self.call.named, _OF_CONVOLUTION))
            split = (*lead, self.axis.outer, -1, self.axis.inner, *patches.shape[1:])
            shape = (*lead, -1, self.positions, self.storage.groups * self.m)
            return patches.reshape(split).transpose(-5, -4).reshape(shape)
        if self.call.name == "embedding":  # a product with the tokens' unit vectors
            a = torch.nn.functional.one_hot(a, self.m).to(known[self.z].dtype)
            padding = self.call.named("padding_idx")
            if padding >= 0:  # to PyTorch a constant
                a[..., padding] = 0
            a = a.expand(*known[self.z].shape[:-1], self.m)
        rows, order = self.rows(a), self.storage.order
        if not order:
            return rows
        return rows.unflatten(-1, (self.storage.groups, -1))[..., order].flatten(-2)

    def pull(self, u: Tensor, columns: Tensor) -> Tensor:
        """A^T u of each sample, the sum over positions: [B, k, T, n] and columns [B, T, groups m] -> [B, k, size]."""
        if self.kind == BIAS:
            return u.sum(2)
        if self.kind == SCALE:
            return (u * columns.unsqueeze(1)).sum(2)
        # All k in one product: a broadcast one would copy the columns for each.
        groups = self.storage.groups
        rows = u.unflatten(3, (groups, -1)).permute(0, 3, 1, 4, 2)  # [B, groups, k, n / groups, T]
        inputs = columns.unflatten(2, (groups, -1)).transpose(1, 2)  # [B, groups, T, m]
        product = (rows.flatten(2, 3) @ inputs).view(*rows.shape[:-1], self.m)
        return self.storage.stored(product.transpose(1, 2).flatten(2, 3))  # of [B, k, n, m]

    @property
    def moving(self) -> int | None:
        """The operand a where it may depend on other parameters: tokens do not."""
        return None if self.call.name == "embedding" else self.a

    @property
    def directions(self) -> int:
        """How many directions of z the parameter's own block takes."""
        return self.n * min(self.positions, self.m) if self.is_layer else self.size

    @property
    def is_layer(self) -> bool:
        """Whether it is a weight whose outputs all have the same inputs."""
        return self.kind in (LINEAR, CONVOLUTION) and self.storage.groups == 1
