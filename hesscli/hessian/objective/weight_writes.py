"""Weights that a model writes to in its forward pass with gradients off, as max-norm layers and clipped critics do.

To autograd, the weights are what was written. So the Hessian is the one there, and all further passes are those of a
model that leaves its weights alone: a little away from there, it would only move them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hesscli.hessian.aten.watcher import FunctionWatcher, Watcher, each


@contextmanager
def weight_writes(weights: Mapping[str, Tensor], prevented: bool) -> Iterator[set[str]]:
    """The names of those weights that are written to inside, or would be if that were not prevented."""
    names = {_place(weight): name for name, weight in weights.items()}
    found: set[str] = set()

    def written(tensor: Tensor) -> bool:
        name = names.get(_place(tensor))
        found.update([name] if name else [])
        return prevented and name is not None

    def replaced(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`weight.data = other`"""
        if func == Tensor.data.__set__ and written(args[0]):  # type: ignore[attr-defined]
            return None
        return func(*args, **kwargs)

    with FunctionWatcher(replaced), _Writing(written):
        yield found


def _place(tensor: Tensor) -> int:
    """Where its numbers lie; -1 if it is not dense, as no weight is."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else -1


class _Writing(Watcher):
    """Sees what is written in place, to views too."""

    def __init__(self, prevented: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.prevented = prevented

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        schema = func._schema
        if schema.is_mutable:
            given = {a.name: x for a, x in zip(schema.arguments, args, strict=False)} | kwargs
            aliases = {a.name: a.alias_info for a in schema.arguments}
            written = [x for n, x in given.items() if aliases[n] and aliases[n].is_write]
            if any(self.prevented(part) for part in each(written, Tensor)):
                return written[0] if schema.returns else None
        return func(*args, **kwargs)
