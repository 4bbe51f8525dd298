"""Which route computes which block: the cheapest of those that are exact, with the reason, in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import Block
from hesscli.hessian.proofs.analysis import Analysis
from hesscli.hessian.proofs.uses import Use, values_of
from hesscli.hessian.recording.recorder import record
from hesscli.hessian.routes.bend import find_bend
from hesscli.hessian.routes.costs import PASSES, Costs, Work
from hesscli.hessian.routes.cuts import Cuts
from hesscli.hessian.routes.gauss_newton import block_uses
from hesscli.hessian.routes.preactivation import chain_of, split
from hesscli.hessian.routes.rates import Rates, usual_rates
from hesscli.hessian.routes.through_weights import numbers_held
from hesscli.hessian.words import (
    FINITE_DIFFERENCE,
    GAUSS_NEWTON,
    HVP,
    PREACTIVATION,
    THROUGH_WEIGHTS,
)


@dataclass(frozen=True)
class Choice:
    """A route for a block.

    Attributes:
        method: the route.
        reason: "64 seeds"; for hvp, why nothing better is exact.
        own: the work that this block alone needs.
        common: the work that serves all blocks of this route at once, if they are computed together.
        through_weights: whether it takes this route to the weights that the block's parameters make.
        held: numbers that the route keeps beside the block.
    """

    method: str
    reason: str
    own: Work
    common: Work = Work()  # noqa: RUF009 - immutable
    through_weights: bool = False
    held: int = 0

    @property
    def route(self) -> str:
        """The name of what computes the block."""
        return f"{self.method}{THROUGH_WEIGHTS}" if self.through_weights else self.method

    @property
    def work(self) -> Work:
        return self.own + self.common

    def __str__(self) -> str:
        if not self.reason:
            return self.method
        if self.method == HVP:
            return f"{self.method}: {self.reason}"
        return f"{self.method} ({self.reason})"


Option = Callable[[Block, bool], Choice]  # of a block, or of its diagonal alone


class Planner:
    """Ranks the routes of each block by their cost on the first batch.

    Args:
        cuts: of the batches of what is differentiated.
    """

    def __init__(self, cuts: Cuts) -> None:
        problem = cuts.problem
        self.problem, self.rates = problem, usual_rates(problem.device)
        self.batch, self.cuts = problem.batches[0], cuts
        self.analysis: Analysis | None = None
        self.costs: Costs | None = None
        self.refused = ""
        try:
            self.analysis = cuts.analyses.of(self.batch)
        except NotApplicable as reason:
            self.refused = str(reason)
        with suppress(NotApplicable):  # what nothing is proven of still has a cost
            tape = self.analysis.tape if self.analysis is not None else record(problem, self.batch)
            self.costs = cuts.costs(tape)

    def choices(self, block: Block, diagonal: bool) -> list[Choice]:
        """The exact routes of a block, the cheapest first, and what is the last resort, if anything is."""
        found, reasons = [], []
        for method in self._options():
            exact, reason = self._exact(method, block, diagonal)
            found += exact
            reasons.append(reason)
        found.append(Choice(HVP, "" if found else reasons[0], self._hvp_work(block)))
        found.sort(key=lambda choice: choice.work.seconds(self.rates))
        return [*found, Choice(FINITE_DIFFERENCE, "", self._hvp_work(block).times(4))]

    def forced(self, block: Block, diagonal: bool, method: str) -> list[Choice]:
        """The route asked for.

        Raises:
            NotApplicable: it would not be exact for this block.
        """
        if method not in self._options():
            return [Choice(method, "", self._hvp_work(block))]
        found, reason = self._exact(method, block, diagonal)
        if not found:
            raise NotApplicable(reason)
        return found

    def _exact(self, method: str, block: Block, diagonal: bool) -> tuple[list[Choice], str]:
        """The block by a route, itself and through weights, the cheapest first; or why it cannot be itself."""
        found, reason = [], ""
        try:
            found.append(self._options()[method](block, diagonal))
        except NotApplicable as refusal:
            reason = str(refusal)
        with suppress(NotApplicable):
            found.append(self._through_weights(method, block, diagonal))
        return sorted(found, key=lambda choice: choice.work.seconds(self.rates)), reason

    def _options(self) -> dict[str, Option]:
        """The routes that are not exact for every block."""
        return {PREACTIVATION: self._preactivation, GAUSS_NEWTON: self._gauss_newton}

    def _proven(self) -> tuple[Analysis, Costs]:
        if self.analysis is None or self.costs is None:
            raise NotApplicable(self.refused)
        return self.analysis, self.costs

    @cached_property
    def _behind_weights(self) -> Planner:
        """That of the blocks of the weights."""
        return type(self)(self.cuts.behind_weights)

    def _through_weights(self, method: str, block: Block, diagonal: bool) -> Choice:
        analysis, costs = self._proven()
        made = analysis.weights_of(block)
        neurons = analysis.neurons_of(block, made) if diagonal else None
        held = numbers_held(block, made, neurons)
        choice = self._behind_weights._options()[method](made, neurons is not None)
        work = self._all(costs.through(analysis.weights, block, made, neurons))
        reason, own = choice.reason + THROUGH_WEIGHTS, choice.own + work
        return replace(choice, reason=reason, own=own, through_weights=True, held=held)

    def _preactivation(self, block: Block, diagonal: bool) -> Choice:
        analysis, costs = self._proven()
        if diagonal:
            steps, mine = chain_of(analysis, [block.name])
            use = mine.get(block.name)
            if use is not None:
                own, sweep = costs.own(use, diagonal), costs.chain(steps)
                return Choice(PREACTIVATION, "chain", self._all(own), self._all(sweep))
        layers, others = split(analysis, block)
        if not layers:
            use = analysis.use(block.parameters[0])
            work = self._along(use, use.size) + costs.own(use, diagonal)
            return Choice(PREACTIVATION, f"{use.size} seeds", self._all(work))
        alone = len(layers) == 1 and not layers[0].again and not others
        work, count, tail = Work(), 0, 0
        for layer in reversed(layers):
            use = replace(layer.weight, positions=layer.positions)  # at all its values
            seeds = use.n * use.positions
            work += self._along(use, seeds) if alone else costs.directions(use.z, seeds)
            if layer.again and not diagonal:  # the inputs move as well, seen from each of them
                work += costs.directions(use.z, use.m * use.positions // 2)
                work += costs.cross(use, layer.size)
            else:
                work += costs.own(use, diagonal)
            if tail:
                work += costs.cross(use, tail)
            tail += layer.size
            count += seeds
        rows = sum(len(block.rows[name]) for name in others)
        if rows:
            work += costs.hvp(block.parameters, rows)
        said = f"{count} seeds" + (f", {rows} rows by hvp" if rows else "")
        return Choice(PREACTIVATION, said, self._all(work))

    def _along(self, use: Use, count: int) -> Work:
        """Derivatives along directions of one layer alone, which end at the next cut."""
        _, costs = self._proven()
        return self.cuts.plan(self.batch).work(costs, use.z, count)

    def _gauss_newton(self, block: Block, diagonal: bool) -> Choice:
        analysis, costs = self._proven()
        uses = block_uses(analysis, block)
        zs = values_of(uses)
        passes, work = costs.class_passes(zs), _jacobian_work(analysis, costs, block, diagonal)
        if find_bend(analysis.tape, zs) is not None:
            for use in uses:
                work += costs.bend(use, diagonal)
        said = f"{costs.classes} classes"
        return Choice(GAUSS_NEWTON, said, self._all(work), self._all(passes))

    def _hvp_work(self, block: Block) -> Work:
        if self.costs is None:
            return Work(calls=PASSES * block.size)
        return self._all(self.costs.hvp(block.parameters, block.size))

    def _all(self, work: Work) -> Work:
        return work.times(len(self.problem.batches))


class JacobianPlanner(Planner):
    """Ranks those of Gauss-Newton and empirical Fisher matrices.

    Per-sample Jacobians where every parameter has an affine use, whatever follows it; else row by row.
    """

    rows = "{} classes"
    """What a sample's Jacobian has a row for."""

    def choices(self, block: Block, diagonal: bool) -> list[Choice]:
        *exact, _ = super().choices(block, diagonal)
        return exact  # differences of gradients are the Hessian's

    def forced(self, block: Block, diagonal: bool, method: str) -> list[Choice]:
        if method in (PREACTIVATION, FINITE_DIFFERENCE):
            raise NotApplicable("it gives the Hessian alone")
        return super().forced(block, diagonal, method)

    def _options(self) -> dict[str, Option]:
        return {GAUSS_NEWTON: self._jacobians}

    def _jacobians(self, block: Block, diagonal: bool) -> Choice:
        analysis, costs = self._proven()
        work = _jacobian_work(analysis, costs, block, diagonal)
        return Choice(GAUSS_NEWTON, self.rows.format(costs.classes), self._all(work))


class FisherPlanner(JacobianPlanner):
    rows = "1 gradient per sample"

    def _jacobians(self, block: Block, diagonal: bool) -> Choice:
        if self.problem.one_sample:
            raise NotApplicable("one sample without a sample axis")
        return super()._jacobians(block, diagonal)


def _jacobian_work(analysis: Analysis, costs: Costs, block: Block, diagonal: bool) -> Work:
    """A block from its parameters' Jacobians."""
    work = Work()
    for name in block.parameters:
        uses = analysis.all_uses(name)
        at_all = replace(uses[0], positions=sum(use.positions for use in uses))
        work += costs.gauss_newton(at_all, diagonal)
    return work


def seconds_of(choices: Sequence[Choice], rates: Rates) -> float:
    """Seconds of a plan: what routes share counts once, for the block that needs most of it."""
    seconds = sum(choice.own.seconds(rates) for choice in choices)
    for route in {choice.route for choice in choices}:
        mine = [choice.common.seconds(rates) for choice in choices if choice.route == route]
        seconds += max(mine)
    return seconds
