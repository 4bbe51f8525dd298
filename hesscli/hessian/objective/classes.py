"""Classes: along which axis of an output they lie, and whether targets and weights are of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hesscli.errors import MismatchError
from hesscli.texts import dtype_name


def class_axis(output: Sequence[int], target: Sequence[int]) -> int:
    """The axis that the classes lie along in an output of this shape: to PyTorch the second, or the only one.

    The last, as a language model has them, where the targets' shape fits that alone.
    """
    second = (*output[:1], *output[2:])
    last = len(output) > 2 and tuple(target) == tuple(output[:-1]) != second
    return len(output) - 1 if last else int(len(output) > 1)


def classes_second(output: Tensor, target: Tensor) -> tuple[Tensor, int]:
    """The output with its classes along the second axis, or the only one; and which it is."""
    axis = class_axis(output.shape, target.shape)
    if axis > 1:  # contiguous, as PyTorch's own derivative wants it
        return output.movedim(axis, 1).contiguous(), 1
    return output, axis


def class_weight(output: Tensor, axis: int, weight: Tensor | None) -> Tensor | None:
    """A weight in the output's dtype, of one number per class, [C]: C is the length of this axis of the output."""
    if weight is None:
        return None
    classes = output.shape[axis]
    if weight.shape != (classes,):
        raise MismatchError(
            f"the loss argument weight has shape {list(weight.shape)}, the model's output "
            f"{list(output.shape)}; expected one weight per class: [{classes}]"
        )
    return weight.to(output.dtype)


def class_numbers(output: Tensor, axis: int, target: Tensor, ignore_index: int) -> Tensor:
    """Targets as class numbers, one for all that lies along this axis of the output, of its shape without the axis.

    Raises:
        MismatchError: they have another shape, are no integers, or no classes; those equal to `ignore_index` may be.
    """
    wanted = output.shape[:axis] + output.shape[axis + 1 :]
    if output.dim() == 0 or target.shape != wanted:
        raise MismatchError(
            f"class targets have shape {list(target.shape)}, the model's output {list(output.shape)}; "
            f"expected targets of shape {list(wanted)}"
            + (f" or {list(output[..., 0].shape)}" if output.dim() > 2 else ""),
            _column_hint(output, target, axis),
        )
    if target.is_floating_point():
        raise MismatchError(
            f"class targets are {dtype_name(target.dtype)}, expected integers",
            "store the class numbers as int64",
        )
    target = target.long()
    counted, classes = target[target != ignore_index], output.shape[axis]
    if not counted.numel():
        return target
    first, last = int(counted.min()), int(counted.max())
    if first < 0 or last >= classes:
        raise MismatchError(
            f"class targets range from {first} to {last}, the model's output has {classes} classes",
            _range_hint(first, last, classes),
        )
    return target


def _range_hint(first: int, last: int, classes: int) -> str | None:
    """What to do about classes counted from 1, or about -1 where none counts."""
    if first == 1 and last == classes:
        return "classes are counted from 0: y - 1"
    return "--loss-arg ignore_index=-1" if first == -1 and last < classes else None


def _column_hint(output: Tensor, target: Tensor, axis: int) -> str | None:
    """What to do about targets with an axis that class numbers do not have."""
    same = output.shape == target.shape
    several = target.dim() > axis and target.shape[axis] > 1
    if several and bool(((target == 0) | (target == 1)).all()):
        if bool((target.sum(axis) == 1).all()):
            return f"store the class numbers: y.argmax({axis})"
        if same:  # several classes may hold, or none
            return "--loss bce-with-logits"
    if output.dim() == target.dim() and output.shape[axis] > 1 and target.shape[axis] == 1:
        return f"store the class numbers without that axis: y.squeeze({axis})"
    return "--loss mse" if same else None
