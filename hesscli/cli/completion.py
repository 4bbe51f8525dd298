"""What the shell offers after TAB: names of blocks and parameters, read from the files named so far.

A completion never fails and never loads torch: what cannot be read is not offered.
"""

from __future__ import annotations

from pathlib import Path

import typer

from hesscli.job.names import blocks_in, parameters_in


def block_names(context: typer.Context, incomplete: str) -> list[str]:
    """The blocks of the Hessian file that the command names."""
    try:
        return _matching(blocks_in(Path(_first(context, "hessian.safetensors"))), incomplete)
    except Exception:  # whatever is wrong with the file
        return []


def parameter_names(context: typer.Context, incomplete: str) -> list[str]:
    """The parameters in the model file that the command names, if it holds weights by their names."""
    try:
        exclude = "!" * incomplete.startswith("!")
        known = parameters_in(Path(_first(context, "")))
        found = _matching(known, incomplete.removeprefix("!"))
        return [exclude + name for name in found]
    except Exception:  # whatever is wrong with the file
        return []


def _first(context: typer.Context, default: str) -> str:
    """The first file that the command names; typer leaves what is no option in `args` here."""
    return next((word for word in context.args if not word.startswith("-")), default)


def _matching(names: list[str], incomplete: str) -> list[str]:
    # Names come from files, and must not steer the terminal.
    return [name for name in names if name.startswith(incomplete) and name.isprintable()]
