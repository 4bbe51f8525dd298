"""A parameter as an operator takes it, and how that is an affine use."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesscli.hessian.proofs.sample_axis import SampleAxis
from hesscli.hessian.proofs.sample_rules import MATRIX_PRODUCTS
from hesscli.hessian.proofs.storage import Storage
from hesscli.hessian.proofs.uses import BIAS, CONVOLUTION, LINEAR, SCALE, Use
from hesscli.hessian.recording.tape import Call

_MOST_UNITS = 1 << 26  # numbers in the unit vectors of all tokens


@dataclass(frozen=True)
class Operand:
    """A parameter as an operator takes it."""

    parameter: str  # its name
    value: int  # its number as the operator takes it
    moves: tuple[Call, ...]  # what makes that of the parameter
    entries: Tensor  # its own, by number unless they lie as a view of it, in the shape in which the operator takes them
    call: Call  # the operator
    place: int  # which of its arguments they are
    z: int  # the number of the value that it gives
    z_shape: torch.Size  # its shape
    axis: SampleAxis  # its sample axis

    @property
    def affine_use(self) -> Use | None:
        """The use, if it is one."""
        find = _FINDERS.get(self.call.name)
        return find and find(self)

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
        """The use, if its outputs do not lie along the samples, of m inputs per output; `stored` as in `Storage`."""
        if self.axis.axis in channels or not self.z_shape.numel():
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


def _in_product(p: Operand) -> Use | None:
    """a W + b, [..., B, m] times [..., m, n]; or W a + b, each of them transposed.

    Both are of rank two, or three with a product for each group of outputs.
    """
    first, rank = int(p.call.name in ("addmm", "baddbmm")), len(p.z_shape)
    groups = 1 if rank == 2 else p.z_shape[0]
    if not p.alone or p.axis.axis < rank - 2 or not p.shape.numel():
        return None
    transposed = p.axis.axis == rank - 1
    outputs = rank - 2 if transposed else rank - 1
    channels = (outputs,) if groups == 1 else (0, outputs)
    if p.place == first + (not transposed):
        entries = p.entries.mT if transposed else p.entries
        if (stored := _storage(entries)) is not None:
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


def _in_convolution(p: Operand) -> Use | None:
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


def _in_embedding(p: Operand) -> Use | None:
    if not p.as_stored:
        return None
    vocabulary, length = p.shape
    if vocabulary * p.z_shape.numel() // max(1, length) > _MOST_UNITS:
        return None
    tokens, channels = p.call.named("indices").value, (len(p.z_shape) - 1,)
    return p.use(LINEAR, tokens, channels, vocabulary, runs=vocabulary)


def _broadcast(p: Operand) -> Use | None:
    """z = a * w, z = ... + b, z = ... - b, or z = b for each sample.

    The parameter lies along the axes where it is longer than one.
    """
    lengths = [1] * (len(p.z_shape) - len(p.shape)) + list(p.shape)
    channels = tuple(i for i, length in enumerate(lengths) if length > 1)
    if not p.alone or not p.as_stored:
        return None
    if p.call.name != "mul":
        return p.use(BIAS, None, channels, 1)
    other = p.call.arguments[1 - p.place].value  # which depends on the samples, as z does
    outputs = math.prod(p.z_shape[c] for c in channels)
    return p.use(SCALE, other, channels, 1, groups=outputs)


_FINDERS: dict[str, Callable[[Operand], Use | None]] = {
    **dict.fromkeys(MATRIX_PRODUCTS, _in_product),
    "convolution": _in_convolution,
    "embedding": _in_embedding,
    **dict.fromkeys(("mul", "add", "sub", "expand"), _broadcast),
}
