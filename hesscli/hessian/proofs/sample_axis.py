"""Where the samples are in a tensor, and a call seen by that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.recording.tape import Call, Ref, Tape


@dataclass(frozen=True)
class SampleAxis:
    """Where the samples are in a tensor: axis `axis` has length `outer * samples * inner`, the sample in the middle."""

    axis: int
    outer: int = 1
    inner: int = 1

    def samples(self, shape: Sequence[int]) -> int:
        """How many lie along it in a tensor of this shape."""
        return shape[self.axis] // (self.outer * self.inner)


Axes = Mapping[int, SampleAxis | None]  # of every value; None: it does not depend on the samples


class MayMix(NotApplicable):
    """Samples may mix at a call."""

    def __init__(self, call: Call) -> None:
        super().__init__(f"{call.name} may mix samples")
        self.call = call


@dataclass(frozen=True)
class Context:
    """A call, and what is known of its arguments."""

    call: Call
    axes: Axes  # of all values that were made before it
    tape: Tape
    samples: int  # how many lie along each axis

    @property
    def shapes(self) -> Mapping[int, Sequence[int]]:
        """Of every value."""
        return self.tape.shapes

    def argument(self, index: int) -> Any:
        """One by its place; None if it is not given, or by name."""
        return self.call.arguments[index] if index < len(self.call.arguments) else None

    def named(self, name: str) -> Any:
        """One by its name, or its default."""
        return self.call.named(name)

    def require(self, apart: bool) -> None:
        """Goes on only where this keeps the samples apart."""
        if not apart:
            raise MayMix(self.call)

    @property
    def along(self) -> set[int]:
        """The axes of the first argument that the call names: one, or two of a diagonal."""
        named = (self.named(name) for name in ("dim", "dimension", "dim1", "dim2"))
        return {d % len(self.shape()) for d in named if d is not None}

    def axis(self, index: int) -> SampleAxis | None:
        """The sample axis of an argument; None if it does not depend on the samples."""
        ref = self.argument(index)
        return self.axes[ref.value] if isinstance(ref, Ref) else None

    def shape(self, index: int = 0) -> Sequence[int]:
        """Of an argument that is a tensor."""
        return self.shapes[self.argument(index).value]

    @property
    def result(self) -> Sequence[int]:
        """The shape of what the call gives first."""
        return self.shapes[self.call.makes[0]]

    def one(self, axes: Iterable[SampleAxis | None]) -> SampleAxis:
        """The axis that all of these are, but for those that do not depend on the samples."""
        found = {axis for axis in axes if axis is not None}
        self.require(len(found) == 1)
        return found.pop()

    def only(self, index: int = 0) -> SampleAxis:
        """The axis of this argument, when no other argument depends on samples."""
        mine = self.axis(index)
        others = [
            ref
            for i, ref in enumerate(self.call.arguments)
            if i != index and isinstance(ref, Ref) and self.axes[ref.value]
        ]
        if mine is None or others:
            raise MayMix(self.call)
        return mine

    def reduced(self, axis: SampleAxis, gone: Collection[int]) -> SampleAxis:
        """The axis where these axes of the argument are gone."""
        self.require(axis.axis not in gone)
        return replace(axis, axis=axis.axis - sum(d < axis.axis for d in gone))

    def dims(self, value: Any, rank: int) -> set[int]:
        """The axes that an argument names, counted from the first; all of them where it names none."""
        values = value if isinstance(value, (tuple, list)) else [value]
        if value is None or not values:
            return set(range(rank))
        return {int(v) % rank for v in values}


Rule = Callable[[Context], SampleAxis | None]  # a call -> the sample axis of its results
