"""Arrays that hold NaN or infinity."""

from __future__ import annotations

from pathlib import Path

import torch

from hesscli.errors import NumericalError
from hesscli.files.arrays import describe

_STEP = 1 << 24  # numbers looked at together


def check_finite(path: Path, name: str, array: torch.Tensor) -> None:
    """Looks at the array in parts, so that one larger than the memory passes through it.

    Raises:
        NumericalError: it holds NaN or infinity.
    """
    if not (array.is_floating_point() or array.is_complex()):
        return
    count, where = 0, None
    parts = (
        array.split(max(1, _STEP * len(array) // max(1, array.numel()))) if array.dim() else [array]
    )
    start = 0
    for part in parts:
        bad = ~torch.isfinite(part)
        found = int(bad.sum())
        if found and where is None:
            where = bad.nonzero()[0].tolist()
            if where:
                where[0] += start
        count += found
        start += len(part) if part.dim() else 0
    if count:
        raise NumericalError(
            f"{path}: array {name} ({describe(array)}) holds NaN or infinity "
            f"in {count} place{'s' if count > 1 else ''}, the first at {where}",
            f"drop these samples, or replace the values: np.nan_to_num({name})",
        )
