"""Which route computes which block of a Gauss-Newton or an empirical Fisher matrix."""

from __future__ import annotations

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import Block
from hesscli.hessian.costs import Work
from hesscli.hessian.planner import Choice, Planner
from hesscli.hessian.words import FINITE_DIFFERENCE, GAUSS_NEWTON, HVP, PREACTIVATION


class JacobianPlanner(Planner):
    """Per-sample Jacobians where every parameter has an affine use, whatever follows it; else row by row."""

    rows = "{} classes"
    """What a sample's Jacobian has a row for."""

    def choices(self, block: Block, diagonal: bool) -> list[Choice]:
        rows = Choice(HVP, "", self._hvp_work(block))
        try:
            found = [self._jacobians(block, diagonal), rows]
        except NotApplicable as reason:
            return [Choice(HVP, str(reason), rows.work)]
        return sorted(found, key=lambda choice: choice.work.seconds(self.rates))

    def forced(self, block: Block, diagonal: bool, method: str) -> list[Choice]:
        if method in (PREACTIVATION, FINITE_DIFFERENCE):
            raise NotApplicable("it gives the Hessian alone")
        if method == GAUSS_NEWTON:
            return [self._jacobians(block, diagonal)]
        return super().forced(block, diagonal, method)

    def _jacobians(self, block: Block, diagonal: bool) -> Choice:
        analysis, costs = self._proven()
        work = Work()
        for name in block.parameters:
            work += costs.gauss_newton(analysis.use(name), diagonal)
        return Choice(GAUSS_NEWTON, self.rows.format(costs.classes), self._all(work))


class FisherPlanner(JacobianPlanner):
    rows = "1 gradient per sample"
