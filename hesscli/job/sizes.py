"""Sizes and counts for people to read. Importing this loads neither torch nor numpy."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1} | {
    letter + end: base**power
    for power, letter in enumerate("KMGT", 1)
    for end, base in (("", 1000), ("B", 1000), ("IB", 1024))
}
_SIZE = re.compile(rf"(\d+\.?\d*|\.\d+)\s*({'|'.join(_UNITS)})", re.IGNORECASE)


def size(count: float) -> str:
    """Bytes in three digits: `4.31 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # which three digits tell from a thousand
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def parse_size(text: str) -> int:
    """`4GiB`, `500MB`, `4096` as bytes; ValueError where it is none of that, or less than a byte."""
    found = _SIZE.fullmatch(text.strip())
    count = float(found[1]) * _UNITS[found[2].upper()] if found else 0.0
    if count < 1:
        raise ValueError(f"{text!r} is not a size like 4GiB or 500MB")
    return int(count)


def counted(count: int, thing: str) -> str:
    """So many of a thing."""
    return f"{count} {thing}{'' if count == 1 else 's'}"
