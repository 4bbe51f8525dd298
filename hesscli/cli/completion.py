"""What the shell offers after TAB: names of blocks and parameters, read from the files named so far.

A completion never fails and never loads torch: what cannot be read is not offered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

import typer

from hesscli.job.metadata import header, hessian_metadata

_LONGEST = 1 << 24  # bytes of a pickle that are read
_NOT_NAMES = ("storage", "cpu", "_metadata", "version")  # strings of every torch file


def block_names(context: typer.Context, incomplete: str) -> list[str]:
    """The blocks of the Hessian file that the command names."""
    try:
        metadata = hessian_metadata(Path(_first(context, "hessian.safetensors")))
        blocks = json.loads(metadata["hesscli"])["blocks"]
        return _matching([block["name"] for block in blocks], incomplete)
    except Exception:  # whatever is wrong with the file
        return []


def parameter_names(context: typer.Context, incomplete: str) -> list[str]:
    """The parameters in the model file that the command names, if it holds weights by their names."""
    try:
        model = Path(_first(context, ""))
        exclude = "!" * incomplete.startswith("!")
        found = _matching(_weights(model), incomplete.removeprefix("!"))
        return [exclude + name for name in found]
    except Exception:  # whatever is wrong with the file
        return []


def _first(context: typer.Context, default: str) -> str:
    """The first file that the command names; typer leaves what is no option in `args` here."""
    return next((word for word in context.args if not word.startswith("-")), default)


def _matching(names: list[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _weights(model: Path) -> list[str]:
    import zipfile

    if not zipfile.is_zipfile(model):
        return [name for name in header(model) if name != "__metadata__"]
    with zipfile.ZipFile(model) as archive:
        (pickle,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        with archive.open(pickle) as file:
            return _strings(file)


def _strings(pickle: IO[bytes]) -> list[str]:
    """The text in a pickle that may name weights; nothing in it is run."""
    import pickletools

    names: dict[str, None] = {}
    for opcode, argument, _ in pickletools.genops(pickle.read(_LONGEST)):
        if opcode.name in ("BINUNICODE", "SHORT_BINUNICODE"):
            text = str(argument)
            if text not in _NOT_NAMES and not text.isdigit() and ":" not in text:
                names[text] = None
    return list(names)
