"""Everything that is printed: data on stdout, talk on stderr.

Colour, bars and fitted widths are for terminals. Elsewhere tables have their natural width, so that no number is
ever cut, and nothing but text.
"""

from __future__ import annotations

import json as json_library
import math
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Document = Mapping[str, Any]


def say(kind: str, text: str) -> None:
    """One line of talk: `note:`, `error:` or `hint:`."""
    sys.stderr.write(f"{kind}: {_encodable(_visible(text), sys.stderr)}\n")
    sys.stderr.flush()


class Output:
    """What one command prints. Also the job's listener."""

    def __init__(
        self, quiet: bool = False, json: bool = False, data_on_stdout: bool = False
    ) -> None:
        self.quiet = quiet
        self.as_json = json
        self.stream: IO[str] = sys.stderr if data_on_stdout else sys.stdout
        self.bar: Progress | None = None
        self.started = time.monotonic()

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop_bar()

    # Talk

    def note(self, text: str) -> None:
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.console.print(f"note: {text}", markup=False, highlight=False)
        else:
            say("note", text)

    def progress(self, done: int, total: int, doing: str) -> None:
        """A bar, on a terminal, for work that has lasted over a second."""
        if self.quiet or not sys.stderr.isatty() or time.monotonic() - self.started < 1:
            return
        if self.bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("{task.percentage:>3.0f}%"),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
                console=Console(file=sys.stderr),
                transient=True,
            )
            self.bar.start()
            self.bar.add_task("", total=total)
        self.bar.update(self.bar.task_ids[0], completed=done, total=total, description=doing)

    def wrote(self, path: str, count: int) -> None:
        if not self.quiet:
            say("wrote", f"{path} ({size(count)})")

    # Results

    def json(self, document: Document) -> None:
        text = json_library.dumps(_finite(document), indent=2, allow_nan=False)
        self.stream.write(text + "\n")
        self.stream.flush()

    def hessian(self, document: Document) -> None:
        """The summary of a Hessian."""
        self._stop_bar()
        if self.as_json:
            return self.json(document)
        if self.quiet:
            return None
        for line in _headline(document):
            self._line(line)
        rows = [_row(facts) for facts in document["blocks"]]
        if len(rows) > 1:
            total = _row({"name": "total", "shape": [], **document["total"]})
            total[4] = _bound(">=", total[4])
            total[5] = _bound("<=", total[5])
            rows.append(total)
        return self._table(
            ["block", "shape", "size", "trace", "eig_max", "eig_min", "fro_norm", "bytes"], rows
        )

    def plan(self, document: Document) -> None:
        """What a command would take."""
        if self.as_json:
            return self.json(document)
        if self.quiet:
            return None
        for line in _headline(document):
            self._line(line)
        rows = [
            [facts["name"], _shape(facts["shape"]), f"{facts['size']}", facts["plan"], f"{facts['bytes']}"]
            for facts in document["blocks"]
        ]
        total = document["total"]
        rows.append(["total", "", f"{total['size']}", "", f"{total['bytes']}"])
        self._table(["block", "shape", "size", "method", "bytes"], rows, text=(0, 1, 3))
        return self._line(
            f"would take about {seconds(total['estimated_seconds'])}, "
            f"{size(total['memory'])} of memory, {size(total['bytes'])} of disk; nothing was computed"
        )

    def eigenpairs(self, document: Document) -> None:
        self._stop_bar()
        if self.as_json:
            return self.json(document)
        if self.quiet:
            return None
        n = document["size"]
        matrix = f"block {document['block']}" if document["block"] else document["structure"]
        self._line(f"{document['hessian']}: {document['which']} eigenvalues of {matrix}, {n} x {n}")
        rows = [
            [f"{index}", f"{value:.6g}", f"{residual:.1e}", block]
            for index, (value, residual, block) in enumerate(
                zip(
                    document["eigenvalues"], document["residuals"], document["blocks"], strict=True
                ),
                1,
            )
        ]
        return self._table(["#", "eigenvalue", "residual", "block"], rows, text=(3,))

    def _line(self, text: str) -> None:
        self.stream.write(_encodable(_visible(text), self.stream) + "\n")

    def _table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = (0, 1)
    ) -> None:
        """A table; the columns numbered in `text` are left-aligned and may wrap, the others are numbers."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for index, name in enumerate(columns):
            if index in text:
                table.add_column(name, justify="left", overflow="fold", no_wrap=index != 0)
            else:
                table.add_column(name, justify="right", no_wrap=True, overflow="ignore")
        for row in rows:
            table.add_row(*(_cell(cell, self.stream) for cell in row))
        console = _console(self.stream)
        natural = console.measure(table, options=console.options.update(max_width=10_000)).maximum
        if not console.is_terminal:
            console.width = natural
        console.print(table, crop=False)

    def _stop_bar(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _console(stream: IO[str]) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False, emoji=False)


def _cell(text: str, stream: IO[str]) -> Any:
    from rich.text import Text

    return Text(_encodable(_visible(text), stream))


def _headline(document: Document) -> list[str]:
    loss, data = document["loss"], document["data"]
    first = f"{document['model']['path']} x {data['path']}"
    second = [
        document["structure"],
        f"{loss['name']} ({loss['reduction']}, N = {data['samples']}) = {number(loss['value'])}",
    ]
    third = [f"{document['dtype']} on {document['device']}"]
    if "gradient_norm" in document:
        second.append(f"gradient norm {number(document['gradient_norm'])}")
        third.append(document["method"])
        check = document["check"]
        third.append(f"check error {check['relative_error']:.1e}" if check else "not checked")
        if document["symmetry_error"] is not None:
            third.append(f"symmetry error {document['symmetry_error']:.1e}")
        if "seconds" in document:
            third.append(seconds(document["seconds"]))
    return [first, ", ".join(second), ", ".join(third)]


def _row(facts: Document) -> list[str]:
    return [
        facts["name"],
        _shape(facts["shape"]),
        f"{facts['size']}",
        *(number(facts[key]) for key in ("trace", "eig_max", "eig_min", "fro_norm")),
        f"{facts['bytes']}",
    ]


def _shape(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape)


def _bound(sign: str, text: str) -> str:
    return text if text == "-" else f"{sign}{text}"


def number(value: float | None) -> str:
    """Three digits; `-` for what was not computed."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3g}"


def seconds(value: float) -> str:
    if value < 120:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    if value < 7200:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h"


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _visible(text: str) -> str:
    """Control characters, from a file's names say, must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _encodable(text: str, stream: IO[str]) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
