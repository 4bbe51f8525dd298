"""The named arrays of a data file, as tensors on the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import torch

from hesscli.errors import FileError
from hesscli.files.safetensors_files import load_safetensors
from hesscli.files.sniff import Kind, kind_of, unsupported
from hesscli.files.torch_files import (
    NeedsPickleError,
    load_weights_only,
    pickled_objects,
    reading,
    verify_checksums,
)

_SAVE = "np.savez('data.npz', x=x, y=y)"
_SAVE_TORCH = "torch.save({'x': x, 'y': y}, 'data.pt')"
_LARGEST = np.iinfo(np.int64).max
# torch knows these by name only: it can neither index with them nor compute on them.
_UNSIGNED = {np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.uint64)}


def load_arrays(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The arrays that are numbers, in file order; and the others, with the reason to skip each.

    Raises:
        UsageError: there is no such file.
        FileError: the file is damaged, of another kind, or holds Python objects.
    """
    kind = kind_of(path)
    if kind == "npz":
        return _npz(path)
    if kind == "safetensors":
        return _tensors(load_safetensors(path))
    if kind in ("torch_zip", "torch_legacy"):
        return _torch(path, kind)
    hints: dict[Kind, str] = {
        "npy": f"give it a name: {_SAVE}",
        "torchscript": "the data comes second: hesscli compute MODEL DATA",
        "exported": "the data comes second: hesscli compute MODEL DATA",
    }
    raise unsupported(
        path, kind, "data as .npz, .safetensors or a dict of tensors in .pt", hints.get(kind, _SAVE)
    )


def _npz(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    arrays: dict[str, torch.Tensor] = {}
    skipped: dict[str, str] = {}
    with reading(path, "npz"), np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            try:
                array = archive[name]
            except ValueError as error:
                if "allow_pickle" not in str(error):
                    raise
                raise FileError(
                    f"{path}: array {name} holds Python objects, which run code when loaded",
                    "convert it to numbers before saving: np.asarray(list_of_rows, dtype=float)",
                ) from error
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufc":
                what = array.dtype.name if isinstance(array, np.ndarray) else "a file"
                skipped[name] = f"not numbers ({what})"
            elif array.dtype.itemsize > (16 if array.dtype.kind == "c" else 8):
                skipped[name] = f"wider than any torch number ({array.dtype.name})"
            elif array.dtype == np.uint64 and (array > _LARGEST).any():
                skipped[name] = "integers too large for int64"
            else:
                arrays[name] = _tensor(array)
    return arrays, skipped


def _tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
    # Native byte order and C order. Not np.ascontiguousarray: it makes a 0-d array 1-d.
    plain = array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
    if plain.dtype in _UNSIGNED:
        plain = plain.astype(np.int64)
    return torch.from_numpy(plain if plain.flags.writeable else plain.copy())


def _torch(
    path: str | os.PathLike[str], kind: Kind
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if kind == "torch_zip":
        verify_checksums(path)
    try:
        with reading(path, kind):
            content = load_weights_only(path)
    except NeedsPickleError as error:
        raise pickled_objects(path, error.name, _SAVE_TORCH) from error
    if isinstance(content, Mapping):
        return _tensors({str(name): value for name, value in content.items()})
    if isinstance(content, (tuple, list)) and len(content) == 2:
        return _tensors(dict(zip(("inputs", "targets"), content, strict=True)))
    raise FileError(
        f"{path}: holds a {type(content).__name__}; expected a dict or a pair of tensors",
        _SAVE_TORCH,
    )


def _tensors(content: Mapping[str, object]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    arrays: dict[str, torch.Tensor] = {}
    skipped: dict[str, str] = {}
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            skipped[name] = f"not a tensor ({type(value).__name__})"
        elif value.layout is not torch.strided or value.is_quantized or value.is_nested:
            skipped[name] = "sparse, nested or quantised"
        else:
            array = value.detach().contiguous()
            wide = array.dtype in (torch.uint16, torch.uint32)
            arrays[name] = array.to(torch.int64) if wide else array
    return arrays, skipped
