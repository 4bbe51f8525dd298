"""What of an unfinished file is finished: a line per part, written after the part is safe on the disk.

Beside `.NAME.partial` lies `.NAME.journal`: first the command, then the finished parts. A run that was killed is
continued from there, and gives the same bytes as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hesscli.errors import FileError, HesscliError, ResourceError, UsageError
from hesscli.files.hessians.result_names import journal_path, journals, partial_path
from hesscli.files.hessians.tensor_file import sync_folder
from hesscli.job.json_form import Document

SCHEMA = "hesscli.journal/2"
_SUMS = {"document.loss.value", "document.loss.denominator", "document.gradient_norm"}
_ROUNDING = 1e-5  # of these, in float32, relative


@dataclass
class Journal:
    """The finished parts of one output file."""

    output: Path | None  # the file; None keeps no journal
    head: Mapping[str, Any]  # the command: what must be the same for another run to go on
    command: Mapping[str, Any]  # all its options, as JSON, for `merge`
    writer: str = ""  # who writes it, where several processes share the file

    def __post_init__(self) -> None:
        self.path = self.output and journal_path(self.output, self.writer)
        self.head = json.loads(json.dumps(self.head, default=str))
        self.start: int | None = None  # where the tensors of the unfinished file begin
        self.finished: dict[str, Document] = {}
        self.own = 0  # parts in its own file; there is none before the first
        # Others have their own: what they have finished is no left-over.
        self.shared = self.writer != ""

    def resume(self, wanted: bool, force: bool) -> None:
        """Takes over what earlier runs, or the other shards, have finished.

        Args:
            force: what is left may be thrown away; with `wanted`, only where it cannot be continued.

        Raises:
            UsageError: something was left, and neither is the case; or another command left it.
            FileError: what was left cannot be read.
        """
        if self.path is None or self.output is None:
            return
        partial = partial_path(self.output)
        if not partial.exists():
            self.remove()  # of a file that was finished just before the end, or that somebody removed
        if force and not wanted:
            for path in [self.path] if self.shared else journals(self.output):
                path.unlink(missing_ok=True)
        for path in journals(self.output):
            try:
                self._take_over(path, "--force throws away what is finished", "--force")
            except HesscliError:
                if not force:
                    raise
                path.unlink(missing_ok=True)
        left = self.own or (0 if self.shared else len(self.finished))
        if left and not wanted:
            finished = f"{left} finished part{'s' if left > 1 else ''}"
            raise UsageError(
                f"{self.output}: an interrupted run left {finished} in {partial.name}; "
                "--force throws away what is finished",
                "--resume",
            )

    def merge(self) -> None:
        """Takes over what the shards have finished.

        Raises:
            UsageError: the file that it is in is gone, or model or data have changed since.
            FileError: what a shard left cannot be read.
        """
        if self.path is None or self.output is None:
            return
        partial = partial_path(self.output)
        if not partial.exists():
            raise UsageError(f"{partial}: no such file; what the shards computed was in it")
        for path in journals(self.output):
            again = f"to compute them again: rm {shlex.quote(str(path))}"
            self._take_over(path, "model and data must be as they were", again)

    def _take_over(self, path: Path, advice: str, hint: str) -> None:
        """Takes over a journal."""
        lines = read_journal(path)
        if lines.finished and lines.head is not None:
            if differ := _differences(self.head, lines.head):
                raise UsageError(
                    f"{path}: another command began it: {differ} differ; {advice}", hint
                )
            self.start = lines.start
            self.finished |= lines.finished
        if path == self.path:
            self.own = len(lines.finished)

    def join(self, start: int, finished: Mapping[str, Document]) -> None:
        """Takes over what the first of several processes knows, and goes on with this one's own file."""
        self.start, self.finished = start, dict(finished)
        if self.path is not None and self.path.exists():
            self.own = len(read_journal(self.path).finished)

    def gather(self) -> None:
        """Takes over what other processes have finished in the meantime."""
        if self.output is not None:
            for path in journals(self.output):
                self.finished |= read_journal(path).finished

    def append(self, parts: Mapping[str, Document]) -> None:
        """Writes the lines of parts that are on the disk."""
        assert self.path is not None
        lines: list[Document] = []
        if not self.own:
            head = {"schema": SCHEMA, "start": self.start, "command": self.command}
            lines.append(head | {"head": self.head})
        lines += [{"part": part, **facts} for part, facts in parts.items()]
        try:
            if self.own:
                whole = self.path.read_bytes().rfind(b"\n") + 1
                os.truncate(self.path, whole)  # without a last line that was torn
            with self.path.open("a" if self.own else "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if not self.own:
                self.path.unlink(missing_ok=True)
            raise ResourceError(f"{self.path}: {error.strerror}") from error
        if not self.own:
            sync_folder(self.path.parent)
        self.own += len(parts)
        self.finished |= parts

    def remove(self) -> None:
        """Forgets everything: the file is finished, or not to be."""
        if self.output is not None:
            for path in journals(self.output):
                path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Lines:
    """What a journal says; no head where the run ended before it was written."""

    head: Document | None
    command: Document
    start: int
    finished: dict[str, Document]


def read_journal(path: Path) -> Lines:
    """Reads a journal, but for a last line that was torn; FileError where it is none."""
    try:
        lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
        if not lines:
            return Lines(None, {}, 0, {})
        first, *others = (json.loads(line) for line in lines)
        if first["schema"] != SCHEMA:
            raise ValueError(f"it is of the format {first['schema']}, this hesscli reads {SCHEMA}")
        finished = {facts.pop("part"): facts for facts in others}
        return Lines(first["head"], first["command"], first["start"], finished)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(
            f"{path}: cannot be read: {error}", f"rm {shlex.quote(str(path))}"
        ) from None


def _differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> str:
    """The names of what is not the same, but for rounding: another number of threads adds up in another order."""
    found = []
    for key in {**left, **right}:
        mine, its, name = left.get(key), right.get(key), f"{prefix}{key}"
        if isinstance(mine, dict) and isinstance(its, dict):
            found += [inner for inner in [_differences(mine, its, f"{name}.")] if inner]
        elif name in _SUMS and isinstance(mine, float) and isinstance(its, float):
            found += [] if math.isclose(mine, its, rel_tol=_ROUNDING) else [name]
        elif mine != its:
            found.append(name)
    return ", ".join(found)
