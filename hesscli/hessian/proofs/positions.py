"""Positions that count as samples: those of a shared layer that do not see each other behind it.

Time steps, tokens or pixels share a layer. Where everything behind it works on each by itself, as it does behind the
last attention of a language model, d^2 L / dz^2 has a block of its own for every position, just as for every sample,
and one direction serves all positions at once. The proof is that of `samples.py`, of another axis and from z on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.proofs.sample_axis import Axes, Context, SampleAxis
from hesscli.hessian.proofs.sample_rules import RESHAPES, rule_of
from hesscli.hessian.proofs.samples import follow
from hesscli.hessian.proofs.uses import Use
from hesscli.hessian.recording.tape import Tape


def positions_stay_apart(
    tape: Tape, axes: Axes, uses: Sequence[Use], coupled: Callable[[SampleAxis, int], bool]
) -> bool:
    """Whether no position of some uses sees another position behind any of them.

    Args:
        tape: a recorded pass.
        axes: the sample axis of every value.
        uses: of parameters, at least one.
        coupled: whether the loss has terms of more than one of the places, so many, along an axis of the output.
    """
    places = [_places(tape, axes, use) for use in uses]
    counts, *others = ([count for _, count in along] for _, along in places)
    if not counts or any(mine != counts for mine in others):
        return False
    for index, count in enumerate(counts):
        start = {value: along[index][0] for value, along in places}
        try:
            end = follow(tape, start, count, picking=True)[tape.output]
        except NotApplicable:
            return False
        if end is not None and coupled(end, count):
            return False
    return True


def _places(tape: Tape, axes: Axes, use: Use) -> tuple[int, list[tuple[SampleAxis, int]]]:
    """z, or what it is reshaped to; along which of its axes the positions of a layer lie, and how many along each."""
    value, channels = _reshaped(tape, use)
    axis, shape = axes[value] if value != use.z else use.axis, tape.shapes[value]
    assert axis is not None
    samples = axis.samples(shape)
    found = [
        (SampleAxis(axis.axis, 1, samples * axis.inner), axis.outer),
        (SampleAxis(axis.axis, axis.outer * samples, 1), axis.inner),
    ]
    others = set(range(len(shape))) - {axis.axis, *channels}
    found += [(SampleAxis(place), shape[place]) for place in sorted(others)]
    return value, [(place, count) for place, count in found if count > 1]


def _reshaped(tape: Tape, use: Use) -> tuple[int, Sequence[int]]:
    """z with its positions along axes of their own, if that is all that becomes of it, and the axes of its channels."""
    value, channels = use.z, use.channels
    while len(channels) == 1:
        readers = tape.readers.get(value, ())
        if len(readers) != 1 or readers[0].name not in RESHAPES:
            break
        axes = {**dict.fromkeys(tape.shapes), value: SampleAxis(*channels)}
        try:
            after = rule_of(readers[0])(Context(readers[0], axes, tape, use.n))
        except NotApplicable:
            break
        if after is None or after != SampleAxis(after.axis):
            break
        (value,), channels = readers[0].makes, (after.axis,)
    return value, channels
