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

from hesscli.errors import MismatchError
from hesscli.hessian.aten.custom_functions import applied_by, by_own_derivative
from hesscli.hessian.aten.watcher import BLANK, Watcher, detaching, each
from hesscli.hessian.differences.pieces import between_kinks
from hesscli.hessian.differences.sides import Sides
from hesscli.hessian.guests import is_guest, is_in_function, turned_gradients_off


class Kinks(Watcher):
    """On which side of each kink a pass is: noted in a first pass, and kept in those that are `held`.

    with kinks: first pass
    with kinks.held(): another one, of the same calls

    Args:
        noted: what a first pass has noted already.
        constants: whether what is detached, or computed with gradients off, is held too.
    """

    def __init__(self, noted: Sequence[Tensor] = (), constants: bool = True) -> None:
        super().__init__()
        self.sides, self.constants = Sides(noted), constants
        self._around = ExitStack()
        self._inside = False  # a Function, whose calls are its own business
        self._copies: dict[int, Tensor] = {}  # that stand for views, by where they lie

    def __enter__(self) -> Kinks:
        self._copies.clear()
        self._around.enter_context(applied_by(self._applied))
        if self.constants:
            self._around.enter_context(detaching(self._detached))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._around.close()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside is such a pass. A model may refuse the outcomes of other comparisons than it made, as a solver with
        steps of its own choice does: they cannot be held then.
        """
        with self.sides.kept(), self:
            try:
                yield
            except MismatchError:
                self.sides.lost = True

    def _detached(self, result: Tensor, in_place: bool) -> Tensor:
        if is_guest() and not self._inside:
            result.data = self.sides.constant(result.data)
        return result

    def _applied(self, apply: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        """What a Function of the model's own gives."""
        if self._inside or not is_guest():
            return apply()
        self._inside = True
        try:
            if not torch.is_grad_enabled():
                return self.sides.constant(apply())
            return self._differentiated(apply, arguments)
        finally:
            self._inside = False

    def _differentiated(self, apply: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        """What it gives as its own derivative has it, where it is not smooth as that."""
        inputs = {
            place: x
            for place, x in enumerate(arguments)
            if isinstance(x, Tensor) and x.requires_grad
        }
        values = [x.detach().clone() for x in inputs.values()]  # it may write to them
        result = apply()
        if not isinstance(result, Tensor) or not result.requires_grad:
            return result
        before = [self.sides.first(x) for x in values]
        made = self.sides.first(result.detach().clone())
        if not self.sides.held:
            return result
        moves = [x - b for x, b in zip(values, before, strict=True)]
        held = by_own_derivative(result, inputs, moves, made)
        self.sides.lost |= held is None
        return result if held is None else held

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._inside:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in BLANK:  # the same in each pass
            return func(*args, **kwargs).zero_()
        if not any(x.is_floating_point() for x in each(args, Tensor)):
            return func(*args, **kwargs)
        if self._copies and func._schema.is_mutable:
            written = each((args[0], *kwargs.values()), Tensor)
            self.sides.lost |= any(x.untyped_storage().data_ptr() in self._copies for x in written)
        if is_in_function():  # one that was applied past `_applied`
            self.sides.lost = True
            return func(*args, **kwargs)
        if self.constants and turned_gradients_off():
            return self._without_gradients(func, args, kwargs)
        if name == "_local_scalar_dense" and is_guest():  # `item`
            return self.sides.constant(func(*args, **kwargs))
        return between_kinks(self.sides, func, args, kwargs)

    def _without_gradients(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is computed with gradients off is a constant to autograd, wherever it is kept.

        So is a view of what moves, which is copied therefore; other views may be of memory that is to be written.
        """
        result = func(*args, **kwargs)
        aliases = [made.alias_info for made in func._schema.returns]
        if all(alias is None for alias in aliases):
            return self.sides.constant(result)
        if not func._schema.is_mutable and any(x.requires_grad for x in each(args, Tensor)):
            copies = self.sides.constant(result)
            self._copies |= {x.untyped_storage().data_ptr(): x for x in each(copies, Tensor)}
            return copies
        for part, alias in zip(each(result, Tensor), aliases, strict=False):
            if alias is not None and alias.is_write and not part.requires_grad:
                part.copy_(self.sides.first(part.clone()))
        return result


def held_difference(
    gradient: Callable[[float], Tensor],
    h: float,
    first: Callable[[], object] | None = None,
    constants: bool = True,
) -> Tensor | None:
    """g(h) - g(-h) with every kink on the side where it is at 0; None where there is none, or where it cannot be held.

    Args:
        gradient: makes the same calls each time.
        h: the step.
        first: a pass with these calls at 0, whose sides count; by default the gradient's own.
        constants: as in `Kinks`.
    """
    kinks = Kinks(constants=constants)
    with kinks:
        first() if first is not None else gradient(0.0)
    if not kinks.sides.noted:
        return None
    with kinks.held():
        ahead = gradient(h)
    with kinks.held():
        behind = gradient(-h)
    return None if kinks.sides.lost else ahead - behind
