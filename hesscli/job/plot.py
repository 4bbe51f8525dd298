"""Pictures of a density, by matplotlib: the extra `plot`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from hesscli.errors import UsageError
from hesscli.job.writing import PICTURES
from hesscli.spectrum.density import Density

_BINS = 120


def check_plot(path: Path) -> None:
    """
    Raises:
        UsageError: the picture cannot be drawn, which is better known before the work than after it.
    """
    if path.suffix.lower() not in PICTURES:
        raise UsageError(
            f"{path}: a picture is {', '.join(PICTURES)}", f"--plot {path.with_suffix('.png')}"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"{path}: matplotlib is not installed", "pip install 'hesscli[plot]'")


def plot_density(path: Path, document: dict[str, Any], found: Density) -> None:
    """The share of eigenvalues per bin, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "hesscli"  # names inside the file, the same each time
    import matplotlib.pyplot as plt

    edges, mass = found.histogram(_BINS)
    shown = mass > 0
    smallest = mass[shown].min() if shown.any() else 1.0
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.bar(edges[:-1][shown], mass[shown], np.diff(edges)[shown], align="edge", color="#3465a4")
    axes.set_yscale("log")
    axes.set_ylim(smallest / 2, 2)
    axes.set_xlabel(f"eigenvalue of the {document['curvature'].replace('_', ' ')}")
    axes.set_ylabel("share of eigenvalues")
    how = "exact" if found.exact else f"{found.probes} probes, {document['steps']} steps"
    axes.set_title(f"{document['size']} eigenvalues ({how})", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    metadata: dict[str, dict[str, str | None]] = {  # the maker's name; no times
        ".png": {"Software": "hesscli"},
        ".svg": {"Creator": "hesscli", "Date": None},
        ".pdf": {"Creator": "hesscli", "CreationDate": None},
    }
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        figure.savefig(temporary, dpi=150, metadata=metadata[path.suffix.lower()])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)
