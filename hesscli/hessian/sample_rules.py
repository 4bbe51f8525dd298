"""What each operator does to the sample axis: one rule for each kind of operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hesscli.hessian.routes.base import NotApplicable
from hesscli.hessian.tape import Call, Ref


@dataclass(frozen=True)
class SampleAxis:
    """Where the samples are in a tensor: axis `axis` has length `outer * samples * inner`, the sample in the middle."""

    axis: int
    outer: int = 1
    inner: int = 1


Axes = Mapping[
    int, SampleAxis | None
]  # of every value; None: the value does not depend on the samples

ELEMENTWISE_UNARY = frozenset(
    "relu tanh sigmoid gelu silu mish elu celu softplus leaky_relu hardtanh hardswish hardshrink softshrink "
    "threshold clamp clamp_min clamp_max abs neg exp expm1 log log1p log2 log10 sqrt rsqrt square pow sin cos tan "
    "asin acos atan sinh cosh asinh acosh atanh erf erfc reciprocal sign log_sigmoid_forward selu logit "
    "detach clone alias contiguous _to_copy lift_fresh zeros_like ones_like full_like nan_to_num round floor ceil "
    "logical_not bitwise_not isnan positive relu6".split()
)
ELEMENTWISE = frozenset(
    "add sub mul div rsub where maximum minimum fmax fmin atan2 eq ne lt le gt ge logical_and logical_or "
    "bitwise_and bitwise_or masked_fill lerp addcmul addcdiv xlogy logaddexp _prelu_kernel copy pow".split()
)
REDUCTION = frozenset(
    "sum mean amax amin prod var std logsumexp max min argmax argmin norm linalg_vector_norm any all".split()
)
ALONG = frozenset(
    "_softmax _log_softmax softmax log_softmax _safe_softmax cumsum sort flip".split()
)
# Samples along the first axis, and no way for an output sample to see another.
FIRST_AXIS = frozenset(
    "convolution max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d "
    "upsample_bilinear2d upsample_linear1d upsample_bicubic2d pixel_shuffle "
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
    "native_batch_norm".split()
)
RESHAPES = frozenset("view _unsafe_view reshape _reshape_alias flatten unflatten".split())


def mixes(call: Call) -> NotApplicable:
    """What to raise where samples may mix."""
    return NotApplicable(f"{call.name} may mix samples")


@dataclass(frozen=True)
class Context:
    """A call, and what is known of its arguments."""

    call: Call
    axes: Axes
    shapes: Mapping[int, Sequence[int]]
    samples: int

    def argument(self, index: int) -> Any:
        return self.call.arguments[index] if index < len(self.call.arguments) else None

    def named(self, name: str) -> Any:
        """An argument by its name in the operator's schema, or its default; the place differs between overloads."""
        for index, argument in enumerate(self.call.operator._schema.arguments):
            if argument.name == name:
                if index < len(self.call.arguments):
                    return self.call.arguments[index]
                return self.call.keywords.get(name, argument.default_value)
        raise mixes(self.call)

    def axis(self, index: int) -> SampleAxis | None:
        ref = self.argument(index)
        return self.axes[ref.value] if isinstance(ref, Ref) else None

    def shape(self, index: int = 0) -> Sequence[int]:
        return self.shapes[self.argument(index).value]

    @property
    def result(self) -> Sequence[int]:
        return next(self.shapes[n] for n in self.call.outputs if n is not None)

    def only(self, index: int = 0) -> SampleAxis:
        """The axis of this argument, when no other argument depends on samples."""
        mine = self.axis(index)
        others = [
            ref
            for i, ref in enumerate(self.call.arguments)
            if i != index and isinstance(ref, Ref) and self.axes[ref.value]
        ]
        if mine is None or others:
            raise mixes(self.call)
        return mine

    def dims(self, value: Any, rank: int) -> set[int]:
        if value is None or value == ():
            return set(range(rank))
        values = value if isinstance(value, (tuple, list)) else [value]
        return {int(v) % max(rank, 1) for v in values}


Rule = Callable[[Context], SampleAxis | None]
"""A call -> the sample axis of its results."""


def _unary(c: Context) -> SampleAxis | None:
    return c.only()


def _elementwise(c: Context) -> SampleAxis | None:
    """All arguments broadcast against each other: their sample axes must fall on the same axis of the result."""
    rank = len(c.result)
    found: set[SampleAxis] = set()
    for ref in c.call.arguments:
        if isinstance(ref, Ref) and (axis := c.axes[ref.value]):
            found.add(replace(axis, axis=axis.axis + rank - len(c.shapes[ref.value])))
    if len(found) != 1:
        raise mixes(c.call)
    return found.pop()


def _reduction(c: Context) -> SampleAxis | None:
    axis, rank = c.only(), len(c.shape())
    dims = c.dims(c.named("dim"), rank)
    if axis.axis in dims:
        raise mixes(c.call)
    if len(c.result) == rank:
        return axis
    return replace(axis, axis=axis.axis - sum(d < axis.axis for d in dims))


def _along(c: Context) -> SampleAxis | None:
    axis = c.only()
    if axis.axis in c.dims(c.named("dims" if c.call.name == "flip" else "dim"), len(c.shape())):
        raise mixes(c.call)
    return axis


def _first(c: Context) -> SampleAxis | None:
    axis, rank = c.only(), len(c.shape())
    least = {"native_batch_norm": 2, "pixel_shuffle": 4}.get(c.call.name, 3)
    if c.call.name == "convolution":
        least = len(c.shape(1))
    if axis.axis != 0 or rank < least:
        raise mixes(c.call)
    if c.call.name == "native_batch_norm" and c.argument(5):
        raise NotApplicable("batch_norm in train mode mixes samples")
    return axis


def _reshape(c: Context) -> SampleAxis | None:
    """Row-major order keeps the samples together: the axis that starts after as many elements has them."""
    axis, old, new = c.only(), c.shape(), c.result
    before = math.prod(old[: axis.axis]) * axis.outer
    after = axis.inner * math.prod(old[axis.axis + 1 :])
    count = 1
    for i, length in enumerate(new):
        outer = before // count
        if before % count == 0 and length and length % (outer * c.samples) == 0:
            inner = length // (outer * c.samples)
            if after % inner == 0:
                return SampleAxis(i, outer, inner)
        count *= length
    raise mixes(c.call)


def _transpose(c: Context) -> SampleAxis | None:
    axis, rank = c.only(), len(c.shape())
    order = list(range(rank))
    if c.call.name == "permute":
        order = [int(d) % rank for d in c.named("dims")]
    else:
        a, b = (
            (0, rank - 1)
            if c.call.name == "t"
            else (c.named("dim0") % rank, c.named("dim1") % rank)
        )
        order[a], order[b] = order[b], order[a]
    return replace(axis, axis=order.index(axis.axis))


def _expand(c: Context) -> SampleAxis | None:
    axis = c.only()
    return replace(axis, axis=axis.axis + len(c.result) - len(c.shape()))


def _unsqueeze(c: Context) -> SampleAxis | None:
    axis = c.only()
    at = c.named("dim") % (len(c.shape()) + 1)
    return replace(axis, axis=axis.axis + (at <= axis.axis))


def _squeeze(c: Context) -> SampleAxis | None:
    axis, shape = c.only(), c.shape()
    dims = (
        c.dims(c.argument(1), len(shape)) if len(c.call.arguments) > 1 else set(range(len(shape)))
    )
    gone = {d for d in dims if shape[d] == 1}
    if axis.axis in gone:
        raise mixes(c.call)
    return replace(axis, axis=axis.axis - sum(d < axis.axis for d in gone))


def _select(c: Context) -> SampleAxis | None:
    axis = c.only()
    at = c.named("dim") % len(c.shape())
    if at == axis.axis:
        raise mixes(c.call)
    return replace(axis, axis=axis.axis - (at < axis.axis))


def _other_axis(c: Context) -> SampleAxis | None:
    """Operators that work along one axis and leave the others alone."""
    axis = c.only()
    if c.named("dim") % len(c.shape()) == axis.axis:
        raise mixes(c.call)
    return axis


def _joined(c: Context) -> SampleAxis | None:
    parts = c.call.arguments[0]
    found = {c.axes[ref.value] for ref in parts}
    if len(found) != 1 or None in found:
        raise mixes(c.call)
    axis = found.pop()
    assert axis is not None
    stacked = c.call.name == "stack"
    rank = len(c.shapes[parts[0].value]) + stacked
    at = c.named("dim") % rank
    if stacked:
        return replace(axis, axis=axis.axis + (at <= axis.axis))
    if at == axis.axis:
        raise mixes(c.call)
    return axis


def _matrix(c: Context) -> SampleAxis | None:
    """mm, mv and addmm: samples may lie along the rows of the first or the columns of the second matrix."""
    shift = 1 if c.call.name in ("addmm", "addmv", "baddbmm") else 0
    left, right = c.axis(shift), c.axis(shift + 1)
    if shift and c.axis(0) is not None:
        raise mixes(c.call)
    if left is not None and right is None and left.axis == 0:
        return left
    if right is not None and left is None and right.axis == 1:
        return right
    raise mixes(c.call)


def _batched_matrix(c: Context) -> SampleAxis | None:
    shift = 1 if c.call.name == "baddbmm" else 0
    left, right = c.axis(shift), c.axis(shift + 1)
    if shift and c.axis(0) is not None:
        raise mixes(c.call)
    known = [axis for axis in (left, right) if axis is not None]
    if all(axis.axis == 0 for axis in known) and len(set(known)) == 1:
        return known[0]
    if left is not None and right is None and left.axis == 1:
        return left
    if right is not None and left is None and right.axis == 2:
        return right
    raise mixes(c.call)


def _embedding(c: Context) -> SampleAxis | None:
    return c.only(1)


def _pad(c: Context) -> SampleAxis | None:
    axis, rank = c.only(), len(c.shape())
    pads = c.argument(1)
    from_end = rank - 1 - axis.axis
    if any(pads[2 * from_end : 2 * from_end + 2]):
        raise mixes(c.call)
    return axis


_RULES: dict[str, Rule] = {
    **dict.fromkeys(REDUCTION, _reduction),
    **dict.fromkeys(ALONG, _along),
    **dict.fromkeys(FIRST_AXIS, _first),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(("t", "transpose", "permute"), _transpose),
    **dict.fromkeys(("mm", "mv", "addmm"), _matrix),
    **dict.fromkeys(("bmm", "baddbmm"), _batched_matrix),
    **dict.fromkeys(("cat", "stack"), _joined),
    **dict.fromkeys(
        "split split_with_sizes unsafe_split unsafe_chunk slice glu narrow index_select".split(),
        _other_axis,
    ),
    **dict.fromkeys(("select", "unbind"), _select),
    "expand": _expand,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "embedding": _embedding,
    "constant_pad_nd": _pad,
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(ELEMENTWISE_UNARY - ELEMENTWISE, _unary),
}


def rule_of(call: Call) -> Rule:
    """The rule of an operator.

    Raises:
        NotApplicable: none is known.
    """
    if call.operator.namespace != "aten" or call.name not in _RULES:
        raise mixes(call)
    return _RULES[call.name]
