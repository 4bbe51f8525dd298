"""A large symmetric matrix on its way to the file: bands of its upper triangle come in, whole rows go out.

Where the upper half fits the memory, a band's rows are completed from the bands before them and written in one run.
Where it does not, a band and its mirror image go to their places at once, and whole rows are read back at the end.
Either way the matrix is then there to be multiplied, for the check.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hesscli.files.hessian_writer import HessianWriter
from hesscli.hessian.layout import Layout, Placed, Span
from hesscli.job.beside import Beside

_TURNED = 1 << 22  # numbers that are transposed at a time
_PIECE = 1 << 22  # numbers in the rows that are written at a time: the cache holds them until then
_READ = 1 << 24  # numbers that are read back at a time
_PAGE = 4096


class Triangle:
    """What both kinds share: the bands, and what is known of the rows that went by.

    `put` takes band after band, `restore` one that an earlier run wrote; `finish` ends it. Then trace and squares are
    known, and `@` works.

    Args:
        name: the tensor's.
        layout: the order of the bands' rows.
        bands: from where to where each goes.
        writer: of the file.
        direction: the vector [n] that the matrix will be multiplied by, of its dtype.
    """

    def __init__(
        self,
        name: str,
        layout: Layout,
        bands: list[Span],
        writer: HessianWriter,
        direction: Tensor,
    ) -> None:
        self.name, self.layout, self.bands = name, layout, bands
        self.writer, self.direction = writer, direction
        self.dtype = direction.dtype
        # Row by row, so that they are the same in whichever order and company the rows come.
        self._diagonal, self._squares, self._products = np.zeros((3, layout.size))

    def put(self, index: int, upper: Tensor) -> None:
        """Takes band `index`, [rows, size - start], its square symmetric, after all before it."""
        raise NotImplementedError

    def restore(self, index: int) -> None:
        """Takes a band that is in the file already, in the same order."""
        raise NotImplementedError

    def finish(self) -> None:
        """All bands are in."""

    def _whole(self) -> Iterator[tuple[int, Tensor]]:
        """The matrix, some whole rows at a time, with the first one's number."""
        raise NotImplementedError

    def _count(self, first_row: int, rows: np.ndarray) -> None:
        # Not by BLAS: its sums depend on how a row lies in memory, and its threads disturb the computing ones.
        mine = slice(first_row, first_row + len(rows))
        self._diagonal[mine] = rows[:, mine].diagonal()
        self._squares[mine] = np.einsum("ij,ij->i", rows, rows)
        self._products[mine] = np.einsum("ij,j->i", rows, self.direction.numpy())

    @property
    def trace(self) -> float:
        return float(self._diagonal.sum())

    @property
    def squares(self) -> float:
        """The square of the Frobenius norm."""
        return float(self._squares.sum())

    def __matmul__(self, v: Tensor) -> Tensor:
        x = v.cpu()
        if torch.equal(x, self.direction):
            self.finish()
            return torch.from_numpy(self._products).to(v.device, v.dtype)
        out = torch.empty_like(x)
        for first, rows in self._whole():
            out[first : first + len(rows)] = rows @ x
        return out.to(v.device)


class HeldTriangle(Triangle):
    """Keeps the bands, and writes whole rows."""

    def __init__(
        self,
        name: str,
        layout: Layout,
        bands: list[Span],
        writer: HessianWriter,
        direction: Tensor,
    ) -> None:
        super().__init__(name, layout, bands, writer, direction)
        self.uppers: list[Tensor] = []
        pieces = (piece for band in bands for piece in self._pieces(*band))
        longest = max(piece.groups * piece.length for piece in pieces)
        room = longest * layout.size * self.dtype.itemsize + _PAGE
        # Page-aligned, as direct writes want it; two of them, so that one is filled while the other is written.
        self.memory = [mmap.mmap(-1, room), mmap.mmap(-1, room)]

    def put(self, index: int, upper: Tensor) -> None:
        self.uppers.append(upper)
        with Beside() as beside:
            for place, rows in self._rows(index):
                self._count(place, rows.numpy())
                beside.run(self.writer.write, self.name, rows.numpy(), place)

    def _pieces(self, start: int, stop: int) -> Iterator[Placed]:
        """These rows in runs of the block, no more than `_PIECE` numbers or one group at a time."""
        for placed in self.layout.placed(start, stop):
            yield from placed.runs(_PIECE // self.layout.size)

    def _rows(self, index: int) -> Iterator[tuple[int, Tensor]]:
        """The rows of a band in the block's order, with the first one's place.

        They are overwritten by those that come two steps later.
        """
        start, stop = self.bands[index]
        for piece in self._pieces(start, stop):
            out = self._aligned(piece.place, piece.groups * piece.length)
            grouped = out.unflatten(0, (piece.groups, piece.length))
            for (first, last), upper in zip(self.bands[:index], self.uppers, strict=False):
                turned = piece.of_rows(upper[:, start - first :]).movedim(0, -1)
                self.layout.to_block(turned, grouped, first, last)
            own = piece.of_rows(self.uppers[index].T).movedim(0, -1)
            self.layout.to_block(own, grouped, start, self.layout.size)
            yield piece.place, out

    def _whole(self) -> Iterator[tuple[int, Tensor]]:
        for index in range(len(self.bands)):
            yield from self._rows(index)

    def _aligned(self, place: int, rows: int) -> Tensor:
        """Room for rows that lies to a page as they will in the file."""
        shift = self.writer.offset(self.name, place) % _PAGE
        count = rows * self.layout.size
        self.memory.reverse()
        flat = torch.frombuffer(self.memory[0], dtype=self.dtype, count=count, offset=shift)
        return flat.view(rows, self.layout.size)

    def restore(self, index: int) -> None:
        start, stop = self.bands[index]
        upper = torch.empty(stop - start, self.layout.size - start, dtype=self.dtype)
        for piece in self._pieces(start, stop):
            out = self._aligned(piece.place, piece.groups * piece.length)
            self.writer.read(self.name, piece.place, out.numpy())
            self.writer.count(self.name, out.numpy(), piece.place)
            self._count(piece.place, out.numpy())
            mine = self.layout.from_block(out)[:, start:].T.unflatten(
                1, (piece.groups, piece.length)
            )
            piece.of_rows(upper.T).copy_(mine)
        self.uppers.append(upper)


class StreamedTriangle(Triangle):
    """Keeps nothing: what comes in goes to the file."""

    counted = False

    def put(self, index: int, upper: Tensor) -> None:
        start, stop = self.bands[index]
        rows, columns = self.layout.places(start, stop), self.layout.places(start, self.layout.size)
        row_order, column_order = rows.argsort(), columns.argsort()
        row_spans, column_spans = spans(rows[row_order]), spans(columns[column_order])
        step = max(1, _TURNED // upper.shape[1])
        for first in range(0, len(rows), step):
            part = row_order[first : first + step]
            values = upper[part][:, column_order]
            self.writer.write_runs(self.name, rows[part].tolist(), column_spans, values.numpy())
        step = max(1, _TURNED // len(rows))
        beyond = column_order[column_order >= stop - start]  # the square is there already
        for first in range(0, len(beyond), step):
            part = beyond[first : first + step]
            turned = upper[:, part].T[:, row_order].contiguous()
            self.writer.write_runs(self.name, columns[part].tolist(), row_spans, turned.numpy())

    def restore(self, index: int) -> None:
        pass  # nothing is kept of it

    def finish(self) -> None:
        if not self.counted:
            for first, rows in self._whole():
                self._count(first, rows.numpy())
                self.writer.count(self.name, rows.numpy(), first)
            self.counted = True

    def _whole(self) -> Iterator[tuple[int, Tensor]]:
        n = self.layout.size
        step = min(n, max(1, _READ // n))
        buffer = torch.empty(step, n, dtype=self.dtype)
        for first in range(0, n, step):
            rows = buffer[: min(step, n - first)]
            self.writer.read(self.name, first, rows.numpy())
            yield first, rows


def spans(places: Tensor) -> list[Span]:
    """Ascending places as runs of neighbours."""
    edges = (places.diff() != 1).nonzero().flatten() + 1
    starts, stops = [0, *edges.tolist()], [*edges.tolist(), len(places)]
    return [
        (int(places[a]), int(places[b - 1]) + 1)
        for a, b in zip(starts, stops, strict=True)
        if b > a
    ]
