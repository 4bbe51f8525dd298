"""What a header says, read as it stands and without a library: for completion, which has no time to load any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hesscli.files.hessians.result_names import index_path, is_index
from hesscli.files.safetensors_header import parse

_LONGEST = 1 << 24  # bytes of an index that are read


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file.

    Raises:
        ValueError: it is none.
    """
    with path.open("rb") as file:
        return parse(file)[0]


def hessian_metadata(path: Path) -> dict[str, str]:
    """The metadata of a Hessian, in one file or in several with an index."""
    index = path if is_index(path) else index_path(path)
    metadata: dict[str, str]
    if path != index and path.exists():
        metadata = header(path)["__metadata__"]
    else:
        with index.open("rb") as file:
            metadata = json.loads(file.read(_LONGEST))["metadata"]
    return metadata
