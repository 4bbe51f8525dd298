"""Reading safetensors files."""

from __future__ import annotations

import os
import shlex

import torch
from safetensors import safe_open

from hesscli.errors import FileError
from hesscli.files.torch_files import reading


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """All tensors of the file, on the CPU, in the order in which they lie in it.

    Raises:
        FileError: the file is damaged, or it is a Hessian and not a model or data.
    """
    with reading(path, "safetensors"), safe_open(path, framework="pt") as file:
        if "hesscli" in (file.metadata() or {}):
            raise FileError(
                f"{path}: a Hessian that hesscli wrote; expected a model or data",
                f"hesscli show {shlex.quote(str(path))}",
            )
        return {name: file.get_tensor(name) for name in file.offset_keys()}
