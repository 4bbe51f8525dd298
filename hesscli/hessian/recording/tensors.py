"""The tensors of a pass: which value each is, and which of them a write has left behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hesscli.hessian.recording.tape import Call


@dataclass
class SharedMemory:
    """What tensors share of which some are views."""

    tensors: list[Tensor] = field(default_factory=list)
    writes: int = 0


@dataclass
class Known:
    """A tensor, kept alive, so that its identity and its memory stay its own."""

    tensor: Tensor
    memory: SharedMemory
    first: int  # the number of the value that it was at first
    now: int  # and of the one that it is, or was
    writes: int  # when its memory had been written to so often
    taken: tuple[Tensor, Call] | None = None  # what it is a view of, and how it was taken
    off: bool = False  # whether gradients were off where it was made
    history: Any = None  # its grad_fn where it was written to with gradients off

    @property
    def is_stale(self) -> bool:
        """Whether another that shares its memory has been written to since."""
        return self.writes != self.memory.writes


class Tensors:
    """By their identity."""

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}
        self._memories: dict[int, SharedMemory] = {}  # by storage

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._known

    def __getitem__(self, tensor: Tensor) -> Known:
        return self._known[id(tensor)]

    def set(self, tensor: Tensor, value: int, func: Any = None, args: tuple[Any, ...] = ()) -> None:
        """From here on a tensor, given or made by `func(*args)`, is the value with this number."""
        known = self._known.get(id(tensor))
        if known is None:
            memory = self._memory(tensor, func, args)
            memory.tensors.append(tensor)
            self._known[id(tensor)] = Known(tensor, memory, value, value, memory.writes)
        else:
            known.now, known.writes, known.off = value, known.memory.writes, False

    def write(self, tensor: Tensor) -> bool:
        """Leaves the others behind that share its memory; returns whether there are any."""
        known = self[tensor]
        known.memory.writes += 1
        known.writes = known.memory.writes
        return len(known.memory.tensors) > 1

    def _memory(self, tensor: Tensor, func: Any, args: tuple[Any, ...]) -> SharedMemory:
        """That of the tensor it is a view of, or its own."""
        if func is not None:
            if func._schema.name.startswith("aten::unsafe_"):  # parts that by contract are no views
                return SharedMemory()
            shares = any(a.alias_info is not None for a in func._schema.returns)
            if shares and args[0] in self:
                return self[args[0]].memory
        if tensor.layout is not torch.strided:
            return SharedMemory()
        return self._memories.setdefault(tensor.untyped_storage()._cdata, SharedMemory())
