"""Copies of modules and losses, the functions that they hold included.

To `copy.deepcopy` a function is a constant: `self.act = lambda x: self.scale * x`, a hook, or a derivative made once by
`torch.func` would compute with the parameters of the original.
"""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import get_ident
from types import CellType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")
_DISPATCH: dict[type, Any] = copy._deepcopy_dispatch  # type: ignore[attr-defined]
_CONSTANTS = "_atomic_types"  # where Python 3.14 looks first
_MOST = 10000  # objects: behind a logger, say, there is no end


def copied(value: T) -> T:
    """A deep copy whose functions refer to what was copied with them.

    What a module computed and keeps, as pruning does, has no copy of its own: it is one without a graph. What else in a
    module cannot be copied, a lock, an open file or a connection, is shared.
    """
    parts = list(value.modules()) if isinstance(value, nn.Module) else []
    every = [x for part in parts for x in (*vars(part).values(), *part.buffers(recurse=False))]
    computed = [x for x in every if isinstance(x, Tensor) and not x.is_leaf]
    memo: dict[int, Any] = {id(x): x.detach().clone() for x in computed}
    with _functions_copied():
        try:
            return copy.deepcopy(value, dict(memo))
        except Exception:
            shared = _without_copies(parts)
            if not shared:
                raise
            return copy.deepcopy(value, memo | shared)


def _without_copies(parts: Sequence[nn.Module]) -> dict[int, object]:
    """What of the attributes of modules can only be shared, as a memo: no tensors, nor what is used up, nor what knows
    of a module, which would be the original.
    """
    tensors = [x for part in parts for x in (*part.parameters(False), *part.buffers(False))]
    own: dict[int, object] = {id(x): x for x in (*parts, *tensors)}
    known = dict(own)
    found: list[object] = [vars(part) for part in parts]
    shared: dict[int, object] = {}
    for each in found:
        if id(each) in known or isinstance(each, (Tensor, GeneratorType)):
            continue
        known[id(each)] = each
        if type(each) in (dict, OrderedDict):
            found += each.values()  # type: ignore[attr-defined]
        elif type(each) in (list, tuple):
            found += each  # type: ignore[arg-type]
        else:
            try:
                copy.deepcopy(each, dict(own))
            except Exception:
                if not _reaches(each, own):
                    shared[id(each)] = each
    return shared


def _reaches(root: object, those: Collection[int]) -> bool:
    """Whether one of `those` ids is found behind an object, or so much that it may be."""
    found, known = [root], {id(root)}
    for each in found:
        if id(each) in those or len(found) > _MOST:
            return True
        if isinstance(each, FunctionType):  # but for its global names
            held: Iterable[object] = each.__closure__ or ()
        else:
            held = () if isinstance(each, (type, ModuleType)) else gc.get_referents(each)
        new = {id(x): x for x in held if id(x) not in known}
        known |= new.keys()
        found += new.values()
    return False


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
