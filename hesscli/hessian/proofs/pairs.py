"""Samples that a pass pairs with each other where shapes fit by broadcasting alone: [N, 1] and [N] make [N, N]."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import permutations

import torch

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.proofs.sample_axis import Axes, Context, SampleAxis
from hesscli.hessian.proofs.sample_rules import LOSS_OPERATORS, rule_of
from hesscli.hessian.recording.tape import Call, Tape


def broadcast_pair(
    tape: Tape, arrays: Collection[int], samples: int, of_model: bool
) -> tuple[int, int] | None:
    """The two values that an operator broadcasts so, the first that does, the one with more axes in front.

    They are made of other arrays each: what compares an array with itself, `time[:, None] <= time`, means it, and so
    does whoever adds an axis.

    Args:
        tape: a recorded pass.
        arrays: its values with the samples in front.
        samples: how many.
        of_model: only one of them is made of parameters, as targets are not: what pairs two that are made alike,
            distances say, means it.
    """
    axes: dict[int, SampleAxis | None] = dict.fromkeys(tape.shapes)
    axes |= dict.fromkeys(arrays if samples > 1 else (), SampleAxis(0))
    origins = [tape.dependent([array]) for array in arrays]
    for call in tape.calls:
        if not any(axes[n] for n in call.reads):
            continue
        try:
            result = rule_of(call)(Context(call, axes, tape, samples))
        except NotApplicable:
            result = None  # nor are samples apart in what is made of this
            for longer, shorter in permutations(_operands(tape, call, axes), 2):
                together = any({longer, shorter} <= reached for reached in origins)
                alike = of_model and (longer in tape.trained) == (shorter in tape.trained)
                if not (together or alike) and _meet(tape.shapes, axes, longer, shorter):
                    return longer, shorter
        axes |= dict.fromkeys(call.makes, result)
    return None


def _operands(tape: Tape, call: Call, axes: Axes) -> set[int]:
    """What an elementwise operator, or a loss, compares of the samples, before it was expanded to another's shape."""
    found = set[int]()
    if call.name in LOSS_OPERATORS or torch.Tag.pointwise in call.operator.tags:
        for n in (n for n in call.reads if axes[n] is not None):
            while n in tape.maker and tape.calls[tape.maker[n]].name == "expand":
                n = tape.calls[tape.maker[n]].reads[0]
            found.add(n)
    return found


def _meet(shapes: Mapping[int, torch.Size], axes: Axes, longer: int, shorter: int) -> bool:
    """Whether the samples of the one with fewer axes lie along an axis of one place of the other."""
    axis, added = axes[shorter], len(shapes[longer]) - len(shapes[shorter])
    return axis is not None and added > 0 and shapes[longer][axis.axis + added] == 1
