"""The order in which a route computes the rows of a block, and the way from there to the file's order.

A route that gives the upper triangle band by band needs each band's columns to be those of the bands that follow.
Layers give theirs neuron by neuron, weights and bias together, in the order of execution; the file has parameter
after parameter. A layout is the permutation between the two, in slices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Span = tuple[int, int]  # first and last + 1
Placed = tuple[slice, int, int, slice, int]  # see `Layout.placed`


@dataclass(frozen=True)
class Piece:
    """Rows that belong together: `groups` times the parts, each (place in the block, entries per group)."""

    groups: int
    parts: tuple[Span, ...]

    @property
    def width(self) -> int:
        return sum(length for _, length in self.parts)

    @property
    def size(self) -> int:
        return self.groups * self.width


@dataclass(frozen=True)
class Layout:
    """A block's rows in the order of computation: piece after piece."""

    pieces: tuple[Piece, ...]

    @classmethod
    def plain(cls, size: int) -> Layout:
        """The file's own order."""
        return cls((Piece(size, ((0, 1),)),))

    @cached_property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def is_plain(self) -> bool:
        """Whether the rows already lie as in the block."""
        return all(len(piece.parts) == 1 and piece.parts[0][0] == at for at, piece in self.starts())

    def starts(self) -> Iterator[tuple[int, Piece]]:
        """Every piece with its first row."""
        at = 0
        for piece in self.pieces:
            yield at, piece
            at += piece.size

    def cut(self, most: int) -> list[Span]:
        """Bands of about `most` entries (rows times the columns right of the diagonal), never through a group.

        Whole rows are written, so the last bands have no more than twice the rows of the first: little is left to
        write when all is computed.
        """
        bands: list[Span] = []
        for at, piece in self.starts():
            group = 0
            while group < piece.groups:
                start = at + group * piece.width
                rows = most // max(1, self.size - start, self.size // 2)
                group = min(piece.groups, group + max(1, rows // piece.width))
                bands.append((start, at + group * piece.width))
        return bands

    def placed(self, start: int, stop: int) -> Iterator[Placed]:
        """Where the rows from `start` to `stop`, at edges of groups, lie in the block.

        Yields:
            the rows, counted from `start`; how many groups they are; how wide a group is; which entries of
            each group are meant; and their place in the block, of `groups * entries` rows.
        """
        for at, piece in self.starts():
            first, last = max(start, at), min(stop, at + piece.size)
            if first >= last:
                continue
            before, groups = (first - at) // piece.width, (last - first) // piece.width
            within = 0
            for place, length in piece.parts:
                rows = slice(first - start, last - start)
                entries = slice(within, within + length)
                yield rows, groups, piece.width, entries, place + before * length
                within += length

    def to_block(self, values: Tensor, out: Tensor, start: int, stop: int) -> None:
        """Copies the columns from `start` to `stop` to their places: [..., stop - start] -> [..., size]."""
        for rows, groups, width, entries, place in self.placed(start, stop):
            length = entries.stop - entries.start
            source = values[..., rows].unflatten(-1, (groups, width))[..., entries]
            target = out[..., place : place + groups * length]
            target.unflatten(-1, (groups, length)).copy_(source)

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
        for rows, groups, width, entries, place in self.placed(0, self.size):
            length = entries.stop - entries.start
            source = values[..., place : place + groups * length].unflatten(-1, (groups, length))
            out[..., rows].unflatten(-1, (groups, width))[..., entries] = source
        return out

    def places(self, start: int, stop: int) -> Tensor:
        """The place in the block of each row from `start` to `stop`."""
        found = torch.empty(stop - start, dtype=torch.long)
        for rows, groups, width, entries, place in self.placed(start, stop):
            length = entries.stop - entries.start
            mine = torch.arange(place, place + groups * length).view(groups, length)
            found[rows].view(groups, width)[:, entries] = mine
        return found


def starts_of(sizes: Sequence[int]) -> list[int]:
    """Where each of these begins, when they lie one after the other."""
    return [0, *itertools.accumulate(sizes)][: len(sizes)]
