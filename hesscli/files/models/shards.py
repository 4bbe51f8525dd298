"""Weights that lie in several files, with an index; and Hugging Face's model folders."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import torch

from hesscli.errors import FileError
from hesscli.files.safetensors_files import load_safetensors
from hesscli.files.sniff import Kind, file_beside, kind_of, unsupported
from hesscli.files.torch_files import read_torch_file, reading
from hesscli.texts import listed

_SAVE = "model.save_pretrained('folder')"
_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def load_folder(folder: Path) -> tuple[dict[str, torch.Tensor], tuple[Path, ...]]:
    """The weights of a Hugging Face folder, and the files that say what the model is.

    Raises:
        UsageError: a file is missing.
        FileError: none holds the weights, or more than one may do; or it is damaged, of another kind, or unsafe.
    """
    path = _weights_in(folder)
    if kind_of(path) is Kind.WEIGHTS_INDEX:
        weights, files = load_shards(path)
    else:
        weights, files = load_part(path), (path,)
    config = folder / "config.json"
    return weights, (*files, config) if config.is_file() else files


def _weights_in(folder: Path) -> Path:
    """The file that holds the weights, or their index."""
    for name in _NAMES:
        if (path := folder / name).exists():
            return path
    found = sorted(folder.glob("*.index.json")) or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names = listed(path.name for path in found) or "none"
        raise FileError(f"{folder}: holds {names}; expected one file of weights", _SAVE)
    return found[0]


def load_shards(index: Path) -> tuple[dict[str, torch.Tensor], tuple[Path, ...]]:
    """All weights that an index lists, and the files they came from, the index first.

    Raises:
        UsageError: a file is missing.
        FileError: the index names files outside of its folder, or weights that are not where it says.
    """
    with reading(index, Kind.WEIGHTS_INDEX):
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = list(dict.fromkeys(places.values()))
    files = [file_beside(index, name, _SAVE) for name in names]
    content = {path.name: load_part(path) for path in files}
    weights = {}
    for weight, name in places.items():
        tensor = content[name].get(weight)
        if tensor is None:
            raise FileError(
                f"{index}: says that {weight} is in {name}, where it is not",
                "copy or download all of its files again",
            )
        weights[weight] = tensor
    return weights, (index, *files)


def index_beside(part: Path) -> Path | None:
    """The index in the folder of a file that lists this file."""
    for index in sorted(part.parent.glob("*.index.json")):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            if part.name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values():
                return index
    return None


def load_part(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a file that holds nothing else; FileError: damaged, of another kind, or unsafe."""
    kind = kind_of(path)
    if kind is Kind.SAFETENSORS:
        return load_safetensors(path)
    if kind not in (Kind.TORCH_ZIP, Kind.TORCH_LEGACY):
        raise unsupported(path, kind, "weights in safetensors or a torch.save file", _SAVE)
    content = read_torch_file(path, kind, _SAVE)
    if not isinstance(content, dict):
        raise FileError(f"{path}: holds a {type(content).__name__}; expected a state dict", _SAVE)
    return {str(name): t for name, t in content.items() if isinstance(t, torch.Tensor)}
