"""The chain of linear layers and elementwise functions that ends at a model's output, as far as it is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.hessian.aten.smooth import slope_and_bend
from hesscli.hessian.proofs.analysis import Analysis
from hesscli.hessian.proofs.sample_axis import SampleAxis
from hesscli.hessian.proofs.sample_rules import ELEMENTWISE_UNARY, RESHAPES
from hesscli.hessian.proofs.uses import CONVOLUTION, Use
from hesscli.hessian.recording.tape import DEFINED, Call, Ref
from hesscli.hessian.routes.factored_hessian import MOST_ROWS

_BOOLEAN = frozenset("isnan isinf signbit logical_not bitwise_not".split())
UNARY = ELEMENTWISE_UNARY - _BOOLEAN - {"detach"}
PRODUCTS = ("mm", "addmm")
_AFFINE = frozenset(["mul", "add", "sub", "div"])


@dataclass(frozen=True)
class Step:
    """One operator of the chain: `call` gives `after` from `before`."""

    call: Call
    before: int
    after: int

    def derivatives(self, at: Tensor) -> tuple[Tensor, Tensor | None]:
        """phi' and phi'' of an elementwise function; None where phi'' is zero."""

        operator = DEFINED.get(self.call.operator, self.call.operator)

        def phi(u: Tensor) -> Tensor:
            arguments = [u if isinstance(a, Ref) else a for a in self.call.arguments]
            result = operator(*arguments, **self.call.keywords)
            return result[0] if isinstance(result, (tuple, list)) else result

        return slope_and_bend(phi, at)


def find_chain(analysis: Analysis, parameters: Iterable[str]) -> tuple[list[Step], dict[str, Use]]:
    """The operators from the output back to the first of these parameters that is reached, and the uses on the way.

    A chain ends where a value is used twice, is complex, or is made in a way that the recursion does not know.
    """
    tape, reached, needed = analysis.tape, dict[str, Use](), 0
    at: dict[int, list[str]] = {}
    for name in parameters:
        use = analysis.uses.get(name)
        if use is not None and use.positions == 1 and use.kind != CONVOLUTION:
            at.setdefault(use.z, []).append(name)
    steps: list[Step] = []
    value = tape.output
    while value in tape.maker and analysis.axes[value] == SampleAxis(0):
        if value in at:
            reached |= {name: analysis.uses[name] for name in at[value]}
            needed = len(steps)
        call = tape.calls[tape.maker[value]]
        before = [n for n in call.reads if analysis.axes[n] is not None]
        if (
            len(before) != 1
            or before[0] in tape.complex
            or len(tape.readers[before[0]]) != 1
            or not _known(call, before[0])
            or (call.name in _AFFINE and tape.shapes[before[0]] != tape.shapes[value])  # repeats it
        ):
            break
        steps.append(Step(call, before[0], value))
        value = before[0]
    return steps[:needed], reached


def rows_along(
    steps: Sequence[Step], sizes: Callable[[int], int], rank: int, curved: bool
) -> Iterator[tuple[int, int]]:
    """Rows that the curvature of one sample is kept in, as they go into each step and as they come out of it.

    See `FactoredHessian`.

    Args:
        steps: of a chain.
        sizes: numbers of one sample in a value.
        rank: of the curvature at the output, less its diagonal.
        curved: whether second derivatives of the steps add to it.
    """
    rows, diagonal = 2 * rank, bool(steps) and rank < sizes(steps[0].after)
    last = last_product(steps)
    for index, step in enumerate(steps):
        after = sizes(step.after)
        if step.call.name not in PRODUCTS:
            diagonal |= curved
            yield rows, rows
            continue
        if rows > MOST_ROWS * after or index == last:  # of which the diagonal is all
            rows = min(rows, 2 * after)
        before = rows
        if diagonal and index != last:
            rows, diagonal = rows + after, False
        yield before, rows


def most_numbers(
    steps: Sequence[Step], sizes: Callable[[int], int], rank: int, curved: bool
) -> int:
    """Numbers in the rows that the curvature of one sample is kept in, at most; see `rows_along`."""
    along = zip(steps, rows_along(steps, sizes, rank, curved), strict=True)
    held = (max(i * sizes(step.after), o * sizes(step.before)) for step, (i, o) in along)
    return max([1, *held])


def last_product(steps: Sequence[Step]) -> int:
    """The place of the linear layer from which on the diagonal is all that is needed."""
    return max((i for i, step in enumerate(steps) if step.call.name in PRODUCTS), default=0)


def _known(call: Call, before: int) -> bool:
    place = call.place(before)
    if call.name in UNARY or call.name in RESHAPES:
        floats = (call.keywords.get("dtype") or torch.float32).is_floating_point
        return floats and call.reads == [before]  # not a clamp between values, say
    if call.name in PRODUCTS and not call.keywords:
        return place == (1 if call.name == "addmm" else 0)
    return call.name in _AFFINE and not call.keywords and (call.name != "div" or place == 0)
