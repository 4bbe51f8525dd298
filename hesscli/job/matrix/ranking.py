"""The routes that may compute a block: which of them is taken, and what is said where one is not exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hesscli.errors import NumericalError
from hesscli.hessian.blocks import Block
from hesscli.hessian.differences.check import SINGLE
from hesscli.hessian.routes.base import Choice, Route
from hesscli.hessian.words import FINITE_DIFFERENCE
from hesscli.job.matrix.planning import Plan
from hesscli.job.remedies import ANOTHER_SLOPE, inexact, more_digits, not_finite, other_way


@dataclass
class Ranking:
    """A block of a plan, and the first of its routes that has not yet been found wanting."""

    plan: Plan
    block: Block
    _place: int = 0

    @property
    def choice(self) -> Choice:
        return self.plan.choices[self.block.name][self._place]

    @property
    def method(self) -> str:
        return self.choice.method

    @property
    def route(self) -> Route:
        return self.choice.route

    def skip(self) -> None:
        """Goes on to the next route, of which enough has been said."""
        self._place += 1

    def refuse(self, reason: Exception) -> None:
        """Goes on to the next route, and says why this one cannot give the block.

        Raises:
            NumericalError: there is no other.
        """
        following = self._following()
        if following is None:
            raise inexact(self.plan.options, self.block, self.method, reason)
        self.plan.opened.listener.note(f"{reason}: {following} instead of {self.route.name}")
        self.skip()

    def accepts(self, error: float | None, finite: Callable[[], bool]) -> bool:
        """Whether the route's result is exact; if not, says so, and goes on to the next route.

        Args:
            error: what the check found, if there is one.
            finite: whether all numbers are, where the check does not tell.

        Raises:
            NumericalError: it is not finite, or there is no other route.
        """
        certificate, dtype = self.plan.certificate, self.plan.problem.dtype
        passed = certificate is not None and error is not None and certificate.passed(error)
        if passed:  # a comparison, which no NaN passes
            return True
        if not finite():
            raise not_finite(f"{self.block.name}: its Hessian", self.plan.options, dtype)
        if certificate is None or error is None:
            return True
        following = self._following()
        said = f"{self.block.name}: {self.route.name} differs from gradients by {error:.1e}"
        if following is None:
            raise self._inexact(f"{said}, more than {certificate.tolerance:.0e}", error)
        self.plan.opened.listener.note(f"{said}; {following} instead")
        self.skip()
        return False

    def _inexact(self, said: str, error: float) -> NumericalError:
        """What is said where the last route does not pass the check."""
        certificate, dtype = self.plan.certificate, self.plan.problem.dtype
        if certificate is not None and certificate.finds_another_slope(self.block):
            return NumericalError(f"{said}: {ANOTHER_SLOPE}; nothing was written")
        hint = more_digits(dtype) or other_way(self.plan.options, self.method)
        if self.method == FINITE_DIFFERENCE and hint is None:  # which is made of gradients itself
            said += (
                ": the gradients contradict each other, as those of a solver that ends early may"
            )
            hint = "--dtype float32" if error <= SINGLE else None
        return NumericalError(f"{said}; nothing was written", hint)

    def _following(self) -> str | None:
        """The next route's name."""
        rest = self.plan.choices[self.block.name][self._place + 1 :]
        return rest[0].route.name if rest else None
