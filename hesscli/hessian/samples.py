"""Proof on a tape that samples do not mix, by following the sample axis through every operator.

If sample b of the output depends on nothing but sample b of the inputs, one direction can be taken in all samples
at once, and the derivatives of all samples come out of one pass. The proof knows the operators that have a rule;
anything else counts as mixing. One sample alone has nothing to mix with: any axis of any value may count as its.
"""

from __future__ import annotations

from collections.abc import Sequence

from hesscli.hessian.routes.base import NotApplicable
from hesscli.hessian.sample_axis import Axes, Context, SampleAxis, mixes
from hesscli.hessian.sample_rules import rule_of
from hesscli.hessian.tape import Call, Tape


def sample_axes(tape: Tape, samples: int) -> Axes:
    """The sample axis of every value.

    Args:
        tape: a recorded pass.
        samples: how many samples went through: the length of the inputs' first axis.

    Raises:
        NotApplicable: an operator mixes samples, or is not known not to.
    """
    axes: dict[int, SampleAxis | None] = dict.fromkeys(tape.given)
    for number in tape.inputs:
        axes[number] = SampleAxis(0)
    for call in tape.calls:
        depends = any(axes[n] for n in call.reads)
        result = None
        if depends and samples > 1:
            result = rule_of(call)(Context(call, axes, tape, samples))
        for made in call.outputs:
            if made is None:
                continue
            if depends and samples == 1:
                result = _only_sample(call, tape.shapes[made])
            axes[made] = result
            if result is not None:
                _verify(call, result, tape.shapes[made], samples)
    output = axes[tape.output]
    if output != SampleAxis(0):
        raise NotApplicable("the output has no sample axis in front")
    return axes


def _only_sample(call: Call, shape: Sequence[int]) -> SampleAxis:
    if not shape:
        raise mixes(call)
    return SampleAxis(0, outer=shape[0])


def _verify(call: Call, axis: SampleAxis, shape: Sequence[int], samples: int) -> None:
    if axis.axis >= len(shape) or shape[axis.axis] != axis.outer * samples * axis.inner:
        raise mixes(call)
