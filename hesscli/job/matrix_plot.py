"""|H| as a figure, by matplotlib (extra `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hesscli.job.figures import save

if TYPE_CHECKING:
    from hesscli.job.picture import Picture

MAP = "cividis"  # reads the same to the colour-blind
SIDE = 6.4  # inches
FONT, SMALLEST = 7.5, 5.0  # points
LEADING = 1.3 / 72  # inches from one label to the next, for each point of the font


def plot_matrix(path: Path, picture: Picture, title: str) -> None:
    """Draws the picture with the borders of its blocks, their names and a scale."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from numpy import ma

    rows, columns = picture.cells.shape
    wide = SIDE + 2.9
    tall = max(1.2, 1.3 * LEADING * FONT * rows) if picture.diagonal else SIDE
    figure = Figure(figsize=(wide, tall + 1.5), layout=None)
    axes = figure.add_axes((0.35 / wide, 0.95 / (tall + 1.5), SIDE / wide, tall / (tall + 1.5)))
    low = picture.low if picture.low < picture.high else picture.high / 10
    image = axes.imshow(
        ma.masked_equal(picture.cells, 0),
        cmap=MAP,
        norm=LogNorm(low or 1e-1, picture.high or 1.0, clip=True),
        extent=(0, columns, rows, 0),
        interpolation="nearest",
        aspect="auto",
    )
    axes.set_facecolor("white")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9, loc="left")
    _borders(axes, picture)
    _names(axes, picture, rows, tall)
    bar = figure.add_axes((0.35 / wide, 0.62 / (tall + 1.5), SIDE / wide, 0.14 / (tall + 1.5)))
    figure.colorbar(image, cax=bar, orientation="horizontal")
    bar.tick_params(labelsize=FONT)
    bar.set_xlabel("|H|; white is zero", fontsize=FONT + 0.5)
    save(figure, path, 200)


def _borders(axes: Any, picture: Picture) -> None:
    style = {"color": "0.1", "linewidth": 0.4}
    for region in picture.regions[1:]:
        axes.axhline(region.start, **style)
        if not picture.diagonal:
            axes.axvline(region.start, **style)


def _names(axes: Any, picture: Picture, rows: int, tall: float) -> None:
    """Names to the right of their rows, moved apart where they would overlap, with a line to each."""
    font = min(FONT, max(SMALLEST, tall / LEADING / len(picture.regions)))
    room = int(tall / (LEADING * font))
    regions = sorted(picture.regions, key=lambda p: p.start - p.stop)[:room]  # the largest that fit
    regions.sort(key=lambda region: region.start)
    centres = [(region.start + region.stop) / 2 for region in regions]
    places = spread(centres, LEADING * font / tall * rows, rows)
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
            fontsize=FONT,
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
