"""Reading safetensors files."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from hesscli.errors import FileError
from hesscli.files.hessians.result_names import index_of_shard
from hesscli.files.npy import tensor
from hesscli.files.safetensors_header import parse
from hesscli.files.sniff import Kind
from hesscli.files.torch_files import reading
from hesscli.files.unusable import NamedArrays, Unusable

_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<i2", "C64": "<c8", "BOOL": "?",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1",
}  # fmt: skip
"""What NumPy can read the bytes as; it knows no bfloat16."""


def load_safetensors(path: Path | str) -> dict[str, torch.Tensor]:
    """All tensors of the file, on the CPU, in the order in which they lie in it; FileError: damaged, or a Hessian."""
    with reading(path, Kind.SAFETENSORS), safe_open(path, framework="pt") as file:
        _refuse_hessian(path, file)
        return {name: file.get_tensor(name) for name in file.offset_keys()}


def map_safetensors(path: Path | str) -> NamedArrays:
    """The same without reading them: the tensors lie in the file, and must not be written to."""
    with reading(path, Kind.SAFETENSORS):
        with safe_open(path, framework="np") as file:  # checks the header, offsets included
            _refuse_hessian(path, file)
            names = file.offset_keys()
        with open(path, "rb") as raw:
            header, start = parse(raw)
        return {name: _mapped(path, header[name], start) for name in names}


def _mapped(path: Path | str, entry: dict[str, Any], start: int) -> torch.Tensor | Unusable:
    if entry["dtype"] not in _TYPES:
        return Unusable(f"of a type that nothing computes with ({entry['dtype']})")
    dtype, (first, last) = np.dtype(_TYPES[entry["dtype"]]), entry["data_offsets"]
    count = (last - first) // dtype.itemsize
    # An empty one cannot be mapped.
    array = np.memmap(path, dtype, "r", start + first, (count,)) if count else np.empty(0, dtype)
    found = tensor(path, array.reshape(entry["shape"]))
    if entry["dtype"] == "BF16" and isinstance(found, torch.Tensor):
        return found.view(torch.bfloat16)
    return found


def _refuse_hessian(path: Path | str, file: Any) -> None:
    document = (file.metadata() or {}).get("hesscli")
    # Products are keyed and shaped as the parameters.
    if document is None or '"hesscli.hvp/' in document:
        return
    expected = "expected a model, data or vectors"
    for command in ("eigen", "density"):
        if f'"hesscli.{command}/' in document:
            raise FileError(f"{path}: what hesscli {command} wrote; {expected}")
    opens = index_of_shard(Path(path)) or Path(path)
    raise FileError(
        f"{path}: a Hessian that hesscli wrote; {expected}",
        f"hesscli show {shlex.quote(str(opens))}",
    )
