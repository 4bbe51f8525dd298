"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
from contextlib import suppress

# Of mallopt, in malloc.h
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_MMAP_MAX = -4
_ARENA_MAX = -8

_MOST_MAPPED = 1 << 16  # glibc's own limit to the pieces that it maps one by one


def keep_freed_memory() -> None:
    """From now on, memory that is freed is used again instead of going back to the system.

    The C library (glibc) would return every large piece, and the system fills each new one with zeros: up to a third
    of the time where activations are large. All threads use the same memory: by itself, each would keep its own.
    """
    _set_malloc({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _ARENA_MAX: 1})


def release_at_once(size: int) -> None:
    """From now on, memory in pieces of this size or more goes back to the system as soon as it is freed.

    The C library (glibc) would keep up to 32 MiB in a piece, and each thread its own: where vectors are that long, as
    much again as all of them take. Getting new ones costs an eighth of a product's time.
    """
    _set_malloc({_MMAP_MAX: _MOST_MAPPED, _MMAP_THRESHOLD: size, _TRIM_THRESHOLD: size})


def _set_malloc(values: dict[int, int]) -> None:
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for name, value in values.items():
            library.mallopt(name, value)


def release_memory() -> None:
    """Gives memory that was freed back to the system, where the C library would keep it (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
