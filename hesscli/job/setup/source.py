"""What batches are cut from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.hessian.aten.precision import in_precision
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.loss import Loss
from hesscli.hessian.objective.losses import ELEMENT_WEIGHTED, TENSORS


@dataclass(frozen=True)
class Source:
    """What batches are cut from: arrays on the CPU that may lie in a file larger than the memory."""

    inputs: Mapping[str, Tensor]  # in the order of the model's
    keywords: tuple[str, ...]  # the last of them, if they are passed by name
    scales: Mapping[str, float]  # what some of them are multiplied by
    target: Tensor | None  # what the loss compares with
    arguments: Mapping[str, object]  # of the loss, the same for each batch
    along: Mapping[str, Tensor]  # those that have an entry for each sample of the file
    range: tuple[int, int]  # which of the file's samples these are: from, up to
    recorded: int  # how many samples the file has
    fewest: int  # samples that the model accepts at once
    most: int | None  # and the most of them; None: any number
    device: torch.device  # of the batches
    dtype: torch.dtype

    @property
    def samples(self) -> int:
        """How many; 1 if the arrays are one sample without an axis for samples."""
        return self.range[1] - self.range[0]

    @property
    def few(self) -> int:
        """How many samples are enough to see what the model makes of them."""
        return min(self.samples, max(2, self.fewest), self.most or self.samples)

    @property
    def bytes(self) -> int:
        """What all batches take together."""
        arrays = [*self.inputs.values(), *([] if self.target is None else [self.target])]
        return sum(
            array.numel()
            * max(array.itemsize, self.dtype.itemsize if array.is_floating_point() else 0)
            for array in arrays
        ) + sum(self.inputs[name].numel() * self.dtype.itemsize for name in self.scales)

    def part(self, start: int, stop: int) -> Batch:
        """The samples from `start` up to `stop`."""
        inputs, target = self.inputs, self.target
        if (start, stop) != (0, self.samples):  # one sample may have no axis for samples
            inputs = {name: array[start:stop] for name, array in inputs.items()}
            target = None if target is None else target[start:stop]
        moved = tuple(
            self._scaled(name, move(array, self.device, self.dtype))
            for name, array in inputs.items()
        )
        recorded = slice(self.range[0] + start, self.range[0] + stop)
        return Batch(
            moved,
            None if target is None else move(target, self.device, self.dtype),
            {**self.arguments, **{name: value[recorded] for name, value in self.along.items()}},
            self.keywords,
        )

    def _scaled(self, name: str, array: Tensor) -> Tensor:
        return array.to(self.dtype) * self.scales[name] if name in self.scales else array


def parted(
    loss: Loss, arguments: Mapping[str, object], target: Tensor | None, recorded: int
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The loss's arguments that are the same for all samples, and those that go along with them."""
    along = {
        name: value
        for name, value in arguments.items()
        if isinstance(value, Tensor) and goes_along(loss, name, value, target, recorded)
    }
    return {name: value for name, value in arguments.items() if name not in along}, along


def goes_along(loss: Loss, name: str, value: Tensor, target: Tensor | None, recorded: int) -> bool:
    """Whether an argument has an entry for each of the file's samples, and not for each class."""
    if not value.dim() or len(value) != recorded:
        return False
    if loss.function is not None:  # of the user's own it is found out: `own_loss.py`
        return True
    of_elements = name in TENSORS and loss.name in ELEMENT_WEIGHTED
    return of_elements and target is not None and value.dim() == target.dim()


def move(array: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The array on the device, in memory of its own, real and complex numbers with the digits of the dtype."""
    wanted = in_precision(array[:0] if array.dim() else array, dtype).dtype
    return torch.empty(array.shape, dtype=wanted, device=device).copy_(array)
