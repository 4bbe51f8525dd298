"""Arrays of a data file that are no numbers, or not all of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

CODES = "classes are whole numbers from 0 on: table.{0} = table.{0}.astype('category').cat.codes"
ROWS = "drop these samples: table = table.dropna(subset=['{0}'])"

DECIMALS = (
    "write points: pd.read_csv('in.csv', sep=';', decimal=',').to_csv('out.csv', index=False)"
)


@dataclass(frozen=True)
class Unusable:
    """Stands in an array's place."""

    why: str  # as in "array x skipped: not numbers"
    remedy: str = ""  # what makes targets of such a column, which {0} stands for; empty: unknown


NamedArrays = dict[str, Tensor | Unusable]
"""The arrays of a data file, by their names."""
