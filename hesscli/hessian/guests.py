"""Calls into code that is not ours: models, and losses of the user's own."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from hesscli.errors import HesscliError, Terminated, is_out_of_memory, signalled
from hesscli.hessian.aten.watcher import unwrapped

Explain = Callable[[str, BaseException], HesscliError]
_MISSING = re.compile(
    r"derivative for .* is not implemented|once_differentiable|[Dd]ouble backward|"
    r"modified by an inplace operation"  # as a backward pass does that was written for one
)


class _Inside(threading.local):
    """Whether this thread runs a guest, and if so, whether that was called with gradients on."""

    with_gradients: bool | None = None
    device: torch.device | None = None  # where guests make tensors, if not on the CPU


_inside = _Inside()


def is_guest() -> bool:
    """Whether code that is not ours is at work."""
    return _inside.with_gradients is not None


def turned_gradients_off() -> bool:
    """Whether code that is not ours is at work, and has turned gradients off."""
    return bool(_inside.with_gradients) and not torch.is_grad_enabled()


def is_in_function() -> bool:
    """Whether the forward pass of a `torch.autograd.Function` is at work: it runs without any derivatives.

    `torch.no_grad` leaves those of forward mode on.
    """
    return not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


@contextmanager
def guest(explain: Explain) -> Iterator[None]:
    """Inside runs code that is not ours, and its errors are made those of `explaining`.

    It runs as it is written: what `torch.compile` would make of it has no second derivatives. If it turns gradients off
    for good, they are on again afterwards.
    """
    before, _inside.with_gradients = _inside.with_gradients, torch.is_grad_enabled()
    try:
        with _inside.device or nullcontext(), _uncompiled(), explaining(explain):
            yield
    finally:
        torch.set_grad_enabled(_inside.with_gradients)
        _inside.with_gradients = before


def may_compile() -> bool:
    """Whether `torch.compile` may be at work: where it is not imported, which takes seconds, nothing is compiled."""
    return "torch._dynamo.eval_frame" in sys.modules


def _uncompiled() -> AbstractContextManager[object]:
    return torch.compiler.set_stance("force_eager") if may_compile() else nullcontext()


@contextmanager
def on_host() -> Iterator[None]:
    """Inside, tensors are made on the CPU, whatever the caller's default device; guests make them on that one."""
    device, before = torch.get_default_device(), _inside.device
    on_cpu = device.type == "cpu"
    _inside.device = None if on_cpu else device
    try:
        with nullcontext() if on_cpu else torch.device("cpu"):
            yield
    finally:
        _inside.device = before


@contextmanager
def explaining(explain: Explain, needed: bool = False) -> Iterator[None]:
    """Inside, any error becomes what `explain` makes of its last line that says something, and of itself.

    What callers deal with goes through: memory that ran out, being told to end, and derivatives that are missing,
    unless they are `needed`.
    """
    try:
        yield
    except (HesscliError, Terminated):
        raise
    except (Exception, SystemExit) as raised:
        error = unwrapped(raised)
        if is_out_of_memory(error) or (_MISSING.search(str(error)) and not needed):
            raise error from error.__cause__
        if signalled:  # inside TorchScript
            raise signalled[-1] from None
        raise explain(reason_of(error), error) from error


def is_missing_derivative(error: BaseException) -> bool:
    """Whether autograd said that an operator cannot be differentiated (twice)."""
    return isinstance(error, NotImplementedError) or bool(_MISSING.search(str(error)))


def reason_of(error: BaseException) -> str:
    """The last line of an error that says something; TorchScript puts its own traceback before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if re.match(r"(builtins\.)?\w+(Error|Exception): ", line)]
    reason = said[-1].removeprefix("builtins.") if said else " ".join(lines[:1])
    if not said and not isinstance(error, (RuntimeError, TypeError, ValueError, AssertionError)):
        reason = f"{type(error).__name__}: {reason}"  # a key alone, say
    return reason.removeprefix("RuntimeError: ") or type(error).__name__
