"""What more digits, or differences of gradients, may mend."""

from __future__ import annotations

import torch

from hesscli.errors import NumericalError
from hesscli.hessian.blocks import Block
from hesscli.hessian.words import FINITE_DIFFERENCE, HVP
from hesscli.job.options import ProblemOptions

ANOTHER_SLOPE = (
    "the gradient is not the derivative of the loss, as where values are clamped with gradients off: a variance below"
    " the eps of gaussian_nll_loss, say"
)


def more_digits(dtype: torch.dtype) -> str | None:
    """The option that takes more than this dtype has, if there is one."""
    return "--dtype float64" if dtype == torch.float32 else None


def not_finite(what: str, options: ProblemOptions, dtype: torch.dtype) -> NumericalError:
    """Differences are not taken unasked: the loss may have no second derivative here."""
    hint = more_digits(dtype)
    if hint is None and options.curvature == "hessian" and options.method != FINITE_DIFFERENCE:
        hint = f"--method {FINITE_DIFFERENCE}"
    return NumericalError(f"{what} is not finite (NaN or inf)", hint)


def inexact(
    options: ProblemOptions, block: Block, method: str, reason: Exception
) -> NumericalError:
    """What is said where a route cannot give a block, and no other is to be tried."""
    return NumericalError(
        f"{block.name}: {method} is not exact here: {reason}", other_way(options, method)
    )


def other_way(options: ProblemOptions, method: str) -> str | None:
    """The option with which another route may do, after this one did not."""
    if options.curvature != "hessian":
        return "--method auto" if options.method != "auto" else "--curvature hessian"
    if method == FINITE_DIFFERENCE:
        return None
    return f"--method {FINITE_DIFFERENCE if method == HVP else 'auto'}"
