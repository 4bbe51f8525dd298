"""Reading a pickle without importing or calling anything of it. Importing this loads neither torch nor numpy."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

_ITEMSIZES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    "ComplexDoubleStorage": 16,
}


class Thing:
    """Stands for whatever a pickle would make, by a class or a function. Does nothing, and takes everything."""

    named = ""  # the name of what would make it
    arguments: tuple[object, ...]  # of that
    attributes: dict[str, object]  # that it would get

    def __new__(cls, *arguments: object, **_: object) -> Thing:
        made = super().__new__(cls)
        made.arguments, made.attributes = arguments, {}
        return made

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *_: object, **__: object) -> Thing:
        return Thing()

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.attributes = state

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        pass


def stand_in(name: str) -> Callable[..., object]:
    """What stands for a class or a function of this name."""
    made = type("Thing", (Thing,), {"named": name})
    # A class within a class is what getattr gives, and is to be a class.
    return (lambda *_: made) if name == "getattr" else made


class InertPickle(pickle._Unpickler):
    """Reads a pickle of PyTorch's: containers and plain values as they are, a `Thing` for all else.

    It is the unpickler in Python, as the one in C refuses what TorchScript writes of an enum: a call whose arguments
    are no tuple, but the value itself.
    """

    stack: list[Any]

    def __init__(self, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled))
        self.storages: dict[str, int] = {}  # bytes of each that tensors lie in, by its key
        self.content = self.load()

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return stand_in(name)

    def persistent_load(self, pid: Any) -> Thing:
        # ("storage", its class, its key, its device, its number of elements)
        _, kind, key, _, count = pid
        size = int(count) * _ITEMSIZES.get(getattr(kind, "named", ""), 1)
        self.storages[str(key)] = max(size, self.storages.get(str(key), 0))
        return Thing()

    def load_reduce(self) -> None:
        arguments, stack = self.stack.pop(), self.stack
        stack[-1] = stack[-1](*(arguments if isinstance(arguments, tuple) else ()))

    dispatch: ClassVar[Any] = pickle._Unpickler.dispatch | {pickle.REDUCE[0]: load_reduce}
