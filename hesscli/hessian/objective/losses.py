"""The losses, written so that every second derivative exists.

A loss is a function `(output, target, **arguments) -> (total, denominator)`: the *sum* of its terms over the batch,
and the number by which `torch.nn.functional`'s `reduction="mean"` would divide that sum. Totals and denominators
both add up over batches, so the mean over all data is exact for any batch size, also where the divisor is a sum
of class weights or a count of targets that are not ignored.

`mse_loss` and `huber_loss` of PyTorch lack some second derivative, so the elementwise losses are spelled out.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from hesscli.errors import MismatchError, UsageError
from hesscli.hessian.aten.formulas import log_sigmoid, log_softmax
from hesscli.hessian.objective.classes import class_numbers, class_weight, classes_second

Total = tuple[Tensor, float]


def _same_shape(output: Tensor, target: Tensor) -> Tensor:
    """The target in the output's dtype, when no broadcasting would be needed to compare the two."""
    if output.shape != target.shape:
        hint = None
        if output.numel() == target.numel():
            hint = f"store the targets with shape {list(output.shape)}; broadcasting would be wrong"
        elif target.shape == output.shape[:-1] and _are_classes(target, output.shape[-1]):
            hint = "store the class numbers as int64"
        raise MismatchError(
            f"the model's output has shape {list(output.shape)}, the targets {list(target.shape)}; "
            "this loss compares them element by element",
            hint,
        )
    return target.to(output.dtype)


def _are_classes(target: Tensor, count: int) -> bool:
    numbers = (target == target.round()) & (target >= 0) & (target < count)
    return count > 1 and bool(numbers.all())


def _weighted(
    terms: Tensor, weight: Tensor | None, name: str = "weight"
) -> tuple[Tensor, Tensor | None]:
    if weight is None:
        return terms, None
    try:
        weight = weight.to(terms.dtype).expand_as(terms)
    except RuntimeError:
        raise MismatchError(
            f"the loss argument {name} has shape {list(weight.shape)}, which does not fit "
            f"an output of shape {list(terms.shape)}"
        ) from None
    return terms * weight, weight


def _mean_by_weight(terms: Tensor, weight: Tensor | None) -> Total:
    """Terms whose mean divides by the sum of the weights, as `mse_loss` and `l1_loss` do."""
    terms, weight = _weighted(terms, weight)
    return terms.sum(), float(terms.numel() if weight is None else weight.sum())


def _mean_by_count(terms: Tensor, weight: Tensor | None = None) -> Total:
    """Terms whose mean divides by their number, weighted or not."""
    return _weighted(terms, weight)[0].sum(), float(terms.numel())


def mse(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Total:
    """sum of w (z - y)^2, by the sum of w."""
    return _mean_by_weight((output - _same_shape(output, target)) ** 2, weight)


def l1(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Total:
    """sum of w |z - y|, by the sum of w."""
    return _mean_by_weight((output - _same_shape(output, target)).abs(), weight)


def _quadratic_then_linear(error: Tensor, width: float) -> Tensor:
    """`error^2 / 2` up to `width`, and the tangent line beyond."""
    if math.isinf(width):
        return 0.5 * error**2
    size = error.abs()
    return torch.where(size < width, 0.5 * error**2, width * (size - 0.5 * width))


def huber(
    output: Tensor, target: Tensor, delta: float = 1.0, weight: Tensor | None = None
) -> Total:
    """sum of w e^2 / 2 up to |e| = delta and w delta (|e| - delta / 2) beyond, e = z - y, by the number of terms."""
    if delta <= 0:
        raise UsageError(f"huber: delta is {delta}, it must be positive")
    error = output - _same_shape(output, target)
    return _mean_by_count(_quadratic_then_linear(error, delta), weight)


def smooth_l1(output: Tensor, target: Tensor, beta: float = 1.0) -> Total:
    """`huber` of delta = beta, divided by beta; `l1` where that is zero."""
    if beta < 0:
        raise UsageError(f"smooth-l1: beta is {beta}, it must not be negative")
    if beta == 0:
        return l1(output, target)
    error = output - _same_shape(output, target)
    return _mean_by_count(_quadratic_then_linear(error, beta) / beta)


def bce(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Total:
    """-sum of w (y log p + (1 - y) log(1 - p)) of probabilities p, by the number of terms."""
    target = _same_shape(output, target)
    if bool(((output < 0) | (output > 1)).any()):
        raise MismatchError(
            "bce wants probabilities, the model's output leaves [0, 1]",
            "--loss bce-with-logits",
        )

    def log(p: Tensor) -> Tensor:  # -100 at 0, as in PyTorch, with derivatives that are finite too
        return torch.where(p > 0, torch.where(p > 0, p, 1).log(), -100).clamp(min=-100)

    return _mean_by_count(-(target * log(output) + (1 - target) * log(1 - output)), weight)


def bce_with_logits(
    output: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> Total:
    """The same of p = sigmoid(z), with pos_weight times y log p."""
    target = _same_shape(output, target)
    positive, _ = _weighted(target, pos_weight, "pos_weight")
    terms = positive * log_sigmoid(output) + (1 - target) * log_sigmoid(-output)
    return _mean_by_count(-terms, weight)


def kl_div(output: Tensor, target: Tensor, log_target: bool = False) -> Total:
    """sum of y (log y - z) of log-probabilities z, by the number of terms."""
    target = _same_shape(output, target)
    if log_target:
        return _mean_by_count(target.exp() * (target - output))
    return _mean_by_count(torch.xlogy(target, target) - target * output)


def poisson_nll(
    output: Tensor, target: Tensor, log_input: bool = True, full: bool = False, eps: float = 1e-8
) -> Total:
    """sum of exp(z) - y z, or of z - y log(z + eps), with `full` plus Stirling's log y! of y > 1, by their number."""
    target = _same_shape(output, target)
    rate, log_rate = (output.exp(), output) if log_input else (output, torch.log(output + eps))
    terms = rate - target * log_rate
    if full:  # Stirling's approximation of log(target!)
        stirling = torch.xlogy(target, target) - target + 0.5 * torch.log(2 * math.pi * target)
        terms = terms + torch.where(target > 1, stirling, torch.zeros_like(target))
    return _mean_by_count(terms)


def nll(
    output: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100
) -> Total:
    """-sum of w_y z_y of log-probabilities z [B, C, ...], by the sum of w_y; without targets that are ignored."""
    output, axis = classes_second(output, target)
    target = class_numbers(output, axis, target, ignore_index)
    weight = class_weight(output, axis, weight)
    kept = target[target != ignore_index]
    denominator = float(kept.numel() if weight is None else weight[kept].sum())
    total = F.nll_loss(output, target, weight, ignore_index=ignore_index, reduction="sum")
    return total, denominator


def cross_entropy(
    output: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Total:
    """`nll` of log softmax z, by the same; targets may be probabilities [B, C, ...], then by B.

    With label smoothing s, (1 - s) times that, and -s / C times the sum over all classes.
    """
    output, axis = classes_second(output, target)
    if output.dim() == 0 or output.shape[axis] < 2:
        raise MismatchError(
            "cross-entropy needs two classes or more, the model's output has shape "
            f"{list(output.shape)}",
            "--loss bce-with-logits",
        )
    if not 0 <= label_smoothing <= 1:
        raise UsageError(f"cross-entropy: label_smoothing is {label_smoothing}, expected 0 to 1")
    log_p = log_softmax(output, axis)
    classes = log_p.shape[axis]
    weight = class_weight(log_p, axis, weight)
    per_class = (classes, *[1] * (log_p.dim() - axis - 1))

    if target.is_floating_point() and target.shape == log_p.shape:  # class probabilities
        if ignore_index >= 0:
            raise MismatchError(
                "ignore_index goes with class numbers; the targets are probabilities"
            )
        p = target.to(log_p.dtype) * (1 - label_smoothing) + label_smoothing / classes
        if weight is not None:
            p = p * weight.reshape(per_class)
        return -(p * log_p).sum(), log_p.numel() / classes

    total, denominator = nll(log_p, target, weight, ignore_index)
    if label_smoothing:
        kept = (target.long() != ignore_index).unsqueeze(axis)
        smooth = log_p if weight is None else log_p * weight.reshape(per_class)
        uniform = -torch.where(kept, smooth, torch.zeros_like(smooth)).sum()
        total = (1 - label_smoothing) * total + label_smoothing / classes * uniform
    return total, denominator


LOSSES: dict[str, Callable[..., Total]] = {
    "mse": mse,
    "cross-entropy": cross_entropy,
    "nll": nll,
    "bce-with-logits": bce_with_logits,
    "bce": bce,
    "huber": huber,
    "smooth-l1": smooth_l1,
    "l1": l1,
    "poisson-nll": poisson_nll,
    "kl-div": kl_div,
}

OF_CLASSES = frozenset({"cross-entropy", "nll"})  # whose targets are class numbers

# A weight of these losses goes with elements, not with classes, and may be as long as the data.
ELEMENT_WEIGHTED = {"mse", "l1", "huber", "bce", "bce-with-logits"}

TENSORS = frozenset({"weight", "pos_weight"})  # the arguments of `LOSSES` that are tensors


def check_arguments(name: str, arguments: Mapping[str, object]) -> None:
    """Refuses keyword arguments that the named loss does not have, and values that they cannot have."""
    if name not in LOSSES:
        return
    known = dict([*inspect.signature(LOSSES[name]).parameters.items()][2:])
    for argument, value in arguments.items():
        if argument not in known:
            raise UsageError(
                f"the loss {name} has no argument {argument!r}; it has: {', '.join(known) or 'none'}"
            )
        kind = type(known[argument].default)
        if kind in _EXPECTED and not _is_a(value, kind):
            raise UsageError(
                f"the loss {name}: {argument} is {value!r}, expected {_EXPECTED[kind]}",
                f"--loss-arg {argument}={_example(known[argument].default)}",
            )


_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}


def _example(default: object) -> str:
    return str(not default).lower() if isinstance(default, bool) else str(default)


def _is_a(value: object, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, Real)
    return isinstance(value, Integral) and abs(int(value)) < 1 << 63
