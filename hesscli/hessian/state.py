"""What a module keeps from pass to pass, put back after each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Place = tuple[int, str]  # which module, and the buffer's name in it
Saved = tuple[Tensor, int, Tensor]  # a buffer, its version, and a copy of it
Container = dict[Any, Any] | list[Any] | set[Any]

_SAVED: WeakKeyDictionary[nn.Module, dict[Place, Saved | None]] = WeakKeyDictionary()


@contextmanager
def state_kept(module: nn.Module) -> Iterator[None]:
    """Every pass begins as the first: with the buffers as saved, and nothing computed and kept.

    Buffers are running statistics, and the ranges that an observer has seen. What a model computes once of its
    parameters, `functools.cached_property`, would be a constant to the next pass, a hidden state the last one's.

    The contents of dicts, lists and sets among the attributes are put back too, hooks included: where a flag says that
    hooks are registered, or a value is stored, one must not go without the other.

    A buffer that was written to is replaced, not written to again: autograd may have saved it.
    """
    if module not in _SAVED:
        _SAVED[module] = _saved(module)
    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    containers = [saved for part in parts for saved in _containers(vars(part))]
    try:
        yield
    finally:
        for now, before in containers:
            _refill(now, before)
        _put_back(module, _SAVED[module])


def _containers(attributes: dict[str, object]) -> Iterator[tuple[Container, Container]]:
    """A module's attributes, and all that hold others in them, each with a copy; buffers are looked after apart."""
    found: list[object] = [attributes]
    known: set[int] = {id(attributes.get("_buffers"))}
    for each in found:
        plain = type(each) in (dict, OrderedDict, list, set)
        if plain and isinstance(each, (dict, list, set)) and id(each) not in known:
            known.add(id(each))
            found += each.values() if isinstance(each, dict) else each
            yield each, copy(each)


def _refill(now: Container, before: Container) -> None:
    """Gives a container what it held, unless it holds just that."""
    if isinstance(now, dict) and isinstance(before, dict):
        if list(now) != list(before) or any(now[key] is not before[key] for key in before):
            now.clear()
            now.update(before)
    elif isinstance(now, list) and isinstance(before, list):
        if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
            now[:] = before
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
