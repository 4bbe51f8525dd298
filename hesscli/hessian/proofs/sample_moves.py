"""What operators that only move, select or repeat numbers do to the sample axis."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from hesscli.hessian.proofs.sample_axis import Context, MayMix, SampleAxis

_REDUCTIONS = (None, "sum", "mean", "amax", "amin")


def reshaped(c: Context) -> SampleAxis | None:
    """Row-major order keeps the samples together: the axis that starts after as many elements has them."""
    axis, old, new = c.only(), c.shape(), c.result
    before = math.prod(old[: axis.axis]) * axis.outer
    count = 1
    for i, length in enumerate(new):
        if not before * length:  # no number is of any sample
            break
        outer = before // count
        if before % count == 0 and length % (outer * c.samples) == 0:
            return SampleAxis(i, outer, length // (outer * c.samples))
        count *= length
    raise MayMix(c.call)


def transposed(c: Context) -> SampleAxis | None:
    axis, rank = c.only(), len(c.shape())
    if c.call.name == "permute":
        order = [d % rank for d in c.named("dims")]
        return replace(axis, axis=order.index(axis.axis))
    a, b = (0, -1) if c.call.name == "t" else (c.named("dim0"), c.named("dim1"))
    swapped = {a % rank: b % rank, b % rank: a % rank}
    return replace(axis, axis=swapped.get(axis.axis, axis.axis))


def expanded(c: Context) -> SampleAxis | None:
    axis = c.only()
    return replace(axis, axis=axis.axis + len(c.result) - len(c.shape()))


def unsqueezed(c: Context) -> SampleAxis | None:
    axis = c.only()
    at = c.named("dim") % (len(c.shape()) + 1)
    return replace(axis, axis=axis.axis + (at <= axis.axis))


def squeezed(c: Context) -> SampleAxis | None:
    axis, shape = c.only(), c.shape()
    return c.reduced(axis, {d for d in c.dims(c.named("dim"), len(shape)) if shape[d] == 1})


def selected(c: Context) -> SampleAxis | None:
    """A part, without the axes along which it is taken; a diagonal has one at the end instead."""
    return c.reduced(c.only(), c.along)


def diagonal_embedded(c: Context) -> SampleAxis | None:
    """Two axes made of the last."""
    axis, rank = c.only(), len(c.result)
    dims = c.dims([c.named("dim1"), c.named("dim2")], rank)
    c.require(axis.axis != rank - 2)
    others = [d for d in range(rank) if d not in dims]
    return replace(axis, axis=others[axis.axis])


def along_another(c: Context) -> SampleAxis | None:
    """Operators that work along one axis and leave the others alone; `unfold` puts its windows' own axis last."""
    axis = c.only()
    c.require(axis.axis not in c.along)
    return axis


def sliced(c: Context) -> SampleAxis | None:
    """Along another axis, or all of it: `x[:, 0]`, traced, takes every sample first."""
    return c.only() if list(c.result) == list(c.shape()) else along_another(c)


def joined(c: Context) -> SampleAxis | None:
    """Parts that do not depend on the samples, like a class token, may be among them."""
    axis = c.one(c.axes[ref.value] for ref in c.named("tensors"))
    rank = len(c.result)  # a part may be an empty vector, of whatever rank the others are
    at = c.named("dim") % rank
    if c.call.name == "stack":
        return replace(axis, axis=axis.axis + (at <= axis.axis))
    c.require(at != axis.axis)
    return axis


def by_position(c: Context) -> SampleAxis | None:
    """`gather`, `scatter` and so on: along one axis by an index; along the others each number stays in its place."""
    axis = c.one(c.axes[n] for n in c.call.reads)
    ranks = {len(c.shapes[n]) for n in c.call.reads}
    c.require(len(ranks) == 1 and ranks != {0} and c.named("reduce") in _REDUCTIONS)
    c.require(c.named("dim") % ranks.pop() != axis.axis)
    return axis


class Indices:
    """Where the axes of a tensor are in what its second argument, a list of indices, takes of it."""

    def __init__(self, c: Context) -> None:
        indices = c.named("indices")
        self.at = [place for place, index in enumerate(indices) if index is not None]
        self.rank = max(len(c.shapes[indices[place].value]) for place in self.at)
        self.adjacent = self.at[-1] - self.at[0] + 1 == len(self.at)
        self.first = self.at[0] if self.adjacent else 0  # where the axes of the indices go

    def moved(self, axis: int) -> int:
        """The place of an axis that no index is for."""
        before = sum(place < axis for place in self.at)
        behind = self.first < axis or not self.adjacent
        return axis - before + (self.rank if behind else 0)


def indexed(c: Context) -> SampleAxis | None:
    """`x[:, i, j]` by constant indices, or a constant by indices that depend on the samples: a table.

    Or each sample's own numbers: `mask[arange(B)[:, None], j]`, where j may depend on the samples too; or `x[mask]`.
    """
    indices, places = c.named("indices"), Indices(c)
    if places.at == [0] and (masked := _masked(c, indices[0].value)):
        return masked
    # A mask may be of several axes.
    c.require(len(c.result) == len(c.shape()) - len(places.at) + places.rank)
    shapes = {place: c.shapes[indices[place].value] for place in places.at}
    taken = {
        replace(axis, axis=places.first + axis.axis + places.rank - len(shape))
        for place, shape in shapes.items()
        if (axis := c.axes[indices[place].value])
    }
    mine = c.axis(0)
    if mine is None and len(taken) == 1:
        return taken.pop()
    if mine is not None and mine.axis in places.at:
        own = _counted(c, mine, indices[mine.axis].value)
        result = SampleAxis(places.first + own + places.rank - len(shapes[mine.axis]))
        c.require(not taken - {result})
        return result
    if mine is None or taken:
        raise MayMix(c.call)
    return replace(mine, axis=places.moved(mine.axis))


def _masked(c: Context, mask: int) -> SampleAxis | None:
    """One sample's after the other's, where a mask takes as many numbers of each."""
    if (c.axis(0), c.axes[mask]) != (SampleAxis(0), SampleAxis(0)):
        return None
    taken = c.tape.recorded(mask)
    if taken.dtype is not torch.bool:
        return None
    counts = taken.flatten(1).sum(1) if taken.dim() > 1 else taken.long()
    return SampleAxis(0, inner=int(counts[0])) if bool((counts == counts[0]).all()) else None


def _counted(c: Context, mine: SampleAxis, index: int) -> int:
    """The axis along which an index counts the samples, from the first to the last."""
    if c.axes[index] is None and mine == SampleAxis(mine.axis):
        numbers = c.tape.recorded(index)
        for axis, length in enumerate(numbers.shape):
            moved = numbers.movedim(axis, -1)
            count = torch.arange(length, device=numbers.device)
            if length == c.samples and bool((moved == count).all()):
                return axis
    raise MayMix(c.call)


def padded(c: Context) -> SampleAxis | None:
    axis, rank = c.only(), len(c.shape())
    pads = c.named("pad")
    from_end = rank - 1 - axis.axis
    c.require(not any(pads[2 * from_end : 2 * from_end + 2]))
    return axis
