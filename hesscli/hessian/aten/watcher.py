"""What sees every call of a pass: operators below autograd, and functions above it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Kind = TypeVar("Kind")

BLANK = frozenset("empty empty_like empty_strided new_empty new_empty_strided".split())
"""Operators that make memory and leave in it what was there."""

_DETACHED = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
_IN_PLACE = (Tensor.detach_, torch.detach_)

_said: list[str] = []  # by the last call that failed while a watcher was on


def unwrapped(error: BaseException) -> BaseException:
    """What a watched call said, where the error is TorchScript's of it, which says nothing but where that was."""
    says_nothing = str(error).rstrip().endswith("\nRuntimeError:")
    return RuntimeError(*_said) if says_nothing else error


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
        try:
            return self.call(func, args, kwargs or {})
        except Exception as error:
            _said[:] = [str(error)]
            raise

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of `func(*args, **kwargs)`, or what shall stand for it."""
        raise NotImplementedError


class FunctionWatcher(TorchFunctionMode):
    """The same of every function of `torch`, above autograd, with a `call` that it is given."""

    def __init__(self, call: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self.call = call

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.call(func, args, kwargs or {})


def detaching(handler: Callable[[Tensor, bool], Tensor]) -> FunctionWatcher:
    """While it is on, `handler(result, in_place)` returns what stands for each tensor that is detached.

    Below autograd, `detach_` does not show at all, and `detach` looks like autograd's own copies of what it saves.
    """

    def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        in_place = func in _IN_PLACE
        return handler(result, in_place) if in_place or func in _DETACHED else result

    return FunctionWatcher(call)


def each(value: Any, kind: type[Kind]) -> Iterator[Kind]:
    """Whatever is of a kind in an argument, or in its lists."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from each(item, kind)
