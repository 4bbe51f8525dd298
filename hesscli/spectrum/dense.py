"""The whole spectrum of a small operator: its matrix by products with the identity, and LAPACK."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

DENSE = 512
"""Up to this size the matrix is formed: about as many products as a hard search takes, and nothing can be missed."""

_ROWS = 32  # products at a time


def dense(
    multiply: Callable[[Tensor], Tensor],
    size: int,
    report: Callable[[int, int, str], None] = lambda done, total, doing: None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All eigenvalues [n], eigenvectors [n, n] (columns) and residuals [n] of a symmetric operator.

    Args:
        multiply: a block [k, n] -> [k, n]; an object with `columns(start, stop)` too.
        size: n.
        report: hears (rows done, n, what is done).
    """
    matrix = np.empty((size, size))
    for first in range(0, size, _ROWS):
        stop = min(first + _ROWS, size)
        rows = multiply.columns(first, stop)  # type: ignore[attr-defined]
        matrix[first:stop] = rows.double().cpu().numpy()
        report(stop, size, f"{stop} products")
    values, columns = np.linalg.eigh((matrix + matrix.T) / 2)
    residuals = np.linalg.norm(matrix @ columns - columns * values, axis=0)
    return values, columns, residuals
