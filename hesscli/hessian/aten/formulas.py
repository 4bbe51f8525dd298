"""Operators as formulas of others, with PyTorch's own signatures, for `definitions.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def hardsigmoid(x: Tensor) -> Tensor:
    """min(max(x / 6 + 1 / 2, 0), 1)"""
    return F.hardtanh(x, -3, 3) / 6 + 0.5  # flat at +-3, as PyTorch's


def hardsigmoid_(x: Tensor) -> Tensor:
    return F.hardtanh_(x, -3, 3).div_(6).add_(0.5)


def mish(x: Tensor) -> Tensor:
    """x tanh(log(1 + exp x)); PyTorch's second derivative takes exp(x), which may overflow."""
    return x * torch.tanh(F.softplus(x))


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    """x where it is positive, weight x elsewhere."""
    return torch.where(x > 0, x, weight * x)


def logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """log(exp x + exp y), the smaller beside the larger; exp(x - y), which PyTorch's derivatives take, may overflow."""
    x, y = torch.broadcast_tensors(x, y)
    above = x > y
    larger, smaller = torch.where(above, x, y), torch.where(above, y, x)
    below = (smaller - larger).masked_fill((x == y) & x.isinf(), 0)
    return larger + F.softplus(below)


def logaddexp2(x: Tensor, y: Tensor) -> Tensor:
    """The same of powers of 2."""
    return logaddexp(x * math.log(2), y * math.log(2)) / math.log(2)


def logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """log sum of exp(x_i) over all i up to each place."""
    if not x.dim():
        return x.clone()
    reach = 1  # each entry has summed up so many
    while reach < x.shape[dim]:
        first, later = x.split([reach, x.shape[dim] - reach], dim)
        earlier = x.narrow(dim, 0, x.shape[dim] - reach)
        x = torch.cat([first, logaddexp(later, earlier)], dim)
        reach *= 2
    return x


def pad_circular(x: Tensor, pad: Sequence[int]) -> Tensor:
    """x as one period of what goes on at its ends; a negative pad cuts it."""
    for place in range(len(pad) // 2):
        axis, (before, after) = x.dim() - 1 - place, pad[2 * place : 2 * place + 2]
        start, stop = max(-before, 0), x.shape[axis] - max(-after, 0)
        before, after, size = max(before, 0), max(after, 0), stop - start
        x = x.narrow(axis, start, size)
        x = torch.cat([x.narrow(axis, size - before, before), x, x.narrow(axis, 0, after)], axis)
    return x


def sinc(x: Tensor) -> Tensor:
    """sin(pi x) / (pi x); near 0 by its series, as derivatives of the quotient lose eps / (pi x)^2 there."""
    z = torch.pi * x
    near = z.abs() < 0.25
    w = z.masked_fill(~near, 0).square()
    series = 1 - w / 6 * (1 - w / 20 * (1 - w / 42 * (1 - w / 72 * (1 - w / 110))))
    other = z.masked_fill(near, 1)
    return torch.where(near, series, other.sin() / other)


def log_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """That of x - x_m, where x_m is the largest, and which is the same.

    Its derivatives sum up to zero, and what is subtracted makes the m-th the sum of the others.
    """
    x = x if dtype is None else x.to(dtype)
    return torch._log_softmax(x - x.gather(dim, x.detach().argmax(dim, keepdim=True)), dim, False)


def log_sigmoid(x: Tensor) -> Tensor:
    """min(x, 0) - log(1 + exp(-|x|)), with derivatives of both sides at 0."""
    positive = x > 0
    return torch.where(positive, 0, x) - F.softplus(torch.where(positive, -x, x))


def vector_norm(
    x: Tensor,
    p: float | None = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(sum |x|^p)^(1/p); of a vector of zeros it is constant, as its first derivative says."""
    x = x if dtype is None else x.to(dtype)
    axes, p = list(dim or range(x.dim())), 2 if p is None else p
    if abs(p) == math.inf:
        return (x.abs().amax if p > 0 else x.abs().amin)(axes, keepdim)
    if p == 0:
        return (x != 0).sum(axes, keepdim).to(x.abs().dtype)
    if p == 1:
        return x.abs().sum(axes, keepdim)
    if p == 2 and not x.is_complex():
        powers = x * x
    else:
        none = x == 0
        powers = x.abs().masked_fill(none, 1).pow(p).masked_fill(none, 0 if p > 0 else math.inf)
    return _root(powers.sum(axes, keepdim), p)


def _root(x: Tensor, p: float) -> Tensor:
    """x^(1/p); constant where x is zero."""
    zero = x == 0
    return x.masked_fill(zero, 1).pow(1 / p).masked_fill(zero, 0)


def std(x: Tensor, dim: list[int] | None = None, **options: Any) -> Tensor:
    """The square root of the variance; constant where that is zero."""
    return _root(torch.var(x, dim, **options), 2)


def std_mean(
    x: Tensor, dim: list[int] | None = None, keepdim: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    return std(x, dim, keepdim=keepdim, **options), x.mean(dim, keepdim)


def atan2(y: Tensor, x: Tensor) -> Tensor:
    """The angle of (x, y), by the smaller over the larger; of zero it is constant, as its first derivative says."""
    y, x = torch.broadcast_tensors(y, x)
    none, steep = (y == 0) & (x == 0), y.abs() > x.abs()
    above, below = torch.where(steep, x, y), torch.where(steep, y, x)
    angle = torch.atan(above.masked_fill(none, 0) / below.masked_fill(none, 1))
    half = torch.copysign(torch.full_like(angle, math.pi), y.detach())
    return torch.where(steep, half / 2 - angle, torch.where(x.signbit(), angle + half, angle))


def angle(z: Tensor) -> Tensor:
    """That of a complex number; of a real one, 0 or pi, whose derivative is zero."""
    if z.is_complex():
        return atan2(z.imag, z.real)
    return torch.where(z < 0, math.pi, z.masked_fill(~z.isnan(), 0))


def sgn(z: Tensor) -> Tensor:
    """z / |z|; of zero it is constant, as its first derivative says. Of a real number, its sign."""
    if not z.is_complex():
        return torch.sign(z)
    zero = z == 0
    other = z.masked_fill(zero, 1)
    return (other / other.abs()).masked_fill(zero, 0)


def cosine_similarity(x: Tensor, y: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """<x, y> / (max(|x|, eps) max(|y|, eps))"""

    def normed(z: Tensor) -> Tensor:
        return z / vector_norm(z, dim=[dim], keepdim=True).clamp(min=eps)

    x, y = torch.broadcast_tensors(x, y)
    return (normed(x) * normed(y)).sum(dim)


def adaptive_avg_pool(axes: int, elsewhere: str) -> Callable[..., Tensor]:
    """The mean over the last axes, where one place is asked for; PyTorch's own operator elsewhere."""

    def pool(x: Tensor, size: Sequence[int]) -> Tensor:
        if all(length == 1 for length in size):
            return x.mean(list(range(-axes, 0)), keepdim=True)
        return getattr(torch.ops.aten, elsewhere)(x, size)

    return pool


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum (mode 0), mean (1) or maximum (2) of each bag's rows, without the padding."""
    count = len(offsets) - include_last_offset
    starts, places = offsets[:count], torch.arange(len(indices), device=offsets.device)
    bag = torch.bucketize(places, starts, right=True) - 1
    kept = (indices != padding_idx).unsqueeze(1)
    rows = F.embedding(indices, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(1)
    length, rest = divmod(len(indices), max(1, count))
    even = not rest and torch.equal(starts, length * torch.arange(count, device=starts.device))

    def summed(x: Tensor) -> Tensor:
        """Over each bag."""
        if even:  # a bag for each row of a matrix
            return x.unflatten(0, (count, length)).sum(1)
        return x.new_zeros(count, x.shape[1]).index_add(0, bag, x)

    size = summed(kept.to(rows.dtype))
    if mode != 2:
        bags = summed(rows * kept.to(rows.dtype)) / (size.clamp(min=1) if mode == 1 else 1)
    elif even:
        largest = rows.masked_fill(~kept, -torch.inf).unflatten(0, (count, length)).max(1).values
        bags = largest.masked_fill(size == 0, 0)
    else:
        raise NotImplementedError("derivative for aten::_embedding_bag (max) is not implemented")
    return bags, bag, size.squeeze(1).to(offsets.dtype), offsets


def cdist(x: Tensor, y: Tensor, p: float, compute_mode: int | None = None) -> Tensor:
    """|x_i - y_j|_p of all rows: [..., P, M], [..., R, M] -> [..., P, R]."""
    return vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, [-1])


def pdist(x: Tensor, p: float = 2) -> Tensor:
    """|x_i - x_j|_p of all rows i < j: [N, M] -> [N (N - 1) / 2]."""
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return vector_norm(x[first] - x[second], p, [-1])


def bilinear(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x' A_k z + b_k, of A [outputs, inputs, inputs], as a linear layer of all products of an x and a z."""
    pairs = (x.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2)
    return torch.nn.functional.linear(pairs, weight.flatten(1), bias)


def repeat(x: Tensor, repeats: Sequence[int]) -> Tensor:
    """Copies one after the other along each axis: what expands along new axes, taken together with the old."""
    lengths = [1] * (len(repeats) - x.dim()) + list(x.shape)
    apart = x.reshape([n for length in lengths for n in (1, length)])
    expanded = apart.expand([n for pair in zip(repeats, lengths, strict=True) for n in pair])
    copies = expanded.clone(memory_format=torch.contiguous_format)
    return copies.view([times * n for times, n in zip(repeats, lengths, strict=True)])


def stft(
    x: Tensor,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Tensor | None = None,
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    align_to_window: bool | None = None,
) -> Tensor:
    """The Fourier transforms of a signal's frames, each within a window: [..., L] -> [..., frequencies, frames].

    PyTorch's reads the frames by `as_strided`, about which nothing can be proven.
    """
    length = win_length or n_fft
    before = (n_fft - length) // 2
    around = [before, n_fft - length - before]
    if align_to_window:
        x = F.pad(x, around)
    frames = x.unfold(-1, n_fft, hop_length or n_fft // 4)
    if window is not None or length < n_fft:
        within = x.new_ones(length) if window is None else window
        frames = frames * F.pad(within, around)
    transform = torch.fft.fft if frames.is_complex() or onesided is False else torch.fft.rfft
    y = transform(frames, norm="ortho" if normalized else None).transpose(-2, -1)
    return y if return_complex else torch.view_as_real(y)
