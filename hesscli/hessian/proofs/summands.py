"""Proof on the tape of a loss that the sum of what it returns is one of terms, each of one sample alone."""

from __future__ import annotations

from dataclasses import replace

from hesscli.hessian.proofs.piecewise import is_linear
from hesscli.hessian.proofs.sample_axis import MayMix, SampleAxis
from hesscli.hessian.proofs.sample_rules import LIKELIHOODS, LOSS_OPERATORS
from hesscli.hessian.proofs.samples import follow
from hesscli.hessian.recording.tape import Tape


def demand_summands(tape: Tape, axis: SampleAxis, samples: int) -> None:
    """What is left where all that is linear at the end is left out keeps samples apart.

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
        if n in tape.inputs:
            summands.add(n)
            continue
        call = tape.calls[tape.maker[n]]
        mine = [read for read in call.reads if read in moving]
        # The sum of what it makes of each sample, or the mean.
        if call.name in LOSS_OPERATORS | LIKELIHOODS:
            summands.update(mine)
        elif is_linear(call, mine):
            left += mine
        elif tape.shapes[n].numel() > 1:
            summands.add(n)
        else:
            raise MayMix(call)
    before = replace(tape, calls=tape.leading_to(summands))
    axes = follow(before, dict.fromkeys(tape.inputs, axis), samples)
    for n in summands:
        if axes[n] is None:
            raise MayMix(tape.calls[tape.maker[n]])
