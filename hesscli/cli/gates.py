"""Bounds that make a command fail: what is written is written all the same, then it exits with 1."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import typer

from hesscli.errors import CheckError, UsageError


def _bound(value: float | None) -> float | None:
    """A bound as typer reads it; NaN, which nothing would ever break, is none."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is not a bound")
    return value


def bound(help: str) -> Any:
    """An option that is a bound."""
    return typer.Option(metavar="X", callback=_bound, help=help)


def gate(
    values: Iterable[tuple[str, float | None]],
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Checks named values, as of "eig_max of fc1.weight", against the bounds that were given; one that is not known
    breaks every bound. The last thing that a command does.
    """
    if above is None and below is None:
        return
    broken = []
    for name, value in values:
        if value is None or math.isnan(value):
            raise CheckError(f"{name} is not known, so no bound can be checked")
        if above is not None and value > above:
            broken.append((value - above, f"{name} is {value:.6g}, above --fail-above {above:g}"))
        if below is not None and value < below:
            broken.append((below - value, f"{name} is {value:.6g}, below --fail-below {below:g}"))
    if broken:
        raise CheckError(max(broken)[1])


def refuse_unseen_end(which: str, top: int, above: float | None, below: float | None) -> None:
    """Refuses a bound on the end of the spectrum that is left out: it would never be broken. Of one eigenvalue, `both`
    is the largest.
    """
    for given, option, end in (
        (above, "--fail-above", "largest"),
        (below, "--fail-below", "smallest"),
    ):
        if given is not None and which not in (end, "both"):
            raise UsageError(
                f"{option} bounds the {end} eigenvalue, and --which {which} need not find it",
                f"--which {end if above is None or below is None else 'both'}",
            )
    if below is not None and which == "both" and top < 2:
        raise UsageError(
            "--fail-below bounds the smallest eigenvalue, and --top 1 finds the largest alone",
            "--top 2",
        )
