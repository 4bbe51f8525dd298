"""What operators that replace a part of a tensor do to the sample axis.

The tensor and the part may both depend on the samples, along the same axis, or only one of them: rows that are filled
one by one, for example, begin as zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from hesscli.hessian.proofs.sample_axis import Context, MayMix, SampleAxis
from hesscli.hessian.proofs.sample_moves import Indices


def into_slice(c: Context) -> SampleAxis | None:
    covers = list(c.shape(0)) == list(c.shape(1))
    return _replaced(c, 1, lambda axis: None if axis in c.along and not covers else axis)


def into_selection(c: Context) -> SampleAxis | None:
    gone = c.along
    return _replaced(
        c, 1, lambda axis: None if axis in gone else axis - sum(d < axis for d in gone)
    )


def by_index(c: Context) -> SampleAxis | None:
    """`index_add`, `index_copy` and `index_fill`: along one axis by an index, which no sample has of its own."""
    c.require(c.axis(2) is None)
    if c.call.name == "index_fill":
        c.require(c.axis(3) is None and c.only().axis not in c.along)
        return c.only()
    return _replaced(c, 3, lambda axis: None if axis in c.along else axis)


def put(c: Context) -> SampleAxis | None:
    """`x[:, i, j] = values`, by constant indices."""
    indices = Indices(c)
    numbers = [index.value for index in c.named("indices") if index is not None]
    for number in numbers:
        c.require(c.axes[number] is None)
        # A mask may be of several axes.
        c.require(len(c.shapes[number]) < 2 or c.tape.recorded(number).dtype is not torch.bool)
    shift = len(c.shape()) - len(numbers) + indices.rank - len(c.shape(2))
    return _replaced(c, 2, lambda axis: None if axis in indices.at else indices.moved(axis) - shift)


def _replaced(c: Context, part: int, place: Callable[[int], int | None]) -> SampleAxis | None:
    """The axis of a tensor of which a part is replaced.

    Args:
        c: the call.
        part: which of its arguments the part is; the first is the tensor.
        place: an axis of the tensor -> the same axis of the part, or None if the part has only some of its places.
    """
    mine, given = c.axis(0), c.axis(part)
    if mine is None and given is not None:
        rank = len(c.shape())
        mine = next(
            (replace(given, axis=axis) for axis in range(rank) if place(axis) == given.axis), None
        )
    if mine is None:
        raise MayMix(c.call)
    there = place(mine.axis)
    if there is None or given not in (None, replace(mine, axis=there)):
        raise MayMix(c.call)
    return mine
