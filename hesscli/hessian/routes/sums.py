"""Sums of products of many samples, of few digits lost."""

from __future__ import annotations

from torch import Tensor

_SMALL = 1 << 16  # numbers


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right. A small product is made by itself: begun with `out`, it would add each sample to the sum of
    all before it, and round by the size of that.
    """
    if out.numel() <= _SMALL:
        out += left @ right
    else:
        out.addmm_(left, right)
