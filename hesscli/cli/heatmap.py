"""|H| in a terminal: two cells in a character, in colour; where there is none, the shade of the larger."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from hesscli.cli.numbers import number
from hesscli.cli.output import Output
from hesscli.cli.terminal import colour_wanted, encodable

if TYPE_CHECKING:
    from hesscli.job.picture import Picture

# cividis, which reads the same to the colour-blind, in nine steps from low to high.
CIVIDIS = (
    (0, 34, 78), (26, 56, 111), (67, 78, 108), (97, 101, 111), (125, 124, 120),
    (155, 148, 118), (188, 174, 108), (222, 201, 88), (254, 232, 56),
)  # fmt: skip
OF_256 = (17, 60, 243, 102, 247, 144, 185, 227)  # the like in 256 colours: ever lighter
_SHADES = " \N{LIGHT SHADE}\N{MEDIUM SHADE}\N{DARK SHADE}\N{FULL BLOCK}"  # the first is zero
_ASCII = " .:-=+*#%@"
_UPPER, _LOWER = "\N{UPPER HALF BLOCK}", "\N{LOWER HALF BLOCK}"
_RESET = "\033[0m"
_LARGEST = 16  # how many columns one entry of a small matrix may take
_LEGEND = 24  # columns of the legend's scale
_MARGIN = 2  # between the picture and the names beside it

Colour = tuple[int, int, int]
Cells = Sequence[Sequence[float]]  # one row of them, or two


def room(out: Output) -> int:
    """How many cells a picture can have on this screen."""
    size = shutil.get_terminal_size()
    names = min(24, size.columns // 3)
    lines = max(24, size.lines - 10) if out.stream.isatty() else size.columns
    return max(8, min(size.columns - names - _MARGIN, 2 * lines))


def draw(out: Output, picture: Picture) -> None:
    """The picture, the names of its parts beside it, and the scale of its shades."""
    if not picture.high:
        out.line("every entry is zero")
        return
    paint = _painter(out)
    cells, starts = _cells(picture, room(out))
    beside = _beside([region.name for region in picture.regions], starts)
    names = max(8, shutil.get_terminal_size().columns - len(cells[0][0]) - _MARGIN)
    if out.as_markdown:
        out.line("\n```")
    for i, line in enumerate(map(paint, cells)):
        out.line(f"{line}{' ' * _MARGIN}{out.fitted(beside.get(i, ''), names)}".rstrip())
    out.line("")
    scale_shown = paint([[i / (_LEGEND - 1) for i in range(_LEGEND)]])
    out.line(f"{number(picture.low)} {scale_shown} {number(picture.high)}")
    out.line(_explained(picture))
    if out.as_markdown:
        out.line("```")


def _cells(picture: Picture, most: int) -> tuple[list[Cells], list[int]]:
    """The cells of each line, and the line at which each part of the picture begins.

    A diagonal has a line for each parameter. Of a matrix two rows share one, and a small one is drawn larger.
    """
    grid = picture.levels().tolist()
    if picture.diagonal:
        return [[row] for row in grid], list(range(len(grid)))
    scale = max(1, min(_LARGEST, most // len(grid)))
    grid = [[level for level in row for _ in range(scale)] for row in grid for _ in range(scale)]
    if len(grid) % 2:
        grid.append([math.nan] * len(grid[0]))
    starts = [int(region.start * scale) // 2 for region in picture.regions]
    return [grid[i : i + 2] for i in range(0, len(grid), 2)], starts


def _explained(picture: Picture) -> str:
    said = f"|H|{' of the diagonal' if picture.diagonal else ''}, log scale; blank is zero"
    if picture.diagonal:
        covered = picture.size > picture.cells.size
        return said + ("; a cell is the largest of the entries it covers" if covered else "")
    rows = picture.size / len(picture.cells)
    covers = f"; a cell is the largest of {rows:.3g} x {rows:.3g} entries"
    return said + (covers if rows > 1 else "")


def _beside(names: Sequence[str], starts: Sequence[int]) -> dict[int, str]:
    """What stands beside each line: the part that begins there, and how many more begin there too."""
    at: dict[int, list[str]] = {}
    for name, line in zip(names, starts, strict=True):
        at.setdefault(line, []).append(name)
    return {
        line: found[0] + (f" (+{len(found) - 1})" if len(found) > 1 else "")
        for line, found in at.items()
    }


def _in_colour(rows: Cells, true_colour: bool) -> str:
    """Two cells in a character: the upper one its foreground, the lower one its background."""
    text, before = [], ""
    for upper, lower in zip(rows[0], rows[-1], strict=True):
        if math.isnan(upper) and math.isnan(lower):
            code, character = _RESET, " "
        elif math.isnan(upper):
            code, character = _RESET + _code(38, lower, true_colour), _LOWER
        elif math.isnan(lower):
            code, character = _RESET + _code(38, upper, true_colour), _UPPER
        else:
            code = _code(38, upper, true_colour) + _code(48, lower, true_colour)
            character = _UPPER
        text.append(character if code == before else code + character)
        before = code
    return "".join(text) + _RESET


def _code(ground: int, level: float, true_colour: bool) -> str:
    if true_colour:
        red, green, blue = _cividis(level)
        return f"\033[{ground};2;{red};{green};{blue}m"
    return f"\033[{ground};5;{OF_256[min(len(OF_256) - 1, int(level * len(OF_256)))]}m"


def _in_shades(rows: Cells, shades: str) -> str:
    """A character for two cells: the shade of the larger."""
    text, steps = "", len(shades) - 1
    for levels in zip(*rows, strict=True):
        level = max((x for x in levels if not math.isnan(x)), default=None)
        text += shades[0 if level is None else 1 + min(steps - 1, int(level * steps))]
    return text


def _painter(out: Output) -> Callable[[Cells], str]:
    """A line of the picture from one row of cells, or from two."""
    blocks = encodable(_SHADES + _UPPER + _LOWER, out.stream)
    true_colour = os.environ.get("COLORTERM", "") in ("truecolor", "24bit")
    many = true_colour or "256color" in os.environ.get("TERM", "")
    if blocks and many and colour_wanted(out.stream) and not out.as_markdown:
        return partial(_in_colour, true_colour=true_colour)
    return partial(_in_shades, shades=_SHADES if blocks else _ASCII)


def _cividis(level: float) -> Colour:
    place = level * (len(CIVIDIS) - 1)
    i = min(int(place), len(CIVIDIS) - 2)
    low, high, part = CIVIDIS[i], CIVIDIS[i + 1], place - i
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return red, green, blue
