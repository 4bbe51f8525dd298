"""A route for a block, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hesscli.hessian.routes.costs import Work
from hesscli.hessian.routes.rates import Rates
from hesscli.hessian.words import HVP

if TYPE_CHECKING:
    from hesscli.hessian.routes.base import Route


@dataclass(frozen=True)
class Choice:
    """A route for a block.

    Attributes:
        reason: "64 seeds"; for hvp, why nothing better is exact.
        own: the work that this block alone needs.
        common: the work that serves all blocks of this route at once, if they are computed together.
        held: numbers that the route keeps beside the block.
    """

    route: Route
    reason: str
    own: Work
    common: Work = Work()  # noqa: RUF009 - immutable
    held: int = 0

    @property
    def method(self) -> str:
        return self.route.method

    @property
    def work(self) -> Work:
        return self.own + self.common

    def __str__(self) -> str:
        if not self.reason:
            return self.method
        if self.method == HVP:
            return f"{self.method}: {self.reason}"
        return f"{self.method} ({self.reason})"


def seconds_of(choices: Sequence[Choice], rates: Rates) -> float:
    """Seconds of a plan: what routes share counts once, for the block that needs most of it."""
    seconds = sum(choice.own.seconds(rates) for choice in choices)
    for route in {choice.route for choice in choices}:
        mine = [choice.common.seconds(rates) for choice in choices if choice.route == route]
        seconds += max(mine)
    return seconds
