"""What the values of options say: numbers, sizes, ranges, factors and `K=V` pairs, from their text."""

from __future__ import annotations

import math
import re

import typer

from hesscli.job.options import EVERY, of_literal
from hesscli.job.sizes import parse_size


def key_values(pairs: list[str], option: str) -> dict[str, object]:
    """`K=V` pairs; V is a Python literal if it reads as one, else text."""
    found: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{pair!r} is not of the form K=V", param_hint=option)
        if key in found:
            raise typer.BadParameter(f"{key} is given twice", param_hint=option)
        found[key] = parse_value(text)
    return found


def finite(value: float | None) -> float | None:
    """A finite number, as typer reads it."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def digits(text: str) -> int | None:
    """The digits as a number; None where they are none, or more than any count has."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def sample_range(text: str) -> tuple[int, int | None]:
    """`N`, `A:B`, `A:` or `:B` as from, up to; up to None is up to the last."""
    first, _, last = text.rpartition(":")
    if text and all(digits(part or "0") is not None for part in (first, last)):
        return digits(first) or 0, digits(last)
    raise typer.BadParameter(f"{text!r} is not of the form N or A:B", param_hint="--samples")


def byte_count(text: str | None, option: str) -> int | None:
    """A size such as `5GB`, in bytes."""
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def shard_place(text: str | None) -> tuple[int, int] | None:
    """`I/N` as two numbers."""
    if text is None:
        return None
    number, count = map(digits, text.partition("/")[::2])
    if not number or not count or number > count:
        raise typer.BadParameter(f"{text!r} is not I/N with I from 1 to N", param_hint="--shard")
    return number, count


def factor(text: str) -> tuple[str, float]:
    """`FACTOR` or `KEY=FACTOR`, a number or a fraction, as the input's name and the number."""
    key, _, number = text.rpartition("=")
    above, slash, below = number.replace(" ", "").partition("/")
    try:
        divisor = float(below if slash else 1)
        value = float(above) / divisor
    except (ValueError, ZeroDivisionError):
        value = divisor = math.nan
    if not (math.isfinite(value) and math.isfinite(divisor)):
        raise typer.BadParameter(
            f"{number!r} is not a number or a fraction like 1/255", param_hint="--scale"
        )
    return key or EVERY, value


def factors(texts: list[str]) -> dict[str, float]:
    """The factor of each input."""
    found = dict(map(factor, texts))
    if len(found) < len(texts):
        raise typer.BadParameter("an input has one factor", param_hint="--scale")
    return found


def parse_value(text: str) -> object:
    """The V of `K=V` as a Python literal; as it stands when it is none, so no quotes are needed."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return of_literal(text)
