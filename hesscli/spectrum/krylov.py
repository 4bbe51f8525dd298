"""The Krylov relation of a symmetric operator: a basis that grows by products, and shrinks without any.

The basis V (rows) and the pending vector q satisfy

    H V^T = V^T T + q b^T + R,        T = V H V^T,   V V^T = I,   V q = 0,

so a Ritz pair (theta, y) of T has the residual ||H x - theta x|| <= ||(b y, R y)|| at x = V^T y.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hesscli.errors import NumericalError
from hesscli.spectrum.finite import NotFinite, norm

Multiply = Callable[[Tensor], Tensor]

_CANCELLED = 1e-3  # of a product is so little that it is orthogonalised once more
_FEW = 4  # rows of the basis that are faster one by one
_TILE = 1 << 16  # columns of the basis that are rotated at a time
_LEAST = 1e-140  # of an operator: the squares of its residuals are numbers


class Krylov:
    """The relation, with full reorthogonalisation.

    Args:
        multiply: v [n] -> H v [n].
        capacity: how many vectors the basis has room for.
        guess: a vector [n] to start from, half and half with a random one, or zeros; of the basis' dtype and device.

    Attributes:
        basis: V; its first `count` rows are in use.
        T, R: [capacity, capacity], the latter R^T R; in use as far.
        coupling: b [count].
        pending: q [n].
        values, columns, residuals: the Ritz values, ascending, their coordinates in the basis, and their residuals.
        largest: the norm of the largest product so far, or the magnitude of the largest Ritz value, those that were let
            go too: |H| is no less.
        products: so far.
    """

    def __init__(
        self,
        multiply: Multiply,
        size: int,
        capacity: int,
        generator: torch.Generator,
        guess: Tensor,
    ) -> None:
        self.multiply, self.size, self.capacity = multiply, size, capacity
        self.generator = generator
        self.basis = torch.zeros(capacity, size, dtype=guess.dtype, device=guess.device)
        self.T = np.zeros((capacity, capacity))
        self.R = np.zeros((capacity, capacity))
        self.count = self.products = 0
        self.coupling = np.zeros(0)
        self.largest = 0.0
        length = norm(guess)
        self.pending = self.random()
        if 0 < length < math.inf:
            self.pending = self._unit(self.pending.add_(guess / length))
        self.solve()

    def step(self) -> bool:
        """Multiplies the pending vector; whether anything is new in the product, which is the next one. `solve` is the
        caller's.
        """
        vector, j = self.pending, self.count
        product = self.multiply(vector)
        size = norm(product)
        if not math.isfinite(size):
            raise NotFinite
        self.largest = max(self.largest, size)
        if 0 < self.largest < _LEAST:
            raise NumericalError(
                f"a product of norm {size:.1g}: the squares of residuals would be zero in float64",
                "scale the loss: a constant factor scales all eigenvalues by as much",
            )
        self.products += 1
        self.basis[j] = vector
        self.count += 1
        parts = np.append(self.coupling, float(vector @ product))
        self._subtract(product, parts)
        parts += self._orthogonalise(product)
        left = norm(product)
        if left < _CANCELLED * size:  # what is left is rounding of what was taken away
            parts += self._orthogonalise(product)
            left = norm(product)
        self.T[j, : self.count] = self.T[: self.count, j] = parts
        self.coupling = np.zeros(self.count)
        least = 16 * torch.finfo(product.dtype).eps * self.largest
        new = left > least and self.count < self.size
        if new:
            self.coupling[j] = left
            self.pending = product.div_(left)
        elif self.count < self.size:  # an invariant subspace: on elsewhere
            self.pending = self.random()
        return new

    def _subtract(self, v: Tensor, parts: np.ndarray) -> None:
        """Takes these parts along the basis, most of which are zero, from v."""
        rows = np.flatnonzero(parts)
        if len(rows) > _FEW:
            v.addmv_(self.basis[: self.count].T, torch.from_numpy(parts).to(v), alpha=-1)
        else:
            for row in rows:
                v.sub_(self.basis[row], alpha=float(parts[row]))

    def _orthogonalise(self, v: Tensor) -> np.ndarray:
        """Takes from v its parts along the basis, and returns them."""
        basis = self.basis[: self.count]
        parts = basis @ v
        v.addmv_(basis.T, parts, alpha=-1)
        return parts.cpu().double().numpy()

    def random(self) -> Tensor:
        """A random vector orthogonal to the basis."""
        v = torch.randn(self.size, generator=self.generator, dtype=torch.float64)
        return self._unit(v.to(self.basis.device, self.basis.dtype))

    def _unit(self, v: Tensor) -> Tensor:
        """v made orthogonal to the basis, and of length one."""
        for _ in range(3):  # once loses orthogonality
            self._orthogonalise(v.div_(norm(v)))
        return v.div_(norm(v))

    def solve(self) -> None:
        """Ritz values, their coordinates in the basis, and their residuals."""
        mine = slice(self.count)
        self.values, self.columns = eigh(self.T[mine, mine])
        left = np.einsum("ik,ij,jk->k", self.columns, self.R[mine, mine], self.columns)
        self.residuals = np.hypot(self.coupling @ self.columns, np.sqrt(left.clip(0)))
        self.largest = max(self.largest, float(np.abs(self.values).max(initial=0.0)))

    def keep(self, Y: np.ndarray, first: int = 0) -> None:
        """The basis, from row `first` on, becomes Y^T times itself: a thick restart, where Y are Ritz vectors.

        `solve` is the caller's.
        """
        S = np.zeros((self.count, first + Y.shape[1]))
        S[:first, :first] = np.eye(first)
        S[first:, first:] = Y
        self.rotate(Y, self.basis[first : self.count], self.basis[first : S.shape[1]])
        for matrix in (self.T, self.R):
            rotated = S.T @ matrix[: self.count, : self.count] @ S
            matrix[:] = 0
            matrix[: S.shape[1], : S.shape[1]] = rotated
        self.coupling = self.coupling @ S
        self.count = S.shape[1]

    def rotate(self, Y: np.ndarray, rows: Tensor, out: Tensor) -> None:
        """Y^T times the rows, in tiles: `out` may be some of them."""
        rotation = torch.from_numpy(np.ascontiguousarray(Y.T)).to(rows)
        for first in range(0, self.size, _TILE):
            tile = slice(first, first + _TILE)
            out[:, tile] = rotation @ rows[:, tile]


def eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, ascending, and eigenvectors, columns.

    By PyTorch: the threads of NumPy's BLAS keep a core busy for 20 ms after their work, which slows the next product.
    """
    values, columns = torch.linalg.eigh(torch.from_numpy(matrix))
    return values.numpy(), columns.numpy()
