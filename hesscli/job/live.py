"""The Hessian of a model in memory: `hesscli.compute`."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hesscli.errors import HesscliError, MismatchError, UsageError
from hesscli.files.hessian_file import read_hessian
from hesscli.files.live_models import live_model
from hesscli.files.models import SavedModel
from hesscli.hessian.autodiff import differentiable
from hesscli.hessian.copies import copied
from hesscli.job.compute import compute as run
from hesscli.job.loaded import Framework, Hessian, converter
from hesscli.job.options import ComputeOptions, Listener, Silent
from hesscli.job.settings import random_kept, settings_kept

PathLike = str | os.PathLike[str]
Arrays = Tensor | np.ndarray
Data = PathLike | Mapping[str, Arrays] | Sequence[Arrays] | Arrays
LossFunction = Callable[[Tensor, Tensor], Tensor]


@overload
def compute(
    model: nn.Module | PathLike,
    data: Data,
    *,
    loss: str | LossFunction = ...,
    blocks: str = ...,
    output: PathLike | None = ...,
    framework: Literal["numpy"] = ...,
    device: str | torch.device | None = ...,
    listener: Listener | None = ...,
    **options: Any,
) -> Hessian[np.ndarray]: ...
@overload
def compute(
    model: nn.Module | PathLike,
    data: Data,
    *,
    loss: str | LossFunction = ...,
    blocks: str = ...,
    output: PathLike | None = ...,
    framework: Literal["torch"],
    device: str | torch.device | None = ...,
    listener: Listener | None = ...,
    **options: Any,
) -> Hessian[Tensor]: ...
def compute(
    model: nn.Module | PathLike,
    data: Data,
    *,
    loss: str | LossFunction = "auto",
    blocks: str = "diag",
    output: PathLike | None = None,
    framework: Framework = "numpy",
    device: str | torch.device | None = None,
    listener: Listener | None = None,
    **options: Any,
) -> Hessian[Any]:
    """The exact Hessian of a model's loss over all the data, checked as `hesscli compute` checks it.

    A module is copied: its parameters, their `requires_grad`, its buffers and its mode stay as they are. The copy is in
    eval mode, unless `train_mode=True`. Torch's random state and settings are put back too.

    >>> hessian = hesscli.compute(model, (x, y), loss="cross-entropy", framework="torch")
    >>> hessian.block("fc.weight") @ v

    Args:
        model: a module, or the path of a model file.
        data: the path of a data file; arrays by their names; (inputs, targets); or the inputs alone.
        loss: a name of `hesscli compute --loss`, or a function of output and targets.
        blocks: "diag", "module", "full" or "elements".
        output: the file to write; a temporary one, which goes with the object, if None.
        framework: "numpy" or "torch", whose arrays the object returns.
        device: as `hesscli compute --device`; by default, or with "auto", that of the module.
        listener: hears notes and progress; the notes are in `metadata["notes"]` too.
        options: the other options of `hesscli compute`, by the names in `ComputeOptions`, such as `params="fc.*"`,
            `dtype="float64"`, `stats="all"`, `loss_arguments={"weight": w}`; w may be an array or a tensor.

    Raises:
        HesscliError: as the command; `hesscli.errors` has the kinds. `hint` speaks of the command line.
        TypeError: no such option.
    """
    convert = converter(framework)
    saved: SavedModel | None = None
    folder = Path(tempfile.mkdtemp(prefix="hesscli."))
    owner = _Folder(folder)
    path = folder / "hessian.safetensors" if output is None else Path(output)
    data_path, named = _data_file(data, folder)
    with differentiable(), random_kept(), settings_kept(), _called(data_path, named):
        asked = ComputeOptions(
            model=Path(type(model).__name__ if isinstance(model, nn.Module) else model),
            data=data_path,
            loss=loss,
            blocks=blocks,
            output=path,
            device=str(device or "auto"),
            **options,
        )
        if isinstance(model, nn.Module):
            wanted = None if asked.device == "auto" else asked.device
            saved = live_model(_copied(model), train_mode=asked.train_mode, device=wanted)
            asked = replace(asked, device=str(next(saved.module.parameters()).device))
        run(asked, listener or Silent(), model=saved)
    if data_path != named:
        data_path.unlink()
    return Hessian(read_hessian(path), convert, owner)


class _Folder:
    """A folder that goes when the last object that needs it goes."""

    def __init__(self, path: Path) -> None:
        weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)


def _copied(module: nn.Module) -> nn.Module:
    # What modules compute and keep, as pruning does, is no leaf, and has no copy of its own.
    attributes = [x for part in module.modules() for x in vars(part).values()]
    tensors = [x for x in [*attributes, *module.buffers()] if isinstance(x, Tensor)]
    kept = {id(x): x.detach().clone() for x in tensors if not x.is_leaf}
    try:
        return copied(module, kept)
    except Exception as error:  # a module may hold anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MismatchError(
            f"{type(module).__name__}: cannot be copied: {reason}",
            "save it, torch.save(model.state_dict(), 'net.pt'), and name its class with arch=",
        ) from error


def _data_file(data: Data, folder: Path) -> tuple[Path, Path]:
    """The data as a file, which is what the job reads, and what errors call it."""
    if isinstance(data, (str, os.PathLike)):
        return Path(data), Path(data)
    if isinstance(data, (Tensor, np.ndarray)):
        data = {"x": data}
    elif not isinstance(data, Mapping):
        if len(data) != 2:
            raise UsageError(
                f"data: {len(data)} arrays; expected (inputs, targets), or a dict of named ones"
            )
        data = {"x": data[0], "y": data[1]}
    tensors = {name: torch.as_tensor(array).detach().cpu() for name, array in data.items()}
    path = folder / "data.safetensors"
    # Without the memory that views share.
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, path)
    return path, Path("data")


@contextmanager
def _called(path: Path, named: Path) -> Iterator[None]:
    """Errors speak of data in memory by the name that it has here."""
    try:
        yield
    except HesscliError as error:
        if path == named:
            raise
        hint = error.hint and error.hint.replace(str(path), str(named))
        raise type(error)(error.message.replace(str(path), str(named)), hint) from error
