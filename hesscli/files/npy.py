"""NumPy's arrays: mapped from the file where they lie in it as they are, so that no memory is taken."""

from __future__ import annotations

import io
import math
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy_format

from hesscli.errors import FileError, ResourceError
from hesscli.files.resources import available_memory
from hesscli.files.sniff import COPY_AGAIN, Kind
from hesscli.files.torch_files import reading
from hesscli.files.unusable import NamedArrays, Unusable
from hesscli.files.zip_files import check_zip

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]

_LOCAL_HEADER = 30  # bytes of a zip member's own header before its name


def load_npy(path: Path | str) -> NamedArrays:
    """The array of an `.npy` file by the file's name; or, in its place, why it cannot be used.

    Raises:
        FileError: the file is damaged, or its array holds Python objects.
    """
    with reading(path, Kind.NPY), open(path, "rb") as file:
        name, size = Path(path).stem, os.fstat(file.fileno()).st_size
        return {name: _array(path, name, file, size, 0)}


def load_npz(path: Path | str) -> NamedArrays:
    """The arrays of an `.npz` file by name; or, in an array's place, why it cannot be used.

    Raises:
        FileError: the file is damaged, or an array holds Python objects.
        ResourceError: what is compressed in it does not fit into the memory.
    """
    check_zip(path, by_case=True)
    arrays: NamedArrays = {}
    with reading(path, Kind.NPZ), zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise FileError(f"{path}: holds two arrays called {name}")
            if name == member.filename:
                arrays[name] = Unusable("not numbers (a file)")
            elif member.compress_type == zipfile.ZIP_STORED:
                start = _content(file, member)
                file.seek(start)
                arrays[name] = _array(path, name, file, member.file_size, start)
            else:
                content = io.BytesIO(archive.read(member))
                arrays[name] = _array(path, name, content, member.file_size, None)
    return arrays


def _content(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: after its own header, whose length may differ from the listing's."""
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER)
    return (
        member.header_offset
        + _LOCAL_HEADER
        + int.from_bytes(header[26:28], "little")
        + int.from_bytes(header[28:30], "little")
    )


def _array(
    path: Path | str, name: str, file: BinaryIO, size: int, start: int | None
) -> torch.Tensor | Unusable:
    """The array whose `size` bytes begin here, at `start` of the file on disk if it is one."""
    begin = file.tell()
    version = npy_format.read_magic(file)
    first = version == (1, 0)
    read = npy_format.read_array_header_1_0 if first else npy_format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise FileError(
            f"{path}: array {name} holds Python objects, which run code when loaded",
            "convert it to numbers before saving: np.asarray(list_of_rows, dtype=float)",
        )
    header = file.tell() - begin
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != size - header:
        raise FileError(
            f"{path}: array {name} is damaged: {dtype} {list(shape)} does not take the "
            f"{size - header} bytes that are there",
            COPY_AGAIN,
        )
    if dtype.kind not in "biufc":
        return Unusable(f"not numbers ({dtype.name})")
    if dtype.itemsize > (16 if dtype.kind == "c" else 8):
        return Unusable(f"wider than any torch number ({dtype.name})")
    array: Array
    if start is None:
        array = np.frombuffer(file.read(), dtype)
    elif size == header:  # nothing can be mapped
        array = np.empty(0, dtype)
    else:
        # Read only: the kernel refuses to map more than the memory for writing.
        array = np.memmap(path, dtype, "r", start + header, (math.prod(shape),))
    array = array.reshape(shape, order="F" if fortran else "C")
    return tensor(path, array)


def tensor(path: Path | str, array: Array) -> torch.Tensor | Unusable:
    """The array as a tensor that must not be written to, without a copy where torch knows its type and byte order.

    Or why it cannot be one; ResourceError where there is no memory for the copy.
    """
    native = array.dtype.newbyteorder("=")
    widened = native.kind == "u" and native.itemsize > 1  # see `indexable`
    needed = array.size * (8 if widened else native.itemsize)
    if (widened or array.dtype != native) and needed > available_memory():
        raise ResourceError(
            f"{path}: its {array.dtype.name} must be converted in memory, which does not suffice",
            "save the array in a type that torch computes with: x.astype(np.float32)",
        )
    with warnings.catch_warnings():  # of memory that may not be written to: batches are copies
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return indexable(torch.from_numpy(array.astype(native, copy=False)))


def indexable(array: torch.Tensor) -> torch.Tensor | Unusable:
    """torch knows unsigned integers by name only: it can neither index with them nor compute on them."""
    if array.dtype not in (torch.uint16, torch.uint32, torch.uint64):
        return array
    wide = array.to(torch.int64)
    return Unusable("integers too large for int64") if wide.lt(0).any() else wide
