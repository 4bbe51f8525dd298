"""Normalisations as formulas of other operators, and PyTorch's own without the errors of its gradients.

All have PyTorch's own signatures, for `definitions.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _normalise(x: Tensor, axes: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    rstd = torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)
    return centred * rstd, mean, rstd


def _scale_and_shift(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]
) -> Tensor:
    if weight is not None:
        x = x * weight.reshape(shape)
    if bias is not None:
        x = x + bias.reshape(shape)
    return x


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps), times weight, plus bias, over the last axes; its mean, and 1 / sqrt(var + eps)."""
    y, mean, rstd = _normalise(x, list(range(-len(shape), 0)), eps)
    return _scale_and_shift(y, weight, bias, shape), mean, rstd


def _group_norm(
    normalise: Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The same over the channels of each group, and all positions: [samples, groups, numbers], over the last axis."""

    def norm(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        samples: int,
        channels: int,
        positions: int,
        groups: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = normalise(x.reshape(samples, groups, -1), eps)
        per_channel = [1, channels] + [1] * (x.dim() - 2)
        y = _scale_and_shift(y.reshape(x.shape), weight, bias, per_channel)
        return y, mean.reshape(samples, groups), rstd.reshape(samples, groups)

    return norm


def _as_batch_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own, as a batch norm of one sample that has every sample's groups.

    On the CPU its backward pass for channels-last ends the process where the weight has a gradient and the input none.
    """
    flat = x.flatten(0, 1).unsqueeze(0)
    return torch.native_batch_norm(flat, None, None, None, None, True, 0.0, eps)


group_norm = _group_norm(lambda x, eps: _normalise(x, [-1], eps))
group_norm_of_flat_groups = _group_norm(_as_batch_norm)


def _channel_norm(across: list[int]) -> Callable[..., Tensor]:
    """By each channel's own statistics over all positions, and across these axes; or by the running ones.

    The running ones are left as they are.
    """

    def norm(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        own: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        per_channel = [1, -1] + [1] * (x.dim() - 2)
        if own or running_mean is None or running_var is None:
            y, _, _ = _normalise(x, [*across, *range(2, x.dim())], eps)
        else:
            rstd = torch.rsqrt(running_var.reshape(per_channel) + eps)
            y = (x - running_mean.reshape(per_channel)) * rstd
        return _scale_and_shift(y, weight, bias, per_channel)

    return norm


instance_norm = _channel_norm([])
batch_norm = _channel_norm([0])


def weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """g v / |v| and |v|, the norm over all axes but `dim`; over all of them where that is -1."""
    if dim == -1:  # the norm of the whole tensor
        norm = (v * v).sum().sqrt()
    else:
        axes = [axis for axis in range(v.dim()) if axis != dim]
        norm = (v * v).sum(axes, keepdim=True).sqrt()
    return v * (g / norm), norm


def instance_norm_of_contiguous_gradients(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    own: bool,
    *options: Any,
) -> Tensor:
    """PyTorch's own, as it computes it: a batch norm of one sample that has every sample's channels.

    On the CPU its backward pass takes a gradient for channels-last that only looks so, and is silently wrong: by more
    than its size where a recurrent layer follows. A gradient made contiguous is read as it is.
    """
    samples, channels = x.shape[:2]

    def repeated(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.repeat(samples)

    y = torch.batch_norm(
        x.reshape(1, samples * channels, *x.shape[2:]),
        repeated(weight),
        repeated(bias),
        None if own else repeated(running_mean),
        None if own else repeated(running_var),
        own,
        *options,
    ).reshape(x.shape)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient.contiguous())
    return y


def weight_norm_of_all_digits(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """PyTorch's own, as it computes it where it has no kernel: CUDA's keeps seven digits of float64."""
    norm = torch.norm_except_dim(v, 2, dim)
    return v * (g / norm), norm
