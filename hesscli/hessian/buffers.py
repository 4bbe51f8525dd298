"""The buffers of a module, put back after every pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import Tensor, nn

_Saved = tuple[Tensor, int, Tensor]  # a buffer, its version, and a copy of it
_SAVED: WeakKeyDictionary[nn.Module, dict[int, _Saved]] = WeakKeyDictionary()


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Every pass begins with the buffers as saved: running statistics, the ranges that an observer has seen.

    A buffer that was written to is replaced, not written to again: autograd may have saved it.
    """
    if module not in _SAVED:
        _SAVED[module] = {id(b): (b, b._version, b.detach().clone()) for b in module.buffers()}
    saved = _SAVED[module]
    try:
        yield
    finally:
        written = {
            key: value for key, (b, version, value) in saved.items() if b._version != version
        }
        fresh = {key: value.clone() for key, value in written.items()}
        for part in module.modules() if written else ():
            for name, buffer in part._buffers.items():
                if id(buffer) in fresh:
                    part._buffers[name] = fresh[id(buffer)]
        for key, buffer in fresh.items():
            del saved[key]
            saved[id(buffer)] = buffer, buffer._version, written[key]
