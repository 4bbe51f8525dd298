"""Finds the affine uses of each parameter on a tape, or why it has none."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.proofs.sample_axis import Axes, SampleAxis
from hesscli.hessian.proofs.storage import Storage
from hesscli.hessian.proofs.uses import BIAS, CONVOLUTION, LINEAR, SCALE, Use
from hesscli.hessian.recording.tape import Call, Tape

_VIEWS = frozenset("t transpose permute view unsqueeze squeeze".split())
_OF_ALL = frozenset("slice expand".split())  # views, where the shape stays
_COPIES = frozenset("clone _unsafe_view reshape".split())
_MULTIPLIES = frozenset("mul div neg".split())
_MOST_UNITS = 1 << 26  # numbers in the unit vectors of all tokens


def find_uses(tape: Tape, axes: Axes) -> tuple[dict[str, tuple[Use, ...]], dict[str, str]]:
    """How the parameters of a tape enter.

    Returns:
        the affine uses of each, in the order of execution: one, or several at values of their own, as it is; and why
        the others have none, or one that is shared no single one.
    """
    trained = tape.dependent([*tape.parameters.values()])
    constants = {n for n, axis in axes.items() if axis is None and n not in trained}
    found: dict[str, tuple[Use, ...]] = {}
    reasons: dict[str, str] = {}
    for name, number in tape.parameters.items():
        search = _Search(tape, axes, constants, name)
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
    constants: Collection[int]
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
                or (_multiplies(call, value, self.constants) and same_shape)
            ):
                return self.uses(made, (*moves, call), lookup)
        z, refusal = call.outputs[0], NotApplicable(f"not an affine use ({call.name})")
        if not self.tape.complex.isdisjoint([value, *call.reads, *([] if z is None else [z])]):
            raise NotApplicable("complex numbers")
        if z is None or (axis := self.axes[z]) is None:
            raise refusal
        if lookup:
            if not _adds_rows(self.tape, call, value, z):
                raise refusal
            call, value = lookup, lookup.named("weight").value
        try:
            entries = _moved(shapes[self.tape.parameters[self.parameter]], moves)
        except RuntimeError:  # not a view of the parameter as it lies in the file
            raise NotApplicable(f"not an affine use ({moves[-1].name})") from None
        place = call.place(value)
        operand = _Operand(self.parameter, value, moves, entries, call, place, z, shapes[z], axis)
        use = _FINDERS[call.name](operand) if call.name in _FINDERS else None
        if use is None:
            raise refusal
        return [use]


def _adds_rows(tape: Tape, call: Call, rows: int, total: int) -> bool:
    """Whether a call adds rows of a table to others of the same length."""
    lengths = tape.shapes[rows][-1], tape.shapes[total][-1]
    return call.name == "add" and not call.keywords and lengths[0] == lengths[1]


def _multiplies(call: Call, value: int, constants: Collection[int]) -> bool:
    """Whether a call multiplies each entry of a value by a constant, or divides it by one."""
    others = [n for n in call.reads if n != value]
    if call.name not in _MULTIPLIES or call.keywords:
        return False
    divides_it = call.name != "div" or call.place(value) == 0
    return divides_it and all(n in constants for n in others)


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


@dataclass(frozen=True)
class _Operand:
    """A parameter as an operator takes it.

    Attributes:
        parameter: its name.
        value: its number as the operator takes it.
        moves: what makes that of the parameter.
        entries: of `_moved`, in the shape in which the operator takes them.
        call: the operator.
        place: which of its arguments they are.
        z: the number of the value that it gives.
        z_shape: its shape.
        axis: its sample axis.
    """

    parameter: str
    value: int
    moves: tuple[Call, ...]
    entries: Tensor
    call: Call
    place: int
    z: int
    z_shape: torch.Size
    axis: SampleAxis

    @property
    def shape(self) -> torch.Size:
        return self.entries.shape

    @property
    def alone(self) -> bool:
        """Whether nothing scales it: no alpha, no beta."""
        return not self.call.keywords

    @property
    def as_stored(self) -> bool:
        """Whether its entries lie in the order of the file."""
        if self.entries.is_meta:
            return self.entries.is_contiguous()
        return torch.equal(self.entries.flatten(), torch.arange(self.entries.numel()))

    def use(
        self, kind: str, a: int | None, channels: tuple[int, ...], m: int, **stored: Any
    ) -> Use | None:
        """The use, if its outputs do not lie along the samples.

        Args:
            kind, a, channels: as in `Use`.
            m: inputs per output.
            stored: further attributes of its `Storage`.
        """
        if self.axis.axis in channels or not self.z_shape.numel() or not m:
            return None
        n = math.prod(self.z_shape[c] for c in channels)
        return Use(
            parameter=self.parameter,
            value=self.value,
            moves=self.moves,
            kind=kind,
            call=self.call,
            z=self.z,
            a=a,
            axis=self.axis,
            channels=channels,
            rank=len(self.z_shape),
            positions=self.z_shape.numel() // n // self.axis.samples(self.z_shape),
            storage=Storage(n, m, **stored),
        )


def _in_product(p: _Operand) -> Use | None:
    """a W + b, [..., B, m] times [..., m, n]; or W a + b, each of them transposed.

    Both are of rank two, or three with a product for each group of outputs.
    """
    first, rank = int(p.call.name in ("addmm", "baddbmm")), len(p.z_shape)
    groups, axis = 1 if rank == 2 else p.z_shape[0], p.axis
    if axis == SampleAxis(0, outer=p.z_shape[0]):  # one sample: see `sample_axes`
        at = rank - 1 if p.place == first else rank - 2
        axis = SampleAxis(at, outer=p.z_shape[at])
    if not p.alone or axis.axis < rank - 2 or not p.shape.numel():
        return None
    transposed = axis.axis == rank - 1
    p, entries = replace(p, axis=axis), p.entries.mT if transposed else p.entries
    outputs = rank - 2 if transposed else rank - 1
    channels = (outputs,) if groups == 1 else (0, outputs)
    if p.place == first + (not transposed) and (stored := _storage(entries)) is not None:
        a = p.call.arguments[first + transposed].value
        return p.use(LINEAR, a, channels, entries.shape[-2], groups=groups, **stored)
    if p.place == 0 and first and p.as_stored:
        wanted = [1] * rank
        for channel in channels:
            wanted[channel] = p.z_shape[channel]
        if [1] * (rank - len(p.shape)) + list(p.shape) == wanted:
            return p.use(BIAS, None, channels, 1)
    return None


def _storage(weight: Tensor) -> dict[str, Any] | None:
    """The `Storage` of these entries, [m, n] or [groups, m, n]; None if they lie in a way that it does not know."""
    m = weight.shape[-2]
    if weight.is_meta:
        if weight.mT.is_contiguous():
            return {}
        inputs_first = {"sections": weight[..., 0, 0].numel(), "runs": m}
        return inputs_first if weight.is_contiguous() else None
    rows = weight.mT.flatten(0, -2)  # of each output
    order = rows[0].argsort()
    rows = rows[:, order]
    jumps = (rows[0].diff() != 1).nonzero()
    run = int(jumps[0]) + 1 if len(jumps) else m
    outputs = int(rows[0, run] - rows[0, 0]) // run if run < m else len(rows)  # of a section
    if m % run or len(rows) % outputs:
        return None
    sections, runs = len(rows) // outputs, m // run
    stored = torch.arange(rows.numel()).view(sections, runs, outputs, run)
    if not torch.equal(rows, stored.transpose(1, 2).reshape(rows.shape)):
        return None
    permuted = not torch.equal(order, torch.arange(m))
    return {"sections": sections, "runs": runs, "order": tuple(order.tolist()) if permuted else ()}


def _in_convolution(p: _Operand) -> Use | None:
    if p.axis.axis != 0 or not p.as_stored:
        return None
    if p.place == 2:
        return p.use(BIAS, None, (1,), 1)
    if p.place != 1:
        return None
    groups, outputs = p.call.named("groups"), p.z_shape[1]
    fan_in = p.shape.numel() // outputs
    sections, runs = (groups, p.shape[0] // groups) if p.call.named("transposed") else (1, 1)
    return p.use(
        CONVOLUTION,
        p.call.named("input").value,
        (1,),
        fan_in,
        groups=groups,
        sections=sections,
        runs=runs,
    )


def _in_embedding(p: _Operand) -> Use | None:
    options = p.call.named("scale_grad_by_freq"), p.call.named("sparse")
    if p.place or not p.alone or len(p.shape) != 2 or not p.as_stored or any(options):
        return None
    vocabulary, length = p.shape
    if vocabulary * p.z_shape.numel() // max(1, length) > _MOST_UNITS:
        return None
    tokens, channels = p.call.named("indices").value, (len(p.z_shape) - 1,)
    return p.use(LINEAR, tokens, channels, vocabulary, runs=vocabulary)


def _broadcast(p: _Operand) -> Use | None:
    """z = a * w, z = ... + b, z = ... - b, or z = b for each sample.

    The parameter lies along the axes where it is longer than one.
    """
    lengths = [1] * (len(p.z_shape) - len(p.shape)) + list(p.shape)
    channels = tuple(i for i, length in enumerate(lengths) if length > 1)
    fits = len(lengths) == len(p.z_shape) and all(lengths[i] == p.z_shape[i] for i in channels)
    if not fits or not p.alone or len(p.call.arguments) != 2 or not p.as_stored:
        return None
    if p.call.name != "mul":
        return p.use(BIAS, None, channels, 1)
    other = p.call.arguments[1 - p.place].value  # which depends on the samples, as z does
    outputs = math.prod(p.z_shape[c] for c in channels)
    return p.use(SCALE, other, channels, 1, groups=outputs)


_FINDERS: dict[str, Callable[[_Operand], Use | None]] = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _in_product),
    "convolution": _in_convolution,
    "embedding": _in_embedding,
    **dict.fromkeys(("mul", "add", "sub", "expand"), _broadcast),
}
