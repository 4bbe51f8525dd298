"""One forward pass as the list of ATen operators that it executed, to be replayed and differentiated piece by piece.

Every kind of model (eager module, TorchScript, exported graph) reaches PyTorch's dispatcher, and is recorded there,
with the definitions of `definitions.py` in place. A tape belongs to the very batch that it was recorded with, so
control flow that depends on the data is exact, and nothing needs to be exportable.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesscli.hessian.aten.definitions import WHOLE_ON_TAPES
from hesscli.hessian.aten.precision import default_of
from hesscli.hessian.aten.smooth import smooth
from hesscli.hessian.aten.watcher import each

_aten = torch.ops.aten
DEFINED = {getattr(_aten, name).default: f for name, f in WHOLE_ON_TAPES.items()}
"""Functions that have the derivatives of these instead."""
_REPLAYED_AS: dict[Any, Callable[..., Any]] = {
    # What was written in place lies elsewhere in its replay, where not every view is one.
    _aten.view.default: _aten.reshape.default,
    _aten._unsafe_view.default: _aten.reshape.default,
    # PyTorch takes their derivatives for one direction after the other.
    **{
        f.default: smooth(DEFINED.get(f.default, f.default))
        for f in (_aten.tanh, _aten.gelu, _aten.silu, _aten.mish, _aten.softplus, _aten.elu)
    },
}

# Their schemas promise that nobody will see that they are views.
_UNMARKED_VIEWS = frozenset("_unsafe_view unsafe_split unsafe_split_with_sizes".split())


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor in a call's arguments: the value with this number."""

    value: int


@dataclass(frozen=True)
class Call:
    """An operator, its arguments (tensors as `Ref`), and the numbers of the values it gives (None: unused)."""

    operator: Any  # torch._ops.OpOverload
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    outputs: tuple[int | None, ...] = ()

    @cached_property
    def name(self) -> str:
        return str(self.operator._schema.name).removeprefix("aten::")

    @cached_property
    def reads(self) -> list[int]:
        """The values among its arguments."""
        return [ref.value for ref in each((self.arguments, *self.keywords.values()), Ref)]

    @cached_property
    def makes(self) -> list[int]:
        """The values that it gives, and that are used."""
        return [n for n in self.outputs if n is not None]

    @cached_property
    def is_view(self) -> bool:
        """Whether its results lie in the memory of what it reads."""
        aliases = [made.alias_info for made in self.operator._schema.returns]
        views = any(alias is not None and not alias.is_write for alias in aliases)
        return views or self.name in _UNMARKED_VIEWS

    def place(self, value: int) -> int:
        """Which of its arguments a value is by itself; -1 for none."""
        ref = Ref(value)
        return self.arguments.index(ref) if ref in self.arguments else -1

    def named(self, name: str) -> Any:
        """An argument by its name in the operator's schema, or its default; its place differs between overloads.

        None where this overload has no such argument: a sum over everything has no dimension.
        """
        for place, argument in enumerate(self.operator._schema.arguments):
            if argument.name == name:
                if place < len(self.arguments):
                    return self.arguments[place]
                return self.keywords.get(name, argument.default_value)
        return None


@dataclass(frozen=True)
class Tape:
    """The calls that lead from parameters and data to the model's output."""

    # In the order of execution; only those that the output needs, unless refused.
    calls: tuple[Call, ...]
    # The values that no call makes: parameters, buffers, data, and TorchScript's constants.
    given: Mapping[int, Tensor]
    shapes: Mapping[int, torch.Size]  # the shape of every value
    parameters: Mapping[str, int]  # the number of each parameter that the output depends on
    inputs: tuple[int, ...]  # the numbers of the model's inputs
    output: int  # the number of its output
    complex: frozenset[int]  # the values that are complex numbers
    default: torch.dtype  # the dtype of tensors that were made without one
    # Whether the pass went the way it did because of numbers that it made of the inputs.
    decided: bool
    # Why the calls, executed again, need not give what the pass gave; empty if they do.
    refusal: str

    @cached_property
    def trained(self) -> frozenset[int]:
        """The values that depend on any parameter, these included."""
        return frozenset(self.dependent([*self.parameters.values()]))

    def dependent(self, values: Sequence[int]) -> set[int]:
        """The values that depend on any of these, themselves included."""
        return {n for place in self.behind(values) for n in self.calls[place].makes}.union(values)

    def behind(self, values: Iterable[int]) -> list[int]:
        """The places of the calls that depend on any of these values, in order."""
        reached = 0
        for value in values:
            reached |= self._behind.get(value, 0)
        return _ones(reached)

    @cached_property
    def _behind(self) -> dict[int, int]:
        """The places of the calls that depend on each value that is read, as bits."""
        behind: dict[int, int] = {}
        for place in reversed(range(len(self.calls))):
            call, mine = self.calls[place], 1 << place
            for n in call.makes:
                mine |= behind.get(n, 0)
            for n in call.reads:
                behind[n] = behind.get(n, 0) | mine
        return behind

    @cached_property
    def readers(self) -> Mapping[int, Sequence[Call]]:
        """The calls that read each value, in order; one that reads it twice is there twice."""
        readers: dict[int, list[Call]] = {}
        for call in self.calls:
            for n in call.reads:
                readers.setdefault(n, []).append(call)
        return readers

    @cached_property
    def maker(self) -> Mapping[int, int]:
        """The place of the call that makes each value, but for those that are given."""
        return {n: i for i, call in enumerate(self.calls) for n in call.makes}

    def met(self, value: int, end: int | None = None) -> int:
        """Numbers in all that is made of a value, views aside, up to the value `end`, if not to the output."""
        stop = len(self.calls) if end is None else self.maker.get(end, -1) + 1
        places = itertools.takewhile(lambda place: place < stop, self.behind([value]))
        calls = [self.calls[place] for place in places]
        made = [self.shapes[n] for call in calls if not call.is_view for n in call.makes]
        return sum(shape.numel() for shape in made)

    def until(self, value: int) -> tuple[Call, ...]:
        """The calls up to the one that makes a value."""
        return self.calls[: self.maker.get(value, -1) + 1]

    def leading_to(self, values: Iterable[int]) -> tuple[Call, ...]:
        """The calls that these values need."""
        calls, needed = [], set(values)
        for call in reversed(self.calls):
            if not needed.isdisjoint(call.outputs):
                calls.append(call)
                needed.update(call.reads)
        return tuple(reversed(calls))

    def recorded(self, value: int, given: Mapping[int, Tensor] = MappingProxyType({})) -> Tensor:
        """A value as it was recorded, by the calls that lead to it; with others that were given."""
        return self.replay(given, calls=self.leading_to([value]))[value]

    def replay(
        self,
        values: Mapping[int, Tensor],
        changed: Callable[[int, Tensor], Tensor] = lambda number, value: value,
        calls: Sequence[Call] | None = None,
    ) -> dict[int, Tensor]:
        """Executes the calls again.

        Args:
            values: what to take for the given values, where it differs from the recording.
            changed: what a value made by a call is replaced by.
            calls: these calls alone; all, if left out.

        Returns:
            every value by its number.
        """
        known = {**self.given, **values}
        with default_of(self.default):
            for call in self.calls if calls is None else calls:
                arguments = _filled(call.arguments, known)
                keywords = {name: _filled(value, known) for name, value in call.keywords.items()}
                operator = _REPLAYED_AS.get(call.operator, call.operator)
                result = operator(*arguments, **keywords)
                parts = result if isinstance(result, (tuple, list)) else (result,)
                for number, part in zip(call.outputs, parts, strict=True):
                    if number is not None:
                        known[number] = changed(number, part)
        return known


def _ones(bits: int) -> list[int]:
    """The places of the ones, from the last bit on."""
    of_bytes = np.frombuffer(bits.to_bytes(bits.bit_length() // 8 + 1, "little"), np.uint8)
    places: list[int] = np.flatnonzero(np.unpackbits(of_bytes, bitorder="little")).tolist()
    return places


def _filled(value: Any, known: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Ref):
        return known[value.value]
    if isinstance(value, tuple) and any(each(value, Ref)):
        return [_filled(item, known) for item in value]
    return value
