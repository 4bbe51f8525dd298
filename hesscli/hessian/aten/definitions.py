"""Operators whose derivatives PyTorch gets wrong or lacks, replaced by their definitions.

Inside `exact_derivatives()` these operators run as the formulas of `formulas.py`, `loss_formulas.py` and
`normalisations.py`, so that autograd differentiates them:

- `weight_norm`: its double backward treats the saved norms as constants and is wrong by tens of percent.
- `batch_norm`, `layer_norm`, `group_norm`, `instance_norm`: forward-over-reverse and batched double backward are
  wrong or missing.
- `hardsigmoid`, `embedding_bag`, `cdist`, `pdist`, `multi_margin_loss`, `multilabel_margin_loss`, `ctc_loss`: no second
  derivative.
- `log_softmax`, `logsigmoid`, `binary_cross_entropy_with_logits`: they take 1 - p of a p that may have been rounded
  to 1, where all their derivatives then are 0.
- `logaddexp`, `logaddexp2`, `mish`: their second derivatives are NaN where an exponential overflows.
- `logcumsumexp`, `sinc`, `std`, `atan2`, `angle`, `sgn`, norms of vectors: their second derivatives are NaN where a
  gradient, or x, is zero.
- `prelu`: at zero its first derivative is that of one side, its second that of the other.
- `cosine_similarity`: bounds its norms with gradients off, about which nothing can be proven.
- `repeat`: says less than the axes that it expands; `mv` less than the product of matrices that it is; and `bilinear`
  less than the linear layer.
- `pad` in a circle: writes into memory that is not yet filled, about which nothing can be proven.
- `stft`: reads a signal's frames by `as_strided`, about which nothing can be proven.
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
from functools import cache, partial

import torch

from hesscli.hessian.aten import formulas, loss_formulas, normalisations
from hesscli.hessian.aten.recomputation import also_recomputed

Definitions = dict[str, Callable[..., object]]  # by the operators' names


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


_OF_ALL_DIGITS: Definitions = {  # PyTorch's gradients lose them too
    "log_softmax.int": formulas.log_softmax,
    "log_sigmoid_forward": lambda x: (formulas.log_sigmoid(x), x.new_empty(0)),
    "binary_cross_entropy_with_logits": loss_formulas.binary_cross_entropy_with_logits,
}

_NORMS = "linalg_vector_norm norm.Scalar norm.ScalarOpt_dim norm.ScalarOpt_dtype norm.ScalarOpt_dim_dtype".split()

DEFINITIONS: Definitions = {
    "native_layer_norm": normalisations.layer_norm,
    "native_group_norm": normalisations.group_norm,
    "instance_norm": normalisations.instance_norm,
    "batch_norm": normalisations.batch_norm,
    "_weight_norm": lambda *args: normalisations.weight_norm_interface(*args)[0],
    "_weight_norm_interface": normalisations.weight_norm_interface,
    "hardsigmoid": formulas.hardsigmoid,
    "hardsigmoid_": formulas.hardsigmoid_,
    "_prelu_kernel": formulas.prelu,
    **_OF_ALL_DIGITS,
    "logaddexp": formulas.logaddexp,
    "logaddexp2": formulas.logaddexp2,
    "logcumsumexp": formulas.logcumsumexp,
    "sinc": formulas.sinc,
    **dict.fromkeys(_NORMS, formulas.vector_norm),
    "std.correction": formulas.std,
    "std_mean.correction": formulas.std_mean,
    "dist": lambda x, y, p=2: formulas.vector_norm(x - y, p),
    "_pad_circular": formulas.pad_circular,
    "stft": formulas.stft,
    "repeat": formulas.repeat,
    "bilinear": formulas.bilinear,
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


WHOLE_ON_TAPES: dict[str, Callable[..., torch.Tensor]] = {
    "mish": formulas.mish,
    "mish_": lambda x: x.copy_(formulas.mish(x.clone())),
}
"""What stays one operator on a tape, which says that it is elementwise; replayed as this."""

_RIGHT_ON_CPU: Definitions = {
    "instance_norm": normalisations.instance_norm_of_contiguous_gradients,
    "native_group_norm": normalisations.group_norm_of_flat_groups,
}
_RIGHT_ON_GPU: Definitions = {
    "_weight_norm": lambda *args: normalisations.weight_norm_of_all_digits(*args)[0],
    "_weight_norm_interface": normalisations.weight_norm_of_all_digits,
    **STEP_BY_STEP,
}


def _replace(library: torch.library.Library, on_cpu: Definitions, on_gpu: Definitions) -> None:
    for key in (CPU, *gpus()):
        for operator, definition in (on_cpu if key == CPU else on_gpu).items():
            library.impl(operator, definition, key)


@contextmanager
def right_gradients() -> Iterator[None]:
    """Forward passes in this context have first derivatives that are right: PyTorch's, without its errors."""
    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        also_recomputed(right_gradients),
    ):
        _replace(library, _OF_ALL_DIGITS | _RIGHT_ON_CPU, _OF_ALL_DIGITS | _RIGHT_ON_GPU)
        yield


@contextmanager
def exact_derivatives(on_tape: bool = False) -> Iterator[None]:
    """Forward passes in this context can be differentiated twice, exactly, wherever PyTorch knows how.

    A tape of one (`on_tape`) is differentiated where it is replayed, in another such context.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.library._scoped_library("aten", "IMPL") as library,
            sdpa_kernel(SDPBackend.MATH),
            torch.jit.optimized_execution(False),  # type: ignore[attr-defined]
            also_recomputed(partial(exact_derivatives, on_tape)),
        ):
            definitions = DEFINITIONS if on_tape else DEFINITIONS | WHOLE_ON_TAPES
            _replace(library, definitions, definitions | STEP_BY_STEP)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
