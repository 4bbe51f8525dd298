"""The diagonal of d^2 L / dz^2 at every layer of a chain, in one backward sweep.

Where a model is a chain of linear layers and elementwise functions, each sample's S = d^2 L / dz^2 goes from a value
to the one before it by

    S_u = diag(phi') S_y diag(phi') + diag(phi'' dL/dy)      y = phi(u)
    S_x = M S_z M^T                                          z = x M

starting from the loss's own Hessian at the output. S is never needed whole: it is kept as a sum of terms L^T R with few
rows (as many as outputs), V^T diag(w) V (as many as neurons of a layer behind), and a diagonal, which passes one linear
layer without being spread out: diag(M diag(d) M^T) = (M * M) d. In a deep chain the rows would add up, so they are
multiplied out now and then.

Source: the recursion is that of A. Botev et al., Practical Gauss-Newton optimisation, 2017, eq. 28-31, kept factored
as in F. Dangel et al., BackPACK, 2020.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.hessian.aten.smooth import slope_and_bend
from hesscli.hessian.chunk_sizes import chunk_sizes, ranges
from hesscli.hessian.proofs.analysis import Analysis
from hesscli.hessian.proofs.sample_axis import SampleAxis
from hesscli.hessian.proofs.sample_rules import ELEMENTWISE_UNARY, RESHAPES
from hesscli.hessian.recording.tape import Call, Ref
from hesscli.hessian.routes.probes import Probed

_TELLING = frozenset("isnan isinf signbit logical_not bitwise_not".split())  # bools
UNARY = ELEMENTWISE_UNARY - _TELLING - {"detach"}
PRODUCTS = ("mm", "addmm")
_AFFINE = frozenset(["mul", "add", "sub", "div"])
MOST_ROWS = 3  # times n: to multiply out S, and start anew from it, costs about as much as to push that many


@dataclass(frozen=True)
class Step:
    """One operator of the chain: `call` gives `after` from `before`."""

    call: Call
    before: int
    after: int


def find_chain(analysis: Analysis, zs: Collection[int]) -> tuple[list[Step], set[int]]:
    """The operators from the output back to the first of these values that can be reached, and those reached.

    A chain ends where a value is used twice, or made in a way that the recursion does not know.
    """
    tape = analysis.tape
    steps: list[Step] = []
    value, reached, needed = tape.output, set[int](), 0
    while value in tape.maker and analysis.axes[value] == SampleAxis(0):
        if value in zs:
            reached.add(value)
            needed = len(steps)
        call = tape.calls[tape.maker[value]]
        before = [n for n in call.reads if analysis.axes[n] is not None]
        if (
            len(before) != 1
            or len(tape.readers[before[0]]) != 1
            or not _known(call, before[0])
            or (call.name in _AFFINE and tape.shapes[before[0]] != tape.shapes[value])  # repeats it
        ):
            break
        steps.append(Step(call, before[0], value))
        value = before[0]
    return steps[:needed], reached


def _known(call: Call, before: int) -> bool:
    place = call.place(before)
    if call.name in UNARY or call.name in RESHAPES:
        floats = (call.keywords.get("dtype") or torch.float32).is_floating_point
        return floats and call.reads == [before]  # not a clamp between values, say
    if call.name in PRODUCTS and not call.keywords:
        return place == (1 if call.name == "addmm" else 0)
    return call.name in _AFFINE and not call.keywords and (call.name != "div" or place == 0)


def chain_diagonals(
    probed: Probed, output: int, steps: Sequence[Step], zs: Collection[int]
) -> dict[int, Tensor]:
    """diag(d^2 L / dz^2) of each sample: [B, n] for each z of the chain.

    Args:
        probed: a pass with probes at `curved_outputs(steps)`.
        output: the number of the model's output.
        steps: of `find_chain`.
        zs: where it is wanted.
    """
    gradient = probed.gradients(list(probed.probes))
    start = probed.output_hessian()
    # From the last linear layer on, the diagonal is all that is needed, and all that is kept.
    last = max((i for i, s in enumerate(steps) if s.call.name in PRODUCTS), default=0)
    widest = max([start.shape[1], *(probed.known[s.before][0].numel() for s in steps)])
    count = chunk_sizes(start.device).chain // (widest * widest)
    found: dict[int, list[Tensor]] = {z: [] for z in zs}
    with torch.no_grad():
        for some in ranges(probed.samples, count):
            part = slice(some.start, some.stop)
            curvature = FactoredHessian(start[part])
            value = output
            for index, step in enumerate(steps):
                if value in found:
                    found[value].append(curvature.diagonal())
                at = probed.known[step.before].detach()[part]
                slope = gradient.get(step.after)
                slope = None if slope is None else slope[part]
                _back(curvature, step, probed.known, at, slope, index >= last)
                value = step.before
            found[value].append(curvature.diagonal())
    return {z: torch.cat(parts) for z, parts in found.items()}


def curved_outputs(steps: Sequence[Step]) -> list[int]:
    """The values of the chain at which dL/dy is needed."""
    return [step.after for step in steps if step.call.name in UNARY]


def _back(
    curvature: FactoredHessian,
    step: Step,
    known: Mapping[int, Tensor],
    before: Tensor,
    gradient: Tensor | None,
    last: bool,
) -> None:
    """S from the value after a step to the one before; `before` and `gradient` (at `after`) are of some samples."""
    call = step.call
    if call.name in RESHAPES:
        return
    if call.name in PRODUCTS:
        matrix = call.arguments[-1]
        curvature.linear(known[matrix.value].detach(), last)
        return
    samples = before.shape[0]
    if call.name in UNARY:
        slope, bend = derivatives(call, before)
        curvature.scale(slope.reshape(samples, -1))
        if bend is not None and gradient is not None:
            curvature.add_diagonal((bend * gradient).reshape(samples, -1))
        return
    if call.name in ("mul", "div"):
        other = next(a for a in call.arguments if a != Ref(step.before))
        factor = known[other.value].detach() if isinstance(other, Ref) else other
        ones = torch.ones_like(before)
        factor = ones * factor if call.name == "mul" else ones / factor
        curvature.scale(factor.reshape(samples, -1))
    # add and sub: the derivative is one, or minus one, which S does not feel


def derivatives(call: Call, at: Tensor) -> tuple[Tensor, Tensor | None]:
    """phi' and phi'' of an elementwise function; None where phi'' is zero."""

    def phi(u: Tensor) -> Tensor:
        arguments = [u if isinstance(a, Ref) else a for a in call.arguments]
        result = call.operator(*arguments, **call.keywords)
        return result[0] if isinstance(result, (tuple, list)) else result

    return slope_and_bend(phi, at)


class FactoredHessian:
    """S = L^T R + sum of V^T diag(w) V + diag(d), for each sample.

    Args:
        S: [B, n, n].
    """

    def __init__(self, S: Tensor) -> None:
        self._begin_with(S)

    def _begin_with(self, S: Tensor) -> None:
        identity = torch.eye(S.shape[1], dtype=S.dtype, device=S.device)
        self.left, self.right = identity.unsqueeze(0), S  # [B or 1, r, n], [B, r, n]
        self.weighted: list[tuple[Tensor, Tensor]] = []  # V [B or 1, r, n], w [B, r]
        self.d: Tensor | None = None  # [B, n]

    def scale(self, g: Tensor) -> None:
        """S <- diag(g) S diag(g), g [B, n]."""
        g = g.unsqueeze(1)
        self.left, self.right = self.left * g, self.right * g
        self.weighted = [(v * g, w) for v, w in self.weighted]
        if self.d is not None:
            self.d = self.d * g.squeeze(1) ** 2

    def add_diagonal(self, d: Tensor) -> None:
        self.d = d if self.d is None else self.d + d

    def linear(self, matrix: Tensor, last: bool) -> None:
        """S <- M S M^T with M [n', n]; the last time, only the diagonal of that."""
        m = matrix.T.contiguous()  # [n, n']
        if 2 * self.left.shape[1] + sum(v.shape[1] for v, _ in self.weighted) > MOST_ROWS * len(m):
            self._multiply_out()
        if last:
            self.d, self.weighted = self.diagonal(m), []
            self.left = self.right = m[:0].unsqueeze(0)
            return
        self.left, self.right = self.left @ m, self.right @ m
        self.weighted = [(v @ m, w) for v, w in self.weighted]
        if self.d is not None:
            self.weighted.append((m.unsqueeze(0), self.d))
            self.d = None

    def diagonal(self, m: Tensor | None = None) -> Tensor:
        """diag(S), [B, n]; or, with m = M^T, diag(M S M^T), [B, n']."""
        left, right = (self.left, self.right) if m is None else (self.left @ m, self.right @ m)
        total = (left * right).sum(1)
        if self.d is not None:
            total = total + (self.d if m is None else self.d @ (m * m))
        for v, w in self.weighted:
            if m is None:
                total = total + _weighted_squares(v, w)
                continue
            for some, weights in zip(v.split(64, 1), w.split(64, 1), strict=True):  # [B, 64, n']
                total = total + _weighted_squares(some @ m, weights)
        return total

    def _multiply_out(self) -> None:
        S = self.left.transpose(1, 2) @ self.right
        for v, w in self.weighted:
            S = S + (v * w.unsqueeze(2)).transpose(1, 2) @ v
        if self.d is not None:
            S = S + torch.diag_embed(self.d)
        self._begin_with(S)


def _weighted_squares(v: Tensor, w: Tensor) -> Tensor:
    """diag(V^T diag(w) V): V [B or 1, r, n], w [B, r] -> [B, n]."""
    squares = v * v
    return w @ squares[0] if len(v) == 1 else (w.unsqueeze(1) @ squares).squeeze(1)
