"""Where a result may go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
    if not path.is_file():
        raise UsageError(f"{path}: is not a regular file; not replaced", "-o -")
    if any(used.exists() and path.samefile(used) for used in inputs):
        raise UsageError(f"{path}: is an input of this command", "-o other.safetensors")
    if not force and not is_hesscli(path):
        raise UsageError(f"{path}: exists, and hesscli did not write it; not replaced", "--force")
