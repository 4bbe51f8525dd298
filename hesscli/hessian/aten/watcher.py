"""What sees every call of a pass: operators below autograd, and functions above it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Kind = TypeVar("Kind")

BLANK = frozenset("empty empty_like empty_strided new_empty new_empty_strided".split())
"""Operators that make memory and leave in it what was there."""


class Watcher(TorchDispatchMode):
    """While it is on, `call` stands between every operator and its caller, backward passes included."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and shielding it from the compiler imports that for 1.4 s

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of `func(*args, **kwargs)`, or what shall stand for it."""
        raise NotImplementedError


class FunctionWatcher(TorchFunctionMode):
    """The same of every function of `torch`, above autograd."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of `func(*args, **kwargs)`, or what shall stand for it."""
        raise NotImplementedError


def each(value: Any, kind: type[Kind]) -> Iterator[Kind]:
    """Whatever is of a kind in an argument, or in its lists."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from each(item, kind)
