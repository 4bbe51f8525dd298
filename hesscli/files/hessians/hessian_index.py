"""The index of a result in several files: its document, and which tensor is in which file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hesscli.errors import FileError
from hesscli.files.safetensors_header import Header, document_of, read_header
from hesscli.files.sniff import file_beside

SHARD_SCHEMA = "hesscli.shard/1"
_AGAIN = "compute it again, or copy all of its files again"


@dataclass(frozen=True)
class Index:
    """What an index says."""

    path: Path
    metadata: dict[str, str]
    places: dict[str, str]  # tensor -> name of its file

    def headers(self, document: dict[str, Any]) -> tuple[Header, ...]:
        """The headers of all its files, which must be those that were written with this document.

        Raises:
            FileError: a file is missing, damaged, or of another result.
        """
        found = tuple(map(self._header, dict.fromkeys(self.places.values())))
        for header in found:
            part = document_of(header.metadata) or {}
            if part.get("of") != document["checksum"]:
                raise FileError(
                    f"{header.path}: does not belong to the Hessian that {self.path.name} lists",
                    _AGAIN,
                )
        held = {name for header in found for name in header.entries}
        if held != document["checksums"].keys():
            raise FileError(f"{self.path}: lists other tensors than are in its files", _AGAIN)
        return found

    def _header(self, name: str) -> Header:
        path = file_beside(self.path, name, _AGAIN)
        try:
            return read_header(path, str(path))
        except FileNotFoundError:
            raise FileError(f"{path}: is missing, and {self.path.name} lists it", _AGAIN) from None


def read_index(path: Path) -> Index:
    """Reads an index, but none of its files.

    Raises:
        FileNotFoundError: there is none.
        FileError: it is none, damaged, or may not be read.
    """
    try:
        if path.exists() and not path.is_file():
            raise FileError(f"{path}: not a regular file")
        index = json.loads(path.read_bytes())
        metadata, places = index.get("metadata", {}), index["weight_map"]
        if not isinstance(metadata, dict) or not all(
            isinstance(name, str) for name in places.values()
        ):
            raise ValueError("its parts are not what they are in an index")
        return Index(path, metadata, places)
    except FileNotFoundError:
        raise
    except PermissionError:
        raise FileError(f"{path}: permission denied") from None
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        raise FileError(
            f"{path}: not the index of a Hessian in several files, or one that was cut short"
        ) from None
