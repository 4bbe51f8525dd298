"""Reading `.csv` files: one array per column of numbers."""

from __future__ import annotations

import csv
import os
import shlex
from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from hesscli.errors import FileError, HesscliError
from hesscli.files.torch_files import reading
from hesscli.files.unusable import CODES, Unusable

_DELIMITERS = ",;\t"
_SPACES = " \t"
_EXACT = 2**53  # up to here every integer is a float64
_WORDS = {"true": 1.0, "false": 0.0, "": float("nan"), "na": float("nan"), "null": float("nan")}


def load_csv(
    path: str | os.PathLike[str],
) -> tuple[dict[str, torch.Tensor | Unusable], tuple[str, ...]]:
    """The columns by name; or, in a column's place, why it cannot be used.

    Columns of a file without a line of names are called 0, 1, ... An empty field, `NA` and `null`
    are NaN, which is refused later, with its place.

    Returns:
        the columns, and notes on what was inferred.

    Raises:
        FileError: lines of different lengths, a name given twice, or no text.
    """
    with reading(path, "text"), open(path, encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        delimiter = max(_DELIMITERS, key=first.count)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        lines = ((reader.line_num, fields) for fields in reader if fields)  # no empty lines
        number, fields = next(lines, (0, []))
        names = [field.strip(_SPACES) for field in fields]
        columns = [_Column() for _ in names]
        notes = []
        if _counted(names):
            notes.append(f"the first line, 0 to {names[-1]}, is taken as the names of the columns")
        elif all(_number(field) is not None for field in names):
            for column, field in zip(columns, names, strict=True):
                column.add(number, field)
            names = _places(len(names))
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise FileError(f"{path}: two columns are called {twice[0]!r}", "name them apart")
        for number, fields in lines:
            if len(fields) != len(names):
                raise _ragged(path, number, len(fields), len(names))
            for column, field in zip(columns, fields, strict=True):
                column.add(number, field.strip(_SPACES))
    found = {name: column.finish() for name, column in zip(names, columns, strict=True)}
    return found, tuple(notes)


def _counted(fields: Sequence[str]) -> bool:
    """Whether they are the names that pandas gives to columns without any: 0, 1, 2, ..., after an index maybe.

    A sample may well be 0, 1.
    """
    if fields[:1] == [""]:
        return len(fields) > 1 and fields[1:] == _places(len(fields) - 1)
    return len(fields) > 2 and fields == _places(len(fields))


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
            words = any(letter.isalpha() for letter in field)
            why = f"not numbers ({field[:20]!r} in line {line})"
            self.unusable = Unusable(why, CODES if words else "")
            return
        boolean = field.lower() in ("true", "false")
        self.booleans &= boolean
        self.integers &= field.lstrip("+-").isdecimal() and abs(value) <= _EXACT
        self.values.append(value)

    def finish(self) -> torch.Tensor | Unusable:
        if self.unusable:
            return self.unusable
        if not self.values:
            return Unusable("no values")
        found = torch.from_numpy(np.frombuffer(self.values, np.float64).copy())
        if self.booleans:
            return found.bool()
        return found.long() if self.integers else found


def _number(field: str) -> float | None:
    if field.lower() in _WORDS:
        return _WORDS[field.lower()]
    try:
        return float(field) if "_" not in field else None
    except ValueError:
        return None


def _ragged(path: str | os.PathLike[str], line: int, found: int, wanted: int) -> HesscliError:
    return FileError(
        f"{path}: line {line} has {found} fields, the first line has {wanted}",
        f"look at it: sed -n {line}p {shlex.quote(str(path))}",
    )
