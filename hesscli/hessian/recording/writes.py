"""What operators that write in place give, by operators that do not.

A write into a view, `out[:, 0] = x`, changes what it is a view of as well: that is put together anew, by the operator
that is the view's inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hesscli.hessian.recording.tape import Call, Ref

_aten = torch.ops.aten
_SAME_ORDER = frozenset("view _unsafe_view _reshape_alias unsqueeze squeeze".split())


def functional(operator: Any) -> Any:
    """The operator that gives what this one writes in place, if PyTorch has one with a derivative."""
    name = operator._schema.name.removeprefix("aten::")
    if name == "transpose_":
        return _aten.transpose.int
    if not name.endswith("_") or name == "copy_":
        return None
    twin = getattr(_aten, name.removesuffix("_"), None)
    overloads = [] if twin is None else [getattr(twin, name) for name in twin.overloads()]
    return next((o for o in overloads if _types(o) == _types(operator)), None)


def _types(operator: Any) -> list[str]:
    """Of the arguments: `pow_.Scalar` has a number for an exponent, `pow.Scalar` one for a base."""
    return [str(argument.type) for argument in operator._schema.arguments]


def fills_a_mask(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether this is `x[mask] = number`, with a mask of x's own shape."""
    if operator is not _aten.index_put_.default or len(args[1]) != 1 or any(args[3:]):
        return False
    x, (mask,), value = args[:3]
    is_mask = isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.shape == x.shape
    return is_mask and not value.dim()


def put_back(
    view: Call,
    whole: Ref,
    part: Ref,
    shape: torch.Size,
    made: Callable[[Any, tuple[Any, ...], Sequence[int]], Ref],
    constant: Callable[[list[int]], Ref],
) -> tuple[Any, tuple[Any, ...]] | None:
    """The operator, and its arguments, that gives the tensor that this is a view of, with the part replaced.

    `index_copy` and not `slice_scatter` or `select_scatter`, whose derivatives take ten times as long in batches.

    Args:
        view: how the part was taken.
        whole: the tensor as it was.
        part: what the part is now.
        shape: of the whole.
        made: the result of another operator, from its arguments and shape.
        constant: a vector of numbers.
    """
    if view.keywords:
        return None
    if view.name in ("slice", "select"):
        dim = view.named("dim") % len(shape)
        length = shape[dim]
        if view.name == "select":
            places = [view.named("index") % length]
            part = made(_aten.unsqueeze.default, (part, dim), (*shape[:dim], 1, *shape[dim + 1 :]))
        else:
            start, stop, step = map(view.named, ("start", "end", "step"))
            places = list(range(length)[start:stop:step])
        if len(places) < length:
            return _aten.index_copy.default, (whole, dim, constant(places), part)
        return _aten.reshape.default, (part, tuple(shape))
    if view.name == "diagonal":
        return _aten.diagonal_scatter.default, (whole, part, *view.arguments[1:])
    if view.name in ("transpose", "t"):
        return view.operator, (part, *view.arguments[1:])
    if view.name == "permute":
        order = [d % len(shape) for d in view.named("dims")]
        return view.operator, (part, tuple(map(order.index, range(len(order)))))
    if view.name in _SAME_ORDER:
        return _aten.reshape.default, (part, tuple(shape))
    return None
