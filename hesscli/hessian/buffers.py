"""The buffers of a module, put back after every pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import Tensor, nn

Place = tuple[int, str]  # which module, and the buffer's name in it
Saved = tuple[Tensor, int, Tensor]  # a buffer, its version, and a copy of it

_SAVED: WeakKeyDictionary[nn.Module, dict[Place, Saved]] = WeakKeyDictionary()


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Every pass begins with the buffers as saved: running statistics, the ranges that an observer has seen.

    A buffer that was written to is replaced, not written to again: autograd may have saved it.
    """
    if module not in _SAVED:
        _SAVED[module] = _saved(module)
    saved = _SAVED[module]
    try:
        yield
    finally:
        fresh: dict[int, Tensor] = {}  # a buffer may have several names
        for (part, name), current in list(_buffers(module)):
            if (id(part), name) not in saved:
                continue
            buffer, version, copy = saved[id(part), name]
            if buffer._version != version:
                if id(buffer) not in fresh:
                    fresh[id(buffer)] = copy.clone()
                new = fresh[id(buffer)]
                saved[id(part), name] = new, new._version, copy
                part._buffers[name] = new
            elif current is not buffer:
                part._buffers[name] = buffer


def _saved(module: nn.Module) -> dict[Place, Saved]:
    copies: dict[int, Tensor] = {}
    found = {}
    for (part, name), buffer in _buffers(module):
        if id(buffer) not in copies:
            copies[id(buffer)] = buffer.detach().clone()
        found[id(part), name] = buffer, buffer._version, copies[id(buffer)]
    return found


def _buffers(module: nn.Module) -> Iterator[tuple[tuple[nn.Module, str], Tensor]]:
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                yield (part, name), buffer
