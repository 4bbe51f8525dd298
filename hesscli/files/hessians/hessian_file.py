"""Hessian files: safetensors with one JSON document in the metadata, read without torch."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hesscli.errors import FileError
from hesscli.files.hessians.checksums import Checksum, document_checksum
from hesscli.files.hessians.hessian_index import SHARD_SCHEMA, Index, read_index
from hesscli.files.hessians.result_names import index_of_shard, index_path, is_index
from hesscli.files.safetensors_header import AGAIN, Header, document_of, read_header
from hesscli.files.sniff import no_such_file

SCHEMA = "hesscli.hessian/1"
_DTYPES = {"F32": "<f4", "F64": "<f8"}
# Of a document, for the commands that read it.
_REQUIRED = tuple(
    "structure curvature blocks total parameters loss gradient_norm model data dtype device checksums checksum".split()
)


@dataclass(frozen=True)
class HessianFile:
    """A Hessian file that was opened: its document, and its tensors, memory-mapped when asked for."""

    path: Path  # of the file, or of the index of several
    document: dict[str, Any]
    headers: tuple[Header, ...]  # of the files that hold the tensors
    shown: str  # what errors call it
    compared: set[str] = field(default_factory=set)  # tensors whose checksum was right

    @cached_property
    def entries(self) -> dict[str, dict[str, Any]]:
        """Each tensor's type and shape, by its key."""
        return {name: entry for header in self.headers for name, entry in header.entries.items()}

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Each parameter's, in the order of the rows."""
        return {facts["name"]: facts["shape"] for facts in self.document["parameters"]}

    def tensor(self, name: str) -> np.ndarray:
        """A tensor by its key, read-only and read from the disk as it is used."""
        header = next(header for header in self.headers if name in header.entries)
        entry = header.entries[name]
        shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
        if 0 in shape:
            return np.zeros(shape, dtype)
        offset = header.start + entry["data_offsets"][0]
        return np.memmap(header.path, dtype, "r", offset, shape)

    def verified(self, name: str) -> np.ndarray:
        """A tensor, once compared with its checksum, read whole; FileError where it is not what was written."""
        array = self.tensor(name)
        if name in self.compared:
            return array
        wanted = self.document["checksums"].get(name)
        checksum = Checksum.of(array)
        if str(checksum) != wanted:
            raise FileError(
                f"{self.shown}: {name} is not what was written: its checksum is {checksum}, "
                f"the file says {wanted}",
                AGAIN,
            )
        self.compared.add(name)
        return array

    def values(self, block: str) -> np.ndarray:
        """A block, compared with its checksum: [n, n], or [n] for a diagonal one."""
        values = self.verified(block)
        return values.reshape(-1) if self.document["structure"] == "elements" else values


def read_hessian(path: Path, shown: str | None = None) -> HessianFile:
    """Opens a Hessian file, or several with an index; only headers are read.

    Args:
        path: the file, the index, or what the file would be called if there were not several.
        shown: what to call it in errors, if not by its path.

    Raises:
        UsageError: there is no such file.
        FileError: it is not a Hessian file, truncated, or may not be read.
    """
    if not os.path.exists(path) and os.path.exists(index_path(path)):
        path = index_path(path)
    shown = shown or str(path)
    try:
        found: Header | Index = read_index(path) if is_index(path) else read_header(path, shown)
    except FileNotFoundError:
        raise no_such_file(
            shown, f"hesscli compute model.pt data.npz -o {shlex.quote(shown)}"
        ) from None
    document = _document(path, shown, found.metadata)
    headers = (found,) if isinstance(found, Header) else found.headers(document)
    file = HessianFile(path, document, headers, shown)
    names = [facts["name"] for facts in document["blocks"]]
    if missing := [name for name in names if name not in file.entries]:
        raise FileError(f"{shown}: lacks the tensor {missing[0]}", AGAIN)
    types = [entry["dtype"] for entry in file.entries.values()]
    if unreadable := [dtype for dtype in types if dtype not in _DTYPES]:
        raise FileError(f"{shown}: holds tensors of type {unreadable[0]}")
    return file


def _document(path: Path, shown: str, metadata: dict[str, str]) -> dict[str, Any]:
    document = document_of(metadata)
    if document is None or "schema" not in document:
        what = "the index of safetensors files" if is_index(path) else "a safetensors file"
        raise FileError(
            f"{shown}: {what}, but not one that hesscli wrote",
            f"hesscli compute {shlex.quote(shown)} data.npz --arch mypkg.nets:make_model",
        )
    schema = document["schema"]
    if schema == SHARD_SCHEMA:
        index = index_of_shard(path)
        raise FileError(
            f"{shown}: holds a part of a Hessian ({document.get('number')} of "
            f"{document.get('count')}); the index opens it",
            f"hesscli show {shlex.quote(str(index))}" if index else None,
        )
    if schema != SCHEMA:
        raise FileError(
            f"{shown}: written in the format {schema}; this hesscli reads {SCHEMA}",
            "hesscli compute model.pt data.npz",
        )
    if missing := [key for key in _REQUIRED if key not in document]:
        raise FileError(f"{shown}: its metadata lacks {', '.join(missing)}", AGAIN)
    if document["checksum"] != document_checksum(
        {key: value for key, value in document.items() if key != "checksum"}
    ):
        raise FileError(f"{shown}: its metadata is not what was written", AGAIN)
    return document


def is_part_of(path: Path, result: Path) -> bool:
    """Whether hesscli wrote this file as the result of this name, or as one of its several files."""
    schema = _schema(path)
    whole = path in (result, index_path(result))
    return schema is not None and whole == (schema != SHARD_SCHEMA)


def _schema(path: Path) -> str | None:
    """What hesscli calls the content of a file that it wrote."""
    try:
        found = read_index(path) if is_index(path) else read_header(path, "")
    except (FileError, OSError):
        return None
    document = document_of(found.metadata)
    return None if document is None else str(document.get("schema", ""))
