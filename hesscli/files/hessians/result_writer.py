"""Writing Hessian files: a stream of rows in any order, and the name at the very end."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hesscli.errors import ResourceError, UsageError
from hesscli.files.hessians.checksums import Checksum, document_checksum
from hesscli.files.hessians.hessian_file import is_part_of
from hesscli.files.hessians.result_files import ResultFiles, SeveralFiles
from hesscli.files.hessians.result_names import (
    into_files,
    partial_path,
    partial_paths,
    result_paths,
)
from hesscli.files.hessians.tensor_file import OPEN_FLAGS, TensorFile

Span = tuple[int, int]  # first and last + 1


def demand_idle(path: Path, shared: bool) -> None:
    """Refuses a result that another run is writing; where it is `shared`, one that does not share it."""
    with suppress(FileNotFoundError):
        descriptor = os.open(partial_path(path), OPEN_FLAGS)
        try:
            _lock(descriptor, path, shared)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, path: Path, shared: bool) -> None:
    """Locks the unfinished file of a result, until it is closed, unless another run has it."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{path}: another run is writing it", "-o other.safetensors") from None
    except OSError:  # a file system without locks
        pass


class ResultWriter:
    """Writes one result. Nothing appears under its name before `commit`; leaving without it leaves nothing,
    unless `keep` was called. One thread at a time may use it, but rows may be counted while others are placed.

    Args:
        path: where the result goes, or None for a temporary file to `copy_to` a stream.
        shapes: every tensor's shape, in the order in which they lie in the file.
        dtype: "float32" or "float64".
        document: the JSON document as far as it is known; it tells how much room the header needs.
        max_shard_size: the most bytes of tensors in one file; None for all.
        start: where the tensors begin in a file that an earlier run, or another process, has begun.
        shared: other processes write into the same file.

    Raises:
        UsageError: another run is writing this very file.
        FileError: what was begun is gone.
        ResourceError: the disk is full.
    """

    def __init__(
        self,
        path: Path | None,
        shapes: Mapping[str, Sequence[int]],
        dtype: str,
        document: Mapping[str, Any],
        *,
        max_shard_size: int | None = None,
        start: int | None = None,
        shared: bool = False,
    ) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.sums = {name: Checksum(shape) for name, shape in shapes.items()}
        self.kept = self.committed = False
        sizes = {name: math.prod(shape) * self.dtype.itemsize for name, shape in shapes.items()}
        groups = [
            {name: shapes[name] for name in names} for names in into_files(sizes, max_shard_size)
        ]
        text = self._text(document)
        # Twenty numbers of up to 32 characters may still join each block, and some notes the document.
        spare = 640 * len(shapes) + 8192
        partial, descriptor = self._begin(start is None and not shared, shared)
        if path is None or len(groups) == 1:
            file = TensorFile(partial, shapes, dtype, {"hesscli": text}, spare, start)
            self.files = ResultFiles(partial, descriptor, [file])
        else:
            self.files = SeveralFiles(path, partial, descriptor, groups, dtype, text, spare)
        self.start = self.files.files[0].start
        try:
            with self._on_disk():
                self.files.reserve(begun=start is not None)
        except BaseException:
            self.kept = start is not None
            self.__exit__(None, None, None)
            raise

    def _begin(self, fresh: bool, shared: bool) -> tuple[Path, int]:
        """The unfinished result, locked; a fresh one without anything that was left of another."""
        if self.path is None:
            descriptor, name = tempfile.mkstemp(".partial", "hesscli.")
            return Path(name), descriptor
        partial = partial_path(self.path)
        descriptor = os.open(partial, OPEN_FLAGS | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, self.path, shared)
        except UsageError:
            os.close(descriptor)
            raise
        if fresh:
            os.ftruncate(descriptor, 0)
            for left in partial_paths(self.path)[1:]:
                left.unlink(missing_ok=True)
        return partial, descriptor

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.files.close()
        if not self.kept and not self.committed:
            self.files.discard()

    def keep(self) -> None:
        """Leaves the unfinished result behind, for another run to go on with."""
        self.kept = True

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Puts a tensor in its place, and counts its rows in its checksum."""
        array = np.ascontiguousarray(tensor, self.dtype)
        self.count(name, array)
        self.place(name, array)

    def place(self, name: str, rows: np.ndarray, first_row: int = 0) -> None:
        """Puts whole rows of a tensor, contiguous, in their place. They are counted elsewhere."""
        with self._on_disk():
            file = self.files.opened(name)
            file.write(self.offset(name, first_row), rows.reshape(-1).view(np.uint8).data)

    def count(self, name: str, rows: np.ndarray, first_row: int = 0) -> None:
        """Counts whole rows of a tensor, contiguous, in its checksum. Each must be counted once."""
        self.sums[name].add(rows, first_row)

    def forget(self, name: str) -> None:
        """Begins a tensor's checksum anew: all its rows will be written or counted."""
        self.sums[name] = Checksum(self.sums[name].shape)

    def holds(self, checksums: Mapping[str, str]) -> bool:
        """Whether tensors that an earlier run wrote are as it wrote them; then their checksums are taken over."""
        found = {name: Checksum.of(self.mapped(name)) for name in checksums}
        if any(str(checksum) != checksums[name] for name, checksum in found.items()):
            return False
        self.sums |= found
        return True

    def mapped(self, name: str) -> np.ndarray:
        """A tensor that was written, read-only and read from the disk as it is used."""
        path = self.files.homes[name].path
        return np.memmap(path, self.dtype, "r", self.offset(name), self.sums[name].shape)

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
        with self._on_disk():
            file = self.files.opened(name)
            for row in rows:
                place = self.offset(name, row)
                for left, length in runs:
                    file.write(place + left, data[at : at + length])
                    at += length

    def read(self, name: str, first_row: int, out: np.ndarray) -> None:
        """Fills `out` with rows of a tensor that were written before."""
        with self._on_disk():
            file = self.files.opened(name)
            file.read(self.offset(name, first_row), out.reshape(-1).view(np.uint8).data)

    def offset(self, name: str, row: int = 0) -> int:
        """Where a row of a tensor begins in its file."""
        return self.files.homes[name].offset(name, row)

    def sync(self) -> None:
        """Waits until everything that was written is on the disk."""
        with self._on_disk():
            self.files.sync()

    def checksums(self) -> dict[str, str]:
        """Each tensor's."""
        return {name: str(checksum) for name, checksum in self.sums.items()}

    def commit(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the document and gives the result its name; returns the checksums that joined the document.

        What an earlier result of this name has in other files goes.
        """
        sums = self._sums_of(document)
        with self._on_disk():
            self.files.finish(self._text(document), sums["checksum"])
            if self.path is not None:
                self.files.rename(self.path)
                self.committed = True
                for found in set(result_paths(self.path)) - set(self.files.names(self.path)):
                    if is_part_of(found, self.path):
                        with suppress(OSError):
                            found.unlink()
        return sums

    def copy_to(self, stream: BinaryIO) -> None:
        """Sends the finished file's bytes to a stream."""
        with self.files.partial.open("rb") as file:
            shutil.copyfileobj(file, stream, 1 << 20)
        stream.flush()

    def _sums_of(self, document: Mapping[str, Any]) -> dict[str, Any]:
        sums: dict[str, Any] = {"checksums": self.checksums()}
        return sums | {"checksum": document_checksum({**document, **sums})}

    def _text(self, document: Mapping[str, Any]) -> str:
        whole = {**document, **self._sums_of(document)}
        return json.dumps(whole, allow_nan=False, separators=(",", ":"))

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceError(f"{self.path or 'the temporary file'}: {error.strerror}") from error
