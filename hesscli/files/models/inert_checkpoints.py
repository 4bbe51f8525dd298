"""Weights that lie in a checkpoint beside Python objects: arguments of a script, numbers of numpy, a scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hesscli.errors import FileError
from hesscli.files.inert_pickle import Thing, stand_in
from hesscli.files.models.checkpoints import ENTRIES, saved_arguments, unwrap
from hesscli.files.sniff import Kind
from hesscli.files.torch_files import NeedsPickleError, read_torch_file
from hesscli.texts import listed

_MOST = 64  # names of objects: each takes one more reading
_DEFAULTDICT: Any = (lambda *_: {}, "collections.defaultdict")


def weights_beside_objects(path: Path, kind: Kind, name: str) -> tuple[object, str] | None:
    """What such a checkpoint holds, with a `Thing` for each object, and a note; None if weights need the objects.

    Nothing of the file is imported or called.

    Args:
        path: the checkpoint.
        kind: `Kind.TORCH_ZIP` or `Kind.TORCH_LEGACY`.
        name: that torch's reader of weights refused first.
    """
    names: list[str] = []
    while name not in names and len(names) < _MOST:
        names.append(name)
        # The reader leaves out the module of what is built in.
        stands: list[Any] = [(stand_in(n), n if "." in n else f"builtins.{n}") for n in names]
        stands.append(_DEFAULTDICT)
        try:
            with torch.serialization.safe_globals(stands):
                content = read_torch_file(path, kind, None)
        except NeedsPickleError as refused:
            name = str(refused)
        except FileError:  # an object that is filled as only its own class can be
            return None
        else:
            note = f"Python objects left unread: {listed(names)}"
            return (content, note) if _stands_apart(content) else None
    return None


def _stands_apart(content: object) -> bool:
    """Whether there are weights that no object is part of, nor of what the architecture is made with."""
    if not isinstance(content, Mapping) or any(_inert(content.get(name)) for name in ENTRIES):
        return False
    weights = unwrap(content, [])
    return weights is not content and not _inert(weights) and not _inert(saved_arguments(content))


def _inert(value: object) -> bool:
    """Whether there is a `Thing` in it."""
    if isinstance(value, Mapping):
        return any(map(_inert, value.values()))
    return isinstance(value, Thing) or (
        isinstance(value, (list, tuple)) and any(map(_inert, value))
    )
