"""Which tensors of a pass share memory, and which of them a write has left behind."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from hesscli.hessian.recording.tape import Call


class Aliases:
    """Keeps every tensor that it is told of alive, so that its identity and its storage stay its own.

    After a write into one of them the others that share its memory are stale, until they are kept again.
    """

    def __init__(self) -> None:
        # All by the identity of a tensor, but for the second, by storage.
        self._storages: dict[int, int] = {}
        self._sharing: dict[int, dict[int, Tensor]] = {}
        self._stale: set[int] = set()
        self._views: dict[int, tuple[Tensor, Call]] = {}
        self._unfollowed = itertools.count(-1, -1)  # storages that are not followed

    def keep(self, tensor: Tensor, func: Any = None, args: tuple[Any, ...] = ()) -> None:
        """A tensor that is given, or what `func(*args)` made, is what its memory holds now."""
        key = id(tensor)
        if key not in self._storages:
            self._storages[key] = self._storage(tensor, func, args)
        self._sharing.setdefault(self._storages[key], {})[key] = tensor
        self._stale.discard(key)

    def _storage(self, tensor: Tensor, func: Any, args: tuple[Any, ...]) -> int:
        """That of the tensor it is a view of, or its own."""
        if func is not None:
            if func._schema.name.startswith("aten::unsafe_"):  # parts that by contract are no views
                return next(self._unfollowed)
            shares = any(a.alias_info is not None for a in func._schema.returns)
            if shares and id(args[0]) in self._storages:
                return self._storages[id(args[0])]
        if tensor.layout is not torch.strided:
            return next(self._unfollowed)
        return tensor.untyped_storage()._cdata

    def keep_view(self, view: Tensor, whole: Tensor, call: Call) -> None:
        """How a view was taken of a tensor."""
        self._views[id(view)] = whole, call

    def view(self, tensor: Tensor) -> tuple[Tensor, Call] | None:
        """What it is a view of, and how it was taken."""
        return self._views.get(id(tensor))

    def sharing(self, tensor: Tensor) -> list[Tensor]:
        """All that are kept in its memory, itself included."""
        return list(self._sharing[self._storages[id(tensor)]].values())

    def write(self, tensor: Tensor) -> bool:
        """Marks the others that share its memory as stale; returns whether there are any."""
        others = self._sharing[self._storages[id(tensor)]].keys() - {id(tensor)}
        self._stale |= others
        return bool(others)

    def is_stale(self, tensor: Tensor) -> bool:
        """Whether another has been written to since it was kept."""
        return id(tensor) in self._stale
