"""The order in which a route computes the rows of a block, and the way from there to the file's order.

A route that gives the upper triangle band by band needs each band's columns to be those of the bands that follow.
Layers give theirs neuron by neuron, weights and bias together, in the order of execution; the file has parameter
after parameter. A layout is the permutation between the two, in slices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

Span = tuple[int, int]  # first and last + 1


@dataclass(frozen=True)
class Part:
    """Some entries of every group, in the block: the first run of every group, then the second of every group ..."""

    place: int  # of the first one
    length: int  # entries of each group
    # How many runs those are in: one, if they lie together; as many as inputs, for a weight stored as [inputs, outputs,
    # ...] whose groups are its outputs.
    runs: int = 1


@dataclass(frozen=True)
class Placed:
    """Rows of a layout, whole groups of one piece, and where one part of theirs lies in the block."""

    rows: slice  # counted from the first row that was asked for
    groups: int  # how many they are
    width: int  # rows of a group
    entries: slice  # which of each group are meant
    place: int  # of the first one in the block
    runs: int  # how many runs the entries of a group are in there
    step: int  # places from run to run

    @property
    def length(self) -> int:
        """Entries of each group."""
        return self.entries.stop - self.entries.start

    @property
    def size(self) -> int:
        """Entries of all groups."""
        return self.groups * self.length

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, runs of each, entries of a run."""
        return self.groups, self.runs, self.length // self.runs

    def of_rows(self, values: Tensor) -> Tensor:
        """A view of these entries: [..., rows] in the layout's order -> [..., *shape]."""
        groups = values[..., self.rows].unflatten(-1, (self.groups, self.width))
        return groups[..., self.entries].unflatten(-1, self.shape[1:])

    def of_block(self, values: Tensor) -> Tensor:
        """A view of these entries: [..., size] in the block's order -> [..., *shape]."""
        *lead, last = values.stride()
        strides = (*lead, self.shape[2] * last, self.step * last, last)
        start = values.storage_offset() + self.place * last
        return values.as_strided((*values.shape[:-1], *self.shape), strides, start)

    def stretches(self, most: int) -> Iterator[Placed]:
        """What of it lies together in the block, of at most so many entries, but never less than a group's run."""
        length = self.shape[2]
        step = max(1, most // length)
        for run, first in itertools.product(range(self.runs), range(0, self.groups, step)):
            count = min(step, self.groups - first)
            begin, entry = self.rows.start + first * self.width, self.entries.start + run * length
            yield replace(
                self,
                rows=slice(begin, begin + count * self.width),
                groups=count,
                entries=slice(entry, entry + length),
                place=self.place + run * self.step + first * length,
                runs=1,
            )


@dataclass(frozen=True)
class Piece:
    """Rows that belong together: `groups` times the parts."""

    groups: int
    parts: tuple[Part, ...]

    @property
    def width(self) -> int:
        return sum(part.length for part in self.parts)

    @property
    def size(self) -> int:
        return self.groups * self.width

    def lies_at(self, place: int) -> bool:
        """Whether its rows lie in the block as they are computed, from this place on."""
        if self.groups > 1:  # several parts, or runs, take turns
            return self.parts == (Part(place, self.parts[0].length),)
        places = itertools.accumulate((part.length for part in self.parts), initial=place)
        return all(part.place == at for part, at in zip(self.parts, places, strict=False))


@dataclass(frozen=True)
class Layout:
    """A block's rows in the order of computation: piece after piece."""

    pieces: tuple[Piece, ...]

    @classmethod
    def plain(cls, size: int) -> Layout:
        """The file's own order."""
        return cls((Piece(size, (Part(0, 1),)),))

    @cached_property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def is_plain(self) -> bool:
        """Whether the rows already lie as in the block."""
        return all(piece.lies_at(at) for at, piece in self.starts())

    def starts(self) -> Iterator[tuple[int, Piece]]:
        """Every piece with its first row."""
        at = 0
        for piece in self.pieces:
            yield at, piece
            at += piece.size

    def bands(self, most: int) -> list[Span]:
        """Bands of rows of about `most` entries (rows times the columns right of the diagonal), never through a group.

        Whole rows are written, so the last bands have no more than twice the rows of the first: little is left to
        write when all is computed.
        """
        found: list[Span] = []
        for at, piece in self.starts():
            group = 0
            while group < piece.groups:
                start = at + group * piece.width
                rows = most // max(1, self.size - start, self.size // 2)
                group = min(piece.groups, group + max(1, rows // piece.width))
                found.append((start, at + group * piece.width))
        return found

    def placed(self, start: int, stop: int) -> Iterator[Placed]:
        """Where the rows from `start` to `stop`, at edges of groups, lie in the block."""
        for at, piece in self.starts():
            first, last = max(start, at), min(stop, at + piece.size)
            if first >= last:
                continue
            before, groups = (first - at) // piece.width, (last - first) // piece.width
            rows, within = slice(first - start, last - start), 0
            for part in piece.parts:
                length = part.length // part.runs
                yield Placed(
                    rows=rows,
                    groups=groups,
                    width=piece.width,
                    entries=slice(within, within + part.length),
                    place=part.place + before * length,
                    runs=part.runs,
                    step=piece.groups * length,
                )
                within += part.length

    def to_block(self, values: Tensor, out: Tensor, start: int, stop: int) -> None:
        """Copies the columns from `start` to `stop` to their places: [..., stop - start] -> [..., size]."""
        for placed in self.placed(start, stop):
            placed.of_block(out).copy_(placed.of_rows(values))

    def ordered(self, matrix: Tensor) -> Tensor:
        """A symmetric matrix [size, size], from the layout's order to the block's."""
        if self.is_plain:
            return matrix
        columns, both = torch.empty_like(matrix), torch.empty_like(matrix)
        self.to_block(matrix, columns, 0, self.size)
        self.to_block(columns.T, both, 0, self.size)  # symmetric: its columns are its rows
        return both

    def from_block(self, values: Tensor) -> Tensor:
        """The inverse: [..., size] in the block's order -> [..., size] in the layout's."""
        out = values.new_empty(values.shape)
        for placed in self.placed(0, self.size):
            placed.of_rows(out).copy_(placed.of_block(values))
        return out

    def places(self, start: int, stop: int) -> Tensor:
        """The place in the block of each row from `start` to `stop`."""
        found = torch.empty(stop - start, dtype=torch.long)
        every = torch.arange(self.size)
        for placed in self.placed(start, stop):
            placed.of_rows(found).copy_(placed.of_block(every))
        return found
