"""Pictures of a density, by matplotlib: the extra `plot`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hesscli.job.figures import save
from hesscli.job.json_form import Document
from hesscli.spectrum.density import Density

_BINS = 120


def plot_density(path: Path, document: Document, found: Density) -> None:
    """The share of eigenvalues per bin, on a logarithmic axis."""
    from matplotlib.figure import Figure

    edges, mass = found.histogram(_BINS)
    shown = mass > 0
    smallest = mass[shown].min() if shown.any() else 1.0
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(edges[:-1][shown], mass[shown], np.diff(edges)[shown], align="edge", color="#3465a4")
    axes.set_yscale("log")
    axes.set_ylim(smallest / 2, 2)
    axes.set_xlabel(f"eigenvalue of the {document['curvature'].replace('_', ' ')}")
    axes.set_ylabel("share of eigenvalues")
    how = "exact" if found.exact else f"{found.probes} probes, {document['steps']} steps"
    axes.set_title(f"{document['size']} eigenvalues ({how})", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    save(figure, path, 150)
