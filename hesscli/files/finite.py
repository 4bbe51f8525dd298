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
    rows = array if array.dim() else array.unsqueeze(0)
    step = max(1, _STEP * len(rows) // max(1, rows.numel()))
    count, where = 0, list[int]()
    for start in range(0, len(rows), step):
        bad = ~torch.isfinite(rows[start : start + step])
        found = int(bad.sum())
        if found and not count:
            row, *others = bad.nonzero()[0].tolist()
            where = [start + row, *others][: array.dim()]
        count += found
    if count:
        raise NumericalError(
            f"{path}: array {name} ({describe(array)}) holds NaN or infinity "
            f"in {count} place{'s' if count > 1 else ''}, the first at {where}",
            f"drop these samples, or replace the values: np.nan_to_num({name})",
        )
