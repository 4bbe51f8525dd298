"""What the table says about one symmetric block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hesscli.spectrum.eigen import DENSE_LIMIT, extremes

QUICK_LIMIT = 1536
"""Up to this size the extreme eigenvalues of a block are always worth their time (a quarter of a second)."""

_RUN = 1 << 14  # numbers


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
    wanted = n > 0 and (level == "all" or (level == "auto" and n <= QUICK_LIMIT))
    low, high = extremes(matrix, DENSE_LIMIT) if wanted else (None, None)
    trace = float(np.trace(matrix, dtype=np.float64))
    return Statistics(trace, _norm(matrix), high, low)


def of_diagonal(diagonal: np.ndarray) -> Statistics:
    """The same of a diagonal matrix, whose eigenvalues are its entries."""
    entries = diagonal.ravel()
    high = float(entries.max()) if entries.size else None
    low = float(entries.min()) if entries.size else None
    return Statistics(float(entries.sum(dtype=np.float64)), _norm(entries), high, low)


def _norm(array: np.ndarray) -> float:
    """The root of the sum of squares: short runs in their own precision, their sum in float64."""
    flat = array.reshape(-1)
    runs = (flat[first : first + _RUN] for first in range(0, flat.size, _RUN))
    return sum(float(np.vdot(run, run)) for run in runs) ** 0.5
