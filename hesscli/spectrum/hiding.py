"""How likely an eigenvector stays hidden from a Lanczos chain that a random vector started.

Let u be an eigenvector of the value lambda, h its coordinates in the chain's basis, and w the one along the pending
vector. The Krylov relation H V^T = V^T T + q b^T gives

    (lambda - T) h = b w,        |h|^2 + w^2 <= 1,

so the chain bounds each coordinate, and with them <u, v> for the vector v that it started with. That is about
Gaussian with the variance 1 / n, where v was random: it is less than c with the probability sqrt(2 n / pi) c.
"""

from __future__ import annotations

import math

import numpy as np


class Hiding:
    """What is known of <u, v> for an eigenvector u of one value; a linear function of its coordinates.

    Args:
        value: lambda, outside of the chain's Ritz values; infinite, it does not hide.
        size: n, of the space that v was drawn from.
    """

    def __init__(self, value: float, size: int) -> None:
        self.value, self.size = value, size
        self.start = np.ones(1)  # along the basis, and the pending vector: v itself is pending

    def step(self) -> None:
        """The pending vector joins the basis, and there is a new one."""
        self.start = np.append(self.start, 0.0)

    def restart(
        self, ritz: np.ndarray, columns: np.ndarray, coupling: np.ndarray, Y: np.ndarray
    ) -> None:
        """The basis becomes Y^T times itself; what u has along the rest is known from the pending vector."""
        *start, pending = self.start
        rest = np.asarray(start) - Y @ (Y.T @ start)
        known = rest @ self._coordinates(ritz, columns, coupling)
        self.start = np.append(Y.T @ start, pending + known)

    def probability(self, ritz: np.ndarray, columns: np.ndarray, coupling: np.ndarray) -> float:
        """That v has so little of u that it does not show; with the eigenvalues and eigenvectors of T."""
        h = self._coordinates(ritz, columns, coupling)
        along = abs(float(self.start[:-1] @ h + self.start[-1])) / math.sqrt(float(h @ h) + 1)
        return math.sqrt(2 * self.size / math.pi) * along

    def _coordinates(
        self, ritz: np.ndarray, columns: np.ndarray, coupling: np.ndarray
    ) -> np.ndarray:
        """h where w is one."""
        gaps = self.value - ritz
        return columns @ (columns.T @ coupling / np.where(gaps == 0, np.finfo(float).tiny, gaps))
