"""The hall: model + data + options -> plan -> blocks -> file. The only place where the rooms meet."""

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
    return document | files
