"""Proof on the tape of a loss that the sum of what it returns is one of terms, each of one sample alone."""

from __future__ import annotations

from dataclasses import replace

from hesscli.hessian.proofs.piecewise import linear_in
from hesscli.hessian.proofs.sample_axis import Context, MayMix, SampleAxis
from hesscli.hessian.proofs.sample_rules import LIKELIHOODS, LOSS_OPERATORS, terms_of
from hesscli.hessian.proofs.samples import follow
from hesscli.hessian.recording.tape import Call, Tape


def demand_summands(tape: Tape, axis: SampleAxis, samples: int) -> None:
    """What is left where all that is linear at the end is left out keeps samples apart.

    Args:
        tape: of the loss, whose inputs are the model's outputs.
        axis: where their samples lie.
        samples: how many.

    Raises:
        NotApplicable: something follows that is not linear; or a term is, or may be, of several samples.
    """
    moving, summands, losses = tape.dependent(tape.inputs), set[int](), list[Call]()
    for n in linear_in(tape):
        call = None if n in tape.inputs else tape.calls[tape.maker[n]]
        # The sum of what it makes of each sample, or the mean.
        if call is not None and call.name in LOSS_OPERATORS | LIKELIHOODS:
            summands.update(moving.intersection(call.reads))
            losses.append(call)
        elif call is None or tape.shapes[n].numel() > 1:
            summands.add(n)
        else:
            raise MayMix(call)
    before = replace(tape, calls=tape.leading_to(summands))
    axes = follow(before, dict.fromkeys(tape.inputs, axis), samples)
    for n in summands:
        if axes[n] is None:
            raise MayMix(tape.calls[tape.maker[n]])
    for call in losses:
        terms_of(Context(call, axes, tape, samples))
