"""Whether the numbers that a PyTorch archive speaks of are in it.

PyTorch's readers take a tensor's size from the pickle and do not compare it with what is stored: of a storage that is
too short they go on reading behind its end, whatever the memory holds there.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from hesscli.errors import FileError
from hesscli.files.sniff import COPY_AGAIN
from hesscli.files.zip_files import read

_ITEMSIZES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    "ComplexDoubleStorage": 16,
}


def check_storages(path: Path | str) -> None:
    """Compares the sizes in the pickles of an archive, which are read without running them, with its content.

    Raises:
        FileError: a storage is missing or too short, or a pickle is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        for name, member in members.items():
            folder, _, pickled = name.rpartition("/")
            if pickled not in ("data.pkl", "constants.pkl"):
                continue
            place = f"{folder}/{pickled.removesuffix('.pkl')}"
            try:
                wanted = _storages(read(archive, member))
            except Exception as error:  # the unpickler raises nearly everything
                raise FileError(f"{path}: damaged: {name} is no pickle", COPY_AGAIN) from error
            for key, size in wanted.items():
                stored = members.get(f"{place}/{key}")
                found = None if stored is None else stored.file_size
                if found is None or found < size:
                    raise FileError(
                        f"{path}: damaged: {place}/{key} should hold {size} bytes, "
                        f"{'it is missing' if found is None else f'{found} are there'}",
                        COPY_AGAIN,
                    )


def _storages(content: bytes) -> dict[str, int]:
    """How many bytes each storage has, by its key."""
    reader = _Inert(io.BytesIO(content))
    reader.load()
    return reader.storages


class _Nothing:
    """Stands for whatever the pickle would make. Does nothing, and takes everything."""

    named = ""

    def __new__(cls, *_: object, **__: object) -> _Nothing:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *_: object, **__: object) -> _Nothing:
        return _Nothing()

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        pass

    def extend(self, items: object) -> None:
        pass

    def add(self, item: object) -> None:
        pass


class _Inert(pickle._Unpickler):
    """Follows a pickle without importing or calling anything of it.

    It is the unpickler in Python, as the one in C refuses what TorchScript writes of an enum: a call whose arguments
    are no tuple, but the value itself.
    """

    stack: list[Any]

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        stands = type("_Nothing", (_Nothing,), {"named": name})
        # A class within a class is what getattr gives, and is to be a class.
        return (lambda *_: stands) if name == "getattr" else stands

    def persistent_load(self, pid: Any) -> _Nothing:
        # ("storage", its class, its key, its device, its number of elements)
        _, kind, key, _, count = pid
        size = int(count) * _ITEMSIZES.get(getattr(kind, "named", ""), 1)
        self.storages[str(key)] = max(size, self.storages.get(str(key), 0))
        return _Nothing()

    def load_reduce(self) -> None:
        arguments, stack = self.stack.pop(), self.stack
        stack[-1] = stack[-1](*(arguments if isinstance(arguments, tuple) else ()))

    dispatch: ClassVar[Any] = pickle._Unpickler.dispatch | {pickle.REDUCE[0]: load_reduce}
