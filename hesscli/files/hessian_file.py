"""Hessian files: safetensors with one JSON document in the metadata, read without torch."""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hesscli.errors import FileError, UsageError
from hesscli.files.checksums import Checksum, document_checksum

SCHEMA = "hesscli.hessian/1"
_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_TILE = 1 << 26  # bytes that are verified at a time


@dataclass(frozen=True)
class HessianFile:
    """A Hessian file that was opened: its document, and its tensors, memory-mapped when asked for."""

    path: Path
    document: dict[str, Any]
    entries: dict[str, dict[str, Any]]
    start: int
    shown: str  # what errors call it

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

    def verified(self, name: str) -> np.ndarray:
        """A tensor that was compared with its checksum, which reads all of it once.

        Raises:
            FileError: it is not what was written.
        """
        array = self.tensor(name)
        wanted = self.document.get("checksums", {}).get(name)
        if wanted is None:  # written before there were checksums
            return array
        checksum = Checksum(array.shape)
        rows = checksum.rows(array)
        step = max(1, _TILE // max(1, rows[:1].nbytes))
        for first in range(0, len(rows), step):
            checksum.add(rows[first : first + step], first)
        if str(checksum) != wanted:
            raise FileError(
                f"{self.shown}: {name} is not what was written: its checksum is {checksum}, "
                f"the file says {wanted}",
                "compute it again, or copy the file again",
            )
        return array


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
    if "checksum" in document and document["checksum"] != document_checksum(
        {key: value for key, value in document.items() if key != "checksum"}
    ):
        raise FileError(
            f"{shown}: its metadata is not what was written",
            "compute it again, or copy the file again",
        )
    return HessianFile(path, document, entries, 8 + length, shown)


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
