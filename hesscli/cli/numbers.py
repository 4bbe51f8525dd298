"""Numbers as they are printed."""

from __future__ import annotations

import math


def number(value: float | None) -> str:
    """Three digits; `-` for what was not computed."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3g}"


def error(value: float | None) -> str:
    """The size of an error."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.1e}" if value else "0"


def seconds(value: float) -> str:
    if value < 120:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    if value < 7200:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h"
