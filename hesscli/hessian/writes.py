"""What operators that write in place give, by operators that do not.

A write into a view, `out[:, 0] = x`, changes what it is a view of as well: that is put together anew, by the operator
that is the view's inverse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscli.hessian.tape import Call, Ref

_aten = torch.ops.aten
_SAME_ORDER = frozenset("view _unsafe_view _reshape_alias unsqueeze squeeze".split())
_SCATTER = {
    "slice": _aten.slice_scatter.default,
    "select": _aten.select_scatter.default,
    "diagonal": _aten.diagonal_scatter.default,
}


def functional(operator: Any) -> Any:
    """The operator that gives what this one writes in place, if PyTorch has one with a derivative."""
    name = operator._schema.name.removeprefix("aten::")
    if name == "transpose_":
        return _aten.transpose.int
    twin = getattr(_aten, name.removesuffix("_"), None) if name.endswith("_") else None
    overload = operator._schema.overload_name or "default"
    if twin is None or name == "copy_" or overload not in twin.overloads():
        return None
    return getattr(twin, overload)


def fills_a_mask(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether this is `x[mask] = number`, with a mask of x's own shape."""
    if operator is not _aten.index_put_.default or len(args[1]) != 1 or any(args[3:]):
        return False
    x, (mask,), value = args[:3]
    is_mask = isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.shape == x.shape
    return is_mask and not value.dim()


def put_back(
    view: Call, whole: Ref, part: Ref, shape: torch.Size
) -> tuple[Any, tuple[Any, ...]] | None:
    """The operator, and its arguments, that gives the tensor that this is a view of, with the part replaced.

    Args:
        view: how the part was taken.
        whole: the tensor as it was.
        part: what the part is now.
        shape: of the whole.
    """
    further = view.arguments[1:]
    if view.keywords:
        return None
    if view.name in _SCATTER:
        return _SCATTER[view.name], (whole, part, *further)
    if view.name in ("transpose", "t"):
        return view.operator, (part, *further)
    if view.name == "permute":
        order = [d % len(shape) for d in further[0]]
        return view.operator, (part, tuple(map(order.index, range(len(order)))))
    if view.name in _SAME_ORDER:
        return _aten.reshape.default, (part, tuple(shape))
    return None
