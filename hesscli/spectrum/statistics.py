"""What the table says about one symmetric block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

QUICK_LIMIT = 1536
"""Up to this size the extreme eigenvalues of a block are always worth their time (a quarter of a second)."""

_RUN = 1 << 14  # numbers


@dataclass(frozen=True)
class Statistics:
    """Of one block; eigenvalues and norm have the unit of its entries."""

    trace: float
    fro_norm: float
    eig_max: float | None = None  # None: not computed
    eig_min: float | None = None
    eig_abs_min: float | None = None  # the smallest magnitude; 0 where it is but rounding
    negative: int | None = None  # how many are below zero by more than rounding


def of_matrix(matrix: np.ndarray, level: str = "auto") -> Statistics:
    """Trace, Frobenius norm and extreme eigenvalues of a symmetric matrix.

    Args:
        level: "basic" leaves the eigenvalues out, "auto" takes them for small blocks, "all" for every block.
    """
    n = matrix.shape[0]
    trace, norm = float(np.trace(matrix, dtype=np.float64)), norm_of(matrix)
    if n == 0 or level == "basic" or (level == "auto" and n > QUICK_LIMIT):
        return Statistics(trace, norm)
    values = np.linalg.eigvalsh(matrix.astype(np.float64))  # scipy's takes 0.2 s to import
    return Statistics(trace, norm, *_of_spectrum(values, matrix.dtype))


def of_diagonal(diagonal: np.ndarray) -> Statistics:
    """The same of a diagonal matrix, whose eigenvalues are its entries."""
    entries = diagonal.ravel()
    trace, norm = float(entries.sum(dtype=np.float64)), norm_of(entries)
    if not entries.size:
        return Statistics(trace, norm)
    return Statistics(trace, norm, *_of_spectrum(entries, entries.dtype))


def _of_spectrum(values: np.ndarray, dtype: np.dtype) -> tuple[float, float, float, int]:
    """Largest, smallest, smallest in magnitude, and how many are negative.

    Eigenvalues of an n x n matrix in `dtype` are known to n eps times the largest one, as for
    `numpy.linalg.matrix_rank`; what is smaller is zero.
    """
    largest, smallest = float(values.max()), float(values.min())
    rounding = len(values) * float(np.finfo(dtype).eps) * max(largest, -smallest)
    least = float(np.abs(values).min())
    return (
        largest,
        smallest,
        least if least > rounding else 0.0,
        int((values < -rounding).sum()),
    )


def norm_of(array: np.ndarray) -> float:
    """The root of the sum of squares: short runs in their own precision, their sum in float64; where squares may leave
    the range of that precision, all in float64, as multiples of the largest entry."""
    flat = array.reshape(-1)
    runs = [flat[first : first + _RUN] for first in range(0, flat.size, _RUN)]
    total = sum(float(np.vdot(run, run)) for run in runs)
    limits = np.finfo(flat.dtype)
    least = float(limits.tiny) / float(limits.eps)  # a mean above which what underflows is nothing
    if not flat.size * least <= total < math.inf:
        largest = max((float(np.abs(run).max()) for run in runs), default=0.0)
        if not 0 < largest < math.inf:
            return largest
        scaled = (run.astype(np.float64) / largest for run in runs)
        return largest * sum(float(np.vdot(run, run)) for run in scaled) ** 0.5
    return total**0.5
