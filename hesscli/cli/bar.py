"""How far the work has come, as a bar."""

from __future__ import annotations

import shutil
import sys
import threading


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
            BarColumn(),
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
