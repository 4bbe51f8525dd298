"""`torch.autograd.Function`s: what a model computes by code of its own, with a derivative of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hesscli.errors import is_out_of_memory

Handler = Callable[[Callable[[], object], tuple[object, ...]], object]

_FAR = 0.1
"""Of what its derivative says: a function that departs so far from it in a small step has another one."""


@contextmanager
def applied_by(handler: Handler) -> Iterator[None]:
    """Inside, every Function is applied by `handler(apply, arguments)`, which returns what stands for `apply()`."""
    base = torch.autograd.Function.__mro__[1]  # whose `apply` a Function's own calls
    before = vars(base).get("apply")

    def apply(cls: type, *arguments: object) -> object:
        own: Any = super(base, cls)
        return handler(partial(own.apply, *arguments), arguments)

    base.apply = classmethod(apply)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if before is None:
            del base.apply  # type: ignore[attr-defined]
        else:
            base.apply = before  # type: ignore[attr-defined]


def by_own_derivative(
    result: Tensor, inputs: Sequence[Tensor], before: Sequence[Tensor], made: Tensor
) -> Tensor:
    """A Function's result; where its derivative is not that of what it computes, that derivative's instead.

    A straight-through estimator rounds, and its derivative is that of the identity: near inputs x0 that gave y0, it is
    y0 + J (x - x0) to autograd, J being what its backward pass multiplies with.

    Args:
        result: of the inputs.
        before: inputs nearby.
        made: their result.
    """
    try:
        along = _along(
            result, inputs, [x.detach() - b for x, b in zip(inputs, before, strict=True)]
        )
    except (RuntimeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        return result  # its backward pass is not to be differentiated
    departure = result.detach() - made - along
    if float(torch.linalg.norm(departure)) <= _FAR * float(torch.linalg.norm(along)):
        return result
    return result - departure


def _along(result: Tensor, inputs: Sequence[Tensor], moves: Sequence[Tensor]) -> Tensor:
    """J d, by the derivative of J^T u along u."""
    u = torch.zeros_like(result, requires_grad=True)
    pulled = torch.autograd.grad(result, inputs, u, create_graph=True, allow_unused=True)
    pairs = [
        (p, d) for p, d in zip(pulled, moves, strict=True) if p is not None and p.requires_grad
    ]
    if not pairs:
        return torch.zeros_like(result)
    outputs, seeds = zip(*pairs, strict=True)
    (along,) = torch.autograd.grad(outputs, u, seeds, allow_unused=True)
    return torch.zeros_like(result) if along is None else along
