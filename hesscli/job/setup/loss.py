"""Which loss is differentiated: the one that was named, or the one that fits the targets."""

from __future__ import annotations

import difflib
import math
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hesscli.errors import MismatchError, UsageError
from hesscli.files.arrays import check_finite, describe
from hesscli.files.data import Data
from hesscli.files.digest import sha256_of
from hesscli.files.models.importing import importable, imported
from hesscli.hessian.aten.precision import in_precision_
from hesscli.hessian.objective.copies import copied
from hesscli.hessian.objective.loss import Loss
from hesscli.hessian.objective.losses import ELEMENT_WEIGHTED, LOSSES, TENSORS, check_arguments
from hesscli.job.options import Note, ProblemOptions
from hesscli.job.setup.source import move, per_sample
from hesscli.texts import dtype_name, first_line

_ELSEWHERE = {"ce": "cross-entropy", "mae": "l1", "l2": "mse"}  # names that look like others here

_WEIGHTED: dict[type, str] = {nn.CrossEntropyLoss: "cross-entropy", nn.NLLLoss: "nll"}
"""PyTorch's modules whose mean may be a weighted one, which goes by the weights of all the data; and their names."""
_DEFAULTS = {"weight": None, "ignore_index": -100, "label_smoothing": 0.0}


def by_name(options: ProblemOptions, note: Note) -> ProblemOptions:
    """The options with the name and the arguments of what one of these modules computes, in place of the module."""
    module: Any = options.loss
    name = _WEIGHTED.get(type(module))
    if name is None or module.reduction == "none" or options.loss_arguments:
        return options
    if options.reduction == "sum" != module.reduction:
        note(f"--reduction sum has no effect: the loss {type(module).__name__} is the mean")
    every = {key: getattr(module, key, default) for key, default in _DEFAULTS.items()}
    arguments = {
        key: value
        for key, value in every.items()
        if isinstance(value, Tensor) or value != _DEFAULTS[key]
    }
    return replace(options, loss=name, loss_arguments=arguments, reduction=module.reduction)


def loss_of(
    options: ProblemOptions, data: Data, device: torch.device, dtype: torch.dtype, note: Note
) -> tuple[Loss, dict[str, object]]:
    """The loss that was named, or the one that fits the targets, and its arguments."""
    name, function = _named(options, data, note)
    if name != "output" and data.targets is None:
        raise UsageError(
            f"{options.data}: holds no targets, and {name} needs them", _name_them(options, data)
        )
    if isinstance(function, nn.Module):  # a copy: the user's stays as it is
        try:
            function = in_precision_(copied(function), dtype).to(device)
        except Exception as error:  # a module may hold anything
            raise MismatchError(f"the loss {name} cannot be copied: {first_line(error)}") from error
    loss = Loss(name, options.reduction, function, wide=dtype is torch.float64)
    arguments = _arguments(options, data, loss, device, dtype)
    if data.targets and name in LOSSES:  # one of the user's own may leave out what is missing
        check_finite(options.data, *data.targets)
    return loss, arguments


def _named(
    options: ProblemOptions, data: Data, note: Note
) -> tuple[str, Callable[..., Any] | None]:
    """The loss's name and, unless that says it all, its function."""
    name: Any = options.loss
    function = None
    if name == "auto":
        if data.targets is None:
            raise UsageError(
                f"{options.data}: holds no targets, and the loss needs them",
                f"name them with {_name_them(options, data)}, or use --loss output if the model returns its loss",
            )
        kind = dtype_name(data.targets[1].dtype)
        name = "mse" if data.targets[1].is_floating_point() else "cross-entropy"
        note(f"loss: {name}, inferred from {kind} targets")
    elif callable(name):
        called = getattr(name, "__name__", type(name).__name__)
        name, function = called, _demand_function(called, name)
        if name in LOSSES or name == "output":  # it is not that one
            name = f"{function.__module__}:{name}"
    elif ":" in name:
        with importable():
            function = _demand_function(name, imported("--loss", name))
        name = os.path.basename(name)  # no paths in files
    elif name not in LOSSES and name != "output":
        plain = name.lower().rpartition(".")[2].replace("_", "-").removesuffix("-loss")
        near = difflib.get_close_matches(_ELSEWHERE.get(plain, plain), LOSSES, 1, 0.7)
        raise UsageError(
            f"no loss is called {name!r}; there are: auto, {', '.join(LOSSES)}, output, PKG.MOD:FN, FILE.py:FN",
            f"--loss {near[0]}" if near else None,
        )
    return name, function


def _name_them(options: ProblemOptions, data: Data) -> str:
    """The option that names the targets: an array of the file, an autoencoder's inputs where there is no other, or,
    beside an array alone, another file.
    """
    if str(options.data).endswith(".npy"):
        return "--targets y.npy"
    given = [v[1:] for v in options.loss_arguments.values() if isinstance(v, str) and v[:1] == "@"]
    others = [name for name in data.arrays if name not in (*data.inputs, *given)]
    return f"--targets {shlex.quote([*others, *data.inputs][0])}"


def _arguments(
    options: ProblemOptions, data: Data, loss: Loss, device: torch.device, dtype: torch.dtype
) -> dict[str, object]:
    """The loss's arguments, arrays as tensors: of all samples, also where some of them are used."""
    target = None if data.targets is None else data.arrays[data.targets[0]]
    arguments = dict(options.loss_arguments)
    check_arguments(loss.name, arguments)
    for key, value in options.loss_arguments.items():
        array = _array(options, data, key, value, loss.name in LOSSES)
        if array is not None:
            if loss.name in ELEMENT_WEIGHTED and target is not None:
                _demand_fit(key, array, target)
            whole = options.unbatched or not per_sample(loss, {key: array}, target, data.recorded)
            used = array if whole else array[slice(*data.range)]
            check_finite(options.data, value[1:] if isinstance(value, str) else key, used)
            arguments[key] = move(array, device, dtype)
    return arguments


def _array(
    options: ProblemOptions, data: Data, key: str, value: object, weighs: bool
) -> Tensor | None:
    """A loss argument that is an array: of the data file, one in memory, or the numbers of a loss's weight."""
    if isinstance(value, str) and value.startswith("@"):
        if value[1:] not in data.arrays:
            raise UsageError(
                f"{options.data}: holds no array {value[1:]!r} for the loss argument {key}; "
                f"it holds: {', '.join(data.arrays)}"
            )
        return data.arrays[value[1:]]
    if isinstance(value, (Tensor, np.ndarray)):
        return torch.as_tensor(value).detach()
    if not weighs or key not in TENSORS or value is None:
        return None
    try:
        return torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise UsageError(
            f"the loss argument {key} is {value!r}; expected numbers, or an array",
            f"--loss-arg {key}=@KEY",
        ) from None


def _demand_fit(key: str, array: Tensor, target: Tensor) -> None:
    """Refuses a weight of elements that does not fit all of them, though it may fit those of a batch."""
    count = target.shape[0] if target.dim() else 1
    apart = array.dim() == target.dim() and array.dim() > 0 and len(array) not in (1, count)
    if apart or array.dim() > target.dim() + 1:
        raise MismatchError(
            f"the loss argument {key} has shape {list(array.shape)}, "
            f"which does not fit targets of shape {list(target.shape)}"
        )


def _demand_function(name: str, function: object) -> Callable[..., Tensor]:
    if isinstance(function, type):
        raise UsageError(
            f"the loss {name} is a class, not a function of output and targets",
            f"write loss = {function.__name__}() into FILE.py: --loss FILE.py:loss",
        )
    if not callable(function):
        kind = type(function).__name__
        raise UsageError(f"the loss {name} is a {kind}, not a function of output and targets")
    return function


def printable(arguments: Mapping[str, object]) -> dict[str, object]:
    """The arguments as JSON has them."""

    def is_plain(value: object) -> bool:
        if isinstance(value, float):
            return math.isfinite(value)
        return isinstance(value, (bool, int, str, type(None)))

    return {k: v if is_plain(v) else described(v) for k, v in arguments.items()}


def described(value: object) -> str:
    """What stands for a value that JSON does not have: of an array, its type, shape and SHA-256."""
    if isinstance(value, (Tensor, np.ndarray)):
        array = torch.as_tensor(value)
        return f"{describe(array)} {sha256_of({'': array})}"
    return str(value)
