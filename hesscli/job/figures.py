"""Figures by matplotlib, the extra `plot`: whether one may be drawn, and how it is written."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hesscli.errors import UsageError
from hesscli.job.results import replacing
from hesscli.job.writing import PICTURES, writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def drawable(path: Path, force: bool, inputs: Sequence[Path]) -> Path:
    """Refuses a figure that cannot be drawn, which is better known before the work than after it.

    Returns:
        the file to draw it to, as of `writable`.

    Raises:
        UsageError: a format that there is not, a file that hesscli did not draw, or no matplotlib.
    """
    if path.suffix.lower() not in PICTURES:
        better = path.with_suffix(".png") if path.name else path / "figure.png"
        raise UsageError(
            f"{path}: a picture is {', '.join(PICTURES)}",
            f"--plot {shlex.quote(str(better))}",
        )
    file = writable(path, force, inputs, "--plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"{path}: matplotlib is not installed", "pip install 'hesscli[plot]'")
    return file


def save(figure: Figure, path: Path, dots_per_inch: int) -> None:
    """Writes a figure, whole or not at all; the same figure gives the same bytes."""
    from matplotlib import rc_context

    metadata: dict[str, dict[str, str | None]] = {  # the maker's name; no times
        ".png": {"Software": "hesscli"},
        ".svg": {"Creator": "hesscli", "Date": None},
        ".pdf": {"Creator": "hesscli", "CreationDate": None},
    }
    # The salt makes names inside the file, the same each time.
    with replacing(path) as temporary, rc_context({"svg.hashsalt": "hesscli"}):
        figure.savefig(temporary, dpi=dots_per_inch, metadata=metadata[path.suffix.lower()])
