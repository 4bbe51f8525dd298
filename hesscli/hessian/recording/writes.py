"""What operators that write in place give, by operators that do not.

A write into a view, `out[:, 0] = x`, changes what it is a view of as well: that is put together anew, by the operator
that is the view's inverse.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hesscli.hessian.recording.draft import Draft
from hesscli.hessian.recording.tape import Call, Ref

_aten = torch.ops.aten
_SAME_ORDER = frozenset("view _unsafe_view _reshape_alias unsqueeze squeeze".split())


def without_writing(draft: Draft, call: Call, args: tuple[Any, ...]) -> Call:
    """The call that gives what this one, of these arguments, writes into the first of them."""
    if call.operator is _aten.copy_.default:
        target, source = args[:2]
        ref = call.arguments[1]
        if source.dtype is not target.dtype:
            dtype = {"dtype": target.dtype}
            ref = draft.made(target, _aten._to_copy.default, (ref,), source.shape, dtype)
        return Call(_aten.expand.default, (ref, tuple(target.shape)), call.keywords)
    if _fills_a_mask(call.operator, args):
        target, (masked,) = args[:2]
        x, (mask,), value, *_ = call.arguments
        if masked.dim() < target.dim():
            shape = (*masked.shape, *[1] * (target.dim() - masked.dim()))
            mask = draft.made(masked, _aten.reshape.default, (mask, shape), shape)
        return Call(_aten.masked_fill.Tensor, (x, mask, value), call.keywords)
    twin = functional(call.operator)
    if twin is None:
        draft.refuse(f"{call.name} writes in place")
        return call
    return Call(twin, call.arguments, call.keywords)


def functional(operator: Any) -> Any:
    """The operator that gives what this one writes in place, if PyTorch has one with a derivative."""
    name = operator._schema.name.removeprefix("aten::")
    if not name.endswith("_"):
        return None
    twin = getattr(_aten, name.removesuffix("_"), None)
    overloads = [] if twin is None else [getattr(twin, name) for name in twin.overloads()]
    return next((o for o in overloads if _types(o) == _types(operator)), None)


def _types(operator: Any) -> list[str]:
    """Of the arguments: `pow_.Scalar` has a number for an exponent, `pow.Scalar` one for a base."""
    return [str(argument.type) for argument in operator._schema.arguments]


def _fills_a_mask(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether this is `x[mask] = number`, with a mask of x's own shape or of its first axes."""
    if operator is not _aten.index_put_.default or len(args[1]) != 1 or any(args[3:]):
        return False
    x, (mask,), value = args[:3]
    is_mask = isinstance(mask, Tensor) and mask.dtype is torch.bool
    return is_mask and mask.shape == x.shape[: mask.dim()] and not value.dim()


def put_back(draft: Draft, view: Call, whole: Tensor, was: Ref, part: Ref) -> Ref | None:
    """The tensor that this is a view of, with the part replaced; None where nothing gives that.

    `index_copy` and not `slice_scatter` or `select_scatter`, whose derivatives take ten times as long in batches.

    Args:
        draft: where that is made.
        view: how the part was taken.
        whole: of what.
        was: what that was.
        part: what the part is now.
    """
    shape = whole.shape
    made = partial(draft.made, whole)
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
            index = draft.constant(places, whole.device)
            return made(_aten.index_copy.default, (was, dim, index, part), shape)
        return made(_aten.reshape.default, (part, tuple(shape)), shape)
    if view.name == "diagonal":
        arguments = (was, part, *view.arguments[1:])
        return made(_aten.diagonal_scatter.default, arguments, shape)
    if view.name in ("transpose", "t"):
        return made(view.operator, (part, *view.arguments[1:]), shape)
    if view.name == "permute":
        order = [d % len(shape) for d in view.named("dims")]
        back = tuple(map(order.index, range(len(order))))
        return made(view.operator, (part, back), shape)
    if view.name in _SAME_ORDER:
        return made(_aten.reshape.default, (part, tuple(shape)), shape)
    return None
