"""Lanczos with full reorthogonalisation and thick restarts, for anything that can multiply a vector.

A step multiplies the pending vector of a Krylov relation (`krylov.py`), which joins the basis, and what is new in the
product becomes pending. When the basis is full it is rotated to its best Ritz vectors (a thick restart), which keeps
the relation and costs no product.

One starting vector sees every eigenvalue once, however often it occurs: the copies are orthogonal to all that the
iteration ever builds. So when the wanted pairs have converged, they alone are kept, what is left of their residuals is
R, and a random vector starts a chain in their complement. What that finds either cannot be among the wanted, or joins
them, and the search goes on.

Source: K. Wu and H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, 2000.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hesscli.spectrum.eigen import WHICH, allowed
from hesscli.spectrum.finite import norm
from hesscli.spectrum.hiding import Hiding
from hesscli.spectrum.interrupts import deferred_interrupt
from hesscli.spectrum.krylov import Krylov, Multiply, eigh

Report = Callable[[int, float, float], None]

CHAIN = 12
"""Products that a random vector gets at least to find a first copy. One that stands out of the rest of the spectrum
by a third stays hidden from twelve with a probability below 1 %. What repeats eigenvalues, as independent outputs do,
repeats the outermost too: the chain goes on until a copy of that one would have shown; once one was found, of any."""

_UNLIKELY = 0.01
_MOST, _ROOM = 80, 1 << 23  # basis vectors, and numbers in them, that are worth having anyway
_LEAST = 0.1  # share of the allowed residual below which none is asked for


@dataclass(frozen=True)
class Found:
    """Eigenpairs in the order asked for."""

    values: np.ndarray  # [k], float64
    vectors: Tensor  # [k, n], rows
    residuals: np.ndarray  # [k], ||H v - lambda v||
    converged: np.ndarray  # [k], bool
    products: int
    interrupted: bool = False
    copies_sought: bool = True  # or else one of a repeated value may be missing
    spent: bool = False  # the products ended the search


class Lanczos(Krylov):
    """A search for eigenpairs of a symmetric operator.

    Args:
        multiply: v [n] -> H v [n].
        which: one of `WHICH`.
        tolerance: a pair has converged when `||H v - lambda v|| <= tolerance |lambda|`; or when value and residual
            are zero to 3 % of the tolerance times the largest value that was met. Zero: when no more than the
            rounding of a product is left of it.
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
        self.top, self.which, self.tolerance, self.report = min(top, size), which, tolerance, report
        # 27 basis vectors for ten pairs: with what is pending and the product, about 30. More where they are short:
        # restarts forget, which costs products at a crowded end.
        roomy = min(_MOST, _ROOM // max(1, size))
        capacity = min(size, max(2 * self.top + 7, self.top + CHAIN, roomy))
        self.copies = False  # whether there were any
        self.copies_sought = False  # whether the last chain came to its end
        self.interrupted: Callable[[], bool] = lambda: False
        super().__init__(multiply, size, capacity, generator, guess)

    def run(self, max_products: int) -> Found:
        """Searches until the wanted pairs have converged and no copy of one hides, or the products are spent.

        Ctrl-C ends the search too, with what is known by then.
        """
        with deferred_interrupt() as self.interrupted:
            while self._goes_on(max_products):
                if self.count == self.capacity:
                    self._restart(self.top + (self.capacity - self.top) // 3)
                self._step()
                if self._settled() and not self._hidden(max_products):
                    break
            found = self._found(self.interrupted())
            spent = self.products >= max_products
            if found.interrupted or spent:
                return replace(found, copies_sought=self.copies_sought, spent=spent)
            return self._confirmed(found, max_products)

    def _goes_on(self, max_products: int) -> bool:
        return self.products < max_products and not self.interrupted()

    def _step(self) -> bool:
        """One product; whether anything in it was new."""
        new = self.step()
        self.solve()
        self.report(self.products, self._worst(), self.tolerance)
        return new

    # Convergence

    def _wanted(self) -> np.ndarray:
        return WHICH[self.which](self.values)[: self.top]

    def _rounding(self) -> float:
        """What a product's rounding leaves of a residual."""
        return 32 * torch.finfo(self.basis.dtype).eps * self.largest

    def _limit(self, values: np.ndarray | float) -> np.ndarray:
        """The residuals with which these have converged."""
        return allowed(values, self.tolerance, self.largest, self._rounding())

    def _worst(self) -> float:
        """The greatest relative residual of the wanted pairs."""
        best = self._wanted()
        if len(best) < self.top:
            return 1.0
        limit = np.maximum(self._limit(self.values[best]), np.finfo(float).tiny)
        return float((self.tolerance * self.residuals[best] / limit).max(initial=0.0))

    def _settled(self) -> bool:
        """Whether all wanted pairs have converged, as far as more products can help: what is left in R stays.

        They may have half of what they are still allowed, in squares: the rest is for the copies that may join them,
        and for what the product that confirms them finds.
        """
        best = self._wanted()
        # Or, where no residual is allowed, what little more products may still gain.
        limit = np.maximum(self._limit(self.values[best]), self._rounding() / 8)
        reducible = self.coupling @ self.columns[:, best]
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
        low, high = (max(self._limit(value), self._rounding()) for value in last)
        return float(last[0] - low), float(last[1] + high)

    # Restarts

    def _restart(self, keep: int, first: int = 0, hiding: Sequence[Hiding] = ()) -> None:
        """Keeps the best Ritz vectors of the basis from row `first` on, and what is before."""
        mine = slice(first, self.count)
        values, columns = eigh(self.T[mine, mine])
        Y = columns[:, WHICH[self.which](values)[:keep]]
        for each in hiding:
            each.restart(values, columns, self.coupling[mine], Y)
        self.keep(Y, first)

    # Copies

    def _hidden(self, max_products: int) -> bool:
        """Whether a random vector's chain in the complement finds what belongs among the wanted.

        If not, nothing of it is kept, so that the residuals of the wanted pairs stay what they are.
        """
        self.copies_sought = self.count == self.size
        if self.copies_sought:
            return False
        self.copies = self.copies or self._repeated()
        self._restart(self.top)
        start = self.count
        # These have converged: nobody needs the direction of what is left.
        self.R[:start, :start] += np.outer(self.coupling, self.coupling)
        self.coupling = np.zeros(start)
        self.pending = self.random()
        if self._chain_finds(start, max_products):
            return True
        self.count, self.coupling = start, np.zeros(start)
        self.solve()
        return False

    def _chain_finds(self, start: int, max_products: int) -> bool:
        """The chain, from row `start` of the basis on, which ends when a copy of any wanted value would have shown.

        If there were none so far, a copy of the outermost will do, or as many products as the search took.
        """
        low, high = self._bounds()
        hiding = [Hiding(value, self.size - start) for value in (low, high)]
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
            values, columns = eigh(self.T[chain, chain])
            if values[0] < low or values[-1] > high:
                self.copies = True
                return True
            coupling = self.coupling[chain]
            few = not self.copies and self.products - began >= CHAIN
            if would_show(hiding) or (few and would_show(outermost)):
                self.copies_sought = True
                break
        return False

    def _outermost(self) -> list[float]:
        """Those of the wanted values that are first to show."""
        found = self.values[self._wanted()]
        ends = {"magnitude": [found[0]], "both": [found.max(), found.min()]}
        return [float(value) for value in ends.get(self.which, [found[0]])]

    def _repeated(self) -> bool:
        """Whether some of the wanted values are the same, as far as can be told: rounding brings copies in, too."""
        values = np.sort(self.values[self._wanted()])
        same = np.maximum(self._rounding(), self.tolerance**2 * np.abs(values[1:]))
        return bool((np.diff(values) <= same).any())

    def _found(self, interrupted: bool) -> Found:
        """The wanted pairs; they take the place of the basis. None has converged while some are not even met."""
        best = self._wanted()
        vectors = self.basis[: len(best)]
        self.rotate(self.columns[:, best], self.basis[: self.count], vectors)
        converged = self.residuals[best] <= self._limit(self.values[best])
        converged &= len(best) == self.top
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
            pairs = zip(found.vectors, found.values, strict=True)
            residuals = np.array([norm(self.multiply(x) - v * x) for x, v in pairs])
            self.products += len(best)
        else:
            residuals = found.residuals + self._relation_error(found, best)
        converged = residuals <= self._limit(found.values)
        return replace(found, residuals=residuals, converged=converged, products=self.products)

    def _relation_error(self, found: Found, best: np.ndarray) -> float:
        """What the residual of a random combination of the eigenvectors has beyond R, in which all is that is known."""
        signs = torch.randint(0, 2, (len(best),), generator=self.generator).double() * 2 - 1
        c = signs.to(found.vectors)
        product = self.multiply(c @ found.vectors)
        self.products += 1
        expected = (c * torch.from_numpy(found.values).to(c)) @ found.vectors
        beyond = norm(product.sub_(expected)) ** 2
        y = self.columns[:, best] @ signs.numpy()
        left = float(y @ self.R[: self.count, : self.count] @ y)
        return float((max(0.0, beyond - left) / len(best)) ** 0.5)
