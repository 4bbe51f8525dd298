"""Where a deep model is cut, so that a layer's directions need not run through all that follows.

If everything that follows z passes through one value c, then with delta = dL/dc and Sigma = d^2 L / dc^2 of each sample

    d^2 L / dz^2 = J^T Sigma J + sum_i delta_i d^2 c_i / dz^2,      J = dc/dz,

exactly: a direction runs to c and back, and is multiplied by Sigma there. Sigma at one cut comes from that at the next,
in as many directions as c has numbers. The residual stream of a transformer is such a value after every layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hesscli.hessian.proofs.analysis import Analysis
from hesscli.hessian.recording.tape import Tape
from hesscli.hessian.routes.costs import CUT_PASSES, PASSES, Costs, Work

_GAIN = 0.8  # cuts must bring the time below this share of the time without
_LEAST = 0.05  # seconds; what takes less without cuts has none


@dataclass(frozen=True)
class CutPlan:
    """The cuts of a tape, in the order of execution."""

    values: tuple[int, ...]  # the cuts
    maker: Mapping[int, int]  # the place of the call that makes each value
    overhead: Work  # the work of every Sigma
    directions: int  # how many there are in all layers
    bytes: int = 0  # of every Sigma, which are kept
    rows: int = 0  # of the largest Sigma of a sample

    def after(self, z: int) -> int | None:
        """The first cut that z, and all that follows it, passes through."""
        return next((c for c in self.values if self.maker[c] >= self.maker[z]), None)

    def work(self, costs: Costs, z: int, count: int) -> Work:
        """Derivatives along that many directions of z, and their share of the overhead."""
        share = count / max(1, self.directions)
        return costs.directions(z, count, self.after(z)) + self.overhead.times(share)


def separators(tape: Tape, zs: Sequence[int]) -> list[int]:
    """The values c such that all that depends on a z made before c reaches the output through c alone."""
    reached = tape.dependent(zs)
    last = {n: i for i, call in enumerate(tape.calls) for n in call.reads}
    last[tape.output] = len(tape.calls)
    live: set[int] = set()
    found: list[int] = []
    for i, call in enumerate(tape.calls):
        live |= reached.intersection(call.makes)
        live = {n for n in live if last.get(n, -1) > i}
        if len(live) == 1 and live != set(found[-1:]):
            found.extend(live)
    return found


def plan_cuts(analysis: Analysis, costs: Costs, samples: int, room: int) -> CutPlan:
    """The cuts of a batch that make the directions of all layers cheapest.

    Sigma is kept of all `samples`, for which there is room of so many bytes.
    """
    tape = analysis.tape
    uses = [analysis.uses_apart([name])[name] for name in analysis.uses]
    demand = [(tape.maker[use.z] + 1, use.directions) for use in uses]
    total = sum(count for _, count in demand)

    candidates = [c for c in separators(tape, [use.z for use in uses]) if _in_front(analysis, c)]
    while True:  # where nothing is chosen, nothing is kept
        chosen = _cheapest(candidates, demand, costs)
        taken = sum(costs.size(c) ** 2 for c in chosen) * samples * costs.itemsize
        if taken <= room:
            following = [*chosen, None][1:]
            overhead = Work()
            for c, after in zip(chosen, following, strict=True):
                overhead += costs.directions(c, costs.size(c), after)
            most = max(map(costs.size, chosen), default=0)
            return CutPlan(tuple(chosen), tape.maker, overhead, total, taken, most)
        candidates.remove(max(chosen, key=costs.size))


def _in_front(analysis: Analysis, value: int) -> bool:
    """Whether the numbers of one sample lie together, and are real."""
    axis = analysis.axes[value]
    if value in analysis.tape.complex:
        return False
    return axis is not None and axis.axis == 0 and axis.outer == 1


@dataclass(frozen=True)
class _End:
    """Where directions may end: a cut, or the loss."""

    place: int  # calls before it
    seconds: float  # of one forward pass up to it
    passes: float  # of the way there and back
    product: float  # seconds of the product with Sigma


def _cheapest(
    candidates: Sequence[int], demand: Sequence[tuple[int, int]], costs: Costs
) -> list[int]:
    """By dynamic programming from the first candidate to the last, and the loss."""
    rates = costs.rates
    # Of one forward pass, of as many as are batched.
    made = costs.seconds_before(replace(rates, call=rates.call / costs.chunk))

    counts, starts = [0.0] * (len(made) + 1), [0.0] * (len(made) + 1)
    for place, count in demand:
        counts[place] += count
        starts[place] += count * made[place]
    counts, starts = list(itertools.accumulate(counts)), list(itertools.accumulate(starts))

    def between(first: int, end: _End) -> float:
        """Seconds of the directions of all z after `first` calls, up to the next cut."""
        count, start = counts[end.place] - counts[first], starts[end.place] - starts[first]
        return end.passes * (count * end.seconds - start) + count * end.product

    ends = []
    for c in candidates:
        place = costs.tape.maker[c] + 1
        product = 2 * costs.samples * costs.size(c) ** 2 / rates.flops
        ends.append(_End(place, made[place], CUT_PASSES, product))
    ends.append(_End(len(made), made[-1] + costs.loss.seconds(rates), PASSES, 0.0))
    best: list[float] = []
    chosen: list[list[int]] = []  # the cuts on the way to each end
    for i, end in enumerate(ends):
        options = [(between(0, end), -1)]
        for k in range(i):
            way = end.passes * (end.seconds - ends[k].seconds) + end.product
            sigma = costs.size(candidates[k]) * way
            options.append((best[k] + sigma + between(ends[k].place, end), k))
        cost, k = min(options)
        best.append(cost)
        chosen.append([*chosen[k], candidates[k]] if k >= 0 else [])
    without = between(0, ends[-1])
    return [] if without < _LEAST or best[-1] > _GAIN * without else chosen[-1]
