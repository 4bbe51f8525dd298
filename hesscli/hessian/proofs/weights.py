"""Weights that a model makes of its parameters alone, whatever the data: normalised, standardised, masked, quantised,
tied as each other's transposes, or sums of a matrix and an adapter's product.

Such a weight w = w(theta) enters as a parameter would. On the tape that begins with it, it is one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.proofs.sample_axis import Axes, SampleAxis
from hesscli.hessian.proofs.samples import follow
from hesscli.hessian.proofs.uses import Use
from hesscli.hessian.recording.tape import Call, Ref, Tape


@dataclass(frozen=True)
class Neurons:
    """A weight of which each neuron is made of entries of its own of a parameter."""

    use: Use  # the weight's
    entries: Tensor  # where those of each neuron lie in the parameter, [n, entries]


@dataclass(frozen=True)
class Weights:
    """What enters of the parameters of a tape, each as it meets the data."""

    tape: Tape  # the calls behind the weights, which are its parameters
    calls: tuple[Call, ...]  # those that make them, of parameters and constants
    of: Mapping[str, tuple[str, ...]]  # the names of the weights that are made of each parameter
    full: Tape  # the tape with what makes them; what takes the shape of data alone is given that shape

    @property
    def values(self) -> dict[str, Tensor]:
        """Each weight as it was recorded."""
        return {name: self.tape.given[number] for name, number in self.tape.parameters.items()}

    def made_of(self, parameters: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
        """Some weights, made anew of these parameters."""
        numbers = self.full.parameters
        given = {numbers[name]: x for name, x in parameters.items() if name in numbers}
        known = self.full.replay(given, calls=self.calls)
        return [known[self.tape.parameters[name]] for name in names]

    def neurons(self, parameter: str, use: Use) -> Neurons | None:
        """Those of a weight of which each is made of entries of its own of a parameter; None if it is not so.

        Whatever else the weight is made of are constants.
        """
        tape, number = replace(self.full, calls=self.calls), self.full.parameters[parameter]
        w = self.tape.parameters[use.parameter]
        neurons = _ordered(use.storage.places)
        for axis, length in enumerate(tape.shapes[number]):
            if length != use.n or length == 1:
                continue
            with suppress(NotApplicable):
                found = follow(tape, {number: SampleAxis(axis)}, length)[w]
                if found is None or found != SampleAxis(found.axis):
                    continue
                rows = torch.arange(use.size).view(tape.shapes[w]).movedim(found.axis, 0)
                if torch.equal(_ordered(rows.reshape(use.n, -1)), neurons):
                    every = torch.arange(tape.shapes[number].numel()).view(tape.shapes[number])
                    return Neurons(use, every.movedim(axis, 0).reshape(use.n, -1))
        return None


def _ordered(rows: Tensor) -> Tensor:
    """Rows of disjoint numbers, as sets that are compared."""
    rows = rows.sort(1).values
    return rows[rows[:, 0].argsort()]


def find_weights(tape: Tape, axes: Axes) -> Weights:
    """The weights of a tape, by names that no parameter has."""
    tape = _with_shapes_given(tape, axes)
    alone = {n for n in tape.trained if axes[n] is None}  # the same for every sample

    behind = tuple(call for call in tape.calls if not alone.issuperset(call.makes))
    entering = sorted({n for call in behind for n in call.reads if n in alone})
    names = {f"weight #{i}": n for i, n in enumerate(entering, start=1)}
    calls = tuple(c for c in tape.calls if all(axes[n] is None for n in c.makes))
    known = tape.replay({}, calls=calls)
    of = {}
    for parameter, number in tape.parameters.items():
        reached = tape.dependent([number])
        of[parameter] = tuple(name for name, n in names.items() if n in reached)
    given = {**tape.given, **{n: known[n] for n in entering}}
    weights = replace(tape, calls=behind, given=given, parameters=names)
    return Weights(weights, calls, of, tape)


def _with_shapes_given(tape: Tape, axes: Axes) -> Tape:
    """A tape of which what takes the shape of data alone is given zeros of that shape: no other number enters it."""

    def shaped(call: Call) -> bool:
        return all(axes[n] is None for n in call.makes) and any(axes[n] for n in call.reads)

    if not any(map(shaped, tape.calls)):
        return tape
    known, shapes, given = tape.replay({}), dict(tape.shapes), dict(tape.given)
    calls, numbers = [], itertools.count(max(shapes) + 1)
    for call in tape.calls:
        if shaped(call):
            like, *others = call.arguments
            zeros = known[like.value].new_zeros(()).expand(shapes[like.value])
            number = next(numbers)
            shapes[number], given[number] = zeros.shape, zeros
            call = replace(call, arguments=(Ref(number), *others))
        calls.append(call)
    return replace(tape, calls=tuple(calls), given=given, shapes=shapes)
