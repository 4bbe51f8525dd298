"""A large symmetric matrix on its way to the file: bands of its upper triangle come in, whole rows go out.

Where the memory allows it, the device's or the host's, a band's rows are completed from the bands before them and
written in one run; what no later row needs is let go, so that a quarter of the matrix is held at most. Where there is
less memory, a band and its mirror image go to their places at once, and whole rows are read back at the end. Either way
the matrix is multiplied by a direction on its way, for the check.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hesscli.errors import FileError
from hesscli.files.hessians.result_writer import ResultWriter
from hesscli.hessian.chunk_sizes import chunk_sizes
from hesscli.hessian.layout import Layout, Placed, Span
from hesscli.job.matrix.background import Background

_TURNED = 1 << 22  # numbers that are transposed at a time
_READ = 1 << 24  # numbers that are read back at a time
_PAGE = 4096
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(eq=False)
class Triangle:
    """What both kinds share: the bands, and what is known of the rows that went by.

    `put` takes band after band, `restore` one that an earlier run wrote; `finish` ends it. Then trace and squares are
    known, and `times` works.

    A band that lay on the disk may have been damaged there. So the bits of the matrix are added up twice, as they are
    computed and as its rows go by: over its rows r, (2 r + 1) times the sum of the row's numbers read as integers,
    modulo 2^32, or 2^64 for float64.
    """

    name: str  # the tensor's
    layout: Layout  # the order of the bands' rows
    bands: list[Span]  # from where to where each goes
    writer: ResultWriter  # of the file
    direction: Tensor  # the vector [n] that the matrix will be multiplied by, of its dtype
    fresh: bool  # whether all bands come from this run

    def __post_init__(self) -> None:
        self.dtype = self.direction.dtype
        self.stream: torch.cuda.Stream | None = None
        self.computed = self.found = 0  # bits
        # Of each row its diagonal entry, its squares and its product: row by row, so that they are the same in
        # whichever order and company the rows come.
        self._facts = np.zeros((3, self.layout.size))

    def put(self, index: int, upper: Tensor) -> int:
        """Takes band `index`, [rows, size - start], computed to its end, its square symmetric, after all before it;
        gives its bits and those of its mirror image, which `restore` wants.
        """
        start, stop = self.bands[index]
        with self._aside():
            integers = upper.view(_INTEGERS[self.dtype])
            along = integers.sum(1, dtype=integers.dtype).cpu()
            beyond = integers[:, stop - start :].sum(0, dtype=integers.dtype).cpu()
        sums = torch.cat([along, beyond]).numpy()
        bits = _weighted(self.layout.places(start, self.layout.size).numpy(), sums)
        self.computed += bits
        return bits

    def restore(self, index: int, bits: int) -> None:
        """Takes a band that is in the file already, in the same order."""
        self.computed += bits

    def finish(self) -> None:
        """All bands are in.

        Raises:
            FileError: one that an earlier run wrote is not in the file as it was written.
        """
        if not self.fresh and (self.computed - self.found) % (1 << 8 * self.dtype.itemsize):
            raise FileError(
                f"{self.writer.path}: what was finished of {self.name} has changed since on the disk",
                "compute it again",
            )

    def _aside(self) -> AbstractContextManager[object]:
        """On a GPU, does not wait for the next band, which is computed meanwhile."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _all_rows(self) -> Iterator[tuple[int, Tensor]]:
        """The matrix, some whole rows at a time, read back, with the first one's number."""
        n = self.layout.size
        step = min(n, max(1, _READ // n))
        buffer = torch.empty(step, n, dtype=self.dtype)
        for first in range(0, n, step):
            rows = buffer[: min(step, n - first)]
            self.writer.read(self.name, first, rows.numpy())
            yield first, rows

    def _measure(self, first: int, rows: np.ndarray) -> None:
        """Takes from some rows what is to be known of them; the first has this number."""
        mine = slice(first, first + len(rows))
        if not self.fresh:
            integers = rows.view(np.dtype(f"i{rows.itemsize}"))
            sums = integers.sum(1, dtype=integers.dtype)
            self.found += _weighted(np.arange(mine.start, mine.stop), sums)
        # Not by BLAS: its sums depend on how a row lies in memory, and its threads disturb the computing ones.
        with np.errstate(over="ignore"):
            squares = np.einsum("ij,ij->i", rows, rows).astype(np.float64)
        if (beyond := ~np.isfinite(squares)).any():  # float32
            part = rows[beyond]
            squares[beyond] = np.einsum("ij,ij->i", part, part, dtype=np.float64)
        along = np.einsum("ij,j->i", rows, self.direction.numpy())
        self._facts[:, mine] = rows[:, mine].diagonal(), squares, along

    @property
    def trace(self) -> float:
        return float(self._facts[0].sum())

    @property
    def squares(self) -> float:
        """The square of the Frobenius norm."""
        return float(self._facts[1].sum())

    def times(self, v: Tensor) -> Tensor:
        """The matrix times a vector, in the matrix's dtype."""
        x = v.to("cpu", self.dtype)
        if torch.equal(x, self.direction):
            return torch.from_numpy(self._facts[2]).to(v.device, self.dtype)
        out = torch.empty_like(x)
        for first, rows in self._all_rows():
            out[first : first + len(rows)] = rows @ x
        return out.to(v.device)


@dataclass(eq=False)
class HeldTriangle(Triangle):
    """Keeps what later rows need of the bands, and writes whole rows."""

    device: torch.device  # where it is kept and rows are completed

    def __post_init__(self) -> None:
        super().__post_init__()
        device, size = self.device, self.layout.size
        longest = max(each.size for band in self.bands for each in self._stretches(*band))
        room = longest * size * self.dtype.itemsize + _PAGE
        # Page-aligned, as direct writes want it; two of them, so that one is filled while the other is written.
        self.memory = [_pages(room, device), _pages(room, device)]
        # Of each band, the part of its rows that the bands before have: [rows, start].
        self.before = {band: self._empty(band[1] - band[0], band[0]) for band in self.bands}
        self.scratch: Tensor | None = None
        if device.type == "cuda":
            self.scratch = torch.empty(longest * size, dtype=self.dtype, device=device)
            self.stream = torch.cuda.Stream(device)

    def put(self, index: int, upper: Tensor) -> int:
        bits = super().put(index, upper)
        with self._aside():
            upper = on_host(upper) if self.device.type == "cpu" else upper
            idle = self.device.type != "cpu"  # else all threads compute the next band meanwhile
            with (
                Background() as placing,
                Background(idle) as counting,
                Background(idle) as measuring,
            ):
                for place, rows in self._rows(index, upper):
                    measuring.run(self._measure, place, rows.numpy())
                    counting.run(self.writer.count, self.name, rows.numpy(), place)
                    placing.run(self.writer.place, self.name, rows.numpy(), place)
            self._keep(index, upper)
        return bits

    def _stretches(self, start: int, stop: int) -> Iterator[Placed]:
        """These rows as they lie together in the block, no more than so many numbers or one group at a time."""
        for placed in self.layout.placed(start, stop):
            yield from placed.stretches(chunk_sizes(self.device).stretch // self.layout.size)

    def _rows(self, index: int, upper: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The rows of a band in the block's order, on the host, with the first one's place.

        They are overwritten by those that come two steps later.
        """
        start, stop = band = self.bands[index]
        for stretch in self._stretches(start, stop):
            rows = self._aligned(stretch)
            out = rows if self.scratch is None else self.scratch[: rows.numel()].view(rows.shape)
            grouped = out.unflatten(0, stretch.shape)
            before = stretch.of_rows(self.before[band].T).movedim(0, -1)
            self.layout.to_block(before, grouped, 0, start)
            own = stretch.of_rows(upper.T).movedim(0, -1)
            self.layout.to_block(own, grouped, start, self.layout.size)
            if out is not rows:
                rows.copy_(out)
            yield stretch.place, rows

    def _keep(self, index: int, upper: Tensor) -> None:
        """Keeps what the rows of later bands have of a band, and no longer what its own had of those before."""
        start, stop = self.bands[index]
        del self.before[start, stop]
        for (first, last), before in self.before.items():
            before[:, start:stop] = upper[:, first - start : last - start].T
        if self.stream is not None:
            self.stream.synchronize()  # the band's room is used again

    def _aligned(self, stretch: Placed) -> Tensor:
        """Room for rows that lies to a page as they will in the file."""
        shift = self.writer.offset(self.name, stretch.place) % _PAGE
        count = stretch.size * self.layout.size
        self.memory.reverse()
        flat = self.memory[0][shift : shift + count * self.dtype.itemsize].view(self.dtype)
        return flat.view(stretch.size, self.layout.size)

    def _empty(self, rows: int, columns: int) -> Tensor:
        """Room for numbers; of the host's memory it takes what was written to, until it is let go."""
        if self.device.type == "cpu":
            flat = _pages(rows * columns * self.dtype.itemsize, self.device).view(self.dtype)
        else:
            flat = torch.empty(rows * columns, dtype=self.dtype, device=self.device)
        return flat.view(rows, columns)

    def restore(self, index: int, bits: int) -> None:
        super().restore(index, bits)
        start, stop = self.bands[index]
        shape = stop - start, self.layout.size - start
        with self._aside():
            upper = torch.empty(shape, dtype=self.dtype, device=self.device)
            for stretch in self._stretches(start, stop):
                rows = self._aligned(stretch)
                self.writer.read(self.name, stretch.place, rows.numpy())
                self.writer.count(self.name, rows.numpy(), stretch.place)
                self._measure(stretch.place, rows.numpy())
                mine = self.layout.from_block(rows.to(self.device))[:, start:].T
                stretch.of_rows(upper.T).copy_(mine.unflatten(1, stretch.shape))
            self._keep(index, upper)


def _pages(size: int, device: torch.device) -> Tensor:
    """So many bytes of the host's memory, whole pages, pinned where a GPU copies into them."""
    if device.type == "cuda":
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return torch.frombuffer(mmap.mmap(-1, max(1, size)), dtype=torch.uint8)[:size]


class StreamedTriangle(Triangle):
    """Keeps nothing: what comes in goes to the file."""

    def put(self, index: int, upper: Tensor) -> int:
        bits = super().put(index, upper)
        upper = on_host(upper)
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
        return bits

    def finish(self) -> None:
        for first, rows in self._all_rows():
            self._measure(first, rows.numpy())
            self.writer.count(self.name, rows.numpy(), first)
        super().finish()


def _weighted(rows: np.ndarray, sums: np.ndarray) -> int:
    """The sum of (2 r + 1) times each row's, modulo 2^64."""
    return int(((2 * rows + 1) * sums.astype(np.int64)).sum())


def spans(places: Tensor) -> list[Span]:
    """Ascending places as runs of neighbours."""
    array = places.numpy()
    runs = np.split(array, np.flatnonzero(np.diff(array) != 1) + 1)
    return [(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]


def on_host(values: Tensor) -> Tensor:
    """Values in the host's memory; from a GPU by way of pinned memory, several times as fast."""
    if values.device.type == "cuda":
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)
    return values.cpu()
