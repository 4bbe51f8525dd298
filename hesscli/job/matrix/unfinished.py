"""A result that is being computed: the file, and beside it the journal of what of it is finished."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

from hesscli.errors import HesscliError, InterruptedRun, ResourceError, is_out_of_memory
from hesscli.files.hessians.result_writer import ResultWriter
from hesscli.job.json_form import Document
from hesscli.job.matrix.journal import Journal
from hesscli.job.options import Listener

INTERVAL = 1.0
"""Seconds between two waits for the disk. What is finished in less is computed again after a crash."""


@dataclass
class Unfinished:
    """A file and its journal, until `commit`. An error leaves both behind where it makes sense to go on later."""

    writer: ResultWriter  # of the file
    journal: Journal  # of its parts
    parts: int  # how many there are
    others: bool  # other processes have journals of the file too, which stay
    listener: Listener  # hears what is kept

    def __post_init__(self) -> None:
        self.waiting: dict[str, Document] = {}
        self.last = time.monotonic()
        self.journal.start = self.writer.start

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if error is not None and not self.writer.committed:
                self._leave(error)
        finally:
            self.writer.__exit__(kind, error, traceback)

    @property
    def finished(self) -> dict[str, Document]:
        """The facts of each part that is in the file already."""
        return self.journal.finished

    def add(self, part: str, facts: Document) -> None:
        """Notes that a part was written; it is safe at the next wait for the disk."""
        self.waiting[part] = facts
        if time.monotonic() - self.last >= INTERVAL:
            self.flush()

    def flush(self) -> None:
        """Waits for the disk, then notes in the journal what is on it."""
        if self.journal.path is not None and self.waiting:
            self.writer.sync()
            self.journal.append(self.waiting)
            self.waiting = {}
            self.last = time.monotonic()

    def commit(self, document: Document) -> dict[str, Any]:
        """Gives the file its name, and forgets the journal; returns the checksums that joined the document."""
        sums = self.writer.commit(document)
        self.journal.remove()
        return sums

    def _leave(self, error: BaseException) -> None:
        """Keeps what is finished, where it makes sense to go on later, and raises an error that says how much."""
        out_of_room = isinstance(error, ResourceError) or is_out_of_memory(error)
        if not out_of_room and not isinstance(error, (KeyboardInterrupt, SystemExit)):
            if not self.others:
                self.journal.remove()
            return
        with contextlib.suppress(HesscliError, OSError):
            self.flush()
        if not self.finished or self.journal.output is None:
            return
        self.writer.keep()
        kept = f"{len(self.finished)} of {self.parts} parts are kept"
        if isinstance(error, KeyboardInterrupt):
            raise InterruptedRun(f"interrupted; {kept}", "--resume") from None
        if out_of_room:
            said = getattr(error, "message", "out of memory")
            raise ResourceError(f"{said}; {kept}", "--resume") from None
        self.listener.note(f"terminated; {kept}, and --resume goes on with them")
