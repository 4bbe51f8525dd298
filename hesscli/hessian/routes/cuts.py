"""The loss to second order at the cuts of a deep model; `cut_plan.py` says what they are, and where."""

from __future__ import annotations

from functools import cached_property
from weakref import WeakKeyDictionary

from hesscli.hessian.batch_size import Passes
from hesscli.hessian.chunk_sizes import shared_ranges
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.proofs.analysis import Analyses, WeightAnalyses
from hesscli.hessian.proofs.uses import Use
from hesscli.hessian.recording.tape import Tape
from hesscli.hessian.routes.costs import Costs
from hesscli.hessian.routes.cut_plan import CutPlan, plan_cuts
from hesscli.hessian.routes.probes import Cut, Probed, passes
from hesscli.hessian.routes.rates import usual_rates
from hesscli.hessian.workers import each_with, graphs_for


class Cuts:
    """Sigma at the cuts of every batch, made when it is needed and kept.

    What there is room for, `passes` says.
    """

    def __init__(self, analyses: Analyses, passes: Passes) -> None:
        self.analyses, self.problem, self.passes = analyses, analyses.problem, passes
        # Kept as long as the batch is, which may be made anew for every pass.
        self.plans: WeakKeyDictionary[Batch, CutPlan] = WeakKeyDictionary()
        self.made: WeakKeyDictionary[Batch, dict[int, Cut]] = WeakKeyDictionary()
        self._behind_weights: Cuts | None = None

    @cached_property
    def samples(self) -> int:
        """In all batches."""
        return sum(map(len, self.problem.batches))

    @property
    def bytes(self) -> int:
        """Of every Sigma, as far as cuts were planned: the plan of each batch counts the samples of all."""
        mine, weights = self.plans.values(), self._behind_weights
        return max((plan.bytes for plan in mine), default=0) + (weights.bytes if weights else 0)

    @property
    def rows(self) -> int:
        """Of the largest Sigma of a sample, as far as cuts were planned."""
        weights = self._behind_weights
        planned = max((plan.rows for plan in self.plans.values()), default=0)
        return max(planned, weights.rows if weights else 0)

    @property
    def behind_weights(self) -> Cuts:
        """Those of the problem as a function of its weights, made when they are first asked for."""
        if self._behind_weights is None:
            self._behind_weights = Cuts(WeightAnalyses(self.analyses), self.passes)
        return self._behind_weights

    def graphs_for(self, rows: int) -> int:
        """How many threads have a graph of a batch, where so many rows go through them."""
        return graphs_for(self.problem.device, rows, self.passes.graphs)

    def costs(self, tape: Tape, rank: int | None = None) -> Costs:
        """What passes of a batch cost without cuts."""
        problem, rates = self.problem, usual_rates(self.problem.device)
        return Costs(tape, problem.dtype.itemsize, self.passes.rows, rates, rank)

    def plan(self, batch: Batch) -> CutPlan:
        """Where a batch's pass is cut; raises NotApplicable where nothing is proven of it."""
        if batch not in self.plans:
            analysis = self.analyses.of(batch)
            costs = self.costs(analysis.tape, analysis.loss_rank(analysis.of_sample))
            self.plans[batch] = plan_cuts(analysis, costs, self.samples, self.passes.cuts)
        return self.plans[batch]

    def after(self, batch: Batch, use: Use, workspace: int) -> Cut | None:
        """The next cut behind a use."""
        plan, made = self.plan(batch), self.made.setdefault(batch, {})
        first, cut = plan.after(use.z), None
        behind = plan.values[plan.values.index(first) :] if first is not None else ()
        for value in reversed(behind):  # each is made of the one after it
            if value not in made:
                made[value] = self._curvature(batch, value, cut, workspace)
            cut = made[value]
        return cut

    def _curvature(self, batch: Batch, value: int, cut: Cut | None, workspace: int) -> Cut:
        """dL/dc and d^2 L / dc^2 of each sample, by those at the next cut."""
        tape = self.analyses.of(batch).tape
        samples = tape.shapes[tape.output][0]
        size = tape.shapes[value].numel() // samples
        graphs = passes(self.graphs_for(size), self.analyses, batch, [value], cut=cut)
        gradient = graphs[0].deltas[value]
        sigma = gradient.new_zeros(samples, size, size)

        def add(probed: Probed, some: range) -> None:
            delta = probed.deltas[value]
            seeds = probed.unit_seeds(delta, some)
            (found,) = probed.along(delta, [probed.probes[value]], seeds)
            if found is not None:
                rows = found.reshape(len(some), samples, size).transpose(0, 1)
                sigma[:, some.start : some.stop] = rows

        if gradient.requires_grad:
            chunk = min(self.passes.rows, workspace // (8 * gradient.numel()))
            each_with(graphs, shared_ranges(range(size), chunk, len(graphs)), add)
        return Cut(value, gradient.detach(), sigma.detach())
