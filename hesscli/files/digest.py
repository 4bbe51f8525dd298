"""The SHA-256 of a file, which ties a Hessian to the model and the data it came from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from hesscli.errors import FileError


def sha256(path: Path | str) -> str:
    """The file's SHA-256 in hexadecimal; FileError where it cannot be read to its end."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error


def sha256_of_all(paths: Sequence[Path | str]) -> str:
    """The file's SHA-256; of several files, that of what `sha256sum` would print of them, names without folders."""
    if len(paths) == 1:
        return sha256(paths[0])
    lines = (f"{sha256(path)}  {os.path.basename(path)}\n" for path in paths)
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def sha256_of(tensors: Mapping[str, object]) -> str:
    """The SHA-256 of named tensors: their names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        if isinstance(t, torch.Tensor):
            digest.update(f"{name} {t.dtype} {list(t.shape)};".encode())
            for part in _parts(t.detach().cpu()):
                digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """The numbers that make a tensor: of a sparse one, where they are and what they are."""
    if tensor.layout is torch.strided:
        return [tensor]
    sparse = tensor.to_sparse_coo().coalesce()
    return [sparse.indices(), sparse.values()]
