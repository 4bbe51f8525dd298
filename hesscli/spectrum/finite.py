"""Products that are numbers: LAPACK and Lanczos go astray with others, or without end."""

from __future__ import annotations

import torch
from torch import Tensor


class NotFinite(ArithmeticError):  # noqa: N818 - told apart by its kind
    """A product holds NaN or infinity."""


def finite(product: Tensor) -> Tensor:
    """The product itself.

    Raises:
        NotFinite: it holds NaN or infinity.
    """
    if not bool(product.isfinite().all()):
        raise NotFinite
    return product


def norm(v: Tensor) -> float:
    """|v|, in float64: the squares of float32 are numbers from 1e-38 to 1e38 alone."""
    return float(torch.linalg.vector_norm(v, dtype=torch.float64))
