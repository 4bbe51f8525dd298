"""The chain of linear layers and elementwise functions that ends at a model's output, as far as it is one.

It is one of each site by itself: a sample, or one of its positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hesscli.hessian.aten.smooth import slope_and_bend
from hesscli.hessian.proofs.analysis import Analysis
from hesscli.hessian.proofs.channels import MOVES, Channels
from hesscli.hessian.proofs.sample_rules import ELEMENTWISE_UNARY
from hesscli.hessian.proofs.uses import BIAS, SCALE, Use
from hesscli.hessian.recording.tape import DEFINED, Call, Ref, Tape
from hesscli.hessian.routes.factored_hessian import MOST_ROWS

_BOOLEAN = frozenset("isnan isinf signbit logical_not bitwise_not".split())
UNARY = ELEMENTWISE_UNARY - _BOOLEAN - {"detach"}
PRODUCTS = ("mm", "addmm", "convolution")
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

    def operand(self, known: Mapping[int, Tensor], channels: Channels) -> Tensor | None:
        """What the curvature passes: of a linear layer z = x M the matrix M, of a function its x and of a product the
        factor of each number, both [sites, n]; None if it stays as it is.

        Args:
            known: the values of a pass.
            channels: where the numbers of a site lie in `before`.
        """
        name, arguments, x = self.call.name, self.call.arguments, known[self.before].detach()
        if name in UNARY:
            return channels.by_site(x)
        if name == "convolution":
            return known[arguments[1].value].detach().flatten(1).T
        if name in PRODUCTS:
            return known[arguments[-1].value].detach()
        if name not in ("mul", "div"):
            return None
        other = next(a for a in arguments if a != Ref(self.before))
        factor = known[other.value].detach() if isinstance(other, Ref) else x.new_full((), other)
        factor = factor if name == "mul" else factor.reciprocal()
        return channels.by_site(factor.to(x.dtype).expand(x.shape))


@dataclass(frozen=True)
class Chain:
    """The operators from the output back to a value, last first."""

    output: int
    steps: list[Step]
    channels: dict[int, Channels]  # where the numbers of a site lie in every value
    uses: dict[str, Use]  # of parameters, at some of the values
    sites: int  # how many each value has, of one batch
    rank: int  # of the loss's own Hessian at a site of the output, less its diagonal

    def width(self, value: int) -> int:
        """Numbers of one site of a value."""
        return self.channels[value].n


def find_chains(analysis: Analysis, parameters: Iterable[str]) -> Iterator[Chain]:
    """The chains back to these parameters, each of which is on one at most: that with the fewest numbers of a site."""
    left = {name: analysis.uses[name] for name in parameters if name in analysis.uses}
    for channels in analysis.of_sites:
        chain = _find_chain(analysis, channels, left.values())
        if chain.uses:
            yield chain
        left = {name: use for name, use in left.items() if name not in chain.uses}


def _find_chain(analysis: Analysis, at_output: Channels, uses: Iterable[Use]) -> Chain:
    """The operators from such sites of the output back to the first of these uses that is reached.

    A chain ends where a value is used twice, is complex, or is made in a way that the recursion does not know.
    """
    tape, reached, needed = analysis.tape, dict[str, Use](), 0
    at: dict[int, list[Use]] = {}
    for use in uses:
        at.setdefault(use.z, []).append(use)
    steps: list[Step] = []
    value, along = tape.output, {tape.output: at_output}
    while value in tape.maker and value not in tape.complex:
        here = [use for use in at.get(value, ()) if _enters_sites(use, along[value], tape)]
        if here:
            reached |= {use.parameter: _of_sites(use) for use in here}
            needed = len(steps)
        call = tape.calls[tape.maker[value]]
        before = [n for n in call.reads if analysis.axes[n] is not None]
        if len(before) != 1 or len(tape.readers[before[0]]) != 1:
            break
        mine = _before(call, before[0], along[value], tape)
        if mine is None:
            break
        steps.append(Step(call, before[0], value))
        (value,) = before
        along[value] = mine
    del steps[needed:]
    channels = {value: along[value] for value in (tape.output, *(s.before for s in steps))}
    count = tape.shapes[tape.output].numel() // max(1, at_output.n)
    return Chain(tape.output, steps, channels, reached, count, analysis.loss_rank(at_output))


def _enters_sites(use: Use, channels: Channels, tape: Tape) -> bool:
    """Whether a parameter enters every site of a value in the same way."""
    is_known = use.is_layer or use.kind in (SCALE, BIAS)
    return is_known and Channels.of(tape.shapes[use.z], use.channels) == channels


def _of_sites(use: Use) -> Use:
    """A use whose positions are sites, as samples are."""
    return replace(use, positions=1, apart=use.positions * use.apart)


def rows_along(chain: Chain, curved: bool) -> Iterator[tuple[int, int]]:
    """Rows that the curvature of one site is kept in, as they go into each step and as they come out of it.

    See `FactoredHessian`.

    Args:
        chain: from the output on.
        curved: whether second derivatives of the steps add to it.
    """
    steps = chain.steps
    rows, diagonal = 2 * chain.rank, bool(steps) and chain.rank < chain.width(steps[0].after)
    last = last_product(steps)
    for index, step in enumerate(steps):
        after = chain.width(step.after)
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


def most_numbers(chain: Chain, curved: bool) -> int:
    """Numbers in the rows that the curvature of one site is kept in, at most; see `rows_along`."""
    along = zip(chain.steps, rows_along(chain, curved), strict=True)
    held = (max(i * chain.width(s.after), o * chain.width(s.before)) for s, (i, o) in along)
    return max([1, 2 * chain.rank * chain.width(chain.output), *held])


def last_product(steps: Sequence[Step]) -> int:
    """The place of the linear layer from which on the diagonal is all that is needed."""
    return max((i for i, step in enumerate(steps) if step.call.name in PRODUCTS), default=0)


def _before(call: Call, value: int, channels: Channels, tape: Tape) -> Channels | None:
    """Where the numbers of a site lie in a value, by where they do in what a call makes of it; None ends the chain."""
    place, shapes = call.place(value), tape.shapes
    (made, *_) = call.makes
    if call.name in UNARY or call.name in MOVES:
        floats = (call.keywords.get("dtype") or torch.float32).is_floating_point
        alone = call.reads == [value]  # not a clamp between values, say
        return channels.before(call, value, shapes) if floats and alone else None
    if call.name in _AFFINE:
        known = not call.keywords and (call.name != "div" or place == 0)
        return channels if known and shapes[value] == shapes[made] else None  # else it repeats it
    if call.name in ("mm", "addmm") and not call.keywords:
        known = place == (1 if call.name == "addmm" else 0) and channels == Channels(
            shapes[made][1]
        )
        return Channels(shapes[value][1]) if known else None
    if call.name == "convolution" and place == 0 and _is_pointwise(call, shapes):
        known = channels == Channels.of(shapes[made], [1])
        return Channels.of(shapes[value], [1]) if known else None
    return None


def _is_pointwise(call: Call, shapes: Mapping[int, Sequence[int]]) -> bool:
    """Whether a convolution takes one position after the other, with all channels."""
    kernel, padding = shapes[call.arguments[1].value][2:], call.named("padding")
    alone = not call.named("transposed") and call.named("groups") == 1
    return alone and {1} == {*kernel, *call.named("stride")} and not any(padding)
