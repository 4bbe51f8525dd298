"""The trace of a symmetric operator, whole and by parts, estimated with its standard error.

For a random vector z of signs, E[z_b . (H z)_b] is the trace of H over the coordinates b (Hutchinson). Its variance is
2 ||H||^2 less the diagonal, and often a few large eigenvalues make most of it. They also skew the samples: most are too
small, and so is the error that these show. So the first samples serve as a sketch, by which the leading directions are
taken out and their trace is had exactly: where they skew the samples, and where it saves products.

Source: M. Hutchinson, A stochastic estimator of the trace, 1989; the sketch is that of R. Meyer et al., Hutch++, 2021.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hesscli.widest import wide

_SKETCH = 16  # samples: the least that a standard error is taken from, and what a sketch is made of
_SKEWED = 0.5  # if one more direction taken out leaves less than this much of the variance, it skews the samples
_SURE = 0.2  # of the total: one of less than five standard errors may be zero, met by chance
_STUDENT = (6.98, 2.26, 1.65, 1.43, 1.32, 1.26, 1.21, 1.18, 1.16, 1.14, 1.13, 1.12, 1.11, 1.1)
"""By how much the standard error of 2 to 15 samples is widened, so that two of it hold as often as two of one that is
known: half of Student's t at 97.7 %. That of more is by its expansion in 1 / (samples - 1)."""
_NOTHING = 1e-9  # of the variance: rounding


@dataclass(frozen=True)
class Estimate:
    """Traces of the parts and of the whole."""

    parts: np.ndarray  # [b]
    errors: np.ndarray  # [b], standard errors
    total: float
    error: float
    products: int
    converged: bool
    interrupted: bool = False


class _Samples:
    """Of the traces of consecutive parts, each from a product with random signs."""

    def __init__(
        self,
        multiply: Callable[[Tensor], Tensor],
        sizes: Sequence[int],
        generator: torch.Generator,
        like: Tensor,
    ) -> None:
        self._multiply, self._sizes = multiply, list(sizes)
        self._generator, self._like = generator, like
        self._basis = like.new_empty(0, sum(sizes))  # directions that are left out of the signs
        self._known = np.zeros(len(sizes))  # their traces, exactly
        self._traces: list[np.ndarray] = []  # [b] each
        self._following = self._signs()
        self._before: Estimate | None = None  # what the samples came to that were thrown away
        self.products = 0

    def __len__(self) -> int:
        return len(self._traces)

    def draw(self) -> Tensor:
        """One more sample; the product that it is made of."""
        z = self._following
        product = self._times(z - (self._basis @ z) @ self._basis)
        self._following = self._signs()  # while a GPU is still at the product
        self._traces.append(self._known + self._by_part(z, product))
        return product

    def leave_out(self, basis: Tensor) -> None:
        """Begins anew without these orthonormal directions [k, n], whose traces are had exactly."""
        known = np.sum([self._by_part(q, self._times(q)) for q in basis], axis=0)
        self._before = self.estimate()
        self._basis, self._known, self._traces = basis, known, []

    def estimate(self, converged: bool = False, interrupted: bool = False) -> Estimate:
        """What the samples come to."""
        if self._before is not None and len(self._traces) < 2:
            return replace(self._before, products=self.products, interrupted=interrupted)
        if not self._traces:
            unknown = np.full(len(self._sizes), np.nan)
            return Estimate(unknown, unknown, math.nan, math.nan, self.products, False, interrupted)
        values = np.array(self._traces)
        totals = values.sum(1)
        return Estimate(
            values.mean(0),
            standard_error(values),
            float(totals.mean()),
            float(standard_error(totals)),
            self.products,
            converged,
            interrupted,
        )

    def relative_error(self) -> float:
        """The total's standard error, relative to it."""
        found = self.estimate()
        return found.error / abs(found.total) if found.total else (math.inf if found.error else 0.0)

    def _signs(self) -> Tensor:
        size = sum(self._sizes)
        bits = torch.randint(0, 2, (size,), generator=self._generator, dtype=torch.int8)
        return (2 * bits - 1).to(self._like.device, self._like.dtype)

    def _times(self, v: Tensor) -> Tensor:
        self.products += 1
        return self._multiply(v)

    def _by_part(self, a: Tensor, b: Tensor) -> np.ndarray:
        terms = wide(a * b)
        return torch.stack([part.sum() for part in terms.split(self._sizes)]).cpu().numpy()


def standard_error(values: np.ndarray) -> np.ndarray:
    """Of the mean over the first axis, widened where the values are few."""
    if len(values) < 2:
        return np.full(values.shape[1:], np.nan)
    freedom, few = len(values) - 1, len(values) < _SKETCH
    wider = _STUDENT[freedom - 1] if few else 1 + 1.25 / freedom + 1.5 / freedom**2
    return np.asarray(wider * values.std(0, ddof=1) / math.sqrt(len(values)))


def estimate(
    multiply: Callable[[Tensor], Tensor],
    sizes: Sequence[int],
    relative_error: float,
    max_products: int,
    generator: torch.Generator,
    like: Tensor,
    report: Callable[[int, float, float], None] = lambda products, error, tolerance: None,
) -> Estimate:
    """The traces of consecutive parts, until the total's standard error is `relative_error` of it, or a fifth.

    A total that cancels to next to nothing has no relative error to reach: the products then run out.

    Args:
        multiply: v [n] -> H v [n].
        sizes: of the parts; they add up to n.
        like: a tensor of the dtype and on the device of the vectors.
        report: hears (products, relative standard error, relative_error).
    """
    samples = _Samples(multiply, sizes, generator, like)
    first: list[Tensor] = []  # products
    try:
        while samples.products < max_products:
            product = samples.draw()
            if samples.products <= _SKETCH:
                first.append(product)
            if len(samples) < _SKETCH:
                report(samples.products, 1.0, relative_error)
                continue
            reached = samples.relative_error()
            report(samples.products, reached, relative_error)
            if samples.products == _SKETCH:
                still = reached / relative_error if relative_error else math.inf
                foreseen = min(_SKETCH * still * still, sys.float_info.max)
                leading = _leading(first, foreseen, max_products - _SKETCH)
                first = []
                if len(leading):
                    samples.leave_out(leading)
                    continue
            if reached <= min(relative_error, _SURE):
                return samples.estimate(converged=True)
    except KeyboardInterrupt:
        return samples.estimate(interrupted=True)
    return samples.estimate()


def _leading(products: list[Tensor], foreseen: float, most: int) -> Tensor:
    """The directions to leave out of further samples, as many as make the products still needed fewest: `foreseen` if
    nothing is left out, and `most` at most.
    """
    sketch = Sketch(torch.stack(products))
    left = sketch.left()
    counts = np.arange(len(left))
    costs = counts + np.maximum(_SKETCH, left * foreseen)
    costs[0] = foreseen - _SKETCH  # which have been made
    skewed = left[1:] + _NOTHING < _SKEWED * (left[:-1] + _NOTHING)
    least = int(np.append(skewed, False).argmin())
    costs[:least] = math.inf
    costs[counts + _SKETCH > most] = math.inf
    return sketch.directions(int(costs.argmin()))


class Sketch:
    """H z_i = Q c_i of some random vectors z_i (Halko, Martinsson and Tropp, SIAM Review 53, 2011).

    Args:
        products: H z_i, [k, n].
    """

    def __init__(self, products: Tensor) -> None:
        # That of MPS is slow, or lacking.
        rows = products.cpu() if products.device.type == "mps" else products
        columns, triangle = torch.linalg.qr(rows.T)
        self._basis = columns.T.to(products.device)  # Q^T [d, n], d = min(k, n)
        self._products = triangle.T.cpu().double()  # c_i [k, d]

    def left(self) -> np.ndarray:
        """||(I - P) H||^2 / ||H||^2 for projections P onto the 0, 1, ..., k - 1 leading directions.

        Estimated by leaving one out: what the leading directions of the other products leave of each.
        """
        inside = []
        for i, own in enumerate(self._products):
            others = torch.cat([self._products[:i], self._products[i + 1 :]])
            inside.append((leading(others) @ own).square().cumsum(0))
        whole = self._products.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        return 1 - np.r_[0, (torch.stack(inside).sum(0) / whole).numpy()]

    def directions(self, count: int) -> Tensor:
        """The leading ones, orthonormal: [count, n]."""
        return leading(self._products)[:count].to(self._basis) @ self._basis


def leading(rows: Tensor) -> Tensor:
    """Orthonormal directions, those first in which the rows are largest."""
    return torch.linalg.svd(rows, full_matrices=False)[2]
