"""Sums of products of many samples, of few digits lost."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALL = 1 << 16  # numbers
_TINY = 1 << 14
_TERMS = 1 << 8  # samples


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right, [p, samples] by [samples, q]; a tiny one as the sum of products over some samples each.

    The kernels of tiny products add each sample to the sum of all before it, and round by the size of that: where all
    samples are alike, in the same direction each time.

    Args:
        out: where a product that is not tiny is put.
    """
    samples = len(right)
    if samples <= _TERMS or len(left) * right.shape[1] > _TINY:
        return torch.mm(left, right, out=out)
    whole = samples - samples % _TERMS
    parts = left[:, :whole].unflatten(1, (-1, _TERMS)).transpose(0, 1)
    sums = (parts @ right[:whole].unflatten(0, (-1, _TERMS))).sum(0)
    return sums.addmm_(left[:, whole:], right[whole:])


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right. A small product is made by itself: begun with `out`, it would add each sample to the sum of
    all before it, and round by the size of that.
    """
    if out.numel() <= _SMALL:
        out += product(left, right)
    else:
        out.addmm_(left, right)
