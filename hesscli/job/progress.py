"""How far an iteration has come that ends when a number is small enough."""

from __future__ import annotations

import math
import sys

from hesscli.job.options import Listener

_STEPS = 1000  # of a bar


class Convergence:
    """Tells a listener how far a residual, or a standard error, has come on its way to the tolerance.

    A residual falls about as its logarithm, a standard error as one over the root of the number of samples.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.first: float | None = None

    def residual(self, products: int, worst: float, tolerance: float) -> None:
        """After so many products the worst relative residual is this, of the tolerance for it."""
        tolerance = max(tolerance, sys.float_info.min)
        if self.first is None or worst > self.first:
            self.first = max(worst, tolerance)
        way = math.log(self.first / tolerance) or 1.0
        come = math.log(self.first / max(worst, tolerance)) / way
        self.listener.progress(
            int(_STEPS * min(come, 0.99)), _STEPS, f"{products} products, residual {worst:.1e}"
        )

    def standard_error(self, products: int, relative: float, tolerance: float) -> None:
        """After so many products the relative standard error is this, of the tolerance for it."""
        come = min(1.0, (tolerance / relative) ** 2) if relative else 1.0
        self.listener.progress(
            int(_STEPS * come), _STEPS, f"{products} products, standard error {relative:.1%}"
        )
