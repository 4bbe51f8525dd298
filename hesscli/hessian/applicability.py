"""That a way to compute the Hessian would be wrong or impossible, and why."""

from __future__ import annotations

import re
import sys
from traceback import walk_tb

from hesscli.errors import HesscliError, is_out_of_memory
from hesscli.hessian.guests import is_missing_derivative, reason_of


class NotApplicable(Exception):  # noqa: N818 - an answer, not an error
    """This route cannot give the exact result; the message says why."""


def explained(error: Exception) -> Exception:
    """NotApplicable where a backward pass fails for want of a second derivative, else the error itself.

    A gradient was had before any route: what fails now is what differentiates that, in PyTorch or in a `Function` of
    the model's.
    """
    if is_missing_derivative(error):
        operator = re.search(r"derivative for '?(?:aten::)?(\w+?)(?:_backward)?\b", str(error))
        name = operator[1].strip("_") if operator else "an operator"
        return NotApplicable(f"{name} has no second derivative in PyTorch")
    if _is_of_backward(error):
        return NotApplicable(f"no second derivative ({reason_of(error)})")
    return error


def _is_of_backward(error: Exception) -> bool:
    """Whether a backward pass met it, in PyTorch's or the model's code, not in one of ours, and with memory left."""
    if isinstance(error, HesscliError | NotApplicable) or is_out_of_memory(error):
        return False
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    names = [frame.f_code.co_name for frame in frames]
    if "_engine_run_backward" not in names:
        return False
    inside = frames[names.index("_engine_run_backward") :]
    packages = [frame.f_globals["__name__"].split(".")[0] for frame in inside]
    callers = [name for name in packages if name not in ("torch", *sys.stdlib_module_names)]
    return callers[-1:] != ["hesscli"]
