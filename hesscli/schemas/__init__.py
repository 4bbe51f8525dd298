"""The JSON Schemas of what `--json` prints: `COMMAND.json` each, with the definitions of `common.json`."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

SAME = {"merge": "compute", "show": "compute"}
"""Commands that print the document of another one."""


def schema(command: str) -> dict[str, Any]:
    """The schema of a command's `--json` document."""
    found, common = _read(SAME.get(command, command)), _read("common")
    return found | {"$defs": common["$defs"] | found.get("$defs", {})}


def commands() -> list[str]:
    """The commands that have one."""
    names = {file.name.removesuffix(".json") for file in _FOLDER.iterdir() if ".json" in file.name}
    return sorted(names - {"common"} | set(SAME))


_FOLDER = files(__package__)


def _read(name: str) -> Any:
    return json.loads(_FOLDER.joinpath(f"{name}.json").read_text(encoding="utf-8"))
