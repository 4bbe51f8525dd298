"""The names in a file, read without a library that takes time to load, for completion. Any error may come of it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hesscli.files.hessians.result_names import index_path, is_index
from hesscli.files.inert_pickle import InertPickle, Thing
from hesscli.files.safetensors_header import parse

_LONGEST = 1 << 24  # bytes of an index or a pickle that are read


def blocks_in(path: Path) -> list[str]:
    """The blocks of a Hessian, in one file or in several with an index."""
    index = path if is_index(path) else index_path(path)
    if path != index and path.exists():
        metadata = _header(path)["__metadata__"]
    else:
        with index.open("rb") as file:
            metadata = json.loads(file.read(_LONGEST))["metadata"]
    return [block["name"] for block in json.loads(metadata["hesscli"])["blocks"]]


def parameters_in(model: Path) -> list[str]:
    """The parameters in a model file, if it holds weights by their names."""
    if not zipfile.is_zipfile(model):
        return [name for name in _header(model) if name != "__metadata__"]
    with zipfile.ZipFile(model) as archive:
        names = archive.namelist()
        (data,) = [name for name in names if name.endswith("/data.pkl")]
        with archive.open(data) as file:
            content = InertPickle(file.read(_LONGEST)).content
    script = any(name.endswith("/constants.pkl") for name in names)
    return list(_of_script(content, "") if script else _of_weights(content))


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return parse(file)[0]


def _is_tensor(value: object) -> bool:
    return isinstance(value, Thing) and value.named.startswith("_rebuild_")


def _of_script(module: Thing, prefix: str) -> Iterator[str]:
    """The parameters of a TorchScript module. Its buffers are tensors too, but not trained."""
    for name, value in module.attributes.items():
        if not isinstance(value, Thing):
            continue
        if not _is_tensor(value):
            yield from _of_script(value, f"{prefix}{name}.")
        elif value.arguments[4:5] == (True,):  # storage, offset, shape, strides, requires_grad
            yield prefix + name


def _of_weights(content: Any) -> Iterator[str]:
    """The weights in a state dict, or in those of a checkpoint."""
    if not isinstance(content, dict):
        return
    found = [name for name, value in content.items() if _is_tensor(value)]
    if found:
        yield from found
        return
    for part in content.values():
        if isinstance(part, dict):
            yield from (name for name, value in part.items() if _is_tensor(value))
