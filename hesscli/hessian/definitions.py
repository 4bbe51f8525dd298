"""Operators whose derivatives PyTorch gets wrong or lacks, replaced by their definitions.

Inside `exact_derivatives()` these operators run as the formulas below, so that autograd differentiates the formula:

- `weight_norm`: its double backward treats the saved norms as constants and is wrong by tens of percent.
- `batch_norm`, `layer_norm`, `group_norm`, `instance_norm`: forward-over-reverse and batched double backward are
  wrong or missing.
- `hardsigmoid`, `embedding_bag`: no second derivative.
- `log_softmax`, `logsigmoid`, `binary_cross_entropy_with_logits`: they take 1 - p of a p that may have been rounded
  to 1, where all their derivatives then are 0.
- `logcumsumexp`, `sinc`: their second derivatives are NaN where a gradient, or x, is zero.
- `prelu`: at zero its first derivative is that of one side, its second that of the other.
- `cosine_similarity`: bounds its norms with gradients off, about which nothing can be proven.
- `pad` in a circle: writes into memory that is not yet filled, about which nothing can be proven.
- fused attention: no second derivative; computed as softmax(Q K^T / sqrt(d)) V instead.
- `adaptive_avg_pool2d`, `adaptive_avg_pool3d` to one place: of channels-last memory, PyTorch's ends with `as_strided`,
  about which nothing can be proven.
- `lstm`, `gru`, `rnn_tanh`, `rnn_relu` on a GPU: cuDNN's have no second derivative, and in eval mode no first; step by
  step instead, by PyTorch's own decompositions.

They are replaced in PyTorch's dispatcher, below every kind of model: eager modules, TorchScript and exported graphs
reach the same operator. The TorchScript optimiser has derivatives of its own and is switched off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
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
    y, mean, rstd = _normalise(x, list(range(-len(shape), 0)), eps)
    return _scale_and_shift(y, weight, bias, shape), mean, rstd


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    samples: int,
    channels: int,
    positions: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _normalise(x.reshape(samples, groups, -1), [-1], eps)
    per_channel = [1, channels] + [1] * (x.dim() - 2)
    y = _scale_and_shift(y.reshape(x.shape), weight, bias, per_channel)
    return y, mean.reshape(samples, groups), rstd.reshape(samples, groups)


def _normalise_channels(
    x: Tensor,
    axes: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    own: bool,
    eps: float,
) -> Tensor:
    """By statistics of their own over these axes, or by the running ones, which are left as they are."""
    per_channel = [1, -1] + [1] * (x.dim() - 2)
    mean, variance = running
    if own or mean is None or variance is None:
        y, _, _ = _normalise(x, axes, eps)
    else:
        y = (x - mean.reshape(per_channel)) * torch.rsqrt(variance.reshape(per_channel) + eps)
    return _scale_and_shift(y, weight, bias, per_channel)


def instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    axes, running = list(range(2, x.dim())), (running_mean, running_var)
    return _normalise_channels(x, axes, weight, bias, running, use_input_stats, eps)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    axes = [axis for axis in range(x.dim()) if axis != 1]
    return _normalise_channels(x, axes, weight, bias, (running_mean, running_var), training, eps)


def weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    if dim == -1:  # the norm of the whole tensor
        norm = (v * v).sum().sqrt()
        return v * (g / norm), norm
    axes = [axis for axis in range(v.dim()) if axis != dim]
    norm = (v * v).sum(axes, keepdim=True).sqrt()
    return v * (g / norm), norm


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return weight_norm_interface(v, g, dim)[0]


def hardsigmoid(x: Tensor) -> Tensor:
    return F.hardtanh(x, -3, 3) / 6 + 0.5  # flat at +-3, as PyTorch's


def hardsigmoid_(x: Tensor) -> Tensor:
    return F.hardtanh_(x, -3, 3).div_(6).add_(0.5)


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    return torch.where(x > 0, x, weight * x)


def logcumsumexp(x: Tensor, dim: int) -> Tensor:
    if not x.dim():
        return x.clone()
    reach = 1  # each entry has summed up so many
    while reach < x.shape[dim]:
        first, later = x.split([reach, x.shape[dim] - reach], dim)
        earlier = x.narrow(dim, 0, x.shape[dim] - reach)
        nothing = earlier == -torch.inf
        sums = torch.logaddexp(later.masked_fill(nothing, 0), earlier.masked_fill(nothing, 0))
        x = torch.cat([first, torch.where(nothing, later, sums)], dim)
        reach *= 2
    return x


def pad_circular(x: Tensor, pad: Sequence[int]) -> Tensor:
    for place in range(len(pad) // 2):
        axis, (before, after) = x.dim() - 1 - place, pad[2 * place : 2 * place + 2]
        start, stop = max(-before, 0), x.shape[axis] - max(-after, 0)
        before, after, size = max(before, 0), max(after, 0), stop - start
        x = x.narrow(axis, start, size)
        x = torch.cat([x.narrow(axis, size - before, before), x, x.narrow(axis, 0, after)], axis)
    return x


def sinc(x: Tensor) -> Tensor:
    zero, z = x == 0, torch.pi * x
    other = z.masked_fill(zero, 1)
    return torch.where(zero, 1 - z * z / 6, other.sin() / other)


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


def binary_cross_entropy_with_logits(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    positive = target if pos_weight is None else pos_weight * target
    terms = -(positive * log_sigmoid(x) + (1 - target) * log_sigmoid(-x))
    if weight is not None:
        terms = terms * weight
    return terms.mean() if reduction == 1 else terms.sum() if reduction == 2 else terms


def cosine_similarity(x: Tensor, y: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    def normed(z: Tensor) -> Tensor:
        return z / torch.linalg.vector_norm(z, dim=dim, keepdim=True).clamp(min=eps)

    x, y = torch.broadcast_tensors(x, y)
    return (normed(x) * normed(y)).sum(dim)


def _adaptive_avg_pool(axes: int, elsewhere: str) -> Callable[..., Tensor]:
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


def _step_by_step(operator: str) -> Callable[..., object]:
    name, overload = operator.split(".")

    def decomposed(*args: object) -> object:
        packet = getattr(getattr(torch.ops.aten, name), overload)
        return packet.py_kernels[torch._C.DispatchKey.CompositeImplicitAutograd](*args)

    return decomposed


STEP_BY_STEP = {
    operator: _step_by_step(operator)
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for operator in (f"{name}.input", f"{name}.data")
}
CPU, GPUS = "AutogradCPU", ("AutogradCUDA", "AutogradMPS")  # keys of the dispatcher

OF_ALL_DIGITS: dict[str, Callable[..., object]] = {  # PyTorch's gradients lose them too
    "log_softmax.int": log_softmax,
    "log_sigmoid_forward": lambda x: (log_sigmoid(x), x.new_empty(0)),
    "binary_cross_entropy_with_logits": binary_cross_entropy_with_logits,
}

DEFINITIONS: dict[str, Callable[..., object]] = {
    "native_layer_norm": layer_norm,
    "native_group_norm": group_norm,
    "instance_norm": instance_norm,
    "batch_norm": batch_norm,
    "_weight_norm": weight_norm,
    "_weight_norm_interface": weight_norm_interface,
    "hardsigmoid": hardsigmoid,
    "hardsigmoid_": hardsigmoid_,
    "_prelu_kernel": prelu,
    **OF_ALL_DIGITS,
    "logcumsumexp": logcumsumexp,
    "sinc": sinc,
    "_pad_circular": pad_circular,
    "cosine_similarity": cosine_similarity,
    "adaptive_avg_pool2d": _adaptive_avg_pool(2, "_adaptive_avg_pool2d"),
    "adaptive_avg_pool3d": _adaptive_avg_pool(3, "_adaptive_avg_pool3d"),
    "_embedding_bag": embedding_bag,
}


def _instance_norm_of_contiguous_gradients(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
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
        None if use_input_stats else repeated(running_mean),
        None if use_input_stats else repeated(running_var),
        use_input_stats,
        momentum,
        eps,
        cudnn_enabled,
    ).reshape(x.shape)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient.contiguous())
    return y


def _weight_norm_of_all_digits(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """PyTorch's own, as it computes it where it has no kernel: CUDA's keeps seven digits of float64."""
    norm = torch.norm_except_dim(v, 2, dim)
    return v * (g / norm), norm


@contextmanager
def right_gradients() -> Iterator[None]:
    """Forward passes in this context have first derivatives that are right: PyTorch's, without its errors."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("instance_norm", _instance_norm_of_contiguous_gradients, CPU)
        for key in (CPU, *GPUS):
            for operator, definition in OF_ALL_DIGITS.items():
                library.impl(operator, definition, key)
        for key in GPUS:
            library.impl("_weight_norm", lambda *x: _weight_norm_of_all_digits(*x)[0], key)
            library.impl("_weight_norm_interface", _weight_norm_of_all_digits, key)
            for operator, definition in STEP_BY_STEP.items():
                library.impl(operator, definition, key)
        yield


@contextmanager
def exact_derivatives() -> Iterator[None]:
    """Forward passes in this context can be differentiated twice, exactly, wherever PyTorch knows how."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.library._scoped_library("aten", "IMPL") as library,
            sdpa_kernel(SDPBackend.MATH),
            torch.jit.optimized_execution(False),  # type: ignore[attr-defined]
        ):
            for key in (CPU, *GPUS):
                own = DEFINITIONS if key == CPU else DEFINITIONS | STEP_BY_STEP
                for operator, definition in own.items():
                    library.impl(operator, definition, key)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
