"""Hessian files: safetensors with one JSON document in the metadata, written as a stream and read without torch.

The header of a safetensors file comes first, but the document in it (statistics, check error) is known last. So room
is reserved for the header, the tensors are written behind it, and the finished header, padded with the spaces
that the format allows, goes in just before the file takes its name.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from hesscli.errors import FileError, ResourceError, UsageError
from hesscli.files.placed_writes import PlacedFile

SCHEMA = "hesscli.hessian/1"
_ALIGNMENT = 4096
_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_NAMES = {"float32": "F32", "float64": "F64"}


class HessianWriter:
    """Writes one Hessian file. Nothing appears under its name before `commit`; leaving without it leaves nothing.

    Args:
        path: where the file goes, or None for a temporary one to `copy_to` a stream.
        shapes: every tensor's shape, in the order in which they lie in the file.
        dtype: "float32" or "float64".
        document: the JSON document as far as it is known; it tells how much room the header needs.
    """

    def __init__(
        self,
        path: Path | None,
        shapes: Mapping[str, Sequence[int]],
        dtype: str,
        document: Mapping[str, Any],
    ) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.entries: dict[str, dict[str, Any]] = {}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + math.prod(shape) * self.dtype.itemsize
            self.entries[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        # Twenty numbers of up to 32 characters may still join each block, and some notes the document.
        room = len(self._header(document)) + 640 * len(shapes) + 8192
        self.start = -(-(8 + room) // _ALIGNMENT) * _ALIGNMENT
        folder = None if path is None else path.parent
        descriptor, name = tempfile.mkstemp(
            ".tmp", f".{path.name}." if path else "hesscli.", folder
        )
        self.temporary: Path | None = Path(name)
        try:
            self.file = PlacedFile(descriptor, self.temporary, self.start + end)
        except OSError as error:
            os.close(descriptor)
            self.temporary.unlink()
            raise self._full(error) from error

    def __enter__(self) -> HessianWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.file.close()
        if self.temporary is not None:
            self.temporary.unlink(missing_ok=True)

    def write(self, name: str, rows: np.ndarray, first_row: int = 0) -> None:
        """Puts rows of a tensor in their place.

        Raises:
            ResourceError: the disk is full.
        """
        entry = self.entries[name]
        row_bytes = math.prod(entry["shape"][1:]) * self.dtype.itemsize
        offset = self.start + entry["data_offsets"][0] + first_row * row_bytes
        flat = np.ascontiguousarray(rows, self.dtype).reshape(-1)
        self._put(offset, flat.view(np.uint8).data)

    def commit(self, document: Mapping[str, Any]) -> None:
        """Writes the header and gives the file its name."""
        header = self._header(document)
        room = self.start - 8
        assert len(header) <= room, "the room reserved for the header is too small"
        self._put(0, memoryview(room.to_bytes(8, "little") + header.ljust(room)))
        try:
            self.file.sync()
            if self.path is None or self.temporary is None:
                return
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(self.temporary, 0o666 & ~mask)  # mkstemp makes it private
            os.replace(self.temporary, self.path)
        except OSError as error:
            raise self._full(error) from error
        self.temporary = None
        _sync_folder(self.path.parent)

    def copy_to(self, stream: BinaryIO) -> None:
        """Sends the finished file's bytes to a stream."""
        assert self.temporary is not None
        with self.temporary.open("rb") as file:
            shutil.copyfileobj(file, stream, 1 << 20)
        stream.flush()

    def _header(self, document: Mapping[str, Any]) -> bytes:
        text = json.dumps(document, allow_nan=False, separators=(",", ":"))
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


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # not on every system
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class HessianFile:
    """A Hessian file that was opened: its document, and its tensors, memory-mapped when asked for."""

    path: Path
    document: dict[str, Any]
    entries: dict[str, dict[str, Any]]
    start: int

    def tensor(self, name: str) -> np.ndarray:
        """A tensor by its key, read-only and read from the disk as it is used."""
        entry = self.entries[name]
        shape = tuple(entry["shape"])
        if 0 in shape:
            return np.zeros(shape, _DTYPES[entry["dtype"]])
        return np.memmap(
            self.path,
            _DTYPES[entry["dtype"]],
            "r",
            self.start + entry["data_offsets"][0],
            shape,
        )


def read_hessian(path: Path, shown: str | None = None) -> HessianFile:
    """Opens a Hessian file; only its header is read.

    Args:
        path: the file.
        shown: what to call it in errors, if not by its path.

    Raises:
        UsageError: there is no such file.
        FileError: it is not a Hessian file, or truncated.
    """
    from safetensors import SafetensorError, safe_open

    shown = shown or str(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise FileError(f"{shown}: not a regular file")
        with safe_open(path, "np") as file:  # checks lengths and offsets
            metadata = file.metadata() or {}
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            entries = json.loads(raw.read(length))
    except FileNotFoundError:
        raise UsageError(
            f"{shown}: no such file",
            f"hesscli compute model.pt data.npz -o {shown}",
        ) from None
    except PermissionError:
        raise FileError(f"{shown}: permission denied") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(
            f"{shown}: not a Hessian file, or one that was cut short ({str(error).splitlines()[0]})"
        ) from None
    entries.pop("__metadata__", None)
    try:
        document = json.loads(metadata["hesscli"])
        if document["schema"] != SCHEMA:
            raise FileError(
                f"{shown}: written in the format {document['schema']}; this hesscli reads {SCHEMA}"
            )
    except (KeyError, ValueError, TypeError):
        raise FileError(
            f"{shown}: a safetensors file, but not one that hesscli wrote",
            f"hesscli compute {shown} data.npz --arch mypkg.nets:make_model",
        ) from None
    unreadable = [entry["dtype"] for entry in entries.values() if entry["dtype"] not in _DTYPES]
    if unreadable:
        raise FileError(f"{shown}: holds tensors of type {unreadable[0]}")
    return HessianFile(path, document, entries, 8 + length)


def is_hesscli(path: Path) -> bool:
    """Whether hesscli wrote this safetensors file, and so may replace it."""
    from safetensors import SafetensorError, safe_open

    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with safe_open(path, "np") as file:
            return "hesscli" in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return False
