"""How many digits a gradient has, whatever its dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscli.hessian.aten.definitions import right_gradients
from hesscli.hessian.aten.watcher import Watcher, each
from hesscli.hessian.objective.problem import Problem


def gradient_digits(problem: Problem) -> torch.dtype:
    """The dtype whose digits the gradients have: float32 where a backward pass in Python rounds to that on the way.

    What it rounds stays the same along a step that is small to float32, as if it were a constant. Differences then miss
    its derivative, and so does a product, if autograd does not see it either.
    """
    if not (problem.functions and problem.runs_here and problem.dtype is torch.float64):
        return problem.dtype
    with torch.enable_grad(), right_gradients():
        value = problem.value(problem.batches[0])
    if not value.requires_grad:
        return problem.dtype
    with _Rounding() as rounding:
        torch.autograd.grad(value, list(problem.parameters.values()), allow_unused=True)
    return torch.float32 if rounding.seen else problem.dtype


class _Rounding(Watcher):
    """Sees whether anything is computed of numbers that float32 may have rounded; whole ones it has not."""

    seen = False

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        narrow = (x for x in each(args, Tensor) if x.is_floating_point() and x.dtype.itemsize < 8)
        self.seen = self.seen or any(not torch.equal(x, x.round()) for x in narrow)
        return func(*args, **kwargs)
