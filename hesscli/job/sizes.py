"""Bytes for people to read. Importing this loads neither torch nor numpy."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes in three digits: `4.31 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
