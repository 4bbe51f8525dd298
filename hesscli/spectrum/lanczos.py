"""Lanczos with full reorthogonalisation and thick restarts, for anything that can multiply a vector.

The basis V (rows) and the pending vector q satisfy the Krylov relation

    H V^T = V^T T + q b^T + R,        T = V H V^T,   V V^T = I,   V q = 0,

so a Ritz pair (theta, y) of T has the residual ||H x - theta x|| <= ||(b y, R y)|| at x = V^T y. A step multiplies the
pending vector, which joins V, and what is new in the product becomes pending. When V is full it is rotated to its best
Ritz vectors (a thick restart), which keeps the relation and costs no product.

One starting vector sees every eigenvalue once, however often it occurs: the copies are orthogonal to all that the
iteration ever builds. So when the wanted pairs have converged, they alone are kept, what is left of their residuals is
R, and a random vector starts a chain in their complement. What that finds either cannot be among the wanted, or joins
them, and the search goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hesscli.spectrum.eigen import WHICH, allowed
from hesscli.spectrum.finite import NotFinite, norm
from hesscli.spectrum.hiding import Hiding
from hesscli.spectrum.interrupts import deferred_interrupt

Multiply = Callable[[Tensor], Tensor]
Report = Callable[[int, float, float], None]

CHAIN = 12
"""Products that a random vector gets at least to find a first copy. One that stands out of the rest of the spectrum
by a third stays hidden from twelve with a probability below 1 %. What repeats eigenvalues, as independent outputs do,
repeats the outermost too: the chain goes on until a copy of that one would have shown; once one was found, of any."""

_UNLIKELY = 0.01
_MOST, _ROOM = 80, 1 << 23  # basis vectors, and numbers in them, that are worth having anyway
_LEAST = 0.1  # share of the allowed residual below which none is asked for
_CANCELLED = 1e-3  # of a product is so little that it is orthogonalised once more
_FEW = 4  # rows of the basis that are faster one by one
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


class Lanczos:
    """A search for eigenpairs of a symmetric operator.

    Args:
        multiply: v [n] -> H v [n].
        size: n.
        top: how many pairs.
        which: one of `WHICH`.
        tolerance: a pair has converged when `||H v - lambda v|| <= tolerance |lambda|`; or when value and residual
            are zero to 3 % of the tolerance times the largest value that was met. Zero: when no more than the
            rounding of a product is left of it.
        generator: of the starting vectors.
        guess: a vector [n] where the wanted ones may be, or zeros. The search starts between it and a random one, so
            that none is missed; in its dtype and on its device.
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
        guess: Tensor,
        report: Report = lambda products, residual, tolerance: None,
    ) -> None:
        self.multiply, self.size, self.top, self.which = multiply, size, min(top, size), which
        self.tolerance, self.generator, self.report = tolerance, generator, report
        # 27 basis vectors for ten pairs: with what is pending and the product, about 30. More where they are short:
        # restarts forget, which costs products at a crowded end.
        roomy = min(_MOST, _ROOM // max(1, size))
        self.capacity = min(size, max(2 * self.top + 7, self.top + CHAIN, roomy))
        self.basis = torch.zeros(self.capacity, size, dtype=guess.dtype, device=guess.device)
        self.T = np.zeros((self.capacity, self.capacity))
        self.R = np.zeros((self.capacity, self.capacity))  # R^T R of the Krylov relation
        self.count = 0
        self.coupling = np.zeros(0)  # b
        length = norm(guess)
        self.pending = self._random()
        if 0 < length < math.inf:
            self.pending = self._unit(self.pending.add_(guess / length))
        self.products = 0
        self.copies = False  # whether there were any
        self.largest = 0.0  # of all Ritz values so far, those that were let go too
        self.interrupted: Callable[[], bool] = lambda: False
        self._solve()

    def run(self, max_products: int) -> Found:
        """Searches until the wanted pairs have converged and no copy of one hides, or the products are spent.

        Ctrl-C ends the search too, with what is known by then.
        """
        with deferred_interrupt() as self.interrupted:
            while self._goes_on(max_products):
                if self.count == self.capacity:
                    self._restart(self.top + (self.capacity - self.top) // 3)
                self._step()
                if self._settled() and not self._hidden(max_products) and self._settled():
                    break
            found = self._found(self.interrupted())
            if found.interrupted or self.products >= max_products:
                return found
            return self._confirmed(found, max_products)

    def _goes_on(self, max_products: int) -> bool:
        return self.count < self.size and self.products < max_products and not self.interrupted()

    # One product

    def _step(self) -> bool:
        """Multiplies the pending vector; what is new in the product is the next one.

        Returns:
            whether anything was new.
        """
        vector, j = self.pending, self.count
        product = self.multiply(vector)
        size = norm(product)
        if not math.isfinite(size):
            raise NotFinite
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
        least = 16 * torch.finfo(product.dtype).eps * max(size, self.largest)
        new = left > least and self.count < self.size
        if new:
            self.coupling[j] = left
            self.pending = product.div_(left)
        elif self.count < self.size:  # an invariant subspace: on elsewhere
            self.pending = self._random()
        self._solve()
        self.report(self.products, self._worst(), self.tolerance)
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
        return parts.double().cpu().numpy()

    def _random(self) -> Tensor:
        """A random vector orthogonal to the basis."""
        v = torch.randn(self.size, generator=self.generator, dtype=torch.float64)
        return self._unit(v.to(self.basis.device, self.basis.dtype))

    def _unit(self, v: Tensor) -> Tensor:
        """v made orthogonal to the basis, and of length one."""
        for _ in range(3):  # once loses orthogonality
            self._orthogonalise(v.div_(norm(v)))
        return v.div_(norm(v))

    # The small problem

    def _solve(self) -> None:
        """Ritz values, their coordinates in the basis, and their residuals."""
        mine = slice(self.count)
        self.values, self.columns = _eigh(self.T[mine, mine])
        left = np.einsum("ik,ij,jk->k", self.columns, self.R[mine, mine], self.columns)
        self.residuals = np.hypot(self.coupling @ self.columns, np.sqrt(left.clip(0)))
        self.largest = max(self.largest, float(np.abs(self.values).max(initial=0.0)))

    def _wanted(self) -> np.ndarray:
        return WHICH[self.which](self.values)[: self.top]

    def _rounding(self) -> float:
        """What a product's rounding leaves of a residual."""
        return 32 * torch.finfo(self.basis.dtype).eps * self.largest

    def _limit(self, values: np.ndarray | float) -> np.ndarray:
        """The residuals with which these have converged."""
        return allowed(values, self.tolerance, self.largest, self._rounding())

    def _reach(self, values: np.ndarray | float) -> np.ndarray:
        """The residuals to try for: those, or what little more products may still gain."""
        return np.maximum(self._limit(values), self._rounding() / 8)

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
        """Whether all wanted pairs have converged, as far as more products can help: what is left in R stays.

        They may have half of what they are still allowed, in squares: the rest is for the copies that may join them,
        and for what the product that confirms them finds.
        """
        best = self._wanted()
        limit, reducible = self._reach(self.values[best]), self.coupling @ self.columns[:, best]
        spent = self.residuals[best] ** 2 - reducible**2
        most = np.maximum(limit**2 - spent, (_LEAST * limit) ** 2) / 2
        return self.count >= self.top and bool((reducible**2 <= most).all())

    def _bounds(self) -> tuple[float, float]:
        """What lies below the first or above the second belongs before the last of the wanted values.

        One that only equals the last may stay away: it would change nothing.
        """
        found = np.sort(self.values[self._wanted()])
        lower = self.top // 2
        last = {
            "largest": (-np.inf, found[0]),
            "smallest": (found[-1], np.inf),
            "magnitude": (-np.abs(found).min(), np.abs(found).min()),
            "both": (found[lower - 1] if lower else -np.inf, found[lower]),
        }[self.which]
        low, high = (
            max(self._limit(value), self._rounding()) if math.isfinite(value) else 0.0
            for value in last
        )
        return float(last[0] - low), float(last[1] + high)

    # Restarts

    def _restart(self, keep: int, first: int = 0, hiding: Sequence[Hiding] = ()) -> None:
        """Rotates the basis, from row `first` on, to its best Ritz vectors."""
        mine = slice(first, self.count)
        values, columns = _eigh(self.T[mine, mine])
        Y = columns[:, WHICH[self.which](values)[:keep]]
        for each in hiding:
            each.restart(values, columns, self.coupling[mine], Y)
        S = np.zeros((self.count, first + Y.shape[1]))
        S[:first, :first] = np.eye(first)
        S[first:, first:] = Y
        self._rotate(Y, self.basis[mine], self.basis[first : S.shape[1]])
        for matrix in (self.T, self.R):
            rotated = S.T @ matrix[: self.count, : self.count] @ S
            matrix[:] = 0
            matrix[: S.shape[1], : S.shape[1]] = rotated
        self.coupling = self.coupling @ S
        self.count = S.shape[1]
        self._solve()

    def _rotate(self, Y: np.ndarray, rows: Tensor, out: Tensor) -> None:
        """Y^T times the rows, in tiles: `out` may be some of them."""
        rotation = torch.from_numpy(np.ascontiguousarray(Y.T)).to(rows)
        for first in range(0, self.size, _TILE):
            tile = slice(first, first + _TILE)
            out[:, tile] = rotation @ rows[:, tile]

    # Copies

    def _hidden(self, max_products: int) -> bool:
        """Whether a random vector's chain in the complement finds what belongs among the wanted.

        If not, nothing of it is kept, so that the residuals of the wanted pairs stay what they are.
        """
        if self.count == self.size:
            return False
        self.copies = self.copies or self._repeated()
        self._restart(self.top)
        start = self.count
        # These have converged: nobody needs the direction of what is left.
        self.R[:start, :start] += np.outer(self.coupling, self.coupling)
        self.coupling = np.zeros(start)
        self.pending = self._random()
        if self._chain_finds(start, max_products):
            return True
        self.count, self.coupling = start, np.zeros(start)
        self._solve()
        return False

    def _chain_finds(self, start: int, max_products: int) -> bool:
        """The chain, from row `start` of the basis on, which ends when a copy of any wanted value would have shown.

        If there were none so far, a copy of the outermost will do, or as many products as the search took.
        """
        low, high = self._bounds()
        hiding = [Hiding(value, self.size - start) for value in (low, high) if np.isfinite(value)]
        outermost = [Hiding(value, self.size - start) for value in self._outermost()]
        began, most = self.products, max(CHAIN, self.products)
        grew = True

        def would_show(copies: list[Hiding]) -> bool:
            return all(h.probability(values, columns, coupling) < _UNLIKELY for h in copies)

        while grew and self._goes_on(
            max_products if self.copies else min(max_products, began + most)
        ):
            if self.count == self.capacity:
                self._restart((self.capacity - start) // 2, start, hiding + outermost)
            grew = self._step()
            for each in hiding + outermost:
                each.step()
            chain = slice(start, self.count)
            values, columns = _eigh(self.T[chain, chain])
            if values[0] < low or values[-1] > high:
                self.copies = True
                return True
            coupling = self.coupling[chain]
            few = not self.copies and self.products - began >= CHAIN
            if would_show(hiding) or (few and would_show(outermost)):
                break
        return False

    def _outermost(self) -> list[float]:
        """Those of the wanted values that are first to show."""
        found = self.values[self._wanted()]
        if self.which == "magnitude":
            return [float(found[0])]
        ends = {
            "largest": [found.max()],
            "smallest": [found.min()],
            "both": [found.max(), found.min()],
        }
        return [float(value) for value in ends[self.which]]

    def _repeated(self) -> bool:
        """Whether some of the wanted values are the same, as far as can be told: rounding brings copies in, too."""
        values = np.sort(self.values[self._wanted()])
        same = np.maximum(self._rounding(), self.tolerance**2 * np.abs(values[1:]))
        return bool((np.diff(values) <= same).any())

    def _found(self, interrupted: bool) -> Found:
        """The wanted pairs; they take the place of the basis."""
        best = self._wanted()
        vectors = self.basis[: len(best)]
        self._rotate(self.columns[:, best], self.basis[: self.count], vectors)
        converged = self._excess(best) <= 1
        residuals = np.maximum(self.residuals[best], self._rounding() / 32)
        return Found(self.values[best], vectors, residuals, converged, self.products, interrupted)

    def _confirmed(self, found: Found, max_products: int) -> Found:
        """The same with residuals that more products have confirmed.

        Where there were copies, what is left of pairs that were kept apart overlaps, and H x is formed for each x. Else
        it is formed for a random combination of the eigenvectors: what it has beyond the Krylov relation is the error
        of that relation (of each pair, about the root of their number less), and is added to every residual.
        """
        best = self._wanted()
        if self.copies and self.products + len(best) <= max_products:
            rests = [
                self.multiply(x) - v * x for x, v in zip(found.vectors, found.values, strict=True)
            ]
            self.products += len(best)
            residuals = np.array([norm(r) for r in rests])
            return replace(
                found,
                residuals=residuals,
                converged=residuals <= self._limit(found.values),
                products=self.products,
            )
        signs = torch.randint(0, 2, (len(best),), generator=self.generator).double() * 2 - 1
        c = signs.to(found.vectors)
        product = self.multiply(c @ found.vectors)
        self.products += 1
        expected = (c * torch.from_numpy(found.values).to(c)) @ found.vectors
        y = self.columns[:, best] @ signs.numpy()
        expected += float(self.coupling @ y) * self.pending
        beyond = norm(product.sub_(expected)) ** 2
        left = float(y @ self.R[: self.count, : self.count] @ y)
        error = (max(0.0, beyond - left) / len(best)) ** 0.5
        residuals = found.residuals + error
        converged = residuals <= self._limit(found.values)
        return Found(found.values, found.vectors, residuals, converged, self.products)


def _eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, ascending, and eigenvectors, columns.

    By PyTorch: the threads of NumPy's BLAS keep a core busy for 20 ms after their work, which slows the next product.
    """
    values, columns = torch.linalg.eigh(torch.from_numpy(matrix))
    return values.numpy(), columns.numpy()
