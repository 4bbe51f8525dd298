"""Reading PyTorch's own files: quietly, without running code in them, with one clean error line."""

from __future__ import annotations

import logging
import pickle
import pickletools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch.serialization import SourceChangeWarning

from hesscli.errors import FileError, HesscliError, ResourceError, is_out_of_memory
from hesscli.files.sniff import COPY_AGAIN, Kind
from hesscli.files.zip_files import check_storages, check_zip, stored

_EXPORT_LOGGERS = (
    "torch.export",
    "torch.export.pt2_archive._package",
    "torch._export.serde.serialize",
)


_DAMAGED = "it is damaged or cut off"
_DAMAGE = re.compile(
    "deserializing header|PytorchStreamReader|EOF|Ran out of input|Weights only load failed"
)
# A class, in what the weights-only unpickler says.
_REFUSED = re.compile(
    r"(?:Unsupported global:|Trying to load unsupported) GLOBAL (\S+)"
    r"|(?:Trying to call reduce for unrecognized function"
    r"|Can only (?:create new object for \S+ or classes allowlisted via \S+|build .+) but got) (.+)"
)
_NESTED = "torch._utils._rebuild_nested_tensor"
"""What makes a nested tensor; torch's weights-only reader refuses it from 2.15 on."""


class NeedsPickleError(Exception):
    """A file holds Python objects, of this name, that only a full unpickling, which runs code, can restore."""


@contextmanager
def reading(path: Path | str, kind: Kind, pickle_hint: str | None = None) -> Iterator[None]:
    """Turns whatever a reader raises on a broken file into one line.

    Readers raise nearly everything on broken files, `KeyError` and `SyntaxError` included, so a
    narrower `except` would let tracebacks through.

    Args:
        pickle_hint: what to do about Python objects in it; None to leave them to the caller.

    Raises:
        FileError: the file could not be read, or not without running code.
        NeedsPickleError: such objects, without a hint.
        ResourceError: the memory did not suffice.
    """
    try:
        yield
    except HesscliError:
        raise
    except NeedsPickleError as error:
        if pickle_hint is None:
            raise
        if str(error) == _NESTED:  # of no use, whoever reads it
            raise FileError(
                f"{path}: holds a nested tensor; expected dense ones",
                "torch.nested.to_padded_tensor(nested, 0.0)",
            ) from error
        raise FileError(
            f"{path}: holds pickled Python objects ({error}), which run code when loaded",
            pickle_hint,
        ) from error
    except Exception as error:
        if is_out_of_memory(error) or "allocate memory" in str(error):
            raise ResourceError(f"{path}: not enough memory to load it") from error
        reason = _reason(error, kind)
        raise FileError(
            f"{path}: {kind.value} that cannot be read: {reason}",
            COPY_AGAIN
            if reason == _DAMAGED
            else "save it again, with the versions of its libraries that are installed here",
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch's talk about itself from the user while a file is read.

    `torch.export.load` logs the real error with its traceback and then raises one that says
    "check the warnings above"; here the logged error is raised instead.
    """
    logged: list[BaseException] = []

    def swallow(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            logged.append(record.exc_info[1])
        return False

    for name in _EXPORT_LOGGERS:
        logging.getLogger(name).addFilter(swallow)
    try:
        with warnings.catch_warnings():
            # The user of a saved model cannot change it; but for a class that is another than when it was saved.
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", SourceChangeWarning)
            yield
    except Exception as error:
        if logged:
            raise logged[-1] from error
        raise
    finally:
        for name in _EXPORT_LOGGERS:
            logging.getLogger(name).removeFilter(swallow)


def read_torch_file(path: Path | str, kind: Kind, hint: str | None) -> object:
    """The tensors and plain containers of a file of `torch.save`, on the CPU, mapped if nothing is compressed.

    Never runs code of the file.

    Args:
        kind: `Kind.TORCH_ZIP` or `Kind.TORCH_LEGACY`.
        hint: as in `reading`, which has the errors too.
    """
    mapped = kind is Kind.TORCH_ZIP
    if mapped:
        check_zip(path)
        check_storages(path)
        mapped = stored(path)
    with reading(path, kind, hint):
        return load_weights_only(path, mapped)


def load_weights_only(source: Path | str | BinaryIO, mapped: bool = False) -> object:
    """The same of a file, or one inside another, whose content was checked; NeedsPickleError for objects in it."""
    try:
        with quiet():
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        name = _refused_class(str(error))
        if name is None:
            raise
        if isinstance(source, (Path, str)):
            _refuse_half_names(source)
        raise NeedsPickleError(name) from error


def _refuse_half_names(path: Path | str) -> None:
    """Tells a file that was cut off within the name of a class, by an EOFError, from one that holds that class."""
    with open(path, "rb") as file:
        if file.read(2) == b"PK":  # a zip file that was cut off has no listing, so it was refused
            return
        file.seek(0)
        try:
            for _ in range(4):  # magic number, protocol, machine, content
                for _ in pickletools.genops(file):
                    pass
        except ValueError as error:
            raise EOFError("pickle without an end") from error


def _refused_class(message: str) -> str | None:
    """The class torch's weights-only unpickler refused, from its message; None if no class did."""
    if "Unsupported operand 149" in message:  # FRAME, the first opcode that only protocol 4 has
        return "pickle protocol 4"
    match = _REFUSED.search(message)
    return (match[1] or match[2]).strip() if match else None


def _reason(error: Exception, kind: Kind) -> str:
    text = str(error).strip()
    # These two come without a check of their content beforehand, and their readers then stumble
    # over damage wherever it is.
    unchecked = kind in (Kind.TORCH_LEGACY, Kind.NPZ)
    cut = isinstance(error, (EOFError, UnicodeDecodeError))
    if unchecked or cut or not text or _DAMAGE.search(text):
        return _DAMAGED
    line = text.splitlines()[0].strip().rstrip(":.")
    if len(line) > 200:
        line = line[:197] + "..."
    return line if isinstance(error, RuntimeError) else f"{type(error).__name__}: {line}"
