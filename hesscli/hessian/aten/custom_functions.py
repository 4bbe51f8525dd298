"""`torch.autograd.Function`s: what a model computes by code of its own, with a derivative of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction

from hesscli.errors import is_out_of_memory

Handler = Callable[[Callable[[], object], tuple[object, ...]], object]
Pull = Callable[[Tensor], list[Tensor | None]]  # u -> J^T u, for each input

_FAR = 0.1  # of what its derivative says: a function that departs so far from it in a small step has another one
_SEEDS = 3  # random u: none of them is orthogonal to J d


def apply_in_python() -> None:
    """Gives `Function` an `apply` in Python, as it had up to PyTorch 2.13.

    What a model then keeps (`clip = Clip.apply`) calls that of the base, which `applied_by` stands in for. C's own does
    not.
    """
    if not isinstance(vars(Function)["apply"], classmethod):

        def apply(cls: type, /, *arguments: object, **named: object) -> object:
            base: Any = super(Function, cls)
            return base.apply(*arguments, **named)

        set_apply(classmethod(apply))


def set_apply(apply: object) -> None:
    """Makes this the `apply` of `Function`."""
    Function.apply = apply  # type: ignore[assignment, method-assign]


@contextmanager
def applied_by(handler: Handler) -> Iterator[None]:
    """Inside, every Function is applied by `handler(apply, arguments)`, which returns what stands for `apply()`."""
    base = Function.__mro__[1]  # whose `apply` a Function's own calls
    before = vars(base).get("apply")

    def apply(cls: type, /, *arguments: object, **named: object) -> object:
        own: Any = super(base, cls)
        return handler(partial(own.apply, *arguments, **named), (*arguments, *named.values()))

    base.apply = classmethod(apply)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if before is None:
            del base.apply  # type: ignore[attr-defined]
        else:
            base.apply = before  # type: ignore[attr-defined]


def by_own_derivative(
    result: Tensor, inputs: Mapping[int, Tensor], moves: Sequence[Tensor], made: Tensor
) -> Tensor | None:
    """A Function's result; where its derivative is not that of what it computes, that derivative's instead.

    A straight-through estimator rounds, and its derivative is that of the identity: near inputs x0 that gave y0, it is
    y0 + J (x - x0) to autograd, J being what its backward pass multiplies with. The backward pass gives J^T u alone.
    What J d = J (x - x0) is, is found in other ways, and compared with it: <u, J d> = <J^T u, d> for random u.

    Args:
        result: of the inputs, which it may have written to.
        inputs: those with a gradient, by their places among the arguments.
        moves: d, how far each was from x0.
        made: y0.

    Returns:
        None where J d is not found; or where the Function wrote into a view, behind which its backward pass is hidden.
    """
    node: Any = result.grad_fn
    if not isinstance(node, BackwardCFunction):
        return None
    moved = result.detach() - made
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.randn(made.shape, generator=generator).to(made) for _ in range(_SEEDS)]

    def pull(u: Tensor) -> list[Tensor | None]:
        """J^T u, by the Function's own backward pass: autograd's would add what one input owes to another."""
        grads = node.apply(u)
        grads = grads if isinstance(grads, tuple) else (grads,)
        found = ((grads[place], x) for place, x in inputs.items())
        return [None if grad is None else grad.sum_to_size(x.shape) for grad, x in found]

    try:
        expected = [
            sum(_inner(p, d) for p, d in zip(pull(u), moves, strict=True) if p is not None)
            for u in seeds
        ]

        def is_of(change: Tensor) -> bool:
            found = [_inner(seed, change) for seed in seeds]
            return math.dist(found, expected) <= _FAR * math.hypot(*expected)

        if is_of(moved):
            return result
        for way in (_by_derivative, _by_entry):
            change = way(result, pull, moves)
            if is_of(change):
                return result - (moved - change)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return result  # it has no backward pass
    return None


def _inner(a: Tensor, b: Tensor) -> float:
    return float((a.conj() * b).detach().sum().real)


def _by_derivative(result: Tensor, pull: Pull, moves: Sequence[Tensor]) -> Tensor:
    """J d, by the derivative of J^T u along u, where the backward pass can be differentiated."""
    u = torch.zeros_like(result, requires_grad=True)
    pairs = [
        (p, d) for p, d in zip(pull(u), moves, strict=True) if p is not None and p.requires_grad
    ]
    if not pairs:
        return torch.zeros_like(result)
    outputs, seeds = zip(*pairs, strict=True)
    (along,) = torch.autograd.grad(outputs, u, seeds, retain_graph=True, allow_unused=True)
    return torch.zeros_like(result) if along is None else along


def _by_entry(result: Tensor, pull: Pull, moves: Sequence[Tensor]) -> Tensor:
    """J d, where each entry of the result has a derivative by the same entry of the inputs alone."""
    along = torch.zeros_like(result)
    for p, d in zip(pull(torch.ones_like(result)), moves, strict=True):
        if p is not None and p.shape == result.shape:
            along += p * d
    return along
