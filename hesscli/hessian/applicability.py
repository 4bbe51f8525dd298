"""That a way to compute the Hessian would be wrong or impossible, and why."""

from __future__ import annotations

import re

from hesscli.hessian.guests import is_missing_derivative


class NotApplicable(Exception):  # noqa: N818 - an answer, not an error
    """This route cannot give the exact result; the message says why."""


def explained(error: Exception) -> Exception:
    """NotApplicable where an operator lacks its second derivative, else the error itself."""
    if not is_missing_derivative(error):
        return error
    operator = re.search(r"derivative for '?(?:aten::)?(\w+?)(?:_backward)?\b", str(error))
    name = operator[1].strip("_") if operator else "an operator"
    return NotApplicable(f"{name} has no second derivative in PyTorch")
