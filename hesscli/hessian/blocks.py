"""Which parameters share a block of the Hessian, and under which name it is written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

ROOT = "(root)"  # the block of parameters that the outermost module owns itself


@dataclass(frozen=True)
class Block:
    """A diagonal block of the Hessian: these parameters' rows and columns, flattened row-major, in this order."""

    name: str
    parameters: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        return sum(self.sizes)

    @property
    def rows(self) -> dict[str, range]:
        """Which rows (and columns) are those of each parameter."""
        ends = itertools.accumulate(self.sizes)
        return {
            name: range(end - size, end)
            for name, size, end in zip(self.parameters, self.sizes, ends, strict=True)
        }

    def entries(self, diagonal: bool) -> int:
        """How many numbers it has, or its diagonal alone."""
        return self.size if diagonal else self.size**2


def select(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match any of the glob patterns."""
    return [name for name in names if any(fnmatchcase(name, p) for p in patterns)]


def _module(parameter: str) -> str:
    # A parametrisation (weight_norm, ...) keeps its tensors in a module of its own; they still belong to the layer.
    if ".parametrizations." in parameter:
        return parameter.split(".parametrizations.")[0]
    return parameter.rpartition(".")[0]


def partition(shapes: Mapping[str, Sequence[int]], structure: str) -> list[Block]:
    """The blocks of a structure, one of `STRUCTURES`' values, in the order of the parameters' shapes."""
    groups: dict[str, list[str]] = {}
    for name in shapes:
        key = {"full": "hessian", "module": _module(name)}.get(structure, name)
        groups.setdefault(key, []).append(name)
    return [
        Block(key or ROOT, tuple(names), tuple(math.prod(shapes[name]) for name in names))
        for key, names in groups.items()
    ]
