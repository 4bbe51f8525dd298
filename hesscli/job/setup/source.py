"""What batches are cut from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hesscli.errors import DeviceMismatchError, MismatchError
from hesscli.files.resources import available_memory
from hesscli.hessian.aten.precision import in_precision
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.first_passes import UnrepeatableError
from hesscli.hessian.objective.loss import Loss
from hesscli.hessian.objective.losses import ELEMENT_WEIGHTED, TENSORS

Result = TypeVar("Result")


@dataclass(frozen=True)
class Source:
    """What batches are cut from: arrays on the CPU that may lie in a file larger than the memory."""

    inputs: Mapping[str, Tensor]  # in the order of the model's
    keywords: tuple[str, ...]  # the last of them, if they are passed by name
    scales: Mapping[str, float]  # what some of them are multiplied by
    target: Tensor | None  # what the loss compares with
    arguments: Mapping[str, Any]  # of the loss
    per_sample: Collection[str]  # those that have an entry for each sample of the file
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

    def batch(self, start: int, stop: int) -> Batch:
        """The samples from `start` up to `stop`."""
        inputs, target = self.inputs, self.target
        if (start, stop) != (0, self.samples):  # one sample may have no axis for samples
            inputs = {name: array[start:stop] for name, array in inputs.items()}
            target = None if target is None else target[start:stop]
        moved = {name: move(array, self.device, self.dtype) for name, array in inputs.items()}
        moved |= {name: moved[name].to(self.dtype) * f for name, f in self.scales.items()}
        recorded = slice(self.range[0] + start, self.range[0] + stop)
        return Batch(
            tuple(moved.values()),
            None if target is None else move(target, self.device, self.dtype),
            {
                name: value[recorded] if name in self.per_sample else value
                for name, value in self.arguments.items()
            },
            self.keywords,
        )

    def first_accepted(
        self, function: Callable[[Batch], Result], *counts: int
    ) -> tuple[Batch, Result]:
        """The first so many samples that a function takes, and what it gives: of these numbers in turn, by default
        `few`, or at last all.

        Raises:
            MismatchError: it takes none of them; why it does not take the last: a graph's nodes want all others.
            DeviceMismatchError: what it makes lies on another device.
            UnrepeatableError: its passes are not alike.
        """
        refused: MismatchError | None = None
        tried = (min(count, self.samples) for count in (*(counts or [self.few]), self.samples))
        with torch.no_grad():
            for count in dict.fromkeys(tried):
                if refused and self.bytes * count // self.samples > available_memory() // 8:
                    break
                batch = self.batch(0, count)
                try:
                    return batch, function(batch)
                except (DeviceMismatchError, UnrepeatableError):
                    raise
                except MismatchError as error:
                    refused = error
        assert refused is not None
        raise refused


def per_sample(
    loss: Loss, arguments: Mapping[str, object], target: Tensor | None, recorded: int
) -> list[str]:
    """The loss's arguments that have an entry for each of the file's samples, and not for each class."""
    axes = target.dim() if target is not None and loss.name in ELEMENT_WEIGHTED else None
    found = []
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.dim() and len(value) == recorded:
            of_elements = name in TENSORS and value.dim() == axes
            # Of a loss of the user's own it may be either: `own_loss.py` finds out.
            if of_elements or loss.function is not None:
                found.append(name)
    return found


def move(array: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The array on the device, in memory of its own, real and complex numbers with the digits of the dtype."""
    wanted = in_precision(array[:0] if array.dim() else array, dtype).dtype
    return torch.empty(array.shape, dtype=wanted, device=device).copy_(array)
