"""Reading `.csv` files: one array per column of numbers."""

from __future__ import annotations

import csv
import shlex
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from hesscli.errors import FileError
from hesscli.files.sniff import Kind
from hesscli.files.torch_files import reading
from hesscli.files.unusable import CODES, DECIMALS, NamedArrays, Unusable

_DELIMITERS = ",;\t"
_SPACES = " \t"
_EXACT = 2**53  # up to here every integer is a float64
_WORDS = {"true": 1.0, "false": 0.0, "": float("nan"), "na": float("nan"), "null": float("nan")}


def load_csv(path: Path | str) -> tuple[NamedArrays, tuple[str, ...]]:
    """The columns by name, or, in a column's place, why it cannot be used; and notes on what was inferred.

    Columns of a file without a line of names are called 0, 1, ... Integers that count up, as the names that
    pandas gives and as years do, are names: from 0 on always, others where not all below are integers. An empty
    field, `NA` and `null` are NaN, which is refused later, with its place.

    Raises:
        FileError: lines of different lengths, a name given twice, names alone, or no text.
    """
    with reading(path, Kind.TEXT), open(path, encoding="utf-8-sig", newline="") as file:
        line = file.readline()
        file.seek(0)
        delimiter = max(_DELIMITERS, key=line.count)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        lines = ((reader.line_num, fields) for fields in reader if fields)  # no empty lines
        first = [field.strip(_SPACES) for field in next(lines, (0, []))[1]]
        columns = [_Column() for _ in first]
        twice = [name for name, count in Counter(first).items() if count > 1]
        if twice and not _numbers(first):
            raise FileError(
                f"{path}: two columns are called {twice[0]!r}", "give them different names"
            )
        for number, fields in lines:
            if len(fields) != len(first):
                raise FileError(
                    f"{path}: line {number} has {len(fields)} fields, the first line has {len(first)}",
                    f"look at it: sed -n {number}p {shlex.quote(str(path))}",
                )
            for column, field in zip(columns, fields, strict=True):
                column.add(number, field.strip(_SPACES))
        if first[1:] and not _numbers(first) and not any(column.found for column in columns):
            raise FileError(
                f"{path}: a line of names of {len(first)} columns, and no samples",
                "a table wants a line of numbers for each sample: 0.5,1.2,3",
            )
    names, notes = _named(first, columns)
    return {name: column.finish() for name, column in zip(names, columns, strict=True)}, notes


def _named(first: list[str], columns: Sequence[_Column]) -> tuple[list[str], tuple[str, ...]]:
    """The columns' names, and a note on them. A first line that is a sample joins the columns."""
    if not _numbers(first):
        return first, ()
    index = first[:1] == [""]
    run = first[index:]
    years = _consecutive(run) and not all(column.integers for column in columns[index:])
    # As pandas calls columns without names; but a sample may well be 0, 1.
    if first == ["", "0"] or (len(first) > 2 and (years or run == _places(len(run)))):
        note = f"the first line, {run[0]} to {run[-1]}, is taken as the names of the columns"
        return first, (note,)
    for column, field in zip(columns, first, strict=True):
        column.put_first(field)
    names = _places(len(first))
    called = f"columns are called 0 to {names[-1]}" if names[1:] else "column is called 0"
    return names, (f"no line of names: the {called}",)


def _consecutive(fields: Sequence[str]) -> bool:
    """Whether they are integers, each one more than that before it, as years are."""
    if not all(field.isdecimal() for field in fields):
        return False
    return all(float(right) - float(left) == 1 for left, right in pairwise(fields))


def _places(count: int) -> list[str]:
    return [str(place) for place in range(count)]


class _Column:
    """A column while it is read: floats, as long as all of it are numbers."""

    def __init__(self) -> None:
        self.values = array("d")
        self.integers = self.booleans = True
        self.unusable: Unusable | None = None

    def add(self, line: int, field: str) -> None:
        if self.unusable:
            return
        value = _number(field)
        if value is None:
            where, words = f"{field[:20]!r} in line {line}", any(map(str.isalpha, field))
            self.unusable = Unusable(f"not numbers ({where})", CODES if words else "")
            if _number(field.replace(",", ".", 1)) is not None:
                self.unusable = Unusable(f"numbers with decimal commas ({where})", DECIMALS)
            self.integers = False
            return
        boolean = field.lower() in ("true", "false")
        self.booleans &= boolean
        self.integers &= field.lstrip("+-").isdecimal() and abs(value) <= _EXACT
        self.values.append(value)

    @property
    def found(self) -> bool:
        """Whether a line had this field."""
        return bool(self.values or self.unusable)

    def put_first(self, field: str) -> None:
        """Adds a number that comes before the others."""
        self.add(1, field)
        if not self.unusable:
            self.values.insert(0, self.values.pop())

    def finish(self) -> torch.Tensor | Unusable:
        if self.unusable:
            return self.unusable
        if not self.values:
            return Unusable("no values")
        found = torch.from_numpy(np.frombuffer(self.values, np.float64).copy())
        if self.booleans:
            return found.bool()
        return found.long() if self.integers else found


def _numbers(fields: Iterable[str]) -> bool:
    return all(_number(field) is not None for field in fields)


def _number(field: str) -> float | None:
    if field.lower() in _WORDS:
        return _WORDS[field.lower()]
    try:
        return float(field) if "_" not in field else None
    except ValueError:
        return None
