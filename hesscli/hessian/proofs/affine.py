"""Finds the affine uses of each parameter on a tape, or why it has none."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.proofs.operands import Operand
from hesscli.hessian.proofs.sample_axis import Axes, SampleAxis
from hesscli.hessian.proofs.sample_rules import MATRIX_PRODUCTS
from hesscli.hessian.proofs.uses import Use
from hesscli.hessian.recording.tape import Call, Tape

_VIEWS = frozenset("t transpose permute view unsqueeze squeeze".split())
_OF_ALL = frozenset("slice expand".split())  # views, where the shape stays
_COPIES = frozenset("clone _unsafe_view reshape".split())
_MULTIPLIES = frozenset("mul div neg".split())


def find_uses(tape: Tape, axes: Axes) -> tuple[dict[str, tuple[Use, ...]], dict[str, str]]:
    """The affine uses of each parameter of a tape, in the order of execution: one, or several at values of their own,
    as it is; and why the others have none, or one that is shared no single one.
    """
    found: dict[str, tuple[Use, ...]] = {}
    reasons: dict[str, str] = {}
    for name, number in tape.parameters.items():
        search = _Search(tape, axes, name)
        try:
            uses = search.uses(number)
        except NotApplicable as reason:
            reasons[name] = str(reason)
            continue
        if len(uses) > 1:
            reasons[name] = search.times(number)
            if any(map(_is_multiplied, uses)) or len({use.z for use in uses}) < len(uses):
                continue
        found[name] = tuple(sorted(uses, key=lambda use: tape.maker[use.z]))
    return found, reasons


@dataclass(frozen=True)
class _Search:
    """From a parameter to where it enters."""

    tape: Tape
    axes: Axes
    parameter: str

    def _readers(self, value: int) -> list[Call]:
        """The calls that read a value, and do not make a constant of it."""
        return [call for call in self.tape.readers.get(value, ()) if call.name != "detach"]

    def times(self, value: int) -> str:
        """How often a value is read, if not once."""
        count = len(self._readers(value))
        if count and value != self.tape.parameters[self.parameter]:
            return "used more than once"
        return {0: "unused", 2: "used twice"}.get(count, f"used {count} times")

    def uses(
        self, value: int, moves: tuple[Call, ...] = (), lookup: Call | None = None
    ) -> list[Use]:
        """The uses of what the moves have made of the parameter.

        Args:
            value: the number of that.
            moves: views, copies, and products with constants.
            lookup: what took it from a table, of the same rows for every sample, as those of positions are.

        Raises:
            NotApplicable: one of them is none, or there are none.
        """
        readers = self._readers(value)
        if len(readers) == 1:
            return self._in(readers[0], value, moves, lookup)
        with suppress(NotApplicable):
            if readers and not lookup:
                return [use for call in readers for use in self._in(call, value, moves, lookup)]
        raise NotApplicable(self.times(value))

    def _in(
        self, call: Call, value: int, moves: tuple[Call, ...], lookup: Call | None
    ) -> list[Use]:
        """Those that it has through one call."""
        shapes = self.tape.shapes
        made = call.makes[0]
        if not lookup and self.axes[made] is None:
            same_shape = shapes[made] == shapes[value]
            if call.name == "embedding":
                return self.uses(made, moves, call)
            if (
                call.name in _VIEWS | _COPIES
                or (call.name in _OF_ALL and same_shape)
                or (_multiplies(call, value, self.tape.trained) and same_shape)
            ):
                return self.uses(made, (*moves, call), lookup)
        z, refusal = call.outputs[0], f"not an affine use ({call.name})"
        if not self.tape.complex.isdisjoint(call.reads):
            raise NotApplicable("complex numbers")
        if z is None or (axis := self._axis(call, z)) is None:
            raise NotApplicable(refusal)
        if lookup:
            if not _adds_rows(self.tape, call, value, z):
                raise NotApplicable(refusal)
            call, value = lookup, lookup.named("weight").value
        try:
            entries = _moved(shapes[self.tape.parameters[self.parameter]], moves)
        except RuntimeError:  # not a view of the parameter as it lies in the file
            raise NotApplicable(f"not an affine use ({moves[-1].name})") from None
        use = Operand(
            parameter=self.parameter,
            value=value,
            moves=moves,
            entries=entries,
            call=call,
            place=call.place(value),
            z=z,
            z_shape=shapes[z],
            axis=axis,
        ).affine_use
        if use is None:
            raise NotApplicable(refusal)
        return [use]

    def _axis(self, call: Call, z: int) -> SampleAxis | None:
        """The sample axis of what a call gives; of one sample, of which any axis may count as it, in a product the one
        that is not its weight's, nor its bias's.
        """
        axis, shape = self.axes[z], self.tape.shapes[z]
        if call.name in MATRIX_PRODUCTS and axis == SampleAxis(0, outer=shape[0]):
            weight_first = self.axes[call.arguments[-2].value] is None
            at = len(shape) - (1 if weight_first else 2)
            axis = SampleAxis(at, outer=shape[at])
        return axis


def _adds_rows(tape: Tape, call: Call, rows: int, total: int) -> bool:
    """Whether a call adds rows of a table to others of the same length."""
    lengths = tape.shapes[rows][-1], tape.shapes[total][-1]
    return call.name == "add" and not call.keywords and lengths[0] == lengths[1]


def _multiplies(call: Call, value: int, trained: Collection[int]) -> bool:
    """Whether a call multiplies each entry of a value by a constant, or divides it by one."""
    if call.name not in _MULTIPLIES or call.keywords:
        return False
    divides_it = call.name != "div" or call.place(value) == 0
    return divides_it and not any(n in trained for n in call.reads if n != value)


def _moved(shape: torch.Size, moves: Sequence[Call], numbered: bool = False) -> Tensor:
    """A parameter's entries, by number, where views and copies have put them.

    Where all are views they have no numbers, unless these are asked for.
    """
    numbered = numbered or any(call.name in _COPIES for call in moves)
    entries = torch.empty(shape, device="meta")  # an arange there takes 0.6 s to import
    if numbered:
        entries = torch.arange(shape.numel()).view(shape)
    for call in moves:
        if call.name not in _MULTIPLIES:
            entries = call.operator(entries, *call.arguments[1:], **call.keywords)
    return entries


def multiplier(tape: Tape, use: Use) -> Tensor | None:
    """What each entry of a parameter is multiplied by before it enters, [size]; None if nothing."""
    if not _is_multiplied(use):
        return None
    number = tape.parameters[use.parameter]
    ones = torch.ones_like(tape.given[number])
    moved = tape.recorded(use.value, {number: ones})
    entries = _moved(ones.shape, use.moves, numbered=True).to(moved.device)
    c = torch.empty_like(ones).view(-1).index_copy_(0, entries.flatten(), moved.flatten())
    return -c if _is_subtracted(use) else c


def _is_multiplied(use: Use) -> bool:
    return _is_subtracted(use) or any(call.name in _MULTIPLIES for call in use.moves)


def _is_subtracted(use: Use) -> bool:
    return use.call.name == "sub" and use.call.place(use.value) == 1
