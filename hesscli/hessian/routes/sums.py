"""Sums of products of many samples, of few digits lost."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALL = 1 << 16  # numbers
_TINY = 1 << 14
_FEW = 1 << 11  # samples, of which a tiny product rounds as little as a large one
_TERMS = 1 << 8  # samples


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right, [p, samples] by [samples, q]; a tiny one as the sum of products over some samples each.

    The kernels of tiny products add each sample to the sum of all before it, and round by the size of that: where all
    samples are alike, in the same direction each time. A product that is not tiny is put into `out`.
    """
    samples = len(right)
    if not _in_parts(samples, len(left) * right.shape[1]):
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


def add_products(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out[i] += left @ right[i], [k, p, q], for left [p, samples] and right [k, samples, q]: small ones at once."""
    size = out[0].numel()
    if size <= _SMALL and not _in_parts(left.shape[1], size):
        out += left @ right
        return
    for target, each in zip(out, right, strict=True):
        add_product(target, left, each)


def _in_parts(samples: int, size: int) -> bool:
    """Whether a product, of so many numbers, is the sum of several."""
    return samples > _FEW and size <= _TINY
