"""One curved function right after z, and nothing curved behind it.

If y = phi(z), elementwise, and the output f is piecewise linear in y, the curvature of each sample is

    S = d^2 L / dz^2 = V^T Lambda V + diag(d),      d = phi''(z) dL/dy,

with V = df/dz and Lambda the loss's Hessian at the output: the Gauss-Newton form, and a diagonal. The last hidden layer
of most networks is such a place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.proofs.piecewise import curved
from hesscli.hessian.proofs.sample_rules import RESHAPES
from hesscli.hessian.proofs.uses import Use
from hesscli.hessian.recording.tape import Tape
from hesscli.hessian.routes.base import Diagonal, Rows
from hesscli.hessian.routes.chain import UNARY, Step
from hesscli.hessian.routes.probes import Probed
from hesscli.hessian.routes.sums import product


def find_bend(tape: Tape, zs: Sequence[int]) -> Step | None:
    """The curved function right after a value, or None where none follows it, or any of several, at all.

    It is of z, but for its shape and what was added.

    Raises:
        NotApplicable: one follows elsewhere.
    """
    operator = curved(tape, zs)
    if operator is None:
        return None
    value = zs[0]
    while len(zs) == 1 and len(readers := tape.readers.get(value, ())) == 1:
        call, after = readers[0], readers[0].makes[0]
        if after in tape.complex:
            break
        shifted = call.name == "add" and not call.keywords
        if call.name in RESHAPES or (shifted and tape.shapes[after] == tape.shapes[value]):
            value = after
        elif call.name in UNARY and call.reads == [value] and curved(tape, [after]) is None:
            return Step(call, value, after)
        else:
            break
    raise NotApplicable(f"{operator} is not piecewise linear")


def bend_diagonal(bend: Step, probed: Probed, gradient: Tensor | None, use: Use) -> Tensor | None:
    """d at the z of a use, [B, T, n], by dL/dy; None where it is zero."""
    _, second = bend.derivatives(probed.known[bend.before].detach())
    if second is None or gradient is None:
        return None
    return use.rows((second * gradient).reshape(probed.known[use.z].shape))


def add_bend(part: Rows, uses: Sequence[Use], inputs: Sequence[Tensor], d: Tensor) -> None:
    """Adds the sum over samples, positions and neurons p of d A_p^T A_p, d [B, T, n]: A_p is what z_p is made of.

    The rows are of the block of all the uses' parameters, one after the other; the uses are at one z, and the inputs
    those of each, [B, T, m].
    """
    for index, x, weights in _neurons(uses, inputs, d):
        columns = index >= part.start
        rows = columns & (index < part.stop)
        values = product((x[:, rows] * weights).T, x[:, columns])
        at = index - part.start
        part.out[at[rows].unsqueeze(1), at[columns]] += values


def add_bend_diagonal(part: Diagonal, use: Use, inputs: Tensor, d: Tensor) -> None:
    """The same for the diagonal of one parameter's block."""
    if use.is_layer:
        part.add_weighted(use, d.flatten(0, 1), inputs.flatten(0, 1))
        return
    for index, x, weights in _neurons([use], [inputs], d):
        part.out[index] += (x * x * weights).sum(0)


def _neurons(
    uses: Sequence[Use], inputs: Sequence[Tensor], d: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each neuron: its places in the block, their inputs [B T, places], and d there [B T, 1]."""
    every = torch.arange(sum(use.size for use in uses), device=d.device)
    places = every.split([use.size for use in uses])
    weights = d.flatten(0, 1)
    for p in range(uses[0].n):
        mine = [use.storage.entries(of, p) for use, of in zip(uses, places, strict=True)]
        index = torch.cat([of.flatten() for of in mine])
        given = [a[..., use.storage.inputs_of(p)] for use, a in zip(uses, inputs, strict=True)]
        yield index, torch.cat(given, -1).flatten(0, 1), weights[:, p : p + 1]
