"""Large arrays some rows at a time, so that they need not fit the memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_NUMBERS = 1 << 22  # that are read at a time


def tiles(array: np.ndarray) -> Iterator[slice]:
    """The rows of an array [n, ...], as many at a time as are about four million numbers, but never less than one."""
    step = max(1, _NUMBERS // max(1, array[:1].size))
    for first in range(0, len(array), step):
        yield slice(first, min(first + step, len(array)))
