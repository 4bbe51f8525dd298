"""What a module keeps from pass to pass, put back after each."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Place = tuple[int, str]  # which module, and the buffer's name in it
Saved = tuple[Tensor, int, Tensor]  # a buffer, its version, and a copy of it
Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any]

_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, set, deque})
_PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None)})
# Modules are looked at on their own; classes, functions and libraries are not the model's.
_OTHERS = (nn.Module, Tensor, Enum, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)
_MOST = 1000  # containers of a module that are kept: behind a logger, say, there is no end

_SAVED: WeakKeyDictionary[nn.Module, dict[Place, Saved | None]] = WeakKeyDictionary()


@contextmanager
def state_kept(module: nn.Module) -> Iterator[None]:
    """Every pass begins as the first: with the buffers as saved, and nothing computed and kept.

    Buffers are running statistics, and the ranges that an observer has seen. What a model computes once of its
    parameters, `functools.cached_property`, would be a constant to the next pass, a hidden state the last one's.

    The contents of dicts, lists, sets, deques and objects among the attributes are put back too, hooks included: where
    a flag says that hooks are registered, or a value is stored, one must not go without the other.

    A buffer that was written to is replaced, not written to again: autograd may have saved it.
    """
    if module not in _SAVED:
        _SAVED[module] = _saved(module)
    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    containers = [saved for part in parts for saved in _containers(part)]
    try:
        yield
    finally:
        for now, before in containers:
            _refill(now, before)
        _put_back(module, _SAVED[module])


def _containers(part: nn.Module) -> Iterator[tuple[Container, Container]]:
    """A module's attributes, and all that hold others in them, each with a copy; buffers are looked after apart.

    So are those that its class has for all modules: `cache = {}` in its body.
    """
    own = (kind for kind in type(part).__mro__ if not _of_a_library(kind) and kind is not object)
    found: list[object] = [vars(part), *(value for kind in own for value in vars(kind).values())]
    known: set[int] = {id(vars(part).get("_buffers"))}
    for each in found:
        held = _held(each)
        if held is None or id(held) in known or len(known) > _MOST:
            continue
        known.add(id(held))
        found += held.values() if isinstance(held, dict) else held
        if not isinstance(held, tuple):
            yield held, held.copy()


def _held(each: object) -> Container | tuple[object, ...] | None:
    """What holds others: a container, or the attributes of an object of the model's own (a dataclass, a namespace)."""
    kind = type(each)
    if kind in _CONTAINERS or issubclass(kind, tuple):
        return cast("Container | tuple[object, ...]", each)
    if kind in _PLAIN or issubclass(kind, _OTHERS) or _of_a_library(kind):
        return None
    attributes = getattr(each, "__dict__", None)
    return attributes if type(attributes) is dict else None


def _of_a_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("torch", "hesscli", "weakref")


def _refill(now: Container, before: Container) -> None:
    """Gives a container what it held, unless it holds just that."""
    if isinstance(now, dict) and isinstance(before, dict):
        if list(now) != list(before) or any(now[key] is not before[key] for key in before):
            now.clear()
            now.update(before)
    elif isinstance(now, (list, deque)) and isinstance(before, (list, deque)):
        if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
            now.clear()
            now.extend(before)
    elif isinstance(now, set) and isinstance(before, set) and now != before:
        now.clear()
        now.update(before)


def _put_back(module: nn.Module, saved: dict[Place, Saved | None]) -> None:
    fresh: dict[int, Tensor] = {}  # a buffer may have several names
    for (part, name), current in list(_buffers(module)):
        if (id(part), name) not in saved:
            if not isinstance(part, torch.jit.ScriptModule):
                del part._buffers[name]
            continue
        place = saved[id(part), name]
        if place is None:
            part._buffers[name] = None
            continue
        buffer, version, copy = place
        if buffer._version != version:
            if id(buffer) not in fresh:
                fresh[id(buffer)] = copy.clone()
            new = fresh[id(buffer)]
            saved[id(part), name] = new, new._version, copy
            part._buffers[name] = new
        elif current is not buffer:
            part._buffers[name] = buffer


def _saved(module: nn.Module) -> dict[Place, Saved | None]:
    copies: dict[int, Tensor] = {}
    found: dict[Place, Saved | None] = {}
    for (part, name), buffer in _buffers(module):
        if buffer is None:
            found[id(part), name] = None
            continue
        if id(buffer) not in copies:
            copies[id(buffer)] = buffer.detach().clone()
        found[id(part), name] = buffer, buffer._version, copies[id(buffer)]
    return found


def _buffers(module: nn.Module) -> Iterator[tuple[tuple[nn.Module, str], Tensor | None]]:
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None or not isinstance(part, torch.jit.ScriptModule):
                yield (part, name), buffer
