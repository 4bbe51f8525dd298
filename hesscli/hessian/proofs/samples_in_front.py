"""A model's output with its samples in front, where it returns them elsewhere: with the tokens along one axis, say."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Size, Tensor

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.loss import Loss
from hesscli.hessian.proofs.sample_axis import SampleAxis
from hesscli.hessian.proofs.samples import follow
from hesscli.hessian.recording.tape import Call, Ref, Tape

_aten = torch.ops.aten


@dataclass(frozen=True)
class LossOfReturned(Loss):
    """The user's own loss of what the model returns, taken of that with its samples in front."""

    shape: Size = field(kw_only=True)  # of what the model returns
    split: Size = field(kw_only=True)  # the same where samples have an axis of their own
    place: int = field(kw_only=True)  # of that axis

    def in_front(self, returned: Tensor) -> Tensor:
        """What the model returns, as [samples, ...]."""
        return returned.reshape(self.split).movedim(self.place, 0)

    def terms(self, output: Tensor, batch: Batch) -> Tensor:
        """Those of an output [samples, ...]."""
        return super().terms(output.movedim(0, self.place).reshape(self.shape), batch)


def with_samples_in_front(tape: Tape, samples: int, loss: Loss) -> tuple[Tape, LossOfReturned]:
    """A pass that ends with its samples in front, and the user's own loss of that.

    Raises:
        NotApplicable: samples mix, or the output does not depend on them.
    """
    axis = follow(tape, dict.fromkeys(tape.inputs, SampleAxis(0)), samples)[tape.output]
    if axis is None:
        raise NotApplicable("the output has no sample axis")
    shape, at = tape.shapes[tape.output], axis.axis
    split = Size([*shape[:at], axis.outer, samples, axis.inner, *shape[at + 1 :]])
    returned = LossOfReturned(**vars(loss), shape=shape, split=split, place=at + 1)
    order = [at + 1, *(i for i in range(len(split)) if i != at + 1)]
    apart, front = max(tape.shapes) + 1, max(tape.shapes) + 2
    calls = (
        Call(_aten.reshape.default, (Ref(tape.output), tuple(split)), {}, (apart,)),
        Call(_aten.permute.default, (Ref(apart), tuple(order)), {}, (front,)),
    )
    shapes = {**tape.shapes, apart: split, front: Size(split[i] for i in order)}
    return replace(tape, calls=tape.calls + calls, shapes=shapes, output=front), returned
