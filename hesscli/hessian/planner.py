"""Which route computes which block: the cheapest of those that are exact, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
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

    def choices(self, block: Block, diagonal: bool, method: str = "auto") -> list[Choice]:
        """The exact routes of a block, of any method or of this one, the cheapest first and differences last.

        Raises:
            NotApplicable: none is exact.
        """
        found: list[Choice] = []
        reasons: list[str] = []
        for route in self.routes:
            if method in ("auto", route.method):
                try:
                    found.append(route.choice(self.first, block, diagonal))
                except NotApplicable as reason:
                    reasons.append(str(reason))
        if not found:
            raise NotApplicable(*reasons[:1] or ["it does not give this matrix"])
        found.sort(key=lambda c: (c.method == FINITE_DIFFERENCE, c.work.seconds(self.rates)))
        if reasons and all(choice.method in (HVP, FINITE_DIFFERENCE) for choice in found):
            found[0] = replace(found[0], reason=reasons[0])
        return found
