"""Copies of modules and losses, the functions that they hold included.

To `copy.deepcopy` a function is a constant: `self.act = lambda x: self.scale * x`, a hook, or a derivative made once by
`torch.func` would compute with the parameters of the original.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import get_ident
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

T = TypeVar("T")
_DISPATCH: dict[type, Any] = copy._deepcopy_dispatch  # type: ignore[attr-defined]
_CONSTANTS = "_atomic_types"  # where Python 3.14 looks first


def copied(value: T, memo: dict[int, Any] | None = None) -> T:
    """A deep copy whose functions refer to what was copied with them; `memo` as of `copy.deepcopy`."""
    with _functions_copied():
        return copy.deepcopy(value, memo)


@contextmanager
def _functions_copied() -> Iterator[None]:
    ours: dict[type, Any] = {FunctionType: _function, MethodType: _method}
    before = {kind: _DISPATCH.get(kind) for kind in ours}
    constants = getattr(copy, _CONSTANTS, None)
    for kind, make in ours.items():
        _DISPATCH[kind] = _in_this_thread(make, before[kind] or (lambda value, memo: value))
    if constants is not None:
        setattr(copy, _CONSTANTS, set(constants) - {FunctionType})
    try:
        yield
    finally:
        for kind, was in before.items():
            if was is None:
                del _DISPATCH[kind]
            else:
                _DISPATCH[kind] = was
        if constants is not None:
            setattr(copy, _CONSTANTS, constants)


def _in_this_thread(make: Any, others: Any) -> Any:
    """`make` here; what `others` make to every other thread, which may copy something meanwhile."""
    here = get_ident()
    return lambda value, memo: (make if get_ident() == here else others)(value, memo)


def _function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    closure = function.__closure__ or ()
    if not (closure or function.__defaults__ or function.__kwdefaults__):
        return function
    cells = tuple(CellType() for _ in closure)
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, None, cells or None
    )
    memo[id(function)] = made  # before what it closes over, which may hold the function
    made.__qualname__ = function.__qualname__
    made.__dict__.update(function.__dict__)
    made.__defaults__ = _shared_or_copied(function.__defaults__, memo)
    made.__kwdefaults__ = _shared_or_copied(function.__kwdefaults__, memo)
    for cell, of in zip(cells, closure, strict=True):
        with suppress(ValueError):  # an empty one
            cell.cell_contents = _shared_or_copied(of.cell_contents, memo)
    return made


def _method(method: MethodType, memo: dict[int, Any]) -> MethodType:
    return MethodType(copy.deepcopy(method.__func__, memo), copy.deepcopy(method.__self__, memo))


def _shared_or_copied(value: Any, memo: dict[int, Any]) -> Any:
    """What cannot be copied, an open file, is shared."""
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        return value
