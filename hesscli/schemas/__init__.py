"""The JSON Schemas of what `--json` prints: one file for each command, `COMMAND.json`."""

from __future__ import annotations

from importlib.resources import files

SAME = {"merge": "compute", "show": "compute"}
"""Commands that print the document of another one."""


def schema(command: str) -> str | None:
    """The schema of a command's `--json` document as text, or None if there is none."""
    file = files(__package__).joinpath(f"{SAME.get(command, command)}.json")
    return file.read_text(encoding="utf-8") if command in commands() else None


def commands() -> list[str]:
    """The commands that have one."""
    found = {file.name.removesuffix(".json") for file in files(__package__).iterdir()}
    return sorted({name for name in found if name.isidentifier()} - {"__init__"} | set(SAME))
