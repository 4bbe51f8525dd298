"""Lanczos with full reorthogonalisation and thick restarts, for anything that can multiply a vector.

The basis V and the pending vectors Q (all rows) satisfy the Krylov relation

    H V^T = V^T T + Q^T B,        T = V H V^T,   V V^T = I,   Q V^T = 0,

so a Ritz pair (theta, y) of T has the residual ||H x - theta x|| = ||B y|| at x = V^T y. A step multiplies one pending
vector, which joins V, and what is new in the product becomes pending. When V is full it is rotated to its best Ritz
vectors (a thick restart), which keeps the relation and costs no product.

One starting vector sees every eigenvalue once, however often it occurs: the copies are orthogonal to all that the
iteration ever builds. So when the wanted pairs have converged, a random vector joins the pending ones and grows a
chain of its own in the complement. What it finds there either cannot be among the wanted, or becomes part of the basis,
and the search goes on with both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hesscli.spectrum.eigen import WHICH
from hesscli.spectrum.interrupts import deferred_interrupt

Multiply = Callable[[Tensor], Tensor]
Report = Callable[[int, float, float], None]

CHAIN = 12
"""Products that a random vector gets to find a first copy. One that stands out of the rest of the spectrum by a third
stays hidden from twelve with a probability below 1 %. Once a copy was found, chains are followed to convergence."""

_TILE = 1 << 16  # columns of the basis that are rotated at a time


@dataclass(frozen=True)
class Found:
    """Eigenpairs in the order asked for."""

    values: np.ndarray  # [k], float64
    vectors: Tensor  # [k, n], rows
    residuals: np.ndarray  # [k], ||H v - lambda v||
    converged: np.ndarray  # [k], bool
    products: int
    interrupted: bool = False


@dataclass
class _Pending:
    """A vector that waits to be multiplied, and its row of B."""

    vector: Tensor  # [n]
    coupling: np.ndarray  # [capacity]


class Lanczos:
    """A search for eigenpairs of a symmetric operator.

    Args:
        multiply: v [n] -> H v [n].
        size: n.
        top: how many pairs.
        which: one of `WHICH`.
        tolerance: a pair has converged when `||H v - lambda v|| <= tolerance |lambda|`; or when no more than the
            rounding of a product is left of it; or when it is zero to a tenth of the tolerance times the largest.
        generator: of the starting vectors.
        like: a tensor of the dtype and on the device of the vectors.
        report: hears (products, worst relative residual of the wanted pairs, tolerance).
    """

    def __init__(
        self,
        multiply: Multiply,
        size: int,
        top: int,
        which: str,
        tolerance: float,
        generator: torch.Generator,
        like: Tensor,
        report: Report = lambda products, residual, tolerance: None,
    ) -> None:
        self.multiply, self.size, self.top, self.which = multiply, size, min(top, size), which
        self.tolerance, self.generator, self.report = tolerance, generator, report
        # 27 basis vectors for ten pairs: with what is pending and the product, about 30.
        self.capacity = min(size, max(2 * self.top + 7, self.top + CHAIN))
        self.basis = torch.zeros(self.capacity, size, dtype=like.dtype, device=like.device)
        self.T = np.zeros((self.capacity, self.capacity))
        self.count = 0
        self.pending = [self._random()]
        self.products = 0
        self.copies = False  # whether a chain has found any
        self.interrupted: Callable[[], bool] = lambda: False
        self._solve()

    def run(self, max_products: int) -> Found:
        """Searches until the wanted pairs have converged and no copy of one hides, or the products are spent.

        Ctrl-C ends the search too, with what is known by then.
        """
        with deferred_interrupt() as self.interrupted:
            while self._goes_on(max_products):
                if self.count == self.capacity:
                    self._restart(self.top + (self.capacity - self.top) // 2)
                self._step(self._most_wanted())
                if self._settled() and not self._hidden(max_products) and self._settled():
                    break
            found = self._found(self.interrupted())
            if found.interrupted or self.products >= max_products:
                return found
            return self._confirmed(found)

    def _goes_on(self, max_products: int) -> bool:
        return self.count < self.size and self.products < max_products and not self.interrupted()

    # One product

    def _step(self, chosen: int) -> bool:
        """Multiplies a pending vector; what is new in the product becomes the last pending one.

        Returns:
            whether anything was new.
        """
        vector = self.pending[chosen].vector
        product = self.multiply(vector)
        if not bool(torch.isfinite(product).all()):
            raise NotFinite
        taken = self.pending.pop(chosen)
        self.products += 1
        j = self.count
        self.basis[j] = vector
        self.count += 1
        self.T[j, :j] = self.T[:j, j] = taken.coupling[:j]
        size = float(torch.linalg.norm(product))
        product, c, others = self._orthogonal(product)
        self.T[j, j] = c[j]
        for pending, overlap in zip(self.pending, others, strict=True):
            pending.coupling[j] = overlap
        norm = float(torch.linalg.norm(product))
        held = self.count + len(self.pending)
        least = 16 * torch.finfo(product.dtype).eps * max(size, self._scale())
        new = norm > least and held < self.size
        if new:
            coupling = np.zeros(self.capacity)
            coupling[j] = norm
            self.pending.append(_Pending(product / norm, coupling))
        elif not self.pending and self.count < self.size:  # an invariant subspace: on elsewhere
            self.pending.append(self._random())
        self._solve()
        self.report(self.products, self._worst(), self.tolerance)
        return new

    def _orthogonal(self, v: Tensor) -> tuple[Tensor, np.ndarray, list[float]]:
        """v without its parts in the basis and the pending vectors, and these parts."""
        basis = self.basis[: self.count]
        parts = torch.zeros(self.count, dtype=v.dtype, device=v.device)
        others = [0.0] * len(self.pending)
        for _ in range(2):  # once loses orthogonality, twice is enough
            part = basis @ v
            v = v - part @ basis
            parts += part
            for i, pending in enumerate(self.pending):
                overlap = pending.vector @ v
                v = v - overlap * pending.vector
                others[i] += float(overlap)
        return v, parts.double().cpu().numpy(), others

    def _random(self) -> _Pending:
        """A random vector orthogonal to all others; nothing couples to it."""
        if self.count == 0:
            self.pending = []
        v = torch.randn(self.size, generator=self.generator, dtype=torch.float64)
        v = v.to(self.basis.device, self.basis.dtype)
        for _ in range(2):
            v = self._orthogonal(v / torch.linalg.norm(v))[0]
        return _Pending(v / torch.linalg.norm(v), np.zeros(self.capacity))

    def _most_wanted(self) -> int:
        """The pending vector with the greatest part in the residual of the wanted pair that has the greatest."""
        if len(self.pending) == 1:
            return 0
        best = self._wanted()
        worst = best[np.argmax(self._excess(best))]
        B = np.stack([pending.coupling[: self.count] for pending in self.pending])
        return int(np.argmax(np.abs(B @ self.columns[:, worst])))

    # The small problem

    def _solve(self) -> None:
        """Ritz values, their coordinates in the basis, and their residuals."""
        T = self.T[: self.count, : self.count]
        self.values, self.columns = np.linalg.eigh(T)
        B = np.zeros((len(self.pending), self.count))
        for row, pending in zip(B, self.pending, strict=True):
            row[:] = pending.coupling[: self.count]
        self.residuals = np.linalg.norm(B @ self.columns, axis=0)

    def _wanted(self) -> np.ndarray:
        return WHICH[self.which](self.values)[: self.top]

    def _scale(self) -> float:
        return float(np.abs(self.values).max(initial=0.0))

    def _rounding(self) -> float:
        """What a product's rounding leaves of a residual."""
        return 32 * torch.finfo(self.basis.dtype).eps * self._scale()

    def _limit(self, values: np.ndarray | float) -> np.ndarray:
        """The residuals with which these have converged.

        What is next to zero has no relative error to reach: it may have what keeps it there.
        """
        sizes = np.abs(values)
        zero = 0.1 * self.tolerance * self._scale() - sizes
        return np.maximum(np.maximum(self.tolerance * sizes, zero), self._rounding())

    def _excess(self, places: np.ndarray) -> np.ndarray:
        """Residuals as multiples of what they may be."""
        limit = self._limit(self.values[places])
        zero = np.zeros(len(places))
        return np.divide(self.residuals[places], limit, out=zero, where=limit > 0)

    def _worst(self) -> float:
        """The greatest relative residual of the wanted pairs."""
        best = self._wanted()
        if len(best) < self.top:
            return 1.0
        return float(self._excess(best).max(initial=0.0)) * self.tolerance

    def _settled(self) -> bool:
        """Whether all wanted pairs have converged."""
        return self.count >= self.top and bool((self._excess(self._wanted()) <= 1).all())

    def _enters(self, values: np.ndarray) -> bool:
        """Whether one of these values belongs before the last of the wanted ones.

        One that only equals the last may stay away: it would change nothing.
        """
        found = np.sort(self.values[self._wanted()])
        lower = self.top // 2
        last = {
            "largest": (None, found[0]),
            "smallest": (found[-1], None),
            "magnitude": (-np.abs(found).min(), np.abs(found).min()),
            "both": (found[lower - 1] if lower else None, found[lower]),
        }
        low, high = last[self.which]
        above = high is not None and values > high + self._limit(high)
        below = low is not None and values < low - self._limit(low)
        return bool(np.any(above) or np.any(below))

    # Restarts

    def _restart(self, keep: int) -> None:
        """Rotates the basis to its best Ritz vectors."""
        best = WHICH[self.which](self.values)[:keep]
        self._rotated(0, self.values[best], self.columns[:, best])
        self._solve()

    def _rotated(self, first: int, values: np.ndarray, Y: np.ndarray) -> None:
        """The basis from row `first` on becomes Y^T times itself, Ritz vectors with these values."""
        keep = first + len(values)
        self._rotate(Y, self.basis[first : self.count], self.basis[first:keep])
        for pending in self.pending:
            pending.coupling[first:keep] = pending.coupling[first : self.count] @ Y
            pending.coupling[keep:] = 0
        self.T[first:, :] = self.T[:, first:] = 0
        self.T[np.arange(first, keep), np.arange(first, keep)] = values
        self.count = keep

    def _rotate(self, Y: np.ndarray, rows: Tensor, out: Tensor) -> None:
        """Y^T times the rows, in tiles: `out` may be some of them."""
        rotation = torch.from_numpy(np.ascontiguousarray(Y.T)).to(rows)
        for first in range(0, self.size, _TILE):
            tile = slice(first, first + _TILE)
            out[:, tile] = rotation @ rows[:, tile]

    # Copies

    def _hidden(self, max_products: int) -> bool:
        """Whether a random vector's chain in the complement finds what belongs among the wanted.

        Once there were copies, the chain goes on until what it finds at the end of the spectrum has converged.
        """
        if self.count == self.size:
            return False
        room = self.capacity - (self.top if self.copies else self.capacity - CHAIN)
        if self.capacity - self.count < room:
            self._restart(self.capacity - room)
        if self.count + len(self.pending) == self.size:
            return True  # what is pending is all that there is
        start = self.count
        self.pending.append(self._random())
        while self.products < max_products and not self.interrupted():
            if self.count == self.capacity:
                if not self.copies:
                    return False
                self._shorten(start)
            grew = self._step(len(self.pending) - 1)
            values, columns = np.linalg.eigh(self.T[start : self.count, start : self.count])
            if self._enters(values):
                self.copies = True
                return True
            coupling = self.pending[-1].coupling[start : self.count] if grew else 0 * values
            residuals = np.abs(coupling @ columns)
            ends = WHICH[self.which](values)[: 2 if self.which == "both" else 1]
            if not grew or (residuals[ends] <= self._limit(values[ends])).all():
                return False
        return False

    def _shorten(self, start: int) -> None:
        """A thick restart of a chain alone."""
        values, columns = np.linalg.eigh(self.T[start : self.count, start : self.count])
        best = WHICH[self.which](values)[: (self.capacity - start) // 2]
        self._rotated(start, values[best], columns[:, best])

    def _found(self, interrupted: bool) -> Found:
        best = self._wanted()
        vectors = self.basis.new_empty(len(best), self.size)
        self._rotate(self.columns[:, best], self.basis[: self.count], vectors)
        converged = self._excess(best) <= 1
        values, residuals = (
            self.values[best],
            np.maximum(self.residuals[best], self._rounding() / 32),
        )
        return Found(values, vectors, residuals, converged, self.products, interrupted)

    def _confirmed(self, found: Found) -> Found:
        """The same with residuals that one more product has confirmed.

        H x is formed for a random combination of the eigenvectors. What it has beyond the Krylov relation is the error
        of that relation (of each pair, about the root of their number less), and is added to every residual.
        """
        best = self._wanted()
        signs = torch.randint(0, 2, (len(best),), generator=self.generator).double() * 2 - 1
        c = signs.to(found.vectors)
        product = self.multiply(c @ found.vectors)
        self.products += 1
        expected = (c * torch.from_numpy(found.values).to(c)) @ found.vectors
        y = self.columns[:, best] @ signs.numpy()
        for pending in self.pending:
            expected += float(pending.coupling[: self.count] @ y) * pending.vector
        error = float(torch.linalg.norm((product - expected).double())) / len(best) ** 0.5
        residuals = found.residuals + error
        converged = residuals <= self._limit(found.values)
        return Found(found.values, found.vectors, residuals, converged, self.products)


class NotFinite(ArithmeticError):  # noqa: N818 - told apart by its kind
    """A product holds NaN or infinity."""
