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
    """Some samples."""

    inputs: tuple[Tensor, ...]  # passed to the module, the first of them by position
    target: Tensor | None  # what the loss compares with
    loss_arguments: Mapping[str, object] = field(default_factory=dict)  # of the loss
    keywords: tuple[str, ...] = ()  # the names of the last inputs, which are passed by name

    def __len__(self) -> int:
        """How many samples; one where there is no axis for them."""
        return len(self.inputs[0]) if self.inputs[0].dim() else 1


class Batches(Sequence[Batch]):
    """Batches that are made when they are asked for.

    Args:
        count: how many.
        make: makes the one with this index.
        kept: whether each is made once; or else anew each time, as the data need not fit into memory.
    """

    def __init__(self, count: int, make: Callable[[int], Batch], kept: bool = False) -> None:
        self._count, self._make, self.kept = count, make, kept
        self._made: dict[int, Batch] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]  # no slices
        index = range(self._count)[index]
        if not self.kept:
            return self._make(index)
        if index not in self._made:
            self._made.setdefault(index, self._make(index))
        return self._made[index]


def held_bytes(batches: Sequence[Batch]) -> int:
    """What all of them hold at once, the last taken to be as large as the first."""
    first = batches[0]
    tensors = (first.target, *first.inputs, *first.loss_arguments.values())
    one = sum(x.nbytes for x in tensors if isinstance(x, Tensor))
    return one * (len(batches) if _are_kept(batches) else 1)


def _are_kept(batches: Sequence[Batch]) -> bool:
    return not isinstance(batches, Batches) or batches.kept


def doubled(batches: Sequence[Batch]) -> Batches:
    """The same in float64."""
    return Batches(len(batches), lambda index: _double(batches[index]), _are_kept(batches))


def _double(batch: Batch) -> Batch:
    def double(value: Any) -> Any:
        return in_precision(value, torch.float64) if isinstance(value, Tensor) else value

    return replace(
        batch,
        inputs=tuple(map(double, batch.inputs)),
        target=double(batch.target),
        loss_arguments={name: double(value) for name, value in batch.loss_arguments.items()},
    )
