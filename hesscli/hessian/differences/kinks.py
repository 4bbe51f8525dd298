"""Gradients with every kink held at one side, for differences that no step across a ReLU's corner disturbs.

A step h in the parameters carries some of n ReLUs across their corner, about n h of them. Each makes the gradient
jump by an amount that does not shrink with h, so where n is in the millions a difference quotient is wrong with every
step that rounding leaves. The Hessian, which exists almost everywhere, knows nothing of the jumps: it is that of the
smooth piece on which theta lies. There are all comparisons, signs, roundings and indices constant. Gradients near
theta that keep those of theta, taken by the same calls of the same module, are those of that piece.

What a model detaches, or computes with gradients off, is a constant to autograd though it moves with theta: the target
of a Q-network, a straight-through estimator, a padding word that is tied to the output. It is held as well. And what a
`torch.autograd.Function` computes moves as its own derivative says (see `custom_functions.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from hesscli.hessian.aten.corners import CORNERS, CURVED, Corner, on_piece, side_of
from hesscli.hessian.aten.custom_functions import applied_by, by_own_derivative
from hesscli.hessian.aten.detaching import Detaching
from hesscli.hessian.aten.watcher import BLANK, Watcher
from hesscli.hessian.guests import is_guest, is_in_function, turned_gradients_off

_STEPS = frozenset("sign sgn floor ceil round trunc heaviside".split())  # with values of floats
_EQUAL = {"eq", "ne"}
"""Comparisons with a number that hold at one point only, such as a norm of zero. Off that point there is no side to
hold: a pass whose answer differs is lost."""
_POOLS = {
    "max_pool2d_with_indices": 2,
    "max_pool3d_with_indices": 3,
    "adaptive_max_pool2d": 2,
    "adaptive_max_pool3d": 3,
}
"""Functions that return what they picked and where, counted over so many last axes."""
_PICKING = frozenset("max min median nanmedian kthvalue mode sort topk cummax cummin".split())
"""Functions that return what they picked along an axis, and where."""
_STRAIGHT_THROUGH = {
    "fake_quantize_per_tensor_affine_cachemask",
    "fake_quantize_per_channel_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "_fused_moving_avg_obs_fq_helper",
}
"""Functions that return what they rounded, and where their derivative is that of the identity; elsewhere it is zero."""


class Kinks(Watcher):
    """On which side of each kink a pass is: noted in a first pass, and kept in those that are `held`.

    with kinks: first pass
    with kinks.held(): another one, of the same calls
    """

    def __init__(self) -> None:
        super().__init__()
        self.sides: list[Tensor] = []
        self.lost = False  # whether a pass that was held had other calls
        self._left: Iterator[Tensor] | None = None  # of the sides, while held
        self._around = ExitStack()
        self._inside = False  # a Function, whose calls are its own business
        self._constant_inside = False  # one that gradients are turned off for

    def __enter__(self) -> Kinks:
        self._around.enter_context(applied_by(self._applied))
        self._around.enter_context(Detaching(self._of_detached))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._around.close()

    @contextmanager
    def held(self) -> Iterator[None]:
        self._left = iter(self.sides)
        try:
            with self:
                yield
            self.lost |= next(self._left, None) is not None
        finally:
            self._left = None

    def _of_detached(self, result: Tensor, in_place: bool) -> Tensor:
        if self._inside or not is_guest():
            return result
        held = self._first(result.clone())
        if not in_place:
            return held
        result.data = held.clone()  # may be written to
        return result

    def _applied(self, apply: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        """What a Function of the model's own gives, where it is not smooth as its derivative has it."""
        if self._inside or not is_guest():
            return apply()
        if not torch.is_grad_enabled():
            self._constant_inside = True
            try:
                return apply()
            finally:
                self._constant_inside = False
        self._inside = True
        try:
            inputs = {
                place: x
                for place, x in enumerate(arguments)
                if isinstance(x, Tensor) and x.requires_grad
            }
            values = [x.detach().clone() for x in inputs.values()]  # it may write to them
            result = apply()
            if not inputs or not isinstance(result, Tensor) or not result.requires_grad:
                return result
            before = [self._first(x) for x in values]
            made = self._first(result.detach().clone())
            if self._left is None:
                return result
            moves = [x - b for x, b in zip(values, before, strict=True)]
            held = by_own_derivative(result, inputs, moves, made)
            self.lost |= held is None
            return result if held is None else held
        finally:
            self._inside = False

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._inside:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        corners = CORNERS.get(name.removesuffix("_").removesuffix("_backward"))
        if corners is not None:
            place = 1 if name.endswith("_backward") else 0  # after the gradient
            before, x, after = args[:place], args[place], args[place + 1 :]
            if x.is_floating_point():
                result = self._of_piece(
                    lambda at: func(*before, at.clone(), *after, **kwargs),
                    corners(*after),
                    x,
                    place == 0,
                )
                return x.copy_(result) if name.endswith("_") else result
        if name.removesuffix("_") in CURVED:
            place, piece = CURVED[name.removesuffix("_")]
            side = self._first(args[place].sign().to(torch.int8))
            if self._left is not None:
                result = piece(side, *args, **kwargs)
                return args[0].copy_(result) if name.endswith("_") else result
        result = func(*args, **kwargs)
        if name in BLANK:  # the same in each pass
            return result.zero_()
        if not any(isinstance(a, Tensor) and a.is_floating_point() for a in args):
            return result
        if name == "_local_scalar_dense" and is_guest():  # `item`: a number, so a constant
            return self._first(torch.tensor(result, dtype=torch.float64)).item()
        if name in _PICKING and isinstance(result, (tuple, list)):
            return self._picked(func, args, kwargs, result[1])
        if name == "embedding" and len(args) > 2 and args[2] >= 0:  # its padding is a constant
            return torch.where((args[1] == args[2]).unsqueeze(-1), self._first(result), result)
        if is_in_function() and not self._constant_inside:  # one that was applied past `_applied`
            self.lost = True
            return result
        own = all(made.alias_info is None for made in func._schema.returns)  # no view
        if own and turned_gradients_off() and isinstance(result, Tensor):
            return self._first(result).clone()  # may be written to
        if name in _POOLS:
            where = self._constant(name, result[1])
            flat = args[0].flatten(-_POOLS[name]).gather(-1, where.flatten(-_POOLS[name]))
            return flat.view_as(where), where
        if name in _STRAIGHT_THROUGH:
            rounded, mask = result
            mask = self._constant(name, mask)
            return args[0] * mask + self._first(rounded - args[0] * mask), mask
        if isinstance(result, (tuple, list)):
            return type(result)(self._constant(name, part) for part in result)
        at_a_point = name in _EQUAL and not isinstance(args[1], Tensor)
        if at_a_point and bool((result == (name == "ne")).all()):
            return result  # off it, as the definition of a norm nearly always is, which the norm itself does not ask
        constant = self._constant(name, result)
        if self._left is not None and at_a_point:
            self.lost |= not constant.equal(result)
        return constant

    def _picked(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], where: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a function picks along an axis: what is where it was in the first pass, and where."""
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        dim, x = given.get("dim", -1), args[0]
        where = self._constant(func.overloadpacket.__name__, where)
        if not x.dim() or where.dim() == x.dim():
            return (x.gather(dim, where) if x.dim() else x.clone()), where
        return x.gather(dim, where.unsqueeze(dim)).squeeze(dim), where

    def _of_piece(
        self, f: Callable[[Tensor], Tensor], corners: Sequence[Corner], x: Tensor, extended: bool
    ) -> Tensor:
        """f on the piece where x was in the first pass."""
        if not corners:
            return f(x)
        side = self._first(side_of(corners, x))
        return f(x) if self._left is None else on_piece(f, corners, side, x, extended)

    def _constant(self, name: str, result: Any) -> Any:
        """What a call gave in the first pass, if that is constant between kinks."""
        if not isinstance(result, Tensor) or result.is_complex() or result.dtype is torch.uint8:
            return result  # bytes are what a kernel keeps for its backward pass
        if result.is_floating_point() and name not in _STEPS:
            return result
        return self._first(result).clone()  # what is noted stays, if the copy is written to

    def _first(self, value: Tensor) -> Tensor:
        """The same value in the first pass."""
        if self._left is None:
            self.sides.append(value)
            return value
        first = next(self._left, None)
        if first is not None and first.is_floating_point() and value.is_floating_point():
            first = first.to(value.dtype)
        if first is None or first.shape != value.shape or first.dtype != value.dtype:
            self.lost = True
            return value
        return first


def held_difference(
    gradient: Callable[[float], Tensor], h: float, first: Callable[[], object] | None = None
) -> Tensor | None:
    """g(h) - g(-h) with every kink on the side where it is at 0; None where there is none, or where it cannot be held.

    Args:
        gradient: makes the same calls each time.
        h: the step.
        first: a pass with these calls at 0, whose sides count; by default the gradient's own.
    """
    kinks = Kinks()
    with kinks:
        first() if first is not None else gradient(0.0)
    if not kinks.sides:
        return None
    with kinks.held():
        ahead = gradient(h)
    with kinks.held():
        behind = gradient(-h)
    return None if kinks.lost else ahead - behind
