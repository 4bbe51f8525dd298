"""What Python has that holds samples and is no arrays: what to call it, and how it becomes some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hesscli.files.roles import TARGET_NAMES

SEVERAL_INPUTS = """hesscli.compute(model, {"a": a, "b": b, "y": y}, inputs=("a", "b"))"""
_COLLATED = "hesscli.compute(model, torch.utils.data.default_collate(list({})))"
_JOINED = "hesscli.compute(model, tuple(map(torch.cat, zip(*data))))"
_JOINED_BY_NAME = "hesscli.compute(model, {k: torch.cat([b[k] for b in data]) for k in data[0]})"
_OF_A_TABLE = "hesscli.compute(model, (table.drop(columns={0!r}), table[{0!r}]))"
_OF_HUGGING_FACE = """hesscli.compute(model, dataset.with_format("torch")[:])"""


def type_of(value: object) -> str:
    """What it is, by its type."""
    return f"a {type(value).__name__}"


def no_arrays(data: Any) -> tuple[str, str | None]:
    """What was found in place of arrays, and how it becomes arrays."""
    if isinstance(data, (tuple, list)):
        if data and all(map(_is_part, data)):
            return f"{len(data)} samples or batches", _of_parts(data)
        return f"{len(data)} arrays", SEVERAL_INPUTS
    return type_of(data), _of_one_object(data)


def _of_one_object(data: Any) -> str | None:
    of_samples = {DataLoader: "loader.dataset", Dataset: "dataset", Iterator: "data"}
    for kind, named in of_samples.items():
        if isinstance(data, kind):
            return _COLLATED.format(named)
    if hasattr(data, "with_format"):
        return _OF_HUGGING_FACE
    if hasattr(data, "iloc") and len(columns := list(getattr(data, "columns", []))) > 1:
        target = next((name for name in columns if name in TARGET_NAMES), columns[-1])
        return _OF_A_TABLE.format(target)
    return None


def _of_parts(parts: Sequence[Any]) -> str:
    lengths = [{len(array) if array.ndim else None for array in _arrays(part)} for part in parts]
    if any(len(of_part) > 1 or None in of_part for of_part in lengths):
        return _COLLATED.format("data")  # samples, whose arrays have no axis in common
    return _JOINED_BY_NAME if isinstance(parts[0], Mapping) else _JOINED


def _is_part(value: object) -> bool:
    return isinstance(value, (tuple, list, Mapping)) and bool(_arrays(value))


def _arrays(part: Any) -> list[Any]:
    values = part.values() if isinstance(part, Mapping) else part
    return [value for value in values if isinstance(value, (Tensor, np.ndarray))]
