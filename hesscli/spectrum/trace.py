"""The trace of a symmetric operator, whole and by parts, estimated with its standard error.

For a random vector z of signs, E[z_b . (H z)_b] is the trace of H over the coordinates b (Hutchinson). Its variance is
2 ||H||^2 less the diagonal, and often a few large eigenvalues make most of it. They also skew the samples: most are too
small, and so is the error that these show. So the first samples serve as a sketch, by which the leading directions are
taken out and their trace is had exactly: where they skew the samples, and where it saves products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hesscli.spectrum.sketch import Sketch

SKETCH = 16  # samples: the least that a standard error is taken from, and what a sketch is made of
_SKEWED = 0.5  # if one more direction taken out leaves less than this much of the variance, it skews the samples
_SURE = 0.2  # of the total: one of less than five standard errors may be zero, met by chance
_STUDENT = (6.98, 2.26, 1.65, 1.43, 1.32, 1.26, 1.21, 1.18, 1.16, 1.14, 1.13, 1.12, 1.11, 1.1)
"""By how much the standard error of 2 to 15 samples is widened, so that two of it hold as often as two of one that is
known: half of Student's t at 97.7 %."""
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


def _estimate(
    samples: Sequence[np.ndarray], parts: int, products: int, converged: bool, interrupted: bool
) -> Estimate:
    """Of samples [b], each of the traces of all parts."""
    if not samples:
        unknown = np.full(parts, np.nan)
        return Estimate(unknown, unknown, math.nan, math.nan, products, False, interrupted)

    def error(values: np.ndarray) -> np.ndarray:
        if len(values) < 2:
            return np.full(values.shape[1:], np.nan)
        wider = _STUDENT[len(values) - 2] if len(values) < SKETCH else 1.0
        return np.asarray(wider * values.std(0, ddof=1) / math.sqrt(len(values)))

    values = np.array(samples)
    totals = values.sum(1)
    return Estimate(
        values.mean(0),
        error(values),
        float(totals.mean()),
        float(error(totals)),
        products,
        converged,
        interrupted,
    )


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
        relative_error: see above.
        max_products: at most.
        generator: of the signs.
        like: a tensor of the dtype and on the device of the vectors.
        report: hears (products, relative standard error, relative_error).
    """
    size = sum(sizes)
    products = 0
    samples: list[np.ndarray] = []
    known = np.zeros(len(sizes))  # the exact part of each sample
    basis = torch.empty(0, size, dtype=like.dtype, device=like.device)
    first: list[Tensor] = []  # products

    def signs() -> Tensor:
        bits = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8)
        return (2 * bits - 1).to(like.device, like.dtype)

    def times(v: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return multiply(v)

    def by_part(a: Tensor, b: Tensor) -> np.ndarray:
        terms = (a * b).double()
        return torch.stack([part.sum() for part in terms.split(list(sizes))]).cpu().numpy()

    def now(converged: bool = False, interrupted: bool = False) -> Estimate:
        return _estimate(samples, len(sizes), products, converged, interrupted)

    def relative() -> float:
        found = now()
        return found.error / abs(found.total) if found.total else (math.inf if found.error else 0.0)

    try:
        following = signs()
        while products < max_products:
            z = following
            product = times(z - (basis @ z) @ basis)
            following = signs()  # while a GPU is still at the product
            samples.append(known + by_part(z, product))
            if products <= SKETCH:
                first.append(product)
            if len(samples) < SKETCH:
                report(products, 1.0, relative_error)
                continue
            report(products, relative(), relative_error)
            if products == SKETCH:
                still = relative() / relative_error if relative_error else math.inf
                basis = _leading(first, SKETCH * still * still, max_products - products)
                first = []
                if len(basis):
                    known = np.sum([by_part(q, times(q)) for q in basis], axis=0)
                    samples = []
                    continue
            if relative() <= min(relative_error, _SURE):
                return now(converged=True)
    except KeyboardInterrupt:
        return now(interrupted=True)
    return now()


def _leading(products: list[Tensor], foreseen: float, most: int) -> Tensor:
    """The directions to leave out of further samples: the fewest products from here, of which there are so many.

    Args:
        products: of the first samples.
        foreseen: samples, if nothing is left out.
        most: products that may follow.
    """
    sketch = Sketch(torch.stack(products))
    left = sketch.left()
    counts = np.arange(len(left))
    costs = counts + np.maximum(SKETCH, left * foreseen)
    costs[0] = foreseen - SKETCH  # which have been made
    skewed = left[1:] + _NOTHING < _SKEWED * (left[:-1] + _NOTHING)
    least = int(np.append(skewed, False).argmin())
    costs[:least] = math.inf
    costs[counts + SKETCH > most] = math.inf
    return sketch.directions(int(costs.argmin()))
