"""The trace of a symmetric operator, whole and by parts, estimated with its standard error.

For a random vector z of signs, E[z_b . (H z)_b] is the trace of H over the coordinates b (Hutchinson). Its variance is
2 ||H||^2 less the diagonal, and most of that comes from a few large eigenvalues. So when many samples are foreseen,
the first products Y = H Z serve as a sketch: Q = orth(Y) spans about the leading eigenvectors, and with P = Q^T Q

    tr_b(H) = tr_b(H P) + tr_b(H (I - P))

has an exact first term, for as many more products as Q has rows, and a second with far less variance (Hutch++, for
every part at once).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SKETCH = 16  # vectors, and the least number of samples that a standard error is taken from
_WORTH = 6  # a sketch is made where this many times its products are foreseen


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
    """Sums of samples, one for each part and one for the whole."""

    def __init__(self, parts: int) -> None:
        self.values: list[np.ndarray] = []
        self.offset = np.zeros(parts)

    def estimate(self, products: int, converged: bool, interrupted: bool = False) -> Estimate:
        parts = np.array(self.values).reshape(-1, len(self.offset)) + self.offset
        count = len(parts)
        totals = parts.sum(1)
        if not count:
            unknown = np.full(len(self.offset), np.nan)
            return Estimate(unknown, unknown, math.nan, math.nan, products, False, interrupted)

        def error(samples: np.ndarray) -> np.ndarray:
            if count < 2:
                return np.full(samples.shape[1:], np.nan)
            return np.asarray(samples.std(0, ddof=1) / math.sqrt(count))

        return Estimate(
            parts.mean(0),
            error(parts),
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
    """The traces of consecutive parts, until the total's standard error is `relative_error` of it.

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
    samples = _Samples(len(sizes))
    products = 0

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

    def relative() -> float:
        now = samples.estimate(products, False)
        return now.error / abs(now.total) if now.total else (math.inf if now.error else 0.0)

    basis: Tensor | None = None
    rows: list[Tensor] = []
    try:
        following = signs()
        while products < max_products:
            z = following
            rest = z if basis is None else z - (basis @ z) @ basis
            product = times(rest)
            following = signs()  # while a GPU is still at the product
            samples.values.append(by_part(z, product))
            if basis is None:
                rows.append(product)
            count = len(samples.values)
            if count < SKETCH:
                report(products, 1.0, relative_error)
                continue
            report(products, relative(), relative_error)
            if relative() <= relative_error:
                return samples.estimate(products, True)
            still = relative() / relative_error if relative_error else math.inf
            foreseen = count * still * still
            left = max_products - products
            if basis is None and rows and min(foreseen, left) > _WORTH * SKETCH:
                basis = torch.linalg.qr(torch.stack(rows).T)[0].T
                samples = _sketched(times, basis, by_part, len(sizes))
            rows = []  # the sketch is made of the first products or not at all
    except KeyboardInterrupt:
        return samples.estimate(products, False, True)
    return samples.estimate(products, False)


def _sketched(
    times: Callable[[Tensor], Tensor],
    basis: Tensor,
    by_part: Callable[[Tensor, Tensor], np.ndarray],
    parts: int,
) -> _Samples:
    """No samples yet, and the exact part tr_b(H P) = sum over q of q_b . (H q)_b."""
    samples = _Samples(parts)
    for q in basis:
        samples.offset = samples.offset + by_part(q, times(q))
    return samples
