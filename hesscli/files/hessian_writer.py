"""Writing Hessian files: a stream of rows in any order, and the name at the very end.

The header of a safetensors file comes first, but the document in it (statistics, check error) is known last. So room
is reserved for the header, the tensors are written behind it, and the finished header, padded with the spaces
that the format allows, goes in just before the file takes its name. Until then it is called `.NAME.partial`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from hesscli.errors import ResourceError, UsageError
from hesscli.files.checksums import Checksum, document_checksum
from hesscli.files.placed_writes import PlacedFile

_ALIGNMENT = 4096
_NAMES = {"float32": "F32", "float64": "F64"}
Span = tuple[int, int]  # first and last + 1


def partial_path(path: Path) -> Path:
    """What a file is called until it is finished."""
    return path.with_name(f".{path.name}.partial")


class HessianWriter:
    """Writes one Hessian file. Nothing appears under its name before `commit`; leaving without it leaves nothing,
    unless `keep` was called.

    Args:
        path: where the file goes, or None for a temporary one to `copy_to` a stream.
        shapes: every tensor's shape, in the order in which they lie in the file.
        dtype: "float32" or "float64".
        document: the JSON document as far as it is known; it tells how much room the header needs.
        start: where the tensors begin in a file that an earlier run, or another process, has begun.
        shared: other processes write into the same file.

    Raises:
        UsageError: another run is writing this very file.
        ResourceError: the disk is full.
    """

    def __init__(
        self,
        path: Path | None,
        shapes: Mapping[str, Sequence[int]],
        dtype: str,
        document: Mapping[str, Any],
        *,
        start: int | None = None,
        shared: bool = False,
    ) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.entries: dict[str, dict[str, Any]] = {}
        end = 0
        for name, shape in shapes.items():
            first, end = end, end + math.prod(shape) * self.dtype.itemsize
            self.entries[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [first, end],
            }
        self.sums = {name: Checksum(entry["shape"]) for name, entry in self.entries.items()}
        # Twenty numbers of up to 32 characters may still join each block, and some notes the document.
        room = len(self._header(document)) + 640 * len(shapes) + 8192
        self.start = start or -(-(8 + room) // _ALIGNMENT) * _ALIGNMENT
        self.kept = False
        if path is None:
            descriptor, name = tempfile.mkstemp(".partial", "hesscli.")
            self.temporary: Path | None = Path(name)
        else:
            self.temporary = partial_path(path)
            descriptor = self._open(self.temporary, shared)
            if start is None and not shared:
                os.ftruncate(descriptor, 0)
        try:
            self.file = PlacedFile(descriptor, self.temporary, self.start + end)
        except OSError as error:
            os.close(descriptor)
            if start is None:
                self.temporary.unlink(missing_ok=True)
            raise self._full(error) from error

    def _open(self, partial: Path, shared: bool) -> int:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(
                f"{self.path}: another run is writing it", "-o other.safetensors"
            ) from None
        except OSError:  # a file system without locks
            pass
        return descriptor

    def __enter__(self) -> HessianWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.file.close()
        if self.temporary is not None and not self.kept:
            self.temporary.unlink(missing_ok=True)

    def keep(self) -> None:
        """Leaves the unfinished file behind, for another run to go on with."""
        self.kept = True

    def write(self, name: str, rows: np.ndarray, first_row: int = 0) -> None:
        """Puts whole rows of a tensor in their place, and counts them in its checksum.

        Raises:
            ResourceError: the disk is full.
        """
        array = np.ascontiguousarray(rows, self.dtype)
        self.count(name, array, first_row)
        self._put(self.offset(name, first_row), array.reshape(-1).view(np.uint8).data)

    def count(self, name: str, rows: np.ndarray, first_row: int = 0) -> None:
        """Counts whole rows of a tensor, contiguous, in its checksum. Each must be counted once."""
        self.sums[name].add(rows, first_row)

    def forget(self, name: str) -> None:
        """Begins a tensor's checksum anew: all its rows will be written or counted."""
        self.sums[name] = Checksum(self.entries[name]["shape"])

    def believe(self, checksums: Mapping[str, str]) -> None:
        """Takes over the checksums of tensors that an earlier run wrote."""
        for name, text in checksums.items():
            self.sums[name] = Checksum(self.entries[name]["shape"], int(text, 16))

    def mapped(self, name: str) -> np.ndarray:
        """A tensor that was written, read-only and read from the disk as it is used."""
        assert self.temporary is not None
        shape = tuple(self.entries[name]["shape"])
        return np.memmap(self.temporary, self.dtype, "r", self.offset(name), shape)

    def write_runs(
        self, name: str, rows: Iterable[int], columns: Sequence[Span], values: np.ndarray
    ) -> None:
        """Puts entries of a matrix in their place: `values` are these rows, and in each these columns in turn.

        They count for no checksum: the rows are not whole.
        """
        array = np.ascontiguousarray(values, self.dtype)
        data = array.reshape(-1).view(np.uint8).data
        size, at = self.dtype.itemsize, 0
        runs = [(left * size, (right - left) * size) for left, right in columns]
        try:
            for row in rows:
                place = self.offset(name, row)
                for left, length in runs:
                    self.file.write(place + left, data[at : at + length])
                    at += length
        except OSError as error:
            raise self._full(error) from error

    def read(self, name: str, first_row: int, out: np.ndarray) -> None:
        """Fills `out` with rows of a tensor that were written before."""
        try:
            self.file.read(self.offset(name, first_row), out.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise self._full(error) from error

    def offset(self, name: str, row: int = 0) -> int:
        """Where a row of a tensor begins in the file."""
        entry = self.entries[name]
        row_bytes = math.prod(entry["shape"][1:]) * self.dtype.itemsize
        return int(self.start + entry["data_offsets"][0] + row * row_bytes)

    def sync(self) -> None:
        """Waits until everything that was written is on the disk."""
        try:
            self.file.sync()
        except OSError as error:
            raise self._full(error) from error

    def checksums(self) -> dict[str, str]:
        """Each tensor's."""
        return {name: str(checksum) for name, checksum in self.sums.items()}

    def commit(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the header and gives the file its name; returns the checksums that joined the document."""
        header = self._header(document)
        room = self.start - 8
        assert len(header) <= room, "the room reserved for the header is too small"
        self._put(0, memoryview(room.to_bytes(8, "little") + header.ljust(room)))
        self.sync()
        if self.path is not None and self.temporary is not None:
            try:
                os.replace(self.temporary, self.path)
            except OSError as error:
                raise self._full(error) from error
            self.temporary = None
            sync_folder(self.path.parent)
        return self._sums_of(document)

    def copy_to(self, stream: BinaryIO) -> None:
        """Sends the finished file's bytes to a stream."""
        assert self.temporary is not None
        with self.temporary.open("rb") as file:
            shutil.copyfileobj(file, stream, 1 << 20)
        stream.flush()

    def _sums_of(self, document: Mapping[str, Any]) -> dict[str, Any]:
        sums: dict[str, Any] = {"checksums": self.checksums()}
        return sums | {"checksum": document_checksum({**document, **sums})}

    def _header(self, document: Mapping[str, Any]) -> bytes:
        whole = {**document, **self._sums_of(document)}
        text = json.dumps(whole, allow_nan=False, separators=(",", ":"))
        metadata = {"format": "pt", "hesscli": text}
        header = {"__metadata__": metadata, **self.entries}
        return json.dumps(header, separators=(",", ":")).encode()

    def _put(self, offset: int, data: memoryview) -> None:
        try:
            self.file.write(offset, data)
        except OSError as error:
            raise self._full(error) from error

    def _full(self, error: OSError) -> ResourceError:
        return ResourceError(f"{self.path or 'the temporary file'}: {error.strerror}")


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder outlast a loss of power."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # not on every system
        return
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)
