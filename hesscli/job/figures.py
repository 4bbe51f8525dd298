"""Figures by matplotlib, the extra `plot`: whether one may be drawn, |H|, a density, and how they are written."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hesscli.errors import UsageError
from hesscli.job.json_form import Document
from hesscli.job.results import PICTURES, replacing, writable
from hesscli.job.sizes import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hesscli.job.picture import Picture
    from hesscli.spectrum.density import Density

_MAP = "cividis"  # reads the same to the colour-blind
_SIDE = 6.4  # inches
_FONT, _SMALLEST = 7.5, 5.0  # points
_LEADING = 1.3 / 72  # inches from one label to the next, for each point of the font
_BINS = 120  # of a density
MATRICES = {
    "hessian": "Hessian",
    "ggn": "generalised Gauss-Newton matrix",
    "empirical_fisher": "empirical Fisher matrix",
}
"""What figures call a curvature."""


def drawable(path: Path, force: bool, inputs: Sequence[Path]) -> Path:
    """The file to draw a figure to, as of `writable`; that it cannot be drawn is better known before the work.

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


def plot_density(path: Path, document: Document, found: Density) -> None:
    """The share of eigenvalues per bin, on a logarithmic axis."""
    from matplotlib.figure import Figure

    edges, mass = found.histogram(_BINS)
    shown = mass > 0
    # Less than a tenth of an eigenvalue is rounding, or chance.
    smallest = max(mass[shown].min() if shown.any() else 1.0, 0.1 / max(1, document["size"]))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(edges[:-1][shown], mass[shown], np.diff(edges)[shown], align="edge", color="#3465a4")
    axes.set_yscale("log")
    axes.set_ylim(smallest / 2, 2)
    axes.set_xlabel(f"eigenvalue of the {MATRICES[document['curvature']]}")
    axes.set_ylabel(f"share of eigenvalues in a bin of {np.ptp(edges) / _BINS:.2g}")
    how = "exact"
    if not found.exact:
        how = f"{counted(found.probes, 'probe')}, {counted(document['steps'], 'step')}"
    axes.set_title(f"{document['size']} eigenvalues ({how})", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    _save(figure, path, 150)


def plot_matrix(path: Path, picture: Picture, title: str) -> None:
    """Draws the picture with the borders of its blocks, their names and a scale."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    rows, columns = picture.cells.shape
    wide = _SIDE + 2.9
    tall = max(1.2, 1.3 * _LEADING * _FONT * rows) if picture.diagonal else _SIDE
    high = tall + 1.5  # of the figure
    figure = Figure(figsize=(wide, high), layout=None)
    axes = figure.add_axes((0.35 / wide, 0.95 / high, _SIDE / wide, tall / high))
    low = picture.low if picture.low < picture.high else picture.high / 10
    image = axes.imshow(
        np.ma.masked_equal(picture.cells, 0),
        cmap=_MAP,
        norm=LogNorm(low or 1e-1, picture.high or 1.0, clip=True),
        extent=(0, columns, rows, 0),
        interpolation="nearest",
        aspect="auto",
    )
    axes.set_facecolor("white")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9, loc="left")
    for region in picture.regions[1:]:
        axes.axhline(region.start, color="0.1", linewidth=0.4)
        if not picture.diagonal:
            axes.axvline(region.start, color="0.1", linewidth=0.4)
    _names(axes, picture, rows, tall)
    bar = figure.add_axes((0.35 / wide, 0.62 / high, _SIDE / wide, 0.14 / high))
    darker = bool(((picture.cells > 0) & (picture.cells < low)).any())
    figure.colorbar(image, cax=bar, orientation="horizontal", extend="min" if darker else "neither")
    bar.tick_params(labelsize=_FONT)
    bar.set_xlabel("|H|, log scale; white is zero", fontsize=_FONT + 0.5)
    _save(figure, path, 200, bbox_inches="tight", pad_inches=0.2)


def _names(axes: Any, picture: Picture, rows: int, tall: float) -> None:
    """Names to the right of their rows, moved apart where they would overlap, with a line to each."""
    font = min(_FONT, max(_SMALLEST, tall / _LEADING / max(1, len(picture.regions))))
    room = int(tall / (_LEADING * font))
    regions = sorted(picture.regions, key=lambda p: p.start - p.stop)[:room]  # the largest that fit
    regions.sort(key=lambda region: region.start)
    centres = [(region.start + region.stop) / 2 for region in regions]
    places = spread(centres, _LEADING * font / tall * rows, rows)
    for region, centre, place in zip(regions, centres, places, strict=True):
        axes.annotate(
            region.name if len(region.name) <= 44 else f"{region.name[:20]}...{region.name[-20:]}",
            xy=(1, centre),
            xytext=(1.035, place),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            fontsize=font,
            va="center",
            parse_math=False,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": "0.45", "linewidth": 0.5, "shrinkA": 2, "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )  # fmt: skip
    left = len(picture.regions) - len(regions)
    if left:
        axes.annotate(
            f"and {left} smaller",
            xy=(1.035, -0.01),
            xycoords="axes fraction",
            fontsize=_FONT,
            va="top",
            annotation_clip=False,
        )


def spread(centres: Sequence[float], gap: float, end: float) -> list[float]:
    """Places between 0 and `end` in the same order, `gap` apart, each close to its centre."""
    places: list[float] = []
    for centre in centres:
        places.append(max(centre, places[-1] + gap if places else gap / 2))
    limit = end - gap / 2
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    return places


def _save(figure: Figure, path: Path, dots_per_inch: int, **cut: Any) -> None:
    """Writes a figure, whole or not at all; the same figure gives the same bytes."""
    from matplotlib import rc_context

    metadata: dict[str, dict[str, str | None]] = {  # the maker's name; no times
        ".png": {"Software": "hesscli"},
        ".svg": {"Creator": "hesscli", "Date": None},
        ".pdf": {"Creator": "hesscli", "CreationDate": None},
    }
    # The salt makes names inside the file, the same each time.
    with replacing(path) as temporary, rc_context({"svg.hashsalt": "hesscli"}):
        figure.savefig(temporary, dpi=dots_per_inch, metadata=metadata[path.suffix.lower()], **cut)
