"""Samples that go through a model together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hesscli.hessian.aten.precision import in_precision


# Two batches are never the same: what is kept of one goes with it.
@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples.

    Args:
        inputs: passed to the module, the first of them by position.
        target: what the loss compares with.
        loss_arguments: of the loss.
        keywords: the names of the last inputs, which are passed by name.
    """

    inputs: tuple[Tensor, ...]
    target: Tensor | None
    loss_arguments: Mapping[str, object] = field(default_factory=dict)
    keywords: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many samples; one where there is no axis for them."""
        return len(self.inputs[0]) if self.inputs[0].dim() else 1


class Batches(Sequence[Batch]):
    """Batches that are made anew each time they are asked for: the data need not fit into memory.

    Args:
        count: how many.
        make: makes the one with this index.
    """

    def __init__(self, count: int, make: Callable[[int], Batch]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]  # no slices
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._make(index)


def doubled(batches: Sequence[Batch]) -> Sequence[Batch]:
    """The same in float64."""
    if isinstance(batches, Batches):
        return Batches(len(batches), lambda index: _double(batches[index]))
    return [_double(batch) for batch in batches]


def _double(batch: Batch) -> Batch:
    def double(value: Any) -> Any:
        return in_precision(value, torch.float64) if isinstance(value, Tensor) else value

    return replace(
        batch,
        inputs=tuple(map(double, batch.inputs)),
        target=double(batch.target),
        loss_arguments={name: double(value) for name, value in batch.loss_arguments.items()},
    )
