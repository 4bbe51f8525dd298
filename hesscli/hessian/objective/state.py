"""What a module keeps from pass to pass, put back after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hesscli.hessian.objective.kept import restores

Place = tuple[int, str]  # which module, and the buffer's name in it
Saved = tuple[Tensor, int, Tensor]  # a buffer, its version, and a copy of it

# Entries of a buffer that an operator writes to without saying so: it has a few of each channel.
_MOST = 1 << 16

_SAVED: WeakKeyDictionary[nn.Module, dict[Place, Saved | None]] = WeakKeyDictionary()


@contextmanager
def state_kept(function: Callable[..., object]) -> Iterator[None]:
    """Every pass of a module, or of a loss, begins as the first: with buffers as saved, and nothing computed and kept.

    Buffers are running statistics, and the ranges that an observer has seen. What a model computes once of its
    parameters, `functools.cached_property`, would be a constant to the next pass, a hidden state the last one's.

    All else that it keeps is put back too, hooks included: where a flag says that hooks are registered, or a value is
    stored, one must not go without the other.

    A buffer that was written to is replaced, not written to again: autograd may have saved it.

    A parameter that the module gave another dtype has its own again, be it but for an attempt in another.
    """
    module = function if isinstance(function, nn.Module) else None
    if module is not None and module not in _SAVED:
        _SAVED[module] = _saved(module)
    before = list(restores(function))
    parameters = [(p, p.data) for p in module.parameters()] if module is not None else []
    try:
        yield
    finally:
        for restore in before:
            restore()
        for parameter, data in parameters:
            if parameter.dtype is not data.dtype:
                parameter.data = data
        if module is not None:
            _put_back(module, _SAVED[module])


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
        if buffer._version != version or _written_unsaid(part, buffer, copy):
            if id(buffer) not in fresh:
                fresh[id(buffer)] = copy.clone()
            new = fresh[id(buffer)]
            saved[id(part), name] = new, new._version, copy
            part._buffers[name] = new
        elif current is not buffer:
            part._buffers[name] = buffer


def _written_unsaid(part: nn.Module, buffer: Tensor, before: Tensor) -> bool:
    """Whether a buffer has other numbers in the same version, as the fused observer of PyTorch's quantization leaves
    it, and a batch norm that tracks.
    """
    if isinstance(part, _NormBase) and not part.training:
        return False  # most buffers are such, and to ask costs a GPU time
    if buffer.numel() > _MOST or buffer.layout is not torch.strided:
        return False
    return not (buffer.is_meta or buffer.is_quantized or torch.equal(buffer, before))


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
