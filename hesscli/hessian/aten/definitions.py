"""Operators whose derivatives PyTorch gets wrong or lacks, replaced by their definitions.

Inside `exact_derivatives()` these operators run as the formulas of `formulas.py` and `loss_formulas.py`, so that
autograd differentiates them:

- `weight_norm`: its double backward treats the saved norms as constants and is wrong by tens of percent.
- `batch_norm`, `layer_norm`, `group_norm`, `instance_norm`: forward-over-reverse and batched double backward are
  wrong or missing.
- `hardsigmoid`, `embedding_bag`, `cdist`, `pdist`, `multi_margin_loss`, `multilabel_margin_loss`, `ctc_loss`: no second
  derivative.
- `log_softmax`, `logsigmoid`, `binary_cross_entropy_with_logits`: they take 1 - p of a p that may have been rounded
  to 1, where all their derivatives then are 0.
- `logcumsumexp`, `sinc`, `std`, `atan2`, `angle`, `sgn`, norms of vectors: their second derivatives are NaN where a
  gradient, or x, is zero.
- `prelu`: at zero its first derivative is that of one side, its second that of the other.
- `cosine_similarity`: bounds its norms with gradients off, about which nothing can be proven.
- `repeat`: says less than the axes that it expands; and `mv` less than the product of matrices that it is.
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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hesscli.hessian.aten import formulas, loss_formulas
from hesscli.hessian.aten.recomputation import also_recomputed


def _step_by_step(name: str, overload: str) -> Callable[..., object]:
    def decomposed(*args: object) -> object:
        packet = getattr(getattr(torch.ops.aten, name), overload)
        return packet.py_kernels[torch._C.DispatchKey.CompositeImplicitAutograd](*args)

    return decomposed


STEP_BY_STEP = {
    f"{name}.{overload}": _step_by_step(name, overload)
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for overload in ("input", "data")
}
CPU = "AutogradCPU"  # a key of the dispatcher


@cache
def gpus() -> tuple[str, ...]:
    """The keys of the GPUs that are there: replacing an operator takes 30 us for each key."""
    present = {
        "AutogradCUDA": torch.cuda.is_available(),
        "AutogradMPS": torch.backends.mps.is_available(),
    }
    return tuple(key for key, found in present.items() if found)


OF_ALL_DIGITS: dict[str, Callable[..., object]] = {  # PyTorch's gradients lose them too
    "log_softmax.int": formulas.log_softmax,
    "log_sigmoid_forward": lambda x: (formulas.log_sigmoid(x), x.new_empty(0)),
    "binary_cross_entropy_with_logits": formulas.binary_cross_entropy_with_logits,
}

_NORMS = "linalg_vector_norm norm.Scalar norm.ScalarOpt_dim norm.ScalarOpt_dtype norm.ScalarOpt_dim_dtype".split()

DEFINITIONS: dict[str, Callable[..., object]] = {
    "native_layer_norm": formulas.layer_norm,
    "native_group_norm": formulas.group_norm,
    "instance_norm": formulas.instance_norm,
    "batch_norm": formulas.batch_norm,
    "_weight_norm": lambda *args: formulas.weight_norm_interface(*args)[0],
    "_weight_norm_interface": formulas.weight_norm_interface,
    "hardsigmoid": formulas.hardsigmoid,
    "hardsigmoid_": formulas.hardsigmoid_,
    "_prelu_kernel": formulas.prelu,
    **OF_ALL_DIGITS,
    "logcumsumexp": formulas.logcumsumexp,
    "sinc": formulas.sinc,
    **dict.fromkeys(_NORMS, formulas.vector_norm),
    "std.correction": formulas.std,
    "std_mean.correction": formulas.std_mean,
    "dist": lambda x, y, p=2: formulas.vector_norm(x - y, p),
    "_pad_circular": formulas.pad_circular,
    "repeat": formulas.repeat,
    "mv": lambda x, v: x.mm(v.unsqueeze(1)).squeeze(1),
    "atan2": formulas.atan2,
    "angle": formulas.angle,
    "sgn": formulas.sgn,
    "cosine_similarity": formulas.cosine_similarity,
    "adaptive_avg_pool2d": formulas.adaptive_avg_pool(2, "_adaptive_avg_pool2d"),
    "adaptive_avg_pool3d": formulas.adaptive_avg_pool(3, "_adaptive_avg_pool3d"),
    "_embedding_bag": formulas.embedding_bag,
    "_cdist_forward": formulas.cdist,
    "_pdist_forward": formulas.pdist,
    "multi_margin_loss": loss_formulas.multi_margin_loss,
    "multilabel_margin_loss_forward": loss_formulas.multilabel_margin_loss,
    "_ctc_loss": loss_formulas.ctc_loss,
    "_ctc_loss.Tensor": loss_formulas.ctc_loss,
}


def _instance_norm_of_contiguous_gradients(
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


def _group_norm_of_flat_groups(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    samples: int,
    channels: int,
    size: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own, as a batch norm of one sample that has every sample's groups.

    On the CPU its backward pass for channels-last ends the process where the weight has a gradient and the input none.
    """
    y, mean, inverse = torch.native_batch_norm(
        x.reshape(1, samples * groups, -1), None, None, None, None, True, 0.0, eps
    )
    per_channel = (channels, *[1] * (x.ndim - 2))
    y = formulas.scale_and_shift(y.reshape(x.shape), weight, bias, per_channel)
    return y, mean.view(samples, groups), inverse.view(samples, groups)


def _weight_norm_of_all_digits(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """PyTorch's own, as it computes it where it has no kernel: CUDA's keeps seven digits of float64."""
    norm = torch.norm_except_dim(v, 2, dim)
    return v * (g / norm), norm


@contextmanager
def right_gradients() -> Iterator[None]:
    """Forward passes in this context have first derivatives that are right: PyTorch's, without its errors."""
    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        also_recomputed(right_gradients),
    ):
        library.impl("instance_norm", _instance_norm_of_contiguous_gradients, CPU)
        library.impl("native_group_norm", _group_norm_of_flat_groups, CPU)
        for key in (CPU, *gpus()):
            for operator, definition in OF_ALL_DIGITS.items():
                library.impl(operator, definition, key)
        for key in gpus():
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
            also_recomputed(exact_derivatives),
        ):
            for key in (CPU, *gpus()):
                own = DEFINITIONS if key == CPU else DEFINITIONS | STEP_BY_STEP
                for operator, definition in own.items():
                    library.impl(operator, definition, key)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
