"""The whole spectrum of a small operator: its matrix by products with the identity, and LAPACK."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from hesscli.spectrum.finite import finite

DENSE = 512
"""Up to this size the matrix is formed: about as many products as a hard search takes, and nothing can be missed."""

HELD = 6
"""Matrices in float64 that it takes at most, those of LAPACK included; measured: 5.2."""

_ROWS = 32  # products at a time


def dense(
    rows: Callable[[int, int], Tensor],
    size: int,
    report: Callable[[int, int, str], None] = lambda done, total, doing: None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All eigenvalues [n], eigenvectors [n, n] (columns) and residuals [n] of a symmetric operator.

    Args:
        rows: start, stop -> rows start to stop of its matrix, [stop - start, n].
        report: hears (rows done, n, what is done).
    """
    matrix = np.empty((size, size))
    for first in range(0, size, _ROWS):
        stop = min(first + _ROWS, size)
        matrix[first:stop] = finite(rows(first, stop)).cpu().double().numpy()
        report(stop, size, f"{stop} products")
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    residuals = np.linalg.norm(matrix @ vectors - vectors * values, axis=0)
    return values, vectors, residuals
