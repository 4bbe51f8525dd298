"""Documents, which `--json` prints and files keep. Importing this loads neither torch nor numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Document = dict[str, Any]
"""What `--json` prints."""


def timeless(document: Document) -> Document:
    """The document as it goes into the file: the same command gives the same bytes, so no times and no paths."""
    files = {
        part: dict(document[part]) for part in ("model", "data", "query") if document.get(part)
    }
    for facts in files.values():
        facts.pop("path", None)
    return without_infinities(document | files)


def without_infinities(value: Any) -> Any:
    """A document, or a part of one, in which what is not finite is None, as JSON has it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(item) for item in value]
    return value
