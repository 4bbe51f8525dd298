"""Where a result may go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hesscli.errors import UsageError
from hesscli.files.hessian_file import is_hesscli
from hesscli.files.hessian_writer import HessianWriter

PICTURES = (".png", ".svg", ".pdf")


def may_write(path: Path, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuses to write over anything but an earlier result.

    Args:
        path: where the output goes.
        force: replace any file.
        inputs: the files that the command reads; they are never replaced.

    Raises:
        UsageError: with the way out.
    """
    if not path.parent.is_dir():
        raise UsageError(f"{path}: no such folder", f"mkdir -p {path.parent}")
    if path.is_dir():
        raise UsageError(f"{path}: is a folder", f"-o {path / 'hessian.safetensors'}")
    if not path.exists():
        return
    if not path.is_file():
        raise UsageError(f"{path}: is not a regular file; not replaced", "-o -")
    if any(used.exists() and path.samefile(used) for used in inputs):
        raise UsageError(f"{path}: is an input of this command", "-o other.safetensors")
    if not force and not (is_hesscli(path) or _says_hesscli(path)):
        raise UsageError(f"{path}: exists, and hesscli did not write it; not replaced", "--force")


def _says_hesscli(path: Path) -> bool:
    """Whether a JSON document or a picture names hesscli as its maker."""
    if path.suffix.lower() not in (".json", *PICTURES):
        return False
    with path.open("rb") as file:
        return b"hesscli" in file.read(1 << 20)


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], dtype: str, document: Mapping[str, Any]
) -> None:
    """A safetensors file of these tensors, whole or not at all, with the document in its metadata."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with HessianWriter(path, shapes, dtype, document) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit(document)
