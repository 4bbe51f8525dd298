"""Where the last parameter enters a pass, so that what follows can be taken for a loss of what it makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

from torch import Tensor

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.loss import Loss
from hesscli.hessian.proofs.samples import sample_axes
from hesscli.hessian.recording.tape import Tape


@dataclass(frozen=True)
class RecordedLoss(Loss):
    """What a model that returns its loss makes of its last layer, as it was recorded of a batch."""

    tape: Tape = field(kw_only=True)

    def terms(self, output: Tensor, batch: Batch) -> Tensor:
        """What the model returns where its last layer gives this output."""
        return self.tape.replay({self.tape.inputs[0]: output})[self.tape.output]


def parted(tape: Tape, samples: int) -> tuple[Tape, Tape] | None:
    """A pass up to its last layer, and what follows, as a tape whose only input is what that layer makes.

    None where no value with the samples in front is all that the output depends on the parameters by.
    """
    for value in reversed([*_bottlenecks(tape)]):
        if tape.shapes[value][:1] != (samples,):
            continue
        front = replace(tape, output=value, calls=tape.leading_to([value]))
        with suppress(NotApplicable):
            sample_axes(front, samples)
            others = tuple(call for call in tape.calls if value not in call.outputs)
            behind = replace(tape, calls=others, inputs=(value,), parameters={})
            return front, replace(behind, calls=behind.leading_to([tape.output]))
    return None


def _bottlenecks(tape: Tape) -> Iterator[int]:
    """The values that the output depends on all parameters by, each alone; from the output back to the last layer."""
    front = {tape.output} & tape.trained
    while front and front <= tape.maker.keys():
        last = max(front, key=lambda n: tape.maker[n])
        if front == {last}:
            yield last
        call = tape.calls[tape.maker[last]]
        front = (front - {*call.makes}) | (tape.trained & {*call.reads})
