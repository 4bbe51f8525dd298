"""What of an unfinished file is finished: a line per part, written after the part is safe on the disk.

Beside `.NAME.partial` lies `.NAME.journal`: first the command, then the finished parts. A run that was killed is
continued from there, and gives the same bytes as one that was not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hesscli.errors import FileError, UsageError
from hesscli.files.hessian_writer import HessianWriter, partial_path, sync_folder

SCHEMA = "hesscli.journal/1"
INTERVAL = 1.0
"""Seconds between two waits for the disk. What is finished in less is computed again after a crash."""

Facts = dict[str, Any]


def journal_path(path: Path) -> Path:
    """Where the journal of an unfinished file lies."""
    return path.with_name(f".{path.name}.journal")


class Journal:
    """The finished parts of one output file.

    Args:
        path: the output file; None keeps no journal.
        head: the command, as JSON: what must be the same for another run to go on.
        parts: how many parts there are.
    """

    def __init__(self, path: Path | None, head: Mapping[str, Any], parts: int) -> None:
        self.output = path
        self.path = None if path is None else journal_path(path)
        self.head = json.loads(json.dumps({"schema": SCHEMA, **head}))
        self.parts = parts
        self.start: int | None = None  # where the tensors of the unfinished file begin
        self.finished: dict[str, Facts] = {}
        self.waiting: dict[str, Facts] = {}
        self.last = time.monotonic()

    def resume(self, wanted: bool, force: bool) -> None:
        """Takes over what an earlier run left.

        Args:
            wanted: it is to be continued.
            force: it may be thrown away.

        Raises:
            UsageError: something was left, and neither is the case; or another command left it.
            FileError: what was left cannot be read.
        """
        if self.path is None or self.output is None or not self.path.exists():
            return
        if force and not wanted:
            self.remove()
            return
        head, finished = self._read(self.path)
        if not finished:
            self.remove()
            return
        if not wanted:
            raise UsageError(
                f"{self.output}: an interrupted run left {len(finished)} of {self.parts} parts "
                f"in {partial_path(self.output).name}; --force throws them away",
                "--resume",
            )
        different = [key for key in {**head, **self.head} if _differ(head, self.head, key)]
        if different:
            raise UsageError(
                f"{self.path}: another command began it: {', '.join(different)} differ",
                "--force",
            )
        if not partial_path(self.output).exists():
            raise FileError(
                f"{partial_path(self.output)}: is gone, only its journal is left", "--force"
            )
        self.finished = finished

    def _read(self, path: Path) -> tuple[Facts, dict[str, Facts]]:
        finished: dict[str, Facts] = {}
        head: Facts = {}
        try:
            lines = path.read_text().splitlines(keepends=True)
            for line in lines:
                if not line.endswith("\n"):
                    break  # the run ended in the middle of it
                facts = json.loads(line)
                if not head:
                    head = facts
                    self.start = head.pop("start")
                else:
                    finished[facts.pop("part")] = facts
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileError(f"{path}: cannot be read: {error}", "--force") from None
        return head, finished

    def add(self, part: str, facts: Facts, writer: HessianWriter) -> None:
        """Notes that a part was written; it is safe at the next wait for the disk."""
        self.waiting[part] = facts
        if time.monotonic() - self.last >= INTERVAL:
            self.flush(writer)

    def flush(self, writer: HessianWriter) -> None:
        """Waits for the disk, then writes the lines of what is on it."""
        if self.path is None or not self.waiting:
            return
        writer.sync()
        lines = []
        if not self.finished:
            lines.append({**self.head, "start": writer.start})
        lines += [{"part": part, **facts} for part, facts in self.waiting.items()]
        with self.path.open("a" if self.finished else "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        if not self.finished:
            sync_folder(self.path.parent)
        self.finished |= self.waiting
        self.waiting = {}
        self.last = time.monotonic()

    def remove(self) -> None:
        """Forgets everything: the file is finished, or not to be."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _differ(left: Facts, right: Facts, key: str) -> bool:
    return bool(left.get(key) != right.get(key))
