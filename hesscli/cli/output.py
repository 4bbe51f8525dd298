"""Everything that is printed: data on stdout, talk on stderr. What a command prints of it is in the command's file.

Colour, bars and fitted widths are for terminals. Elsewhere tables have their natural width, so that
no number is ever cut, and nothing but text.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hesscli.cli.table import GAP, code, markdown_table, tables
from hesscli.cli.terminal import clean, coloured, encodable, silence
from hesscli.errors import UsageError
from hesscli.job.json_form import Document, without_infinities
from hesscli.job.options import Listener
from hesscli.job.sizes import size


def say(kind: str, text: str) -> None:
    """One line of talk: `note:`, `wrote:`, `error:` or `hint:`. A closed pipe, or a full disk, stops nothing."""
    try:
        sys.stderr.write(f"{coloured(f'{kind}:', kind, sys.stderr)} {clean(text, sys.stderr)}\n")
        sys.stderr.flush()
    except OSError:
        silence(sys.stderr)


class Output(Listener):
    """What one command prints. Also the job's listener."""

    def __init__(self, quiet: bool = False, json: bool = False) -> None:
        self.quiet = quiet
        self.as_json = json
        self.as_markdown = False
        self.stdout = sys.stdout
        self.stream: IO[str] = sys.stdout
        self.bar: Bar | None = None

    def __enter__(self) -> Output:
        sys.stdout = sys.stderr  # what a model or a loss prints is no result
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        sys.stdout = self.stdout
        self._stop_bar()
        self._flush()

    def leave_stdout(self) -> None:
        """Prints on stderr, as bytes go to stdout: to somebody, and to no terminal."""
        if self.stdout.isatty():
            raise UsageError("-: standard output is a terminal", "| hesscli eigen -")
        if getattr(self.stdout, "name", "") == os.devnull:
            raise UsageError("-: standard output is closed", "-o hessian.safetensors")
        self.stream = sys.stderr

    def use_markdown(self, wanted: bool) -> None:
        """Prints a result as Markdown, if that is wanted, and JSON is not."""
        if wanted and self.as_json:
            raise UsageError("--json and --md are two ways to print one result; take one of them")
        self.as_markdown = wanted

    # Talk

    def note(self, text: str) -> None:
        if self.quiet:
            return
        if self.bar is not None and self.bar.shown:
            self.bar.say(f"note: {clean(text, sys.stderr)}")
        else:
            say("note", text)

    def progress(self, done: int, total: int, doing: str) -> None:
        """A bar, on a terminal, for work that lasts over a second."""
        if self.quiet or not sys.stderr.isatty():
            return
        if self.bar is None:
            self.bar = Bar(total)
        self.bar.update(done, total, clean(doing, sys.stderr))

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
        text = clean(text, self.stream)
        if len(text) <= columns:
            return text
        kept = columns - 2
        return f"{text[: kept - kept // 2]}..{text[len(text) - kept // 2 :]}"

    def facts(self, facts: Mapping[str, str], gap: bool = True) -> None:
        width = max(7, *map(len, facts))
        for name, text in facts.items():
            text = clean(text, self.stream)
            if self.as_markdown:
                self.line(f"- {name}: {code(text)}")
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
        rows = [[clean(cell, self.stream) for cell in row] for row in rows]
        if self.as_markdown:
            for line in markdown_table(columns, rows, words):
                self.line(line)
            return
        screen = shutil.get_terminal_size().columns if self.stream.isatty() else None
        for number, (header, *lines) in enumerate(tables(columns, rows, words, screen)):
            if number:
                self.line("")
            self.line(coloured(header, "header", self.stream))
            for line in lines:
                self.line(line)

    def _stop_bar(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.bar = None


class Bar:
    """A bar on stderr, for work that lasts over a second."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.progress = Progress(
            TextColumn("{task.percentage:>3.0f}%"),
            *([BarColumn()] if encodable("\N{BOX DRAWINGS HEAVY HORIZONTAL}", sys.stderr) else []),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left  {task.description}", markup=False),
            # Room for the ^C that a terminal echoes: a line that it breaks is not erased.
            console=Console(file=sys.stderr, width=max(20, shutil.get_terminal_size().columns - 4)),
            transient=True,
        )
        self.task = self.progress.add_task("", total=total)
        self.timer = threading.Timer(1, self.progress.start)
        self.timer.start()

    @property
    def shown(self) -> bool:
        return self.progress.live.is_started

    def update(self, done: int, total: int, doing: str) -> None:
        self.progress.update(self.task, completed=done, total=total, description=doing)

    def say(self, line: str) -> None:
        """A line of talk above it."""
        self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self.timer.cancel()
        self.timer.join()
        if self.shown:
            self.progress.stop()
