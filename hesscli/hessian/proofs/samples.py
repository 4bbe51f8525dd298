"""Proof on a tape that samples do not mix, by following the sample axis through every operator.

If sample b of the output depends on nothing but sample b of the inputs, one direction can be taken in all samples
at once, and the derivatives of all samples come out of one pass. The proof knows the operators that have a rule;
anything else counts as mixing. One sample alone has nothing to mix with: any axis of any value may count as its.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.proofs.sample_axis import Axes, Context, MayMix, SampleAxis
from hesscli.hessian.proofs.sample_rules import CONSTANT, MATRIX_PRODUCTS, rule_of
from hesscli.hessian.recording.tape import Call, Tape

_LAYERS = MATRIX_PRODUCTS | {"convolution"}


def sample_axes(tape: Tape, samples: int) -> Axes:
    """The sample axis of every value of a pass of so many samples.

    Raises:
        NotApplicable: an operator mixes samples, or is not known not to.
    """
    start = dict.fromkeys(tape.inputs, SampleAxis(0))
    axes = follow(tape, start, samples)
    if axes[tape.output] != SampleAxis(0):
        raise NotApplicable("the output has no sample axis in front")
    for find in (_states, _expanded):
        found = dict(find(tape, axes, samples))
        if found:
            with suppress(NotApplicable):
                axes = follow(tape, start | found, samples)
                start |= found
    return axes


def _states(tape: Tape, axes: Axes, samples: int) -> Iterator[tuple[int, SampleAxis]]:
    """Constants with a row for each sample that layers are applied to, as the first state of a recurrent one."""
    for call in tape.calls:
        applied = call.name in _LAYERS and not tape.trained.isdisjoint(call.reads)
        if applied and not any(axes[n] for n in call.reads):
            rows = (n for n in call.reads if tape.shapes[n][:1] == (samples,))
            yield from ((n, SampleAxis(0)) for n in rows if n not in tape.trained)


def _expanded(tape: Tape, axes: Axes, samples: int) -> Iterator[tuple[int, SampleAxis]]:
    """What gives each sample its own copy of trained values, as of a class token or of learned queries."""
    for call in tape.calls:
        made = call.outputs[0]
        if (
            call.name not in ("expand", "add")
            or made is None
            or axes[made]
            or made not in tape.trained
        ):
            continue
        mine = next(n for n in call.reads if n in tape.trained)
        old, new = tape.shapes[mine], tape.shapes[made]
        lengths = [1] * (len(new) - len(old)) + list(old)
        fresh = [i for i, length in enumerate(lengths) if length == 1 and new[i] == samples]
        if fresh and (call.name == "expand" or old != new):  # of one sample, anything may be added
            yield made, SampleAxis(fresh[0])


def follow(
    tape: Tape, start: Mapping[int, SampleAxis], samples: int, picking: bool = False
) -> Axes:
    """Where the samples lie in every value that depends on the given ones.

    Args:
        tape: a recorded pass.
        start: the values and axes to follow from.
        samples: how many lie along each.
        picking: one of them may be picked and go on alone, without an axis; so does what is made of it.

    Raises:
        NotApplicable: an operator mixes samples, or is not known not to.
    """
    axes: dict[int, SampleAxis | None] = {**dict.fromkeys(tape.shapes), **start}
    alone: dict[int, int] = {}  # values made of one of them, and of which
    for call in tape.calls:
        picked = {alone[n] for n in call.reads if n in alone}
        depends = any(axes[n] for n in call.reads)
        if depends and picking and (place := _pick(Context(call, axes, tape, samples))) is not None:
            picked, depends = picked | {place}, False
        if picked:
            if depends or len(picked) > 1 or not start.keys().isdisjoint(call.outputs):
                raise MayMix(call)
            alone.update(dict.fromkeys(call.makes, *picked))
            continue
        if not depends:
            continue
        result = rule_of(call)(Context(call, axes, tape, samples)) if samples > 1 else None
        for made in call.makes:
            if samples == 1 and call.name not in CONSTANT:
                if not tape.shapes[made]:
                    raise MayMix(call)
                result = SampleAxis(0, outer=tape.shapes[made][0])
            if made in start:
                if result not in (None, start[made]):
                    raise MayMix(call)
                continue
            axes[made] = result
            if result is not None:
                _verify(call, result, tape.shapes[made], samples)
    return axes


def _pick(c: Context) -> int | None:
    """Which of the samples a call takes alone, if it does: `x[:, 0]` or `x[:, -1:]`."""
    if c.call.name not in ("select", "slice") or (axis := c.axis(0)) is None:
        return None
    if axis != SampleAxis(axis.axis) or c.along != {axis.axis}:
        return None
    if c.call.name == "select":
        return int(c.named("index")) % c.samples
    start = max(int(c.named("start") or 0), -c.samples)  # as slices have it
    return start % c.samples if c.result[axis.axis] == 1 else None


def _verify(call: Call, axis: SampleAxis, shape: Sequence[int], samples: int) -> None:
    if axis.axis >= len(shape) or shape[axis.axis] != axis.outer * samples * axis.inner:
        raise MayMix(call)
