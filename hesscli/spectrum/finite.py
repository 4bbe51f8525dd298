"""Products that are numbers: LAPACK and Lanczos go astray with others, or without end."""

from __future__ import annotations

import math

from torch import Tensor

from hesscli.widest import wide

_TILE = 1 << 16  # numbers that are made float64 at a time: at once, it takes four times as long


class NotFinite(ArithmeticError):  # noqa: N818 - told apart by its kind
    """A product holds NaN or infinity."""


def finite(product: Tensor) -> Tensor:
    """The product itself; NotFinite where it holds NaN or infinity."""
    if not bool(product.isfinite().all()):
        raise NotFinite
    return product


def norm(v: Tensor) -> float:
    """|v|, in float64 if the device has it: the squares of float32 are numbers from 1e-38 to 1e38 alone, and many add
    up to few digits."""
    parts = map(wide, v.split(_TILE))
    return math.sqrt(sum(part @ part for part in parts))
