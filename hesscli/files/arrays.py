"""The named arrays of a data file, as tensors on the CPU, mapped where the file allows it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hesscli.errors import FileError, NumericalError, UsageError
from hesscli.files.arrow_files import dataset_files, load_arrow, load_dataset, load_parquet
from hesscli.files.csv_files import load_csv
from hesscli.files.npy import indexable, load_npy, load_npz
from hesscli.files.safetensors_files import map_safetensors
from hesscli.files.sniff import Kind, kind_of, unsupported
from hesscli.files.torch_files import read_torch_file
from hesscli.files.unusable import DECIMALS, NamedArrays, Unusable
from hesscli.texts import dtype_name

_SAVE = "np.savez('data.npz', x=x, y=y)"
_SECOND = "the data comes second: hesscli compute MODEL DATA"
_SAVE_TORCH = "torch.save({'x': x, 'y': y}, 'data.pt')"
_EXPECTED = "data as .npz, .npy, .safetensors, .csv, .parquet, .arrow, a dict of tensors in .pt or a datasets folder"


@dataclass(frozen=True)
class Arrays:
    """What a data file holds; or arrays in memory, which have no files."""

    numbers: dict[str, torch.Tensor]  # the arrays that are numbers, in file order
    skipped: dict[str, Unusable]  # the others
    files: tuple[Path, ...] = ()  # those that were read, whose content the SHA-256 is of
    columns: bool = False  # whether the arrays are the columns of a table
    notes: tuple[str, ...] = ()  # what was inferred, one line each

    def __str__(self) -> str:
        return "data"  # what errors call those in memory


def load_arrays(path: Path | str, swapped: str = _SECOND) -> Arrays:
    """Reads a data file or folder, told by its content.

    Args:
        swapped: the hint where the file is a model.

    Raises:
        UsageError: there is no such file.
        FileError: the file is damaged, of another kind, or holds Python objects.
        ResourceError: it does not fit into the memory.
    """
    kind, notes = kind_of(path), tuple[str, ...]()
    if kind is Kind.TEXT:
        found, notes = load_csv(path)
        _demand_numbers(path, found)
    elif kind in _READERS:
        found = _READERS[kind](path)
    else:
        raise _unreadable(path, kind, swapped)
    return Arrays(*_told_apart(found), _files(path, kind), kind in _TABLES, notes)


def in_memory(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    """Named tensors on the CPU, as those of a file."""
    return Arrays(*_told_apart(_tensors(tensors)))


def _told_apart(found: NamedArrays) -> tuple[dict[str, torch.Tensor], dict[str, Unusable]]:
    """The arrays that are numbers, and the others."""
    numbers = {name: value for name, value in found.items() if not isinstance(value, Unusable)}
    skipped = {name: value for name, value in found.items() if isinstance(value, Unusable)}
    return numbers, skipped


def describe(array: torch.Tensor) -> str:
    """dtype and shape, as in `float32 [1, 3]`."""
    return f"{dtype_name(array.dtype)} {list(array.shape)}"


def _demand_numbers(path: Path | str, table: NamedArrays) -> None:
    """Refuses a text without a column of numbers."""
    unusable = [column for column in table.values() if isinstance(column, Unusable)]
    if len(unusable) == len(table):
        decimals = any(column.remedy == DECIMALS for column in unusable)
        hint = DECIMALS if decimals else "a table wants columns of numbers: x1,x2,y"
        raise unsupported(path, Kind.TEXT, _EXPECTED, hint)


def _unreadable(path: Path | str, kind: Kind, swapped: str) -> FileError | UsageError:
    if kind is Kind.DATASET_SPLITS:
        splits = sorted(entry.name for entry in Path(path).iterdir() if entry.is_dir())
        first = os.path.join(path, splits[0] if splits else "SPLIT")
        return UsageError(
            f"{path}: a Hugging Face datasets folder of several splits: {', '.join(splits)}",
            f"hesscli compute MODEL {shlex.quote(first)}",
        )
    of_model = kind in (Kind.TORCHSCRIPT, Kind.EXPORTED, Kind.TRANSFORMERS, Kind.ONNX)
    hint = swapped if of_model else _SAVE
    return unsupported(path, kind, _EXPECTED, hint)


def _files(path: Path | str, kind: Kind) -> tuple[Path, ...]:
    """Those that are read."""
    if kind is Kind.NPY_FOLDER:
        return tuple(sorted(Path(path).glob("*.npy")))
    return tuple(dataset_files(path)) if kind is Kind.DATASET else (Path(path),)


def _load_npy_folder(folder: Path | str) -> NamedArrays:
    found: NamedArrays = {}
    for file in _files(folder, Kind.NPY_FOLDER):
        if (kind := kind_of(file)) is not Kind.NPY:
            raise unsupported(file, kind, "an npy array", "np.save('x.npy', x)")
        found |= load_npy(file)
    return found


def _load_torch(path: Path | str) -> NamedArrays:
    content = read_torch_file(path, kind_of(path), _SAVE_TORCH)
    if isinstance(content, Mapping):
        return _tensors({str(name): value for name, value in content.items()})
    if isinstance(content, (tuple, list)) and len(content) == 2:
        return _tensors(dict(zip(("inputs", "targets"), content, strict=True)))
    raise FileError(
        f"{path}: holds a {type(content).__name__}; expected a dict or a pair of tensors",
        _SAVE_TORCH,
    )


def _tensors(content: Mapping[str, object]) -> NamedArrays:
    found: NamedArrays = {}
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            found[name] = Unusable(f"not a tensor ({type(value).__name__})")
        elif value.layout is not torch.strided or value.is_quantized or value.is_nested:
            found[name] = Unusable("sparse, nested or quantised")
        elif value.dtype.is_floating_point and value.dtype.itemsize == 1:
            kind = dtype_name(value.dtype)
            found[name] = Unusable(f"of a type that nothing computes with ({kind})")
        elif value.is_meta:
            found[name] = Unusable("on the meta device, which holds no values")
        else:
            found[name] = indexable(value.detach())
    return found


_READERS: dict[Kind, Callable[[Path | str], NamedArrays]] = {
    Kind.NPZ: load_npz,
    Kind.NPY: load_npy,
    Kind.NPY_FOLDER: _load_npy_folder,
    Kind.SAFETENSORS: map_safetensors,
    Kind.TORCH_ZIP: _load_torch,
    Kind.TORCH_LEGACY: _load_torch,
    Kind.PARQUET: load_parquet,
    Kind.ARROW: load_arrow,
    Kind.DATASET: load_dataset,
}
_TABLES = (Kind.TEXT, Kind.PARQUET, Kind.ARROW, Kind.DATASET)


_STEP = 1 << 20  # numbers looked at together, which takes nine bytes and more for each


def not_finite(name: str, array: torch.Tensor) -> str | None:
    """Where an array holds NaN or infinity; in parts, so that one larger than the memory passes through it."""
    if not (array.is_floating_point() or array.is_complex()):
        return None
    rows = array if array.dim() else array.unsqueeze(0)
    step = max(1, _STEP * len(rows) // max(1, rows.numel()))
    count, where = 0, list[int]()
    for start in range(0, len(rows), step):
        bad = ~torch.isfinite(rows[start : start + step])
        found = int(bad.sum())
        if found and not count:
            row, *others = bad.nonzero()[0].tolist()
            where = [start + row, *others][: array.dim()]
        count += found
    if not count:
        return None
    places = f"{count} place{'s' if count > 1 else ''}, the first at {where}"
    return f"array {name} ({describe(array)}) holds NaN or infinity in {places}"


def check_finite(data: Path | Arrays, name: str, array: torch.Tensor) -> None:
    """Refuses NaN and infinity."""
    found = not_finite(name, array)
    if found is not None:
        raise not_finite_error(data, name, found)


def not_finite_error(data: Path | Arrays, name: str, found: str) -> NumericalError:
    return NumericalError(
        f"{data}: {found}", f"drop these samples, or replace the values: np.nan_to_num({name})"
    )
