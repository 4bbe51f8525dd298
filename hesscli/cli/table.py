"""Tables as lines of text: names are left-aligned, numbers right-aligned."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

GAP = "  "  # between two columns
_NARROWEST = 12  # a column of names is folded, but not to less than this

Row = Sequence[str]


def tables(
    columns: Row, rows: Sequence[Row], words: Sequence[int], screen: int | None
) -> Iterator[list[str]]:
    """The lines of a table, first the names of its columns; of several, where it is too wide for the screen.

    Args:
        words: which columns are left-aligned: the longest of them is folded before the table is taken apart.
        screen: how many columns a terminal has; None elsewhere.
    """
    from rich.cells import cell_len

    widths = [max(cell_len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    folded = max(words, key=lambda i: widths[i])
    parts = [list(range(len(columns)))]
    if screen is not None:
        room = screen - sum(widths) - len(GAP) * (len(columns) - 1)
        least = max(_NARROWEST, len(columns[folded]))
        widths[folded] = min(widths[folded], max(widths[folded] + room, least))
        parts = _parts(widths, screen)
    for part in parts:
        chosen = [widths[i] for i in part]
        left = [place for place, i in enumerate(part) if i in words]
        fold = part.index(folded) if folded in part else 0
        yield [
            line
            for row in (columns, *rows)
            for line in _lines([row[i] for i in part], chosen, left, fold)
        ]


def markdown_table(columns: Row, rows: Sequence[Row], words: Sequence[int]) -> Iterator[str]:
    """The lines of a table in Markdown; the first column of words is code."""
    rules = ["---" if i in words else "---:" for i in range(len(columns))]
    coded = [[code(c) if i == words[0] else c for i, c in enumerate(row)] for row in rows]
    for cells in (columns, rules, *coded):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def code(text: str) -> str:
    """Markdown that shows the text as it is: names come from files."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def _parts(widths: Sequence[int], screen: int) -> list[list[int]]:
    """The columns of each of the tables that fit the screen; all but the first begin with the first column again."""
    parts, used = [[0]], widths[0]
    for i in range(1, len(widths)):
        if used + len(GAP) + widths[i] > screen and len(parts[-1]) > 1:
            parts.append([0])
            used = widths[0]
        parts[-1].append(i)
        used += len(GAP) + widths[i]
    return parts


def _lines(row: Row, widths: Sequence[int], words: Sequence[int], folded: int) -> Iterator[str]:
    """One row of a table; more than one line where a cell is folded."""
    from rich.cells import cell_len, chop_cells

    pieces = chop_cells(row[folded], widths[folded]) or [""]
    for number, piece in enumerate(pieces):
        cells = list(row) if number == 0 else [""] * len(row)
        cells[folded] = piece
        for i, cell in enumerate(cells):
            space = " " * (widths[i] - cell_len(cell))
            cells[i] = cell + space if i in words else space + cell
        yield GAP.join(cells).rstrip()
