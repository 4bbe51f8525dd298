"""One safetensors file on its way: room for a header, tensors in their places, the header at last.

The header comes first in the file, but the metadata in it are known last. So room is reserved, the tensors are
written behind it, and the finished header, padded with the spaces that the format allows, goes in at the end.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hesscli.files.hessians.placed_writes import PlacedFile

_ALIGNMENT = 4096
_NAMES = {"float32": "F32", "float64": "F64"}
OPEN_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


class TensorFile:
    """Some tensors, one behind the other, in a file of their own.

    It is opened when it is used, and may be closed in between: several thousand would be too many for one process.

    Args:
        shapes, dtype, start: as of `ResultWriter`.
        metadata: as far as they are known; they tell how much room the header needs.
        spare: bytes that may join the header.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, Sequence[int]],
        dtype: str,
        metadata: Mapping[str, str],
        spare: int = 0,
        start: int | None = None,
    ) -> None:
        self.path = path
        self.itemsize = np.dtype(dtype).itemsize
        self.entries: dict[str, dict[str, Any]] = {}
        end = 0
        for name, shape in shapes.items():
            first, end = end, end + math.prod(shape) * self.itemsize
            self.entries[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [first, end],
            }
        room = len(self._header(metadata)) + spare
        self.start = start or -(-(8 + room) // _ALIGNMENT) * _ALIGNMENT
        self.length = self.start + end
        self.placed: PlacedFile | None = None

    def reserve(self, descriptor: int | None = None) -> None:
        """Takes the room on the disk, by the descriptor of the file if it is open already; OSError, ENOSPC, without."""
        if descriptor is None:
            descriptor = os.open(self.path, OPEN_FLAGS | os.O_CREAT, 0o666)
        try:
            os.ftruncate(descriptor, self.length)
            self.placed = PlacedFile(descriptor, self.path, self.length)
        except OSError:
            os.close(descriptor)
            raise

    def opened(self) -> PlacedFile:
        """The file, to write to and to read from."""
        if self.placed is None:
            descriptor = os.open(self.path, OPEN_FLAGS)
            self.placed = PlacedFile(descriptor, self.path, self.length, reserve=False)
        return self.placed

    def offset(self, name: str, row: int = 0) -> int:
        """Where a row of a tensor begins in the file."""
        entry = self.entries[name]
        row_bytes = math.prod(entry["shape"][1:]) * self.itemsize
        return int(self.start + entry["data_offsets"][0] + row * row_bytes)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Writes the header, and waits until all is on the disk."""
        header = self._header(metadata)
        room = self.start - 8
        assert len(header) <= room, "the room reserved for the header is too small"
        file = self.opened()
        file.write(0, memoryview(room.to_bytes(8, "little") + header.ljust(room)))
        file.sync()

    def close(self) -> None:
        if self.placed is not None:
            placed, self.placed = self.placed, None
            placed.close()

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        header = {"__metadata__": {"format": "pt", **metadata}, **self.entries}
        return json.dumps(header, separators=(",", ":")).encode()


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder outlast a loss of power."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # not on every system
        return
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)
