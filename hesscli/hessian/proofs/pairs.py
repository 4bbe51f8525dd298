"""Samples that a pass pairs with each other where shapes fit by broadcasting alone: [N, 1] and [N] make [N, N]."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import permutations

import torch

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.proofs.sample_axis import MayMix, SampleAxis
from hesscli.hessian.proofs.sample_rules import LOSS_OPERATORS
from hesscli.hessian.proofs.samples import follow
from hesscli.hessian.recording.tape import Tape


def broadcast_pair(tape: Tape, arrays: Collection[int], samples: int) -> tuple[int, int] | None:
    """The two values that the first operator that may mix samples broadcasts so, the one with more axes first.

    Only one of them is made of parameters, and the other of other arrays alone, as targets are: what pairs two that are
    made alike, distances say, means it, as whoever adds an axis does. None where it is not so.

    Args:
        tape: a recorded pass.
        arrays: its values with the samples in front.
        samples: how many.
    """
    start = dict.fromkeys(arrays, SampleAxis(0))
    try:
        follow(tape, start, samples)
        return None
    except MayMix as found:
        call = found.call
    except NotApplicable:
        return None
    if not (call.name in LOSS_OPERATORS or torch.Tag.pointwise in call.operator.tags):
        return None
    axes = follow(replace(tape, calls=tape.until(call.makes[0])[:-1]), start, samples)
    shapes, origins = tape.shapes, {array: tape.dependent([array]) for array in arrays}
    operands = {_unexpanded(tape, n) for n in call.reads if axes[n] is not None}
    for longer, shorter in permutations(operands, 2):
        added, axis = len(shapes[longer]) - len(shapes[shorter]), axes[shorter]
        together = any({longer, shorter} <= reached for reached in origins.values())
        alike = (longer in tape.trained) == (shorter in tape.trained)
        if axis is None or added <= 0 or together or alike:
            continue
        if shapes[longer][axis.axis + added] == 1:
            return longer, shorter
    return None


def _unexpanded(tape: Tape, value: int) -> int:
    """A value before it was expanded to the shape of another."""
    while value in tape.maker and tape.calls[tape.maker[value]].name == "expand":
        value = tape.calls[tape.maker[value]].reads[0]
    return value
