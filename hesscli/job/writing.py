"""Where a result may go, and small results going there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hesscli.errors import UsageError
from hesscli.files.hessian_file import is_hesscli


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
    if any(used.exists() and path.samefile(used) for used in inputs):
        raise UsageError(f"{path}: is an input of this command", "-o other.safetensors")
    if not force and not is_hesscli(path):
        raise UsageError(f"{path}: exists, and hesscli did not write it; not replaced", "--force")


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes tensors to safetensors, whole or not at all."""
    from safetensors.numpy import save

    data = save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, dict(metadata))
    descriptor, name = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
