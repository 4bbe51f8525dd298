"""What the shell offers after TAB: names of blocks and parameters, read from the files named so far.

A completion never fails and never loads torch: what cannot be read is not offered.
"""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import typer

from hesscli.job.metadata import header, hessian_metadata

_LONGEST = 1 << 24  # bytes of a pickle that are read


def block_names(context: typer.Context, incomplete: str) -> list[str]:
    """The blocks of the Hessian file that the command names."""
    try:
        metadata = hessian_metadata(Path(_first(context, "hessian.safetensors")))
        blocks = json.loads(metadata["hesscli"])["blocks"]
        return _matching([block["name"] for block in blocks], incomplete)
    except Exception:  # whatever is wrong with the file
        return []


def parameter_names(context: typer.Context, incomplete: str) -> list[str]:
    """The parameters in the model file that the command names, if it holds weights by their names."""
    try:
        model = Path(_first(context, ""))
        exclude = "!" * incomplete.startswith("!")
        found = _matching(_weights(model), incomplete.removeprefix("!"))
        return [exclude + name for name in found]
    except Exception:  # whatever is wrong with the file
        return []


def _first(context: typer.Context, default: str) -> str:
    """The first file that the command names; typer leaves what is no option in `args` here."""
    return next((word for word in context.args if not word.startswith("-")), default)


def _matching(names: list[str], incomplete: str) -> list[str]:
    # Names come from files, and must not steer the terminal.
    return [name for name in names if name.startswith(incomplete) and name.isprintable()]


def _weights(model: Path) -> list[str]:
    import zipfile

    if not zipfile.is_zipfile(model):
        return [name for name in header(model) if name != "__metadata__"]
    with zipfile.ZipFile(model) as archive:
        names = archive.namelist()
        (data,) = [name for name in names if name.endswith("/data.pkl")]
        with archive.open(data) as file:
            content = _Inert(BytesIO(file.read(_LONGEST))).load()
    script = any(name.endswith("/constants.pkl") for name in names)
    return list(_of_script(content, "") if script else _of_weights(content))


class _Object:
    """What stands for any object of a pickle; its attributes are what was stored."""

    def __init__(self, *_stored: object) -> None:
        pass


class _Tensor(_Object):
    def __init__(self, *stored: object) -> None:
        self.trained = stored[4:5] == (True,)  # storage, offset, shape, strides, requires_grad


class _Inert(pickle.Unpickler):
    """Reads a pickle without running anything in it: no class or function is what it says."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return _Tensor if name.startswith("_rebuild_") else _Object

    def persistent_load(self, _storage: object) -> None:
        return None


def _of_script(module: _Object, prefix: str) -> Iterator[str]:
    """The parameters of a TorchScript module. Its buffers are tensors too, but not trained."""
    for name, value in vars(module).items():
        if isinstance(value, _Tensor):
            if value.trained:
                yield prefix + name
        elif isinstance(value, _Object):
            yield from _of_script(value, f"{prefix}{name}.")


def _of_weights(content: Any) -> Iterator[str]:
    """The weights in a state dict, or in those of a checkpoint."""
    if not isinstance(content, dict):
        return
    found = [name for name, value in content.items() if isinstance(value, _Tensor)]
    if found:
        yield from found
        return
    for part in content.values():
        if isinstance(part, dict):
            yield from (name for name, value in part.items() if isinstance(value, _Tensor))
