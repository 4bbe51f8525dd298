"""On which side of each kink a pass is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Sides:
    """What a first pass notes, call by call, and passes of the same calls keep to."""

    def __init__(self, noted: Iterable[Tensor] = ()) -> None:
        self.noted = list(noted)  # in the order of the calls
        self.lost = False  # whether a pass that was held had other calls
        self._left: Iterator[Tensor] | None = None

    @property
    def held(self) -> bool:
        """Whether this pass keeps to what is noted."""
        return self._left is not None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside is a pass that keeps to what is noted."""
        self._left = iter(self.noted)
        yield
        self.lost |= next(self._left, None) is not None
        self._left = None

    def first(self, value: Tensor) -> Tensor:
        """The same value in the first pass. It is what is noted, and not to be written to."""
        if self._left is None:
            self.noted.append(value)
            return value
        first = next(self._left, None)
        if first is not None and first.is_floating_point() and value.is_floating_point():
            first = first.to(value.dtype)
        if first is None or first.shape != value.shape or first.dtype != value.dtype:
            self.lost = True
            return value
        return first

    def constant(self, result: Any) -> Any:
        """A result as it was in the first pass, be it several tensors, or a number."""
        if isinstance(result, (tuple, list)):
            return type(result)(self.constant(part) for part in result)
        if isinstance(result, float):
            return self.first(torch.tensor(result, dtype=torch.float64)).item()
        return self.first(result).clone() if isinstance(result, Tensor) else result
