"""How far two symmetric matrices are from each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hesscli.spectrum.tiles import tiles


@dataclass(frozen=True)
class Difference:
    """Of B from A."""

    fro_norm: float  # ||B - A||
    largest: float  # the largest |B - A| of an entry
    a_norm: float  # ||A||
    a_trace: float
    b_trace: float

    @property
    def relative(self) -> float:
        """||B - A|| / ||A|| in the Frobenius norm; 0 where both are zero."""
        if self.fro_norm == 0:
            return 0.0
        return self.fro_norm / self.a_norm if self.a_norm else float("inf")


def difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """Of two [n, n], or [n] for diagonal ones: in float64, and in tiles, so that neither need fit the memory."""
    squares = a_squares = largest = a_trace = b_trace = 0.0
    for tile in tiles(a):
        ours, theirs = a[tile].astype(np.float64), b[tile].astype(np.float64)
        a_trace += _trace(ours, tile.start)
        b_trace += _trace(theirs, tile.start)
        a_squares += float(np.vdot(ours, ours))
        theirs -= ours
        squares += float(np.vdot(theirs, theirs))
        # numpy's maximum, unlike Python's, keeps NaN.
        largest = float(np.maximum(largest, np.abs(theirs).max(initial=0.0)))
    return Difference(squares**0.5, largest, a_squares**0.5, a_trace, b_trace)


def _trace(rows: np.ndarray, first: int) -> float:
    """The share of the trace that lies in these rows of the matrix."""
    return float(rows.sum() if rows.ndim == 1 else np.trace(rows, offset=first))
