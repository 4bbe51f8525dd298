"""The header of a safetensors file. Importing this loads no torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from hesscli.errors import FileError
from hesscli.files.sniff import Kind, kind_of, unsupported
from hesscli.texts import first_line

AGAIN = "compute it again, or copy the file again"
_LONGEST = 100_000_000  # bytes, by the format
_MODELS = (Kind.TORCHSCRIPT, Kind.EXPORTED, Kind.TORCH_ZIP, Kind.TORCH_LEGACY)


@dataclass(frozen=True)
class Header:
    """What is in a safetensors file, and where."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, dict[str, Any]]
    start: int  # of the tensors


def read_header(path: Path, shown: str) -> Header:
    """Reads a header, and compares it with the file's length; errors call the file as it is `shown`.

    Raises:
        FileNotFoundError: there is none.
        FileError: it is not a safetensors file, truncated, or may not be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if path.exists() and not path.is_file():
            raise FileError(f"{shown}: not a regular file")
        # Opened here first: safe_open calls a file that may not be read a missing one.
        with path.open("rb") as raw, safe_open(path, "np") as file:  # checks lengths and offsets
            metadata = file.metadata() or {}
            entries, start = parse(raw)
    except FileNotFoundError:
        raise
    except PermissionError:
        raise FileError(f"{shown}: permission denied") from None
    except (SafetensorError, OSError, ValueError) as error:
        if (kind := kind_of(path)) not in (Kind.SAFETENSORS, Kind.UNKNOWN):
            named = kind in _MODELS and shown == str(path)  # and not standard input
            model = shlex.quote(shown) if named else "model.pt"
            hint = f"hesscli compute {model} data.npz"
            raise unsupported(shown, kind, "a Hessian file", hint) from None
        raise FileError(
            f"{shown}: not a Hessian file, or one that was cut short ({first_line(error)})", AGAIN
        ) from None
    entries.pop("__metadata__", None)
    return Header(path, metadata, entries, start)


def parse(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header as it stands at the start of a file, and where the tensors begin; ValueError where it is none."""
    length = int.from_bytes(file.read(8), "little")
    if length > _LONGEST:
        raise ValueError("not a safetensors header")
    found: dict[str, Any] = json.loads(file.read(length))
    return found, 8 + length


def document_of(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """hesscli's JSON document in a file's metadata; None where there is none, or one that is damaged."""
    try:
        found = json.loads(metadata["hesscli"], parse_constant=_no_number)
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _no_number(text: str) -> NoReturn:
    """JSON has no NaN or infinity, and hesscli writes none."""
    raise ValueError(text)
