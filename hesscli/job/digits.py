"""What more digits may mend."""

from __future__ import annotations

import torch

from hesscli.errors import NumericalError


def more_digits(dtype: torch.dtype) -> str | None:
    """The option that takes more than this dtype has, if there is one."""
    return "--dtype float64" if dtype == torch.float32 else None


def not_finite(what: str, dtype: torch.dtype) -> NumericalError:
    """Differences would not do better: the loss may have no second derivative here."""
    return NumericalError(f"{what} is not finite (NaN or inf)", more_digits(dtype))
