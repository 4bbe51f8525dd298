"""What a route costs, in seconds: one model of passes, flops and bytes, for the planner and for `--dry-run`.

A pass over some calls of a tape costs its matrix products at the machine's rate, its activations at memory speed, and a
fixed time per call. Reverse-over-reverse products take about four forward passes' worth of each.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from hesscli.hessian.blocks import Block
from hesscli.hessian.proofs.uses import CONVOLUTION, LINEAR, Use
from hesscli.hessian.proofs.weights import Neurons, Weights
from hesscli.hessian.recording.tape import Call, Ref, Tape
from hesscli.hessian.routes.chain import PRODUCTS, Chain, most_numbers, rows_along
from hesscli.hessian.routes.rates import Rates


@dataclass(frozen=True)
class Work:
    """An amount of work; `loops` are calls that each row of a batched pass makes for itself."""

    flops: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0
    loops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.calls + other.calls,
            self.loops + other.loops,
        )

    def times(self, factor: float, calls: float | None = None) -> Work:
        """This work so many times; the calls, where batched, only `calls` times."""
        return Work(
            self.flops * factor,
            self.bytes * factor,
            self.calls * (factor if calls is None else calls),
            self.loops * factor,
        )

    def seconds(self, rates: Rates) -> float:
        called = (self.calls + self.loops) * rates.call
        return self.flops / rates.flops + self.bytes / rates.memory + called


PASSES = 4.0  # forward passes' worth of work in one product of d delta / dz with a direction
CUT_PASSES = 5.5  # the same where the direction ends at a cut: it goes the way back twice
_UNCACHED = 2.5  # times as long as a number in the cache takes one that is not: of a whole matrix
_THROUGH = 200  # calls' worth of time that a block takes through weights, whatever its size
_ON_ITS_WAY = (
    2  # values as large as the largest that are held while a gradient goes from one to the next
)
# Times the curvature along a chain that is held while it goes from one value to the next; measured: 1.9 to 3.1.
_REPLACED = 2.5
_LOOPED = 0.08  # calls' worth of time of an operator in each row of a pass, where its derivative cannot be batched
# The same of those whose second derivative takes several such steps.
_LOOPED_MORE = {"gelu": 0.45, "convolution": 1.7}
_VECTOR = 64  # bytes of the channels that a convolution's kernels take at once: fewer take as long
_LOSS = 4.0  # elementwise operators in a loss: a softmax's exponential, sum, quotient and logarithm


def numbers_along(tape: Tape, z: int, inputs: int, end: int | None = None) -> int:
    """How many numbers a direction of z makes: what arrives at so many inputs, or what it meets on its way, if more.

    Behind a small z there may be large values, of a decoder's images say. The way goes to the value `end`, if not to
    the output.
    """
    return max(4 * tape.shapes[z].numel() * inputs, tape.met(z, end))


class Costs:
    """The cost of each route on one recorded batch, of which `chunk` directions share a batched pass.

    The loss's own Hessian at the output is of this rank, less its diagonal; None where nothing is known of it.
    """

    def __init__(
        self, tape: Tape, itemsize: int, chunk: int, rates: Rates, rank: int | None = None
    ) -> None:
        self.tape, self.itemsize, self.chunk, self.rates = tape, itemsize, chunk, rates
        self._each = np.array([self._work(call) for call in tape.calls]).reshape(-1, 4)
        self._after: dict[tuple[int, ...], Work] = {}
        output = tape.shapes[tape.output]
        self.samples = output[0] if output else 1
        self.classes = max(1, self.size(tape.output))
        self.rank = self.classes if rank is None else rank
        self.loss = Work(bytes=_LOSS * output.numel() * itemsize, calls=_LOSS)
        self.forward = self._pass(slice(None)) + self.loss

    def size(self, value: int) -> int:
        """Numbers of one sample in a value."""
        return self.tape.shapes[value].numel() // max(1, self.samples)

    def after(self, *values: int) -> Work:
        """One forward pass over everything that depends on some values, and the loss."""
        if values not in self._after:
            self._after[values] = self._pass(self.tape.behind(values)) + self.loss
        return self._after[values]

    def _pass(self, places: Sequence[int] | slice) -> Work:
        """A forward pass over the calls at these places of the tape."""
        return Work(*self._each[places].sum(0).tolist())

    def hvp(self, parameters: Sequence[str], rows: int) -> Work:
        """That many Hessian-vector products, through what depends on these parameters."""
        values = [self.tape.parameters[n] for n in parameters if n in self.tape.parameters]
        chunks = math.ceil(rows / self.chunk)
        way = self.forward if self.tape.refusal else self.after(*values)
        return way.times(PASSES * rows, PASSES * chunks) + self.forward.times(3)

    def product(self) -> Work:
        """A Hessian-vector product of all parameters that shares no pass with another."""
        return self.forward.times(PASSES)

    def seconds_before(self, rates: Rates) -> list[float]:
        """Seconds of a forward pass's first so many calls: none, one, two, ..."""
        each = self._each @ [1 / rates.flops, 1 / rates.memory, rates.call, rates.call]
        return [0.0, *each.cumsum().tolist()]

    def directions(self, z: int, count: int, cut: int | None = None) -> Work:
        """Derivatives of delta along that many directions of z; of those that end at a cut, with its product."""
        chunks, way = math.ceil(count / self.chunk), self.after(z)
        product = Work()
        if cut is not None:
            behind = self.tape.behind([z])
            way = self._pass(behind[: bisect_left(behind, len(self.tape.until(cut)))])
            product = self._product(self.samples * self.size(cut) ** 2).times(count, chunks)
        passes = PASSES if cut is None else CUT_PASSES
        return way.times(passes * count, passes * chunks) + product + self.forward.times(3)

    def own(self, use: Use, diagonal: bool) -> Work:
        """The assembly of a parameter's own block from its derivatives along z."""
        b, t, n, m = self.samples * use.apart, use.positions, use.n, use.m
        if diagonal and t == 1:
            return self._product(b * n * m)
        if diagonal and use.is_layer and t < m:
            # Each direction, of n t, meets the inputs at all positions once: no matrix product, which has many.
            return self._product(b * t * n * m * t) + self._moved(b * t * n * m * t)
        if use.kind == LINEAR and use.is_layer and t == 1:
            return self._product(b * n * n * m * m / 4) + self._moved(3 * _UNCACHED * use.size**2)
        if use.kind not in (LINEAR, CONVOLUTION):
            return self._moved(b * t * n * n)
        if not use.is_layer or t >= m:
            # A direction per entry: one product of [n, B T] and [B T, m] each.
            return self._product(use.size * b * t * n * m)
        return self._product(2 * b * t * t * n * n * m + b * t * use.size**2)

    def chain(self, chain: Chain, curved: bool) -> Work:
        """The curvature of every value of a chain, kept in rows; see `rows_along`."""
        work = self.forward.times(3)
        for step, (rows, _) in zip(chain.steps, rows_along(chain, curved), strict=True):
            after, before = chain.width(step.after), chain.width(step.before)
            if step.call.name in PRODUCTS:
                work += self._product(chain.sites * rows * after * before)
            else:
                work += self._moved(3 * chain.sites * rows * before)
        return work

    def held_of_chain(self, chain: Chain, curved: bool, most: int) -> int:
        """Numbers of the curvature at the output, and along the chain of as many sites as are kept at once, up to
        so many; what it becomes at the next value is held beside it. Sites whose numbers do not lie together are put
        so, in the values and in their gradients.
        """
        each, width = most_numbers(chain, curved), chain.width(chain.output)
        at_output = chain.sites * width * min(width, 2 * chain.rank + 1)
        apart = (channels.n for channels in chain.channels.values() if channels.inner > 1)
        put = 2 * chain.sites * sum(apart)
        return put + at_output + int(_REPLACED * each) * max(1, min(chain.sites, most // each))

    def held_of_directions(self, z: int, inputs: int, count: int, most: int, more: int = 0) -> int:
        """Numbers that so many directions of z make for so many inputs, or as many of them as make up to `most`.

        Args:
            z: the value.
            inputs: that derivatives arrive at.
            count: how many directions go together.
            most: numbers that these make, unless one alone makes more.
            more: what is made of each besides.
        """
        each = numbers_along(self.tape, z, inputs) + more
        return each * max(1, min(count, most // each))

    def cross(self, seeds: int, inputs: int, use: Use, columns: int, made: int) -> Work:
        """The assembly of rows from directions, over the columns of some layers.

        Args:
            seeds: how many directions.
            inputs: how many rows each has a share of.
            use: whose rows they are.
            columns: parameters of the layers.
            made: the same, each as often as it is applied in one sample: so a gradient is made.
        """
        samples = self.samples * use.apart
        moved = self._moved(3 * seeds * samples * columns)
        return moved + self._product(seeds * samples * (inputs * columns + 2 * made))

    def class_passes(self, values: Sequence[int], classes: int) -> Work:
        """The backward passes of so many outputs to some values, and the loss's Hessian there."""
        return self.after(*values).times(2 * classes, 2) + self.forward.times(2)

    def held_of_classes(self, uses: Sequence[Use], classes: int) -> int:
        """Numbers that are held besides for a block: of the passes on their way, a reordered copy of what they leave at
        its uses, and the inputs there.
        """
        behind = (self.tape.calls[place] for place in self.tape.behind(use.z for use in uses))
        met = (self.tape.shapes[n].numel() for call in behind for n in call.makes)
        on_the_way = _ON_ITS_WAY * max(met, default=0)
        left = sum(self.tape.shapes[use.z].numel() for use in uses)
        inputs = sum(use.positions * use.apart * use.storage.groups * use.m for use in uses)
        return classes * (on_the_way + left) + self.samples * inputs

    def gauss_newton(self, use: Use, diagonal: bool, classes: int) -> Work:
        """A block from the backward passes of so many outputs."""
        b, c, t, n, m = self.samples, classes, use.positions, use.n, use.m
        coupled = min(c, 2 * self.rank + 1)
        if use.kind == LINEAR and use.is_layer and t == 1:
            curvature = self._product(b * c * n * (coupled + (1 if diagonal else n)))
            return curvature + self.own(use, diagonal)
        pulled = self._product(b * c * (t * n * m + coupled * use.size)) + self._moved(
            4 * b * c * use.size
        )
        return pulled + (Work() if diagonal else self._product(b * c * use.size**2))

    def through(self, weights: Weights, block: Block, made: Block, neurons: Neurons | None) -> Work:
        """A block from that of the weights which its parameters make; its diagonal, from the squares of neurons."""
        numbers = self.tape.parameters
        behind = self.tape.behind(numbers[n] for n in block.parameters if n in numbers)
        making = set(map(id, weights.calls))
        way = self._pass([place for place in behind if id(self.tape.calls[place]) in making])
        if neurons is None:
            rows = 2 * (made.size + block.size) + PASSES * block.size
            # It is mirrored, put in order, and pulled back from both sides.
            assembly = self._moved(4 * _UNCACHED * (made.size + block.size) ** 2)
        else:
            use = neurons.use
            rows = 4 * use.m + PASSES * neurons.entries.shape[1]
            assembly = self._product(self.samples * use.positions * use.size * use.m)
        once = self.forward.times(3) + Work(calls=_THROUGH)
        return way.times(rows, math.ceil(rows / self.chunk)) + assembly + once

    def bend(self, use: Use, diagonal: bool) -> Work:
        """A block's diagonal share, one product per neuron."""
        inputs = self.samples * use.positions * use.n * use.m
        shares = Work() if diagonal else self._product(inputs * use.m)
        return shares + self._moved(2 * inputs) + Work(calls=6 * use.n)

    def _product(self, multiplications: float) -> Work:
        return Work(flops=2 * multiplications, calls=1)

    def _moved(self, numbers: float) -> Work:
        return Work(bytes=numbers * self.itemsize, calls=2)

    def _work(self, call: Call) -> tuple[float, float, float, float]:
        """As in `Work`."""
        size = sum(self.tape.shapes[n].numel() for n in call.makes)
        moved = 0 if call.is_view else 2 * size * self.itemsize
        return self._flops(call, size), moved, 1, _loops(call.name)

    def _flops(self, call: Call, size: int) -> float:
        shapes = [self.tape.shapes[a.value] for a in call.arguments if isinstance(a, Ref)]
        if call.name in ("mm", "bmm"):
            return 2.0 * size * shapes[0][-1]
        if call.name in ("addmm", "baddbmm"):
            return 2.0 * size * shapes[1][-1]
        if call.name == "convolution":
            return self._convolution(call, size, shapes[0], shapes[1])
        return 0.0

    def _convolution(self, call: Call, size: int, given: torch.Size, weight: torch.Size) -> float:
        """Operations of a convolution, those with channels that only fill up vectors among them.

        Its derivatives exchange the channels of both ends. Those of groups are mostly made along one end alone.
        """
        groups, transposed = call.named("groups"), call.named("transposed")
        width = max(1, _VECTOR // self.itemsize)
        ends = (weight[0] // groups, weight[1]) if groups == 1 else (weight[0] // groups,)
        filled = math.prod(width * math.ceil(channels / width) / channels for channels in ends)
        return 2.0 * (given.numel() if transposed else size) * math.prod(weight[1:]) * filled


@cache
def _loops(name: str) -> float:
    """Calls' worth of time in each row of a pass: none, unless PyTorch has no rule to batch the derivative."""
    backward = f"{name}_backward"
    if not hasattr(torch.ops.aten, backward):  # made of other operators
        return 0.0
    has_kernel = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", None)
    if has_kernel is None or has_kernel(f"aten::{backward}", "Batched"):
        return 0.0
    return _LOOPED_MORE.get(name, _LOOPED)
