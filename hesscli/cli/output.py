"""Everything that is printed: data on stdout, talk on stderr. What a command prints of it is in the command's file.

Colour, bars and fitted widths are for terminals. Elsewhere tables have their natural width, so that
no number is ever cut, and nothing but text.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hesscli.job.json_form import without_infinities
from hesscli.job.sizes import size

if TYPE_CHECKING:
    from rich.progress import Progress

Document = Mapping[str, Any]

GAP = "  "  # between two columns
NARROWEST = 12  # a column of names is folded, but not to less than this
COLOURS = {"error": "1;31", "hint": "1;36", "note": "2", "wrote": "2", "header": "1"}


def say(kind: str, text: str) -> None:
    """One line of talk: `note:`, `wrote:`, `error:` or `hint:`. A closed pipe, or a full disk, stops nothing."""
    try:
        sys.stderr.write(f"{_coloured(f'{kind}:', kind, sys.stderr)} {_clean(text, sys.stderr)}\n")
        sys.stderr.flush()
    except OSError:
        silence(sys.stderr)


def silence(stream: IO[str]) -> None:
    """Drops what a stream still holds for a reader who has gone; else Python complains at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Output:
    """What one command prints. Also the job's listener."""

    def __init__(
        self,
        quiet: bool = False,
        json: bool = False,
        data_on_stdout: bool = False,
        markdown: bool = False,
    ) -> None:
        self.quiet = quiet
        self.as_json = json
        self.as_markdown = markdown
        self.stdout = sys.stdout
        self.stream: IO[str] = sys.stderr if data_on_stdout else sys.stdout
        self.bar: Progress | None = None
        self.timer: threading.Timer | None = None

    def __enter__(self) -> Output:
        sys.stdout = sys.stderr  # what a model or a loss prints is no result
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        sys.stdout = self.stdout
        self._stop_bar()
        self._flush()

    # Talk

    def note(self, text: str) -> None:
        if self.quiet:
            return
        if self.bar is not None and self.bar.live.is_started:
            line = f"note: {_clean(text, sys.stderr)}"
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            say("note", text)

    def progress(self, done: int, total: int, doing: str) -> None:
        """A bar, on a terminal, for work that lasts over a second."""
        if self.quiet or not sys.stderr.isatty():
            return
        if self.bar is None:
            self.bar = _bar(total)
            self.timer = threading.Timer(1, self.bar.start)
            self.timer.start()
        doing = _clean(doing, sys.stderr)
        self.bar.update(self.bar.task_ids[0], completed=done, total=total, description=doing)

    def wrote(self, path: Path, count: int | None = None) -> None:
        """Says what was written; of several files, with the bytes of all."""
        self._flush()  # the table comes first, also where both streams are one
        if not self.quiet:
            say("wrote", f"{path} ({size(path.stat().st_size if count is None else count)})")

    # Results

    def result(
        self, document: Document, as_text: Callable[[Output, Document], None] | None = None
    ) -> None:
        """Prints the JSON document where that is wanted, else the text of it; nothing of a text if quiet."""
        self._stop_bar()
        if self.as_json:
            self.line(json.dumps(without_infinities(document), indent=2, allow_nan=False))
        elif as_text is not None and not self.quiet:
            as_text(self, document)

    # The parts of a result

    def line(self, text: str) -> None:
        with self._for_a_reader():
            self.stream.write(text + "\n")

    def _flush(self) -> None:
        with self._for_a_reader():
            self.stream.flush()

    @contextmanager
    def _for_a_reader(self) -> Iterator[None]:
        """Who has gone stops nothing: what is to be written to files, or checked against bounds, still is."""
        try:
            yield
        except BrokenPipeError:
            silence(self.stream)

    def fitted(self, text: str, columns: int) -> str:
        """A name within so many columns, shortened in the middle if it must be."""
        text = _clean(text, self.stream)
        if len(text) <= columns:
            return text
        kept = columns - 2
        return f"{text[: kept - kept // 2]}..{text[len(text) - kept // 2 :]}"

    def facts(self, facts: Mapping[str, str], gap: bool = True) -> None:
        width = max(7, *map(len, facts))
        for name, text in facts.items():
            text = _clean(text, self.stream)
            if self.as_markdown:
                self.line(f"- {name}: {_code(text)}")
            else:
                self.line(f"{name:{width}}{GAP}{text}".rstrip())
        if gap:
            self.line("")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0, 1)
    ) -> None:
        """A table; the columns numbered in `words` are left-aligned, the others are numbers.

        Nothing is ever cut. In a terminal that is too narrow the longest column of words is folded, and what
        is too wide even so becomes several tables.
        """
        from rich.cells import cell_len

        rows = [[_clean(cell, self.stream) for cell in row] for row in rows]
        if self.as_markdown:
            self._markdown_table(columns, rows, words)
            return
        widths = [max(cell_len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
        folded = max(words, key=lambda i: widths[i])
        parts = [list(range(len(columns)))]
        if self.stream.isatty():
            screen = shutil.get_terminal_size().columns
            room = screen - sum(widths) - len(GAP) * (len(columns) - 1)
            least = max(NARROWEST, len(columns[folded]))
            widths[folded] = min(widths[folded], max(widths[folded] + room, least))
            parts = _parts(widths, screen)
        for number, part in enumerate(parts):
            if number:
                self.line("")
            chosen = [widths[i] for i in part]
            left = [place for place, i in enumerate(part) if i in words]
            fold = part.index(folded) if folded in part else 0
            (header,) = _lines([columns[i] for i in part], chosen, left, fold)
            self.line(_coloured(header, "header", self.stream))
            for row in rows:
                for line in _lines([row[i] for i in part], chosen, left, fold):
                    self.line(line)

    def _markdown_table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int]
    ) -> None:
        rules = ["---" if i in words else "---:" for i in range(len(columns))]
        coded = [[_code(c) if i == words[0] else c for i, c in enumerate(row)] for row in rows]
        for cells in (columns, rules, *coded):
            self.line(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")

    def _stop_bar(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer.join()
        if self.bar is not None and self.bar.live.is_started:
            self.bar.stop()
        self.bar = None


def _bar(total: int) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.percentage:>3.0f}%"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left  {task.description}", markup=False),
        # Room for the ^C that a terminal echoes: a line that it breaks is not erased.
        console=Console(file=sys.stderr, width=max(20, shutil.get_terminal_size().columns - 4)),
        transient=True,
    )
    bar.add_task("", total=total)
    return bar


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


def _lines(
    row: Sequence[str], widths: Sequence[int], words: Sequence[int], folded: int
) -> Iterator[str]:
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


def encodable(text: str, stream: IO[str]) -> bool:
    """Whether a stream can show the text."""
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _clean(text: str, stream: IO[str]) -> str:
    """Text that the stream can show, and that cannot steer a terminal: names come from files."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _code(text: str) -> str:
    """Markdown that shows the text as it is: names come from files."""
    if not text:
        return ""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def colour_wanted(stream: IO[str]) -> bool:
    """Whether a stream takes colours: a terminal does, and what `FORCE_COLOR` says; `NO_COLOR` comes first."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _coloured(text: str, kind: str, stream: IO[str]) -> str:
    return f"\033[{COLOURS[kind]}m{text}\033[0m" if colour_wanted(stream) else text
