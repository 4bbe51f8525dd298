"""Reading what Apache Arrow writes: `.parquet` and `.arrow` files, and Hugging Face `datasets` folders."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hesscli.errors import FileError, ResourceError, UsageError
from hesscli.files.npy import tensor
from hesscli.files.resources import available_memory
from hesscli.files.sniff import Kind, file_beside
from hesscli.files.torch_files import reading
from hesscli.files.unusable import CODES, ROWS, NamedArrays, Unusable


def load_parquet(path: Path | str) -> NamedArrays:
    """The columns by name; or, in a column's place, why it cannot be used.

    Raises:
        UsageError: pyarrow is not installed, or does not load.
        FileError: the file is damaged.
        ResourceError: it does not fit into the memory.
    """
    _pyarrow(path)
    import pyarrow.parquet as parquet

    with reading(path, Kind.PARQUET), parquet.ParquetFile(path, memory_map=True) as file:
        groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
        _demand_room(path, sum(group.total_byte_size for group in groups))
        return _columns(path, file.read())


def load_arrow(path: Path | str) -> NamedArrays:
    """The same of an Arrow file or stream, mapped where it is in one part."""
    with reading(path, Kind.ARROW):
        return _columns(path, _mapped(path))


def dataset_files(folder: Path | str) -> list[Path]:
    """The Arrow files of a folder that `datasets.Dataset.save_to_disk` wrote, in their order.

    Raises:
        FileError: the folder is not what was written, or it names files outside of it.
    """
    state = Path(folder, "state.json")
    with reading(state, Kind.TEXT):
        names = [str(entry["filename"]) for entry in json.loads(state.read_text())["_data_files"]]
    return [
        file_beside(state, name, "save it again: dataset.save_to_disk('data')") for name in names
    ]


def load_dataset(folder: Path | str) -> NamedArrays:
    """The columns of a `datasets` folder, mapped where they lie in one file; with the errors of `load_parquet`."""
    arrow = _pyarrow(folder)
    tables = [_mapped(file) for file in dataset_files(folder)]
    with reading(folder, Kind.DATASET):
        return _columns(folder, arrow.concat_tables(tables))


def _mapped(path: Path | str) -> Any:
    """The table in an Arrow file, or in a stream, which is what `datasets` writes."""
    arrow = _pyarrow(path)
    with reading(path, Kind.ARROW):
        file = arrow.memory_map(str(path))
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        return (arrow.ipc.open_file if is_file else arrow.ipc.open_stream)(file).read_all()


def _demand_room(path: Path | str, needed: int) -> None:
    if needed > (free := available_memory()):
        raise ResourceError(
            f"{path}: unpacks to {needed} bytes; {free} bytes of memory are free",
            "save it as .npy files, which are read in parts: np.save('x.npy', x)",
        )


def _pyarrow(path: Path | str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:  # not there; or too new for NumPy 1, which pip does not know
        raise UsageError(
            f"{path}: reading it needs pyarrow: {error}", "pip install --upgrade pyarrow numpy"
        ) from error
    return pyarrow


def _columns(path: Path | str, table: Any) -> NamedArrays:
    names: Sequence[str] = table.column_names
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise FileError(f"{path}: two columns are called {twice[0]!r}", "give them different names")
    parts = (column.nbytes for column in table.columns if column.num_chunks > 1)
    _demand_room(path, max(parts, default=0))  # to put them into one
    return {
        name: _column(path, table.column(place).combine_chunks())
        for place, name in enumerate(names)
    }


def _column(path: Path | str, values: Any) -> torch.Tensor | Unusable:
    import pyarrow.compute
    from pyarrow import types

    if hasattr(values, "chunks"):  # combine_chunks of several that are too large for one
        return Unusable("too large for one Arrow array")
    shape = [len(values)]
    while True:
        kind = values.type
        if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
            if values.null_count and not types.is_floating(kind):
                values = values.cast("float64", safe=False)  # what is missing is NaN, as in a .csv
            return tensor(path, values.to_numpy(zero_copy_only=False).reshape(shape))
        if values.null_count:
            return Unusable(f"missing in {values.null_count} of {len(values)} places", ROWS)
        if hasattr(values, "storage"):  # an extension: Array2D and the like of `datasets`
            values = values.storage
        elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            lengths = pyarrow.compute.unique(pyarrow.compute.list_value_length(values))
            if len(lengths) > 1:
                return Unusable("rows of different lengths: pad them")
            shape.append(lengths[0].as_py() if len(lengths) else 0)
            values = values.flatten()
        else:
            words = (types.is_string, types.is_large_string, types.is_dictionary)
            remedy = CODES if any(is_of(kind) for is_of in words) else ""
            return Unusable(f"not numbers ({kind})", remedy)
