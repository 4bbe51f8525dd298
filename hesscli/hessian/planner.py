"""Which route computes which block: the cheapest of those that are exact, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import Block
from hesscli.hessian.routes.base import Choice, Route
from hesscli.hessian.routes.cuts import Cuts
from hesscli.hessian.routes.first_batch import FirstBatch
from hesscli.hessian.routes.rates import usual_rates
from hesscli.hessian.words import FINITE_DIFFERENCE, HVP


class Planner:
    """Ranks the routes of each block by their cost on the first batch."""

    def __init__(self, cuts: Cuts, routes: Sequence[Route]) -> None:
        self.first, self.routes = FirstBatch(cuts), routes
        self.rates = usual_rates(cuts.problem.device)

    def choices(self, block: Block, diagonal: bool) -> list[Choice]:
        """The exact routes of a block, the cheapest first, and what is the last resort, if anything is."""
        found, reasons = self._exact(self.routes, block, diagonal)
        if all(choice.method in (HVP, FINITE_DIFFERENCE) for choice in found):
            found[0] = replace(found[0], reason=reasons[0])
        return found

    def forced(self, block: Block, diagonal: bool, method: str) -> list[Choice]:
        """The routes by the method asked for, of which one must be exact for this block."""
        mine = [route for route in self.routes if route.method == method]
        if not mine:
            raise NotApplicable("it gives the Hessian alone")
        found, reasons = self._exact(mine, block, diagonal)
        if not found:
            raise NotApplicable(reasons[0])
        return found

    def _exact(
        self, routes: Iterable[Route], block: Block, diagonal: bool
    ) -> tuple[list[Choice], list[str]]:
        """Those that are, the cheapest first and differences last; and why others are not."""
        found: list[Choice] = []
        reasons: list[str] = []
        for route in routes:
            try:
                found.append(route.choice(self.first, block, diagonal))
            except NotApplicable as reason:
                reasons.append(str(reason))
        found.sort(key=lambda c: (c.method == FINITE_DIFFERENCE, c.work.seconds(self.rates)))
        return found, reasons
