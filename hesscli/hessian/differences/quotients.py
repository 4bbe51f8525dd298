"""Derivatives of gradients by differences: for operators that PyTorch cannot differentiate twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hesscli.hessian.differences.kinks import held_difference

Gradient = Callable[[float], Tensor]  # h -> g(theta + h v)
Difference = Callable[[Gradient, float], Tensor | None]  # g, h -> g(h) - g(-h)
_STEPS = {torch.float64: (1e-4, 1e-5, 1e-6, 1e-7), torch.float32: (3e-2, 3e-3)}
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-2}


class Quotients:
    """dg/dh at 0 of gradients g(h): (g(h) - g(-h)) / 2h, extrapolated from steps h and h/2 (error h^4).

    Every kink is held where it is at 0 (see `kinks.py`), as far as the model lets itself be held: a unit right at its
    corner then has the derivative that autograd gives it. Where it does not, a step that crosses a kink makes the two
    disagree, and a smaller one is tried.

    Args:
        dtype: of the gradients.
        holds: whether they are computed here, where kinks can be held.
        constants: whether what the model detaches is held, too.
    """

    def __init__(self, dtype: torch.dtype, holds: bool = True, constants: bool = True) -> None:
        self.steps, self.agreement = _STEPS[dtype], _AGREEMENT[dtype]
        self.holds = holds
        self.held: Difference = partial(held_difference, constants=constants)

    def __call__(self, gradient: Gradient, scale: float) -> Tensor:
        """The derivative of one batch's gradient; `scale` is what steps are relative to."""
        if self.holds:
            value, agrees = self._extrapolated(self.held, gradient, scale)
            self.holds = value is not None  # the next gradient makes the same calls
            if value is not None and agrees:
                return value
        value, _ = self._extrapolated(_difference, gradient, scale)
        assert value is not None
        return value

    def _extrapolated(
        self, difference: Difference, gradient: Gradient, scale: float
    ) -> tuple[Tensor | None, bool]:
        """The derivative with the first step that agrees with its half, or else with the one that differs least from
        it; and whether they agree."""
        best, least = None, math.inf
        for step in self.steps:
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
