"""Which loss is differentiated: the one that was named, or the one that fits the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hesscli.errors import UsageError
from hesscli.files.data import Data
from hesscli.files.importing import importable, imported
from hesscli.hessian.losses import ELEMENT_WEIGHTED, LOSSES, Loss, check_arguments
from hesscli.job.options import ProblemOptions


def loss_of(
    options: ProblemOptions,
    data: Data,
    moved: Callable[[Tensor], Tensor],
    note: Callable[[str], None],
) -> Loss:
    """The loss that was named, or the one that fits the targets."""
    name: Any = options.loss
    function = None
    if name == "auto":
        if data.targets is None:
            raise UsageError(
                f"{options.data}: holds no targets, and the loss needs them",
                "name them with --targets KEY, or use --loss output if the model returns its loss",
            )
        kind = str(data.targets[1].dtype).removeprefix("torch.")
        name = "mse" if data.targets[1].is_floating_point() else "cross-entropy"
        note(f"loss: {name}, inferred from {kind} targets")
    elif callable(name):
        name, function = getattr(name, "__name__", type(name).__name__), name
        if name in LOSSES or name == "output":  # it is not that one
            name = f"{function.__module__}:{name}"
    elif ":" in name:
        function = _import_function(name)
    elif name not in LOSSES and name != "output":
        raise UsageError(
            f"no loss is called {name!r}; there are: auto, {', '.join(LOSSES)}, output, PKG.MOD:FN, FILE.py:FN"
        )
    if name != "output" and data.targets is None:
        raise UsageError(
            f"{options.data}: holds no targets, and {name} needs them", "--targets KEY"
        )
    arguments = dict(options.loss_arguments)
    for key, value in arguments.items():
        if isinstance(value, str) and value.startswith("@"):
            if value[1:] not in data.arrays:
                raise UsageError(
                    f"{options.data}: holds no array {value[1:]!r} for the loss argument {key}; "
                    f"it holds: {', '.join(data.arrays)}"
                )
            array = data.arrays[value[1:]]
            of_elements = data.targets is not None and array.dim() == data.targets[1].dim()
            weighted = key == "weight" and name in ELEMENT_WEIGHTED and of_elements
            if (weighted or function is not None) and data.per_sample(array):
                array = array[slice(*data.range)]  # as its targets are
            arguments[key] = moved(array)
    check_arguments(name, arguments)
    return Loss(name, options.reduction, arguments, function)


def _import_function(spec: str) -> Callable[..., Tensor]:
    with importable():
        function = imported("--loss", spec, "FN")
    if not callable(function):
        raise UsageError(f"the loss {spec} is a {type(function).__name__}, not a function")
    return function


def printable(arguments: Mapping[str, object]) -> dict[str, object]:
    plain = (bool, int, float, str, type(None))
    return {k: v if isinstance(v, plain) else str(v) for k, v in arguments.items()}
