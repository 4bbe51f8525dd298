"""What batches are cut from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.hessian.aten.precision import in_precision
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.loss import Loss


@dataclass(frozen=True)
class Source:
    """What batches are cut from: arrays on the CPU that may lie in a file larger than the memory."""

    inputs: tuple[Tensor, ...]  # in the order of the model's
    target: Tensor | None  # what the loss compares with
    samples: int  # the length of their first axis; 1 if they are one sample without that axis
    loss: Loss  # whose arguments go with each batch, weights per element cut like the target
    scales: Mapping[int, float]  # what inputs are multiplied by, by their place
    keywords: tuple[str, ...]  # the names of the last inputs, if they are passed by name
    device: torch.device  # of the batches
    dtype: torch.dtype
    fewest: int  # samples that the model accepts at once
    most: int | None  # and the most of them; None: any number
    first: int  # which of the file's samples is the first of these
    # How many samples the file has: as long are loss arguments that have an entry for each.
    recorded: int

    @property
    def few(self) -> int:
        """How many samples are enough to see what the model makes of them."""
        return min(self.samples, max(2, self.fewest), self.most or self.samples)

    @property
    def bytes(self) -> int:
        """What all batches take together."""
        arrays = [*self.inputs, *([] if self.target is None else [self.target])]
        return sum(
            array.numel()
            * max(array.itemsize, self.dtype.itemsize if array.is_floating_point() else 0)
            for array in arrays
        ) + sum(self.inputs[place].numel() * self.dtype.itemsize for place in self.scales)

    def part(self, start: int, stop: int) -> Batch:
        """The samples from `start` up to `stop`."""
        inputs, target = self.inputs, self.target
        if (start, stop) != (0, self.samples):  # one sample may have no axis for samples
            inputs = tuple(array[start:stop] for array in inputs)
            target = None if target is None else target[start:stop]
        moved = tuple(
            self._scaled(place, move(array, self.device, self.dtype))
            for place, array in enumerate(inputs)
        )
        return Batch(
            moved,
            None if target is None else move(target, self.device, self.dtype),
            self._arguments(start, stop),
            self.keywords,
        )

    def _arguments(self, start: int, stop: int) -> Mapping[str, object]:
        mine = slice(self.first + start, self.first + stop)
        cut = {name: value[mine] for name, value in self.along().items()}
        return {**self.loss.arguments, **cut}

    def along(self) -> dict[str, Tensor]:
        """The loss arguments, whole, that are cut like the samples."""
        return {
            name: value
            for name, value in self.loss.arguments.items()
            if isinstance(value, Tensor)
            and value.dim()
            and len(value) == self.recorded
            and self.loss.goes_along(name, value, self.target)
        }

    def _scaled(self, place: int, array: Tensor) -> Tensor:
        return array.to(self.dtype) * self.scales[place] if place in self.scales else array


def move(array: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The array on the device, in memory of its own, real and complex numbers with the digits of the dtype."""
    wanted = in_precision(array[:0] if array.dim() else array, dtype).dtype
    return torch.empty(array.shape, dtype=wanted, device=device).copy_(array)
