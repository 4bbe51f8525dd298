"""Where each parameter enters a tape, when it does so once and in an affine way.

At such a use, z = A(a) theta with some activation a, and everything after z sees the parameter through z alone. Then,
with delta = dL/dz and S = d^2 L / dz^2 of each sample, its own block of the Hessian is the sum over samples of A^T S
A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.hessian.layout import Part
from hesscli.hessian.patches import convolved
from hesscli.hessian.sample_axis import Axes, SampleAxis
from hesscli.hessian.tape import Call, Ref, Tape

LINEAR, CONVOLUTION, SCALE, BIAS = "linear", "convolution", "scale", "bias"
_VIEWS = frozenset("t transpose permute view unsqueeze squeeze".split())
_MOST_UNITS = 1 << 26  # numbers in the unit vectors of all tokens


@dataclass(frozen=True)
class Use:
    """The one affine use of a parameter.

    Attributes:
        parameter: its name.
        kind: linear (z = a W^T), convolution, scale (z = a * w) or bias (z = ... + b).
        call: the operator.
        z: the number of the value that it gives; of rows looked up for all samples alike, of the sum they go into.
        a: the number of the other operand; None for a bias.
        axis: the sample axis of z.
        channels: the axes of z that the parameter's outputs lie along.
        n: outputs per position.
        m: inputs per output (fan-in); 1 for scale and bias.
        positions: at how many places of one sample the parameter is applied.
        apart: at how many further places, each of which counts as a sample.
        rank: the number of axes of z.
        kernel: a convolution's spatial extent.
        groups: of outputs, each with inputs of its own.
        runs: how many runs of the parameter an output's entries lie in; 1 where they lie together.
    """

    parameter: str
    kind: str
    call: Call
    z: int
    a: int | None
    axis: SampleAxis
    channels: tuple[int, ...]
    n: int
    m: int
    positions: int
    rank: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    runs: int = 1
    apart: int = 1

    def rows(self, u: Tensor) -> Tensor:
        """[..., *z.shape] -> [..., samples, positions, n]."""
        lead, axis = u.dim() - self.rank, self.axis
        shape = u.shape[lead:]
        samples = shape[axis.axis] // (axis.outer * axis.inner)
        split = [*shape[: axis.axis], axis.outer, samples, axis.inner, *shape[axis.axis + 1 :]]
        u = u.reshape(*u.shape[:lead], *split)
        u = u.permute(*range(lead), *(lead + i for i in _order(self.rank, axis, self.channels)))
        return u.reshape(*u.shape[:lead], samples * self.apart, self.positions, -1)

    def spread(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `rows`: [..., samples, positions, n] -> [..., *shape], the shape of z."""
        axis, lead = self.axis, u.dim() - 3
        split = [
            *shape[: axis.axis],
            axis.outer,
            u.shape[lead] // self.apart,
            axis.inner,
            *shape[axis.axis + 1 :],
        ]
        order = _order(self.rank, axis, self.channels)
        u = u.reshape(*u.shape[:lead], *(split[i] for i in order))
        back = sorted(range(len(order)), key=order.__getitem__)
        u = u.permute(*range(lead), *(lead + i for i in back))
        return u.reshape(*u.shape[:lead], *shape)

    def columns(self, known: Mapping[int, Tensor]) -> Tensor:
        """The inputs of the affine map: [samples, positions, groups m]; for a bias all ones."""
        if self.a is None:
            samples = known[self.z].shape[self.axis.axis] // (self.axis.outer * self.axis.inner)
            return known[self.z].new_ones(samples * self.apart, self.positions, 1)
        a = known[self.a]
        if self.kind == SCALE:
            return self.rows(a.expand(known[self.z].shape))
        if self.kind == CONVOLUTION:
            patches = convolved(a, self.kernel, *self.call.arguments[3:8])
            split = (self.axis.outer, -1, self.axis.inner, *patches.shape[1:])
            whole = (-1, self.positions, self.groups * self.m)
            return patches.reshape(split).transpose(0, 1).reshape(whole)
        if self.call.name == "embedding":  # a product with the tokens' unit vectors
            a = torch.nn.functional.one_hot(a, self.m).to(known[self.z].dtype)
            if self.padding is not None:  # to PyTorch a constant
                a[..., self.padding] = 0
            a = a.expand(*known[self.z].shape[:-1], self.m)
        return self.rows(a)

    def pull(self, u: Tensor, columns: Tensor) -> Tensor:
        """A^T u, the sum over positions: [..., T, n] with columns [..., T, groups m] -> [..., size], as it lies."""
        if self.kind == BIAS:
            return u.sum(-2)
        if self.kind == SCALE:
            return (u * columns).sum(-2)
        if self.groups > 1:
            u, columns = (x.unflatten(-1, (self.groups, -1)).movedim(-2, -3) for x in (u, columns))
        product = u.transpose(-1, -2) @ columns  # [..., n, m]; or of each group
        return self.stored(product if self.groups == 1 else product.flatten(-3, -2))

    def stored(self, values: Tensor) -> Tensor:
        """Of each output and input, [..., n, m], as the parameter lies: [..., size]."""
        return values.unflatten(-1, (self.runs, -1)).transpose(-3, -2).flatten(-3)

    def by_output(self, values: Tensor) -> Tensor:
        """The inverse, as a view: [..., size] -> [..., n, runs, m / runs]."""
        return values.unflatten(-1, (self.runs, self.n, -1)).transpose(-3, -2)

    def inputs_of(self, output: int) -> slice:
        """Which of the columns an output is made of."""
        group = output * self.groups // self.n
        return slice(group * self.m, (group + 1) * self.m)

    def part(self, first: int) -> Part:
        """Where an output's entries lie in a block in which the parameter's start at `first`."""
        return Part(first, self.size // self.n, self.runs)

    @property
    def padding(self) -> int | None:
        """The token of an embedding that has no gradient."""
        token = self.call.arguments[2] if len(self.call.arguments) > 2 else -1
        return token if token >= 0 else None

    @property
    def moving(self) -> int | None:
        """The operand a where it may depend on other parameters: tokens do not."""
        return None if self.call.name == "embedding" else self.a

    @property
    def directions(self) -> int:
        """How many directions of z the parameter's own block takes."""
        return self.n * min(self.positions, self.m) if self.is_layer else self.size

    @property
    def is_layer(self) -> bool:
        """Whether it is a weight whose outputs all have the same inputs."""
        return self.kind in (LINEAR, CONVOLUTION) and self.groups == 1

    @property
    def size(self) -> int:
        return self.n if self.kind in (SCALE, BIAS) else self.n * self.m


def find_uses(tape: Tape, axes: Axes) -> tuple[dict[str, Use], dict[str, str]]:
    """The affine use of each parameter, or the reason why it has none."""
    consumers: dict[int, list[Call]] = {}
    for call in tape.calls:
        for number in call.reads:
            consumers.setdefault(number, []).append(call)
    uses, reasons = {}, {}
    for name, number in tape.parameters.items():
        found = _use(tape, axes, consumers, name, number)
        if isinstance(found, Use):
            uses[name] = found
        else:
            reasons[name] = found
    return uses, reasons


def _use(
    tape: Tape, axes: Axes, consumers: Mapping[int, Sequence[Call]], name: str, number: int
) -> Use | str:
    value, view = number, torch.empty(tape.shapes[number], device="meta")
    lookup: Call | None = None  # of the same rows for every sample, as those of positions are
    while True:
        readers = consumers.get(value, [])
        if len(readers) != 1:
            times = {0: "unused", 2: "used twice"}.get(len(readers), f"used {len(readers)} times")
            return times if value == number or not readers else "used more than once"
        call = readers[0]
        if call.reads.count(value) != 1:
            return "used twice"
        made = next(output for output in call.outputs if output is not None)
        if lookup or axes[made] is not None:
            break
        if call.name == "embedding":
            lookup, value = call, made
            continue
        whole = tape.shapes[made] == tape.shapes[value]
        if call.name not in _VIEWS and not (call.name == "slice" and whole):
            break
        try:
            view = call.operator(view, *call.arguments[1:], **call.keywords)
        except RuntimeError:  # not a view of the parameter as it lies in the file
            return f"not an affine use ({call.name})"
        value = made
    z, reason = call.outputs[0], f"not an affine use ({call.name})"
    if not tape.complex.isdisjoint([value, *call.reads, *([] if z is None else [z])]):
        return "complex numbers"
    if z is None or axes[z] is None or (lookup and not _adds_rows(tape, call, value, z)):
        return reason
    if lookup:
        call, value = lookup, lookup.arguments[0].value
    place = next(
        (i for i, a in enumerate(call.arguments) if isinstance(a, Ref) and a.value == value), -1
    )
    return _affine(tape, axes, call, place, z, name, view) or reason


def _adds_rows(tape: Tape, call: Call, rows: int, total: int) -> bool:
    """Whether a call adds rows of a table to others of the same length."""
    lengths = tape.shapes[rows][-1], tape.shapes[total][-1]
    return call.name == "add" and not call.keywords and lengths[0] == lengths[1]


def _affine(
    tape: Tape,
    axes: Axes,
    call: Call,
    place: int,
    z: int,
    name: str,
    view: Tensor,
) -> Use | None:
    found, shape, z_shape = axes[z], view.shape, tape.shapes[z]
    assert found is not None
    axis = found
    if call.name == "bmm" and axis.axis == 0 and z_shape[0] == 1:  # one sample: see `sample_axes`
        axis = SampleAxis(1, outer=z_shape[1])

    def use(
        kind: str,
        a: int | None,
        channels: tuple[int, ...],
        m: int,
        kernel: tuple[int, ...] = (),
        groups: int = 1,
        runs: int = 1,
    ) -> Use | None:
        if axis.axis in channels or not z_shape.numel() or not m:
            return None
        if kind != LINEAR and not view.is_contiguous():
            return None  # its entries lie in another order than its outputs
        n = math.prod(z_shape[c] for c in channels)
        size = z_shape.numel() // n
        samples = z_shape[axis.axis] // (axis.outer * axis.inner)
        rank, positions = len(z_shape), size // samples
        own = n if kind == SCALE else groups
        return Use(
            parameter=name,
            kind=kind,
            call=call,
            z=z,
            a=a,
            axis=axis,
            channels=channels,
            n=n,
            m=m,
            positions=positions,
            rank=rank,
            kernel=kernel,
            groups=own,
            runs=runs,
        )

    plain = not call.keywords  # no alpha, no beta
    arguments = call.arguments
    if call.name in ("mm", "addmm", "bmm") and plain:
        first, rank = (1 if call.name == "addmm" else 0), len(z_shape)
        alone = axis.axis == rank - 2 and (rank == 2 or z_shape[0] == 1)  # no batch of products
        if place == first + 1 and alone:
            by_output, by_input = view.mT.is_contiguous(), view.is_contiguous()
            if by_output or by_input:
                a, runs = arguments[first].value, 1 if by_output else shape[-2]
                return use(LINEAR, a, (rank - 1,), shape[-2], runs=runs)
        if place == 0 and first and alone and len(shape) == 1 and shape[0] == z_shape[1]:
            return use(BIAS, None, (1,), 1)
    if call.name == "convolution" and axis.axis == 0:
        if place == 2:
            return use(BIAS, None, (1,), 1)
        transposed, groups, kernel = arguments[6], arguments[8], tuple(shape[2:])
        entangled = transposed and groups > 1 and shape[1] > 1  # runs of each group
        if place == 1 and not entangled:
            fan_in = shape.numel() // z_shape[1]
            runs = shape[0] if transposed and groups == 1 else 1
            return use(CONVOLUTION, arguments[0].value, (1,), fan_in, kernel, groups, runs)
    table = len(shape) == 2 and view.is_contiguous()
    if call.name == "embedding" and place == 0 and plain and table:
        vocabulary, options = shape[0], arguments[3:]  # scaled by frequency, sparse
        small = vocabulary * z_shape.numel() // max(1, shape[1]) <= _MOST_UNITS
        if small and not any(options):
            return use(LINEAR, arguments[1].value, (len(z_shape) - 1,), vocabulary, runs=vocabulary)
    if call.name in ("mul", "add") and plain and len(arguments) == 2:
        # Broadcast against z: the parameter lies along the axes where it is longer than one.
        lengths = [1] * (len(z_shape) - len(shape)) + list(shape)
        channels = tuple(i for i, length in enumerate(lengths) if length > 1)
        if all(lengths[i] == z_shape[i] for i in channels) and len(lengths) == len(z_shape):
            other = arguments[1 - place]
            if call.name == "add":
                return use(BIAS, None, channels, 1)
            if isinstance(other, Ref):
                return use(SCALE, other.value, channels, 1)
    return None


def _order(rank: int, axis: SampleAxis, channels: tuple[int, ...]) -> list[int]:
    """The axes in canonical order, when the sample axis has been split into (outer, samples, inner)."""
    last = [c + 2 * (c > axis.axis) for c in channels]
    first = axis.axis + 1
    return [first, *(i for i in range(rank + 2) if i != first and i not in last), *last]
