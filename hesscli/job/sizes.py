"""Bytes for people to read. Importing this loads neither torch nor numpy."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes in three digits: `4.31 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def parse_size(text: str) -> int:
    """`4GiB`, `500MB`, `4096` as bytes.

    Raises:
        ValueError: it is none of that.
    """
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", 1):
        units |= {letter: 1000**power, f"{letter}B": 1000**power, f"{letter}IB": 1024**power}
    digits = text.strip().rstrip("KMGTiIBkmgtb ")
    unit = text.strip()[len(digits) :].strip().upper()
    count = float(digits) * units[unit] if unit in units else -1.0
    if not 0 < count < float("inf"):
        raise ValueError(f"{text!r} is not a size like 4GiB or 500MB")
    return int(count)
