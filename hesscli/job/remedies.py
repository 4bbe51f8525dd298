"""What more digits, or differences of gradients, may mend."""

from __future__ import annotations

import torch

from hesscli.errors import NumericalError
from hesscli.hessian.words import FINITE_DIFFERENCE
from hesscli.job.options import ProblemOptions


def more_digits(dtype: torch.dtype) -> str | None:
    """The option that takes more than this dtype has, if there is one."""
    return "--dtype float64" if dtype == torch.float32 else None


def not_finite(what: str, options: ProblemOptions, dtype: torch.dtype) -> NumericalError:
    """Differences are not taken unasked: the loss may have no second derivative here."""
    hint = more_digits(dtype)
    if hint is None and options.curvature == "hessian" and options.method != FINITE_DIFFERENCE:
        hint = f"--method {FINITE_DIFFERENCE}"
    return NumericalError(f"{what} is not finite (NaN or inf)", hint)
