"""Where the last parameters enter a pass, so that what follows can be taken for a loss of what their layers make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Size, Tensor

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.loss import Loss
from hesscli.hessian.proofs.sample_axis import Axes
from hesscli.hessian.proofs.samples import sample_axes
from hesscli.hessian.recording.tape import Call, Ref, Tape

_aten = torch.ops.aten


@dataclass(frozen=True)
class RecordedLoss(Loss):
    """What a model that returns its loss makes of its last layers, as it was recorded of a batch."""

    tape: Tape = field(kw_only=True)

    def terms(self, output: Tensor, batch: Batch) -> Tensor:
        """What the model returns where its last layers give this output."""
        return self.tape.replay({self.tape.inputs[0]: output})[self.tape.output]


def parted(tape: Tape, samples: int) -> tuple[Tape, Axes, Tape] | None:
    """A pass up to its last layers, its sample axes, and what follows, as a tape whose only input is what they make.

    Of all values that could stand between the two, with the samples in front, these are the fewest, and the first.

    None where there are none: where samples mix before, or something else is a part of the loss.
    """
    found = [
        values
        for values in _between(tape)
        if all(tape.shapes[n][:1] == (samples,) for n in values) and tape.complex.isdisjoint(values)
    ]
    found.reverse()
    for values in sorted(found, key=len):
        front, behind = _divided(tape, values, samples)
        with suppress(NotApplicable):
            return front, sample_axes(front, samples), behind
    return None


def _between(tape: Tape) -> Iterator[list[int]]:
    """Values that the output depends on all parameters by; from the output back to where parameters enter."""
    of_data = tape.dependent(tape.inputs)
    left, ends = {tape.output} & tape.trained, set[int]()
    while left:
        yield sorted(left | ends)
        last = max(left, key=lambda n: tape.maker.get(n, -1))
        left.remove(last)
        made_of = tape.calls[tape.maker[last]].reads if last in tape.maker else []
        read = tape.trained.intersection(made_of)
        if read and read <= of_data:
            left |= read
        else:
            ends.add(last)


def _divided(tape: Tape, values: Sequence[int], samples: int) -> tuple[Tape, Tape]:
    """The pass up to these values, [B, ...] each, and what follows; several lie side by side, [B, n]."""
    shapes, up_to, output = tape.shapes, tape.leading_to(values), values[0]
    behind = tuple(call for call in tape.calls if set(values).isdisjoint(call.outputs))
    if len(values) > 1:
        rows = range(max(shapes) + 1, max(shapes) + 1 + len(values))
        output = rows.stop
        sizes = tuple(shapes[n].numel() // samples for n in values)
        numbers = dict(zip(rows, sizes, strict=True)) | {output: sum(sizes)}
        shapes = {**shapes, **{row: Size([samples, size]) for row, size in numbers.items()}}
        pairs = [*zip(values, rows, strict=True)]
        beside = Call(_aten.cat.default, (tuple(map(Ref, rows)), 1), {}, (output,))
        apart = Call(_aten.split_with_sizes.default, (Ref(output), sizes, 1), {}, tuple(rows))
        up_to += (*(_reshaped(n, row, shapes) for n, row in pairs), beside)
        behind = (apart, *(_reshaped(row, n, shapes) for n, row in pairs), *behind)
    front = replace(tape, shapes=shapes, calls=up_to, output=output)
    rest = replace(tape, shapes=shapes, calls=behind, inputs=(output,), parameters={})
    return front, replace(rest, calls=rest.leading_to([tape.output]))


def _reshaped(value: int, to: int, shapes: Mapping[int, Size]) -> Call:
    return Call(_aten.reshape.default, (Ref(value), tuple(shapes[to])), {}, (to,))
