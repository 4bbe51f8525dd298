"""Proof on the tape of a loss that its only number is a sum of terms, each of one sample alone."""

from __future__ import annotations

from dataclasses import replace

from hesscli.hessian.proofs.sample_axis import MayMix, SampleAxis
from hesscli.hessian.proofs.samples import follow
from hesscli.hessian.recording.tape import Call, Tape

_LINEAR = frozenset(
    "add sub neg view reshape _unsafe_view squeeze unsqueeze clone _to_copy mean sum".split()
)
_LINEAR_IN_ONE = frozenset("mul div".split())
_SUMS = frozenset(
    "mse_loss huber_loss smooth_l1_loss binary_cross_entropy soft_margin_loss multi_margin_loss "
    "nll_loss_forward nll_loss2d_forward".split()
)
"""Losses that add up what they make of each sample, or their mean."""


def demand_summands(tape: Tape, axis: SampleAxis, samples: int) -> None:
    """What is left where the sums are left out keeps samples apart, and all that follows is linear in it.

    Args:
        tape: of the loss, whose inputs are the model's outputs.
        axis: where their samples lie.
        samples: how many.

    Raises:
        NotApplicable: something follows that is not linear; or a term is, or may be, of several samples.
    """
    moving, summands, left = tape.dependent(tape.inputs), set[int](), [tape.output]
    while left:
        n = left.pop()
        if n not in moving:
            continue
        if n in tape.inputs or tape.shapes[n].numel() > 1:
            summands.add(n)
            continue
        call = tape.calls[tape.maker[n]]
        mine = [read for read in call.reads if read in moving]
        if call.name in _SUMS:
            summands.update(mine)
        elif call.name in _LINEAR or _is_linear_in_one(call, mine):
            left += mine
        else:
            raise MayMix(call)
    before = replace(tape, calls=tape.leading_to(summands))
    axes = follow(before, dict.fromkeys(tape.inputs, axis), samples)
    for n in summands:
        if axes[n] is None:
            raise MayMix(tape.calls[tape.maker[n]])


def _is_linear_in_one(call: Call, moving: list[int]) -> bool:
    """Whether only one factor moves, or only the numerator."""
    alone = call.name in _LINEAR_IN_ONE and len(moving) == 1
    return alone and (call.name == "mul" or call.place(*moving) == 0)
