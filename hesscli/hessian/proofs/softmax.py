"""Proof on the tape of a loss that it is linear in log softmaxes of the model's output, as a cross-entropy is."""

from __future__ import annotations

from collections.abc import Collection

from hesscli.hessian.proofs.channels import MOVES, Channels
from hesscli.hessian.proofs.piecewise import linear_in
from hesscli.hessian.recording.tape import Tape

_ELEMENTWISE = frozenset("add sub mul div neg clone alias contiguous _to_copy".split())


def log_softmaxes(tape: Tape, classes: Channels) -> dict[int, Channels] | None:
    """The values log softmax(s f + c) that the sum of a loss is linear in, beside f itself, and where the classes lie
    in them; None where it is not.

    s is one factor for each number of f; c is a constant, or the same for all classes.

    Args:
        tape: of the loss, whose only input is the model's output f.
        classes: where they lie in f.
    """
    (f,) = tape.inputs
    moving, found = tape.dependent([f]), {}
    for n in sorted(linear_in(tape) - {f}):
        call, shape = tape.calls[tape.maker[n]], tape.shapes[n]
        if call.name != "_log_softmax":
            return None
        along = Channels.of(shape, [call.named("dim") % len(shape)])
        if along is None or _scaled(tape, f, call.arguments[0].value, along, moving) != classes:
            return None
        found[n] = along
    return found


def _scaled(
    tape: Tape, f: int, value: int, along: Channels | None, moving: Collection[int]
) -> Channels | None:
    """Where the classes lie in f, if a value is s f + c and they lie `along` in it; else None."""
    alike = True  # whether all classes are multiplied by the same behind a value
    while value != f and along is not None:
        call, shape = tape.calls[tape.maker[value]], tape.shapes[value]
        mine = [n for n in call.reads if n in moving]
        if alike and call.name in ("add", "sub"):
            # Of what is the same for all classes, as their maximum.
            mine = [n for n in mine if not along.are_alike(shape, tape.shapes[n])]
        if call.name not in _ELEMENTWISE | MOVES or len(mine) != 1:
            return None
        (before,) = mine
        if call.name in _ELEMENTWISE and tape.shapes[before] != shape:
            return None
        if call.name == "div" and call.place(before) != 0:
            return None
        if call.name in ("mul", "div"):
            factors = (tape.shapes[n] for n in call.reads if n != before)
            alike &= all(along.are_alike(shape, each) for each in factors)
        value, along = before, along.before(call, before, tape.shapes)
    return along
