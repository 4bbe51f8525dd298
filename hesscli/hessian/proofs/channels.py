"""Tensors by site, a sample or one of its positions: the numbers of each that a linear layer takes at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.hessian.proofs.sample_rules import RESHAPES
from hesscli.hessian.recording.tape import Call

_SAME_ORDER = RESHAPES | {"squeeze", "unsqueeze"}
_PERMUTATIONS = frozenset("t transpose permute".split())
MOVES = _SAME_ORDER | _PERMUTATIONS


@dataclass(frozen=True)
class Channels:
    """Where the numbers of one site lie in a tensor: it is [..., n, inner] when its other axes are taken together."""

    n: int
    inner: int = 1

    @classmethod
    def of(cls, shape: Sequence[int], axes: Sequence[int]) -> Channels | None:
        """Those along some axes; None where others lie between them, or there are none."""
        if not axes or sorted(axes) != [*range(min(axes), max(axes) + 1)]:
            return None
        first, last = min(axes), max(axes)
        return cls(math.prod(shape[first : last + 1]), math.prod(shape[last + 1 :]))

    def by_site(self, x: Tensor) -> Tensor:
        """The tensor as [sites, n]."""
        return x.reshape(-1, self.n, self.inner).transpose(1, 2).reshape(-1, self.n)

    def spread(self, numbers: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `by_site`: [..., sites, n] -> [..., *shape]."""
        lead = numbers.shape[:-2]
        apart = numbers.reshape(*lead, -1, self.inner, self.n)
        return apart.transpose(-1, -2).reshape(*lead, *shape)

    def are_alike(self, shape: Sequence[int], other: Sequence[int]) -> bool:
        """Whether another tensor has the same number for all of a site, where it is broadcast to this shape."""
        lengths, axes = [*[1] * (len(shape) - len(other)), *other], self._axes(shape)
        return bool(axes) and all(lengths[axis] == 1 for axis in axes)

    def before(
        self, call: Call, value: int, shapes: Mapping[int, Sequence[int]]
    ) -> Channels | None:
        """Those of a value of which a call makes a tensor with these, of the same sites in the same order.

        None where it puts sites in another order, or tears them apart. The call is one of `MOVES`, or elementwise.
        """
        if call.name not in _PERMUTATIONS:
            return self  # the numbers lie as they lay
        (made,), shape = call.makes, shapes[value]
        marked = torch.empty([*range(1, len(shape) + 1)], device="meta")
        order = [length - 1 for length in call.operator(marked, *call.arguments[1:]).shape]
        mine = [order[axis] for axis in self._axes(shapes[made])]
        others = [axis for axis in order if axis not in mine and shape[axis] > 1]
        if mine != sorted(mine) or others != sorted(others):
            return None
        found = Channels.of(shape, [*range(mine[0], mine[-1] + 1)]) if mine else None
        return found if found is not None and found.n == self.n else None

    def _axes(self, shape: Sequence[int]) -> list[int]:
        """The axes longer than one that a site's numbers lie along; none where it is a part of an axis."""
        behind = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        inside = self.inner, self.inner * self.n
        axes = [i for i, b in enumerate(behind) if shape[i] > 1 and inside[0] <= b < inside[1]]
        return axes if math.prod(shape[axis] for axis in axes) == self.n else []
