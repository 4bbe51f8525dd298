"""The Hessian of a model in memory: `hesscli.compute`."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, overload

import numpy as np
import torch
from torch import Tensor

from hesscli.errors import InterruptedRun, ResourceError, UsageError
from hesscli.files.hessians.hessian_file import read_hessian
from hesscli.job.compute import compute as run
from hesscli.job.loaded import Framework, Hessian, converter
from hesscli.job.options import ComputeOptions, Listener, wrong_option
from hesscli.job.setup.given import DataLike, LossFunction, Model, PathLike, given
from hesscli.job.setup.settings import as_written

_ELSEWHERE = "tempfile.tempdir = os.getcwd()"  # temporary files have room there


@overload
def compute(
    model: Model, data: DataLike, *, framework: Literal["torch"], **options: Any
) -> Hessian[Tensor]: ...
@overload
def compute(model: Model, data: DataLike, **options: Any) -> Hessian[np.ndarray]: ...
@as_written
def compute(
    model: Model,
    data: DataLike,
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
    eval mode, unless `train_mode=True`. Torch's settings are put back too, and the state of random numbers. Among
    processes that `torchrun` started, the one that calls it does all of the work.

    >>> hessian = hesscli.compute(model, (x, y), loss="cross-entropy", framework="torch")
    >>> hessian.block("fc.weight") @ v

    Args:
        model: a module, or the path of a model file.
        data: the path of a data file; arrays by their names; (inputs, targets), or a `TensorDataset` of them; or the
            inputs alone.
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
        KeyboardInterrupt: Ctrl-C; where parts of an `output` are kept, for `resume=True`, it says how many.
    """
    if not isinstance(output, (str, os.PathLike, NoneType)):
        raise wrong_option("output", output, "None, or a path")
    convert, folder = converter(framework), None
    if output is None:
        folder = _Folder()
        output = folder.path / "hessian.safetensors"
    path = Path(output)
    options |= {"loss": loss, "blocks": blocks, "output": path}
    with given(model, data, device, ComputeOptions, options) as asked:
        if asked.shard is not None:
            hint = "hesscli compute MODEL DATA --shard 1/2"
            raise UsageError("shard: one share is no Hessian; expected None", hint)
        try:
            run(asked, listener or Listener(), alone=True)
        except InterruptedRun as error:  # is no error to a program, which may deal with errors
            raise KeyboardInterrupt(*([error.message] if folder is None else [])) from None
        except ResourceError as error:
            if folder is not None and error.hint is None and str(folder.path) in error.message:
                raise ResourceError(error.message, _ELSEWHERE) from error.__cause__
            raise
    return Hessian(read_hessian(path), convert, folder)


class _Folder:
    """A temporary folder that goes when the last object that needs it goes; copies of objects need it too.

    In a process that was forked they go without it: it is another's.
    """

    def __init__(self) -> None:
        try:
            self.path = Path(tempfile.mkdtemp(prefix="hesscli."))
        except OSError as error:
            raise ResourceError(
                f"a temporary folder in {tempfile.gettempdir()}: {error.strerror or error}",
                _ELSEWHERE,
            ) from error
        weakref.finalize(self, _remove, self.path, os.getpid())

    def __deepcopy__(self, memo: object) -> _Folder:
        return self

    def __reduce__(self) -> NoReturn:
        raise UsageError("a temporary folder cannot be pickled; a Hessian with an output can")


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
