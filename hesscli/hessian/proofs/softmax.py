"""Proof on the tape of a loss that it is linear in log softmaxes of the model's output, as a cross-entropy is."""

from __future__ import annotations

from collections.abc import Collection

from hesscli.hessian.proofs.piecewise import linear_in
from hesscli.hessian.recording.tape import Tape

_ELEMENTWISE = frozenset("add sub mul div neg clone alias contiguous view _to_copy".split())


def log_softmaxes(tape: Tape) -> list[int] | None:
    """The values log softmax(s f + c) that the sum of a loss is linear in, beside f itself; None where it is not.

    f is [B, C], and s is one factor for each of its numbers; c is a constant, or the same for all classes.

    Args:
        tape: of the loss, whose only input is the model's output f.
    """
    (f,) = tape.inputs
    moving, found = tape.dependent([f]), []
    for n in linear_in(tape) - {f}:
        call = tape.calls[tape.maker[n]]
        if call.name != "_log_softmax" or call.named("dim") not in (1, -1):
            return None
        if not _scaled(tape, f, call.arguments[0].value, moving):
            return None
        found.append(n)
    return sorted(found)


def _scaled(tape: Tape, f: int, value: int, moving: Collection[int]) -> bool:
    """Whether a value is s f + c."""
    shape = tape.shapes[f]
    while value != f and len(shape) == 2 and tape.shapes[value] == shape:
        call = tape.calls[tape.maker[value]]
        mine = [n for n in call.reads if n in moving]
        if call.name in ("add", "sub"):  # of what is the same for all classes, as their maximum
            mine = [n for n in mine if tape.shapes[n][1:] != (1,)]
        if call.name not in _ELEMENTWISE or len(mine) != 1:
            return False
        if call.name == "div" and call.place(mine[0]) != 0:
            return False
        (value,) = mine
    return value == f and len(shape) == 2
