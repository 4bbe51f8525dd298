"""Words for messages and documents."""

from __future__ import annotations

from collections.abc import Iterable


def listed(names: Iterable[str], most: int = 10) -> str:
    """Names for a message: the first ones, and how many more there are."""
    found = list(names)
    more = len(found) - most
    return ", ".join(found[:most]) + (f" and {more} more" if more > 0 else "")


def first_line(error: BaseException) -> str:
    """Of what an error says; its kind, where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def dtype_name(dtype: object) -> str:
    """What NumPy calls one of torch's dtypes, as in `float32`."""
    return str(dtype).removeprefix("torch.")
