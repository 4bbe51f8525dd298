"""What operators give between kinks: on the smooth piece of them where a first pass was.

There all comparisons, signs, roundings and indices are constant. What is picked by an index is picked by that of the
first pass, and a function with corners goes on beyond one as it was before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hesscli.hessian.aten.corners import CORNERS, CURVED, on_piece, side_of
from hesscli.hessian.differences.sides import Sides
from hesscli.hessian.recording.tape import Call
from hesscli.hessian.recording.writes import functional

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]
Rule = Callable[[Sides, Any, Arguments, Keywords], Any]

_POOLS = {  # over how many last axes their indices count
    "max_pool2d_with_indices": 2,
    "max_pool3d_with_indices": 3,
    "adaptive_max_pool2d": 2,
    "adaptive_max_pool3d": 3,
}


def between_kinks(sides: Sides, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """What `func(*args, **kwargs)` gives on the piece where the first pass was."""
    name = func.overloadpacket.__name__
    rule = _RULES.get(name.removesuffix("_"))
    if rule is None:
        return _with_constant_indices(sides, func, args, kwargs)
    twin = functional(func) if name.endswith("_") else func
    result = rule(sides, twin, args, kwargs)
    return result if twin is func else args[0].copy_(result)


def _with_constant_indices(sides: Sides, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Numbers move, and all else is constant: but for bytes, which a kernel keeps for its backward pass."""

    def kept(part: Any) -> Any:
        if not isinstance(part, Tensor) or part.is_floating_point() or part.is_complex():
            return part
        return part if part.dtype is torch.uint8 else sides.constant(part)

    result = func(*args, **kwargs)
    return type(result)(map(kept, result)) if isinstance(result, (tuple, list)) else kept(result)


def _step(sides: Sides, func: Any, args: Arguments, kwargs: Keywords) -> Tensor:
    """A function that is constant between its jumps."""
    return sides.constant(func(*args, **kwargs))


def _compared(sides: Sides, func: Any, args: Arguments, kwargs: Keywords) -> Tensor:
    """`x == y`. With a number, such as a norm with zero, it holds at one point only. Off that there is no side to keep:
    a pass whose answer differs is lost. And so it nearly always is in the definition of a norm, which the norm itself
    does not ask.
    """
    result = func(*args, **kwargs)
    if isinstance(args[1], Tensor):
        return sides.constant(result)
    if bool((result == (func.overloadpacket.__name__ == "ne")).all()):
        return result
    first = sides.constant(result)
    sides.lost |= not first.equal(result)
    return first


def _cornered(sides: Sides, func: Any, args: Arguments, kwargs: Keywords) -> Tensor:
    """A function of one argument with corners, or its derivative, which has them too and jumps there."""
    derivative = func.overloadpacket.__name__.endswith("_backward")
    place = 1 if derivative else 0  # after the gradient
    before, x, after = args[:place], args[place], args[place + 1 :]
    corners = CORNERS[func.overloadpacket.__name__.removesuffix("_backward")](*after)
    if not corners:
        return _with_constant_indices(sides, func, args, kwargs)
    side = sides.first(side_of(corners, x))
    if not sides.held:
        return func(*args, **kwargs)
    return on_piece(
        lambda at: func(*before, at, *after, **kwargs), corners, side, x, extended=not derivative
    )


def _curved(sides: Sides, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """A function with a corner at zero whose pieces are no straight lines."""
    place, piece = CURVED[func.overloadpacket.__name__]
    side = sides.first(args[place].sign().to(torch.int8))
    return piece(side, *args, **kwargs) if sides.held else func(*args, **kwargs)


def _picked(sides: Sides, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """What a function picks along an axis, and where."""
    result = func(*args, **kwargs)
    if isinstance(result, Tensor):  # of all entries
        return result
    dim = Call(func, args, kwargs).named("dim")
    x, where = args[0], sides.constant(result[1])
    if where.dim() == x.dim():
        return x.gather(dim, where), where
    return x.gather(dim, where.unsqueeze(dim)).squeeze(dim), where


def _pooled(sides: Sides, func: Any, args: Arguments, kwargs: Keywords) -> tuple[Tensor, Tensor]:
    """What a function picks out of windows, and where."""
    where = sides.constant(func(*args, **kwargs)[1])
    axes = _POOLS[func.overloadpacket.__name__]
    picked = args[0].flatten(-axes).gather(-1, where.flatten(-axes))
    return picked.view_as(where), where


def _straight_through(
    sides: Sides, func: Any, args: Arguments, kwargs: Keywords
) -> tuple[Tensor, Tensor]:
    """What a function rounds, and where its derivative is that of the identity; elsewhere it is zero."""
    rounded, mask = func(*args, **kwargs)
    mask = sides.constant(mask)
    return args[0] * mask + sides.first(rounded - args[0] * mask), mask


def _embedded(sides: Sides, func: Any, args: Arguments, kwargs: Keywords) -> Tensor:
    """An embedding, whose padding is a constant."""
    result = func(*args, **kwargs)
    _, indices, padding = (*args, -1)[:3]
    if padding < 0:
        return result
    return torch.where((indices == padding).unsqueeze(-1), sides.first(result), result)


_RULES: dict[str, Rule] = {
    **dict.fromkeys("sign sgn floor ceil round trunc heaviside".split(), _step),
    **dict.fromkeys("eq ne".split(), _compared),
    **dict.fromkeys([*CORNERS, *(f"{name}_backward" for name in CORNERS)], _cornered),
    **dict.fromkeys(CURVED, _curved),
    **dict.fromkeys(
        "max min median nanmedian kthvalue mode sort topk cummax cummin".split(), _picked
    ),
    **dict.fromkeys(_POOLS, _pooled),
    "fake_quantize_per_tensor_affine_cachemask": _straight_through,
    "fake_quantize_per_channel_affine_cachemask": _straight_through,
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams": _straight_through,
    "_fused_moving_avg_obs_fq_helper": _straight_through,
    "embedding": _embedded,
}
