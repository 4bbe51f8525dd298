"""Derivatives of gradients by differences: for operators that PyTorch cannot differentiate twice.

To most models what they detach is a constant: the target of a Q-network. But an implicit layer finds a fixed point with
gradients off, and its backward pass, a hook say, solves for the gradient of the loss as it is, the fixed point being
where the parameters move it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hesscli.hessian.differences.digits import gradient_digits
from hesscli.hessian.differences.kinks import held_difference
from hesscli.hessian.objective.problem import Problem, parameters_moved

Gradient = Callable[[float], Tensor]  # h -> g(theta + h v)
Difference = Callable[[Gradient, float], Tensor | None]  # g, h -> g(h) - g(-h)
_STEPS = {torch.float64: (1e-4, 1e-5, 1e-6, 1e-7), torch.float32: (3e-2, 3e-3)}
AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-2}
_MOVED = 1e-4  # relative to the parameters: a step along which it is seen whether all moves


class Quotients:
    """dg/dh at 0 of gradients g(h): (g(h) - g(-h)) / 2h, extrapolated from steps h and h/2 (error h^4).

    Every kink is held where it is at 0 (see `kinks.py`), as far as the model lets itself be held: a unit right at its
    corner then has the derivative that autograd gives it. Where it does not, a step that crosses a kink makes the two
    disagree, and a smaller one is tried.

    To hold costs many times what the gradients do, where a `Function`'s own backward pass is asked what it does. Where
    nothing needs it, `free`, they are taken as they are, unless a step and its half disagree.

    Args:
        dtype: whose digits the gradients have.
        holds: whether they are computed here, where kinks can be held.
        constants: whether what the model detaches is held, too.
    """

    def __init__(self, dtype: torch.dtype, holds: bool = True, constants: bool = True) -> None:
        self.steps, self.agreement = _STEPS[dtype], AGREEMENT[dtype]
        self.holds, self.free = holds, False
        self.held: Difference = partial(held_difference, constants=constants)

    def __call__(self, gradient: Gradient, scale: float) -> Tensor:
        """The derivative of one batch's gradient; `scale` is what steps are relative to."""
        if self.holds and self.free:
            value, agrees = self._extrapolated(_difference, gradient, scale, most=1)
            if value is not None and agrees:
                return value
        if self.holds:
            value, agrees = self._extrapolated(self.held, gradient, scale)
            self.holds = value is not None  # the next gradient makes the same calls
            if value is not None and agrees:
                return value
        value, _ = self._extrapolated(_difference, gradient, scale)
        assert value is not None
        return value

    def _extrapolated(
        self, difference: Difference, gradient: Gradient, scale: float, most: int | None = None
    ) -> tuple[Tensor | None, bool]:
        """The derivative with the first of so many steps that agrees with its half, or else with the one that differs
        least from it; and whether they agree."""
        best, least = None, math.inf
        for step in self.steps[:most]:
            h = step * scale
            coarse = difference(gradient, h)
            fine = None if coarse is None else difference(gradient, h / 2)
            if coarse is None or fine is None:
                return None, False
            value = (8 * fine - coarse) / (6 * h)
            gap = float(torch.linalg.norm(2 * fine - coarse))
            if gap <= self.agreement * float(torch.linalg.norm(2 * fine)):
                return value, True
            if best is None or gap / h < least:
                best, least = value, gap / h
        return best, False


def _difference(gradient: Gradient, h: float) -> Tensor:
    return gradient(h) - gradient(-h)


def quotients_of(problem: Problem) -> Quotients:
    """Those of the gradients of a problem, or of a batch of it."""
    here, digits = problem.runs_here, gradient_digits(problem)
    return Quotients(digits, here, constants=not (here and _detached_moves(problem)))


def _detached_moves(problem: Problem) -> bool:
    """Whether what a model detaches moves along with its parameters, as far as its gradients are concerned.

    So it is where the gradient along a random direction is that of the loss, by differences in which all moves; and,
    but for kinks, where nothing is detached. A gradient of zero tells nothing.
    """
    if problem.dtype is not torch.float64:
        return False
    names, leaves = list(problem.parameters), list(problem.parameters.values())
    theta = torch.cat([leaf.detach().reshape(-1) for leaf in leaves])
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(0), dtype=theta.dtype)
    v = v.to(theta.device) * (_MOVED * max(1.0, float(theta.norm())) / float(v.norm()))

    def value(step: float) -> float:
        with torch.no_grad(), parameters_moved(leaves, v, step):
            return sum(float(problem.value(batch)) for batch in problem.batches)

    slope = (8 * (value(1) - value(-1)) - (value(2) - value(-2))) / 12
    expected = float(problem.flat_gradient(names) @ v)
    agrees = abs(slope - expected) <= AGREEMENT[torch.float64] * abs(expected)
    return bool(expected) and agrees
