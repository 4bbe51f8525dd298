"""Positions that count as samples: those of a shared layer that do not see each other behind it.

Time steps, tokens or pixels share a layer. Where everything behind it works on each by itself, as it does behind the
last attention of a language model, d^2 L / dz^2 has a block of its own for every position, just as for every sample,
and one direction serves all positions at once. The proof is that of `samples.py`, of another axis and from z on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hesscli.hessian.probes import Analysis
from hesscli.hessian.routes.base import NotApplicable
from hesscli.hessian.sample_axis import SampleAxis
from hesscli.hessian.samples import follow
from hesscli.hessian.uses import Use


def positions_as_samples(analysis: Analysis, uses: Mapping[str, Use]) -> Mapping[str, Use]:
    """The uses of a block with their positions as samples, if none sees another behind any of them; else as given."""
    zs = tuple(dict.fromkeys(use.z for use in uses.values()))
    if zs not in analysis.apart:
        analysis.apart[zs] = _apart(analysis, {use.z: use for use in uses.values()})
    if not analysis.apart[zs]:
        return uses
    return {n: replace(use, positions=1, apart=use.positions) for n, use in uses.items()}


def _apart(analysis: Analysis, uses: Mapping[int, Use]) -> bool:
    axes = [_position_axes(analysis, use) for use in uses.values()]
    if len(uses) == 1:  # each axis by itself
        starts = [({z: axis}, count) for z in uses for axis, count in axes[0]]
    else:
        if any(len(mine) != 1 for mine in axes) or len({count for ((_, count),) in axes}) != 1:
            return False
        starts = [({z: axis for z, ((axis, _),) in zip(uses, axes, strict=True)}, axes[0][0][1])]
    return bool(starts) and all(_stays_apart(analysis, start, count) for start, count in starts)


def _stays_apart(analysis: Analysis, start: Mapping[int, SampleAxis], count: int) -> bool:
    """Whether places along these axes, so many, meet neither on the way to the output nor in the loss."""
    try:
        end = follow(analysis.tape, start, count)[analysis.tape.output]
    except NotApplicable:
        return False
    return end is None or end.axis != analysis.class_axis


def _position_axes(analysis: Analysis, use: Use) -> Sequence[tuple[SampleAxis, int]]:
    """Along which axes of z the positions lie, and how many along each."""
    axis, shape = use.axis, analysis.tape.shapes[use.z]
    samples = shape[axis.axis] // (axis.outer * axis.inner)
    found = [
        (SampleAxis(axis.axis, 1, samples * axis.inner), axis.outer),
        (SampleAxis(axis.axis, axis.outer * samples, 1), axis.inner),
    ]
    others = set(range(len(shape))) - {axis.axis, *use.channels}
    found += [(SampleAxis(place), shape[place]) for place in sorted(others)]
    return [(place, count) for place, count in found if count > 1]
