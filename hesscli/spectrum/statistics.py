"""What the table says about one symmetric block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hesscli.spectrum.eigen import DENSE_LIMIT, extremes

QUICK_LIMIT = 1024
"""Up to this size the extreme eigenvalues of a block are always worth their time (about 0.1 s)."""


@dataclass(frozen=True)
class Statistics:
    trace: float
    fro_norm: float
    eig_max: float | None  # None: not computed
    eig_min: float | None


def of_matrix(matrix: np.ndarray, level: str = "auto") -> Statistics:
    """Trace, Frobenius norm and extreme eigenvalues of a symmetric matrix.

    Args:
        matrix: [n, n].
        level: "basic" leaves the eigenvalues out, "auto" takes them for small blocks, "all" for every block.
    """
    n = matrix.shape[0]
    wanted = level == "all" or (level == "auto" and n <= QUICK_LIMIT)
    low, high = extremes(matrix, DENSE_LIMIT) if wanted else (None, None)
    trace = float(np.trace(matrix, dtype=np.float64))
    return Statistics(trace, _norm(matrix), high, low)


def of_diagonal(diagonal: np.ndarray) -> Statistics:
    """The same of a diagonal matrix, whose eigenvalues are its entries."""
    entries = diagonal.ravel()
    return Statistics(
        float(entries.sum(dtype=np.float64)),
        _norm(entries),
        float(entries.max()),
        float(entries.min()),
    )


def _norm(array: np.ndarray) -> float:
    """The root of the sum of squares, in float64 without a float64 copy of the whole."""
    rows = array.reshape(array.shape[0], -1)
    step = max(1, (1 << 22) // max(rows.shape[1], 1))
    total = 0.0
    for first in range(0, rows.shape[0], step):
        part = rows[first : first + step].astype(np.float64, copy=False)
        total += float(np.vdot(part, part))
    return total**0.5
