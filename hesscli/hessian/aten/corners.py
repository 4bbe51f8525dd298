"""Functions with corners: where these are, and what such a function is between two of them.

Between its corners it is smooth, and beyond them it goes on as it was, or in a straight line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Corner = tuple[float, bool]  # where it is, and whether it belongs to what lies below it
CORNERS: dict[str, Callable[..., list[Corner]]] = {
    "relu": lambda: [(0.0, True)],
    "leaky_relu": lambda *_: [(0.0, True)],
    "rrelu_with_noise": lambda *_: [(0.0, True)],
    "threshold": lambda threshold, *_: [(threshold, True)],
    "hardtanh": lambda low=-1.0, high=1.0: [(low, True), (high, False)],
    "hardswish": lambda: [(-3.0, True), (3.0, False)],
    "hardsigmoid": lambda: [(-3.0, True), (3.0, False)],
    "hardshrink": lambda width=0.5: [(-width, False), (width, True)],
    "softshrink": lambda width=0.5: [(-width, False), (width, True)],
    "clamp": lambda low=None, high=None: _numbers((low, False), (high, True)),
    "clamp_min": lambda low: _numbers((low, False)),
    "clamp_max": lambda high: _numbers((high, True)),
}
"""Functions with kinks: the corners, ascending, from the arguments after the first. Their derivatives have the same."""


def _one_of(side: Tensor, below: Tensor, at: Tensor, above: Tensor) -> Tensor:
    return torch.where(side < 0, below, torch.where(side > 0, above, at))


CURVED: dict[str, tuple[int, Callable[..., Any]]] = {
    "elu": (
        0,
        lambda side, x, alpha=1, scale=1, inner=1: _one_of(
            side,
            alpha * scale * torch.expm1(inner * x),
            alpha * scale * inner * x,  # to autograd
            scale * x,
        ),
    ),
    "elu_backward": (
        5,
        lambda side, gradient, alpha, scale, inner, is_result, x: _one_of(
            side,
            gradient
            * inner
            * (x + alpha * scale if is_result else alpha * scale * (inner * x).exp()),
            gradient * inner * alpha * scale,
            gradient * scale,
        ),
    ),
    "_prelu_kernel": (0, lambda side, x, slope: torch.where(side > 0, x, slope * x)),
    "_prelu_kernel_backward": (
        1,
        lambda side, gradient, x, slope: (
            torch.where(side > 0, gradient, slope * gradient),
            torch.where(side > 0, 0, x * gradient),
        ),
    ),
}
"""Functions with a corner at zero whose pieces are no straight lines in all arguments, CELU and SELU among them: which
argument decides, and what the function is on the side of that argument's sign."""


def side_of(corners: Sequence[Corner], x: Tensor) -> Tensor:
    """How many corners x lies beyond, in eight bits."""
    beyond = [x > at if below else x >= at for at, below in corners]
    return torch.stack(beyond).sum(0, dtype=torch.int8)


def on_piece(
    f: Callable[[Tensor], Tensor],
    corners: Sequence[Corner],
    side: Tensor,
    x: Tensor,
    extended: bool,
) -> Tensor:
    """f between the corners that are on this side of x; beyond them, as there, or on in a straight line."""
    low, high = (bound[side.int()] for bound in _bounds(corners, x))
    nearest = x.clamp(low, high)
    value = f(nearest)
    if not extended:
        return value
    inside = (low.where(low.isfinite(), high - 1) + high.where(high.isfinite(), low + 1)) / 2
    slope = (f(inside) - value) / (inside - nearest)  # of a straight piece
    return torch.where(x == nearest, value, value + slope.nan_to_num(0, 0, 0) * (x - nearest))


def _bounds(corners: Sequence[Corner], like: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest number on each side, before the first corner and after each: [corners + 1]."""
    ats = like.new_tensor([at for at, _ in corners])
    below = torch.tensor([below for _, below in corners], device=like.device)
    inf = like.new_tensor([math.inf])
    lowest = torch.where(below, torch.nextafter(ats, inf), ats)
    highest = torch.where(below, ats, torch.nextafter(ats, -inf))
    return torch.cat([-inf, lowest]), torch.cat([highest, inf])


def _numbers(*corners: tuple[Any, bool]) -> list[Corner]:
    """Those that there are, unless they are tensors."""
    return [(at, below) for at, below in corners if isinstance(at, (int, float))]
