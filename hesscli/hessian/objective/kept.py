"""What the Python objects of a model hold, and how each is given back what it held."""

from __future__ import annotations

import sysconfig
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, lru_cache, partial
from operator import is_
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch
from torch import Tensor, nn

Restore = Callable[[], None]
_Slot = tuple[Any, object, object]  # a descriptor of a slot, whose it is, and what was in it
Held = tuple[Iterable[object], Restore | None]
"""What an object holds, and what gives it back that; None for what cannot change."""

_CONTAINERS = (OrderedDict, dict, list, set, deque)  # and their subclasses
_PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None)})
# Buffers are looked after apart.
_OTHERS = (Tensor, ModuleType, BuiltinFunctionType, torch.jit.ScriptModule)
_MOST = 1000  # objects besides those of modules: behind a logger, say, there is no end
_OF_A_MODULE = 50  # containers that any module has, and more
_HEAP_TYPE = 1 << 9  # a flag of types that Python code has made: others cannot be written to
_MISSING = object()
_CELL: Any = vars(CellType)["cell_contents"]
_CACHED = type(lru_cache(lambda: None))
_LIBRARIES = ("torch", "hesscli", "weakref", "builtins")
_INSTALLED = tuple(
    sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


def restores(root: Callable[..., object]) -> Iterator[Restore]:
    """What gives back all that is kept anywhere behind a module or a function, as it is now.

    That is the contents of dicts, lists, sets and deques, the attributes of objects and classes, and what functions
    keep: in global names that their code has, in closures, in defaults, and by `functools.lru_cache`. Such a cache
    cannot be taken apart: it is as it was where nothing new was computed for it, and empty otherwise.
    """
    parts = list(root.modules()) if isinstance(root, nn.Module) else []
    # First what modules hold themselves: behind their classes and settings lies more than is looked at.
    found: list[object] = [container for part in parts for container in _containers(part)]
    found.append(root)
    known: set[int] = set()
    most = _MOST + _OF_A_MODULE * len(parts)
    inside = set(map(id, parts))
    for each in found:
        if type(each) in _PLAIN or id(each) in known or len(known) > most:
            continue
        known.add(id(each))
        if type(each) in _CONTAINERS and not each:  # as most of a module's are
            yield each.clear  # type: ignore[attr-defined]
            continue
        if issubclass(type(each), nn.Module) and id(each) not in inside:
            most += _OF_A_MODULE
        held, restore = _held(each)
        found += held
        if restore is not None:
            yield restore


def _containers(part: nn.Module) -> Iterator[object]:
    """The attributes of a module, and what there is among them of containers: of hooks, say."""
    attributes = vars(part)
    if not isinstance(part, torch.jit.ScriptModule):
        yield attributes
        yield from (value for value in attributes.values() if type(value) in _CONTAINERS)


def _held(each: object) -> Held:
    its = type(each)  # a proxy's `__class__` may be another's, or an error
    for kind, of in _KINDS.items():
        if issubclass(its, kind):
            return of(each)
    if _foreign(its) and not issubclass(its, nn.Module):
        return (), None
    return _of_object(each)


def _of_container(each: Any) -> Held:
    """Of a dict, list, set or deque; of a subclass, by the methods that it has from there."""
    base: Any = type(each)
    own: tuple[object, ...] = ()
    if base not in _CONTAINERS:
        own = (_attributes(each), base)
        base = next(base for base in _CONTAINERS if isinstance(each, base))
    items = base.items(each) if isinstance(each, dict) else base.__iter__(each)
    before = base(items)  # `copy` would make one of the subclass, by whatever its `__init__` wants
    values = before.values() if isinstance(before, dict) else before
    return (*own, *values), partial(_refill, base, each, before)


def _of_object(each: object) -> Held:
    kind = type(each)
    slots = [
        slot
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for slot in vars(base).values()
        if isinstance(slot, MemberDescriptorType)
    ]
    before = [(slot, each, _in_slot(slot, each)) for slot in slots]
    held = (kind, _attributes(each), *(value for *_, value in before))
    return held, partial(_reslot, each, kind, before)


def _of_function(function: FunctionType) -> Held:
    cells = [(_CELL, cell, _in_slot(_CELL, cell)) for cell in function.__closure__ or ()]
    held = [value for *_, value in cells]
    if _foreign(function):  # a decorator, perhaps, of one that is not
        return held, None
    names, everywhere = _names(function.__code__), [function.__globals__]
    everywhere += [
        vars(value)
        for name in names
        if isinstance(value := function.__globals__.get(name), ModuleType) and _own(value)
    ]
    bound = [(space, {n: space.get(n, _MISSING) for n in names}) for space in everywhere]
    held += [value for _, values in bound for value in values.values()]
    held += [function.__defaults__, function.__kwdefaults__, function.__dict__]
    return held, partial(_rebind, bound, cells)


def _of_cache(cached: Any) -> Held:
    function = cached.__wrapped__
    misses = cached.cache_info().misses
    return (function,), None if _foreign(function) else partial(_forget, cached, misses)


def _of_class(kind: type) -> Held:
    if _foreign(kind) or not kind.__flags__ & _HEAP_TYPE:
        return (), None
    attributes = dict(vars(kind))
    return (*attributes.values(), *kind.__bases__), partial(_reset, kind, attributes)


def _always(*names: str) -> Callable[[object], Held]:
    """Of what cannot be given other attributes than it has."""
    return lambda each: ([getattr(each, name) for name in names], None)


_KINDS: dict[type | tuple[type, ...], Callable[[Any], Held]] = {
    _CONTAINERS: _of_container,
    tuple: lambda each: (tuple.__iter__(each), None),  # a subclass may refuse its length
    FunctionType: _of_function,
    _CACHED: _of_cache,
    MethodType: _always("__func__", "__self__"),
    (staticmethod, classmethod): _always("__func__"),
    property: _always("fget"),
    cached_property: _always("func"),
    partial: _always("func", "args", "keywords"),
    type: _of_class,
    _OTHERS: _always(),
}
"""Anything else is an object with attributes, or belongs to a library."""


def _own(module: ModuleType) -> bool:
    """Whether a module is neither installed nor built in."""
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and not file.startswith(_INSTALLED)


@lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    """The global names that some code, or code inside it, may use: those of attributes among them."""
    inner = (_names(part) for part in code.co_consts if isinstance(part, CodeType))
    return frozenset(code.co_names).union(*inner)


def _attributes(each: object) -> object:
    """Its `__dict__`, if it has one; a class may answer for what is missing, with an error of its own."""
    try:
        return object.__getattribute__(each, "__dict__")
    except AttributeError:
        return None


def _in_slot(slot: Any, each: object) -> object:
    """What is in it, whatever a property of the same name says, or a class that forbids to set it."""
    try:
        return slot.__get__(each)
    except (AttributeError, ValueError):  # nothing; of a cell, it is the other error
        return _MISSING


def _foreign(thing: type | FunctionType) -> bool:
    """Whether this belongs to PyTorch, to hesscli, or, if it is a function, to anything that was installed."""
    if str(thing.__module__).partition(".")[0] in _LIBRARIES:
        return True
    return isinstance(thing, FunctionType) and thing.__code__.co_filename.startswith(_INSTALLED)


def _forget(cached: Any, misses: int) -> None:
    """Clears a cache, if more was asked of it than it held."""
    if cached.cache_info().misses != misses:
        cached.cache_clear()


def _refill(base: Any, now: Any, before: Any) -> None:
    """Gives a container what it held, unless it holds just that."""
    same = base.__len__(now) == len(before)
    if same and isinstance(now, set):  # whose order is its own
        same = set(map(id, base.__iter__(now))) == set(map(id, before))
    elif same:
        same = all(map(is_, base.__iter__(now), before))
    if same and isinstance(now, dict):
        same = all(map(is_, base.values(now), base.values(before)))
    if not same:
        base.clear(now)
        (base.extend if isinstance(now, (list, deque)) else base.update)(now, before)


def _reset(kind: type, before: Mapping[str, object]) -> None:
    now = vars(kind)
    for name in [name for name in now if name not in before]:
        type.__delattr__(kind, name)  # its metaclass may forbid what its methods do
    for name, value in before.items():
        if now.get(name, _MISSING) is not value:
            type.__setattr__(kind, name, value)


def _reslot(each: object, kind: type, before: Iterable[_Slot]) -> None:
    if type(each) is not kind:  # a lazy module's, after its first pass
        each.__class__ = kind
    _fill(before)


def _fill(slots: Iterable[_Slot]) -> None:
    for slot, each, value in slots:
        if _in_slot(slot, each) is not value:
            if value is _MISSING:
                slot.__delete__(each)
            else:
                slot.__set__(each, value)


def _rebind(
    bound: Iterable[tuple[dict[str, object], Mapping[str, object]]], cells: Iterable[_Slot]
) -> None:
    for space, values in bound:
        for name, value in values.items():
            if space.get(name, _MISSING) is not value:
                if value is _MISSING:
                    del space[name]
                else:
                    space[name] = value
    _fill(cells)
