"""A model and data as Python has them, a module and arrays or files of them, in the form that the job takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hesscli.errors import UsageError
from hesscli.files.arrays import Arrays, in_memory
from hesscli.files.models.live_models import live_model
from hesscli.hessian.autodiff import differentiable
from hesscli.job.options import ProblemOptions
from hesscli.job.setup.devices import demanding_float64, device_called
from hesscli.job.setup.module_copy import own_copy
from hesscli.job.setup.no_arrays import SEVERAL_INPUTS, no_arrays, type_of
from hesscli.job.setup.settings import random_kept, settings_kept

PathLike = str | os.PathLike[str]
Array = Tensor | np.ndarray
Model = nn.Module | PathLike
DataLike = PathLike | Mapping[str, Array] | Sequence[Array] | TensorDataset | Array
LossFunction = Callable[[Tensor, Tensor], Tensor]
Options = TypeVar("Options", bound=ProblemOptions)


@contextmanager
def given(
    model: Model,
    data: DataLike,
    device: str | torch.device | None,
    kind: type[Options],
    options: Mapping[str, Any],
    kept: bool = False,
) -> Iterator[Options]:
    """The options with a model, a copy of it where it is a module, and data.

    Inside, torch's settings and the state of random numbers may change; they are put back.

    Args:
        kept: the data is used afterwards too, whatever becomes of arrays in memory: it is a copy then.

    Raises:
        HesscliError: the model cannot be copied, the data is none, or there is no such option.
    """
    known = {field.name for field in fields(kind)} - {"model", "data"}
    unknown = sorted(set(options) - known)
    if unknown:
        listed = ", ".join(sorted(known))
        raise UsageError(f"no option is called {unknown[0]!r}; there are: {listed}")
    if not isinstance(model, (nn.Module, str, os.PathLike)):
        raise UsageError(
            f"model: {type_of(model)}; expected a module, or the path of a file",
            "hesscli.compute(model.module(), data)" if hasattr(model, "graph_module") else None,
        )
    with settings_kept(), differentiable(), random_kept():
        source = Path(data) if isinstance(data, (str, os.PathLike)) else _arrays(data, kept)
        name = Path(type(model).__name__ if isinstance(model, nn.Module) else model)
        asked = kind(model=name, data=source, device=str(device or "auto"), **options)
        if not isinstance(model, nn.Module):
            yield asked
            return
        wanted = None if asked.device == "auto" else device_called(asked.device)
        with demanding_float64():
            saved = live_model(own_copy(model), train_mode=asked.train_mode, device=wanted)
        saved = replace(saved, originals=tuple(model.parameters()))
        device = next(saved.module.parameters()).device
        yield replace(asked, model=saved, device=str(device))


def _arrays(data: object, copied: bool) -> Arrays:
    """By their names."""
    arrays = _by_name(data)
    tensors = {}
    for name, array in arrays.items():
        if not isinstance(name, str):
            raise UsageError(f"data: a key is {name!r}; expected the name of an array")
        try:
            if _several(array, arrays.values()):
                raise TypeError
            tensors[name] = _tensor(name, array)
        except (TypeError, ValueError, RuntimeError) as error:
            found, hint = _no_numbers(name, array)
            hint = hint or _others(arrays)
            raise UsageError(f"data: {name} is {found}; expected an array", hint) from error
    return in_memory({n: t.clone() for n, t in tensors.items()} if copied else tensors)


def _by_name(data: object) -> Mapping[Any, Any]:
    """What stands for arrays: inputs are called x, targets y."""
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Mapping):
        return data
    if isinstance(data, (Tensor, np.ndarray)):
        return {"x": data}
    if isinstance(data, (tuple, list)) and len(data) == 2:
        return {"x": data[0], "y": data[1]}
    found, hint = no_arrays(data)
    expected = "expected (inputs, targets), or a dict of named arrays"
    raise UsageError(f"data: {found}; {expected}", hint)


def _several(value: object, values: Iterable[object]) -> bool:
    """Whether it is several arrays with an entry per sample, as others have, and not one array, sample by sample.

    Two arrays of two entries, say, may be either.
    """
    if not isinstance(value, (tuple, list)) or not all(isinstance(part, Array) for part in value):
        return False
    sizes = {_length(other) for other in values if other is not value}
    lengths = {_length(part) for part in value}
    return lengths == {len(value)} if len(value) in sizes else bool(lengths & sizes - {0})


def _length(value: object) -> int:
    """How many entries the first axis has; 0 without one."""
    if isinstance(value, Array):
        return len(value) if value.ndim else 0
    return len(value) if isinstance(value, (tuple, list)) else 0


def _tensor(name: str, array: Any) -> Tensor:
    """On the CPU; of Python's numbers with all their digits.

    Raises:
        UsageError: it is a tensor that is not dense.
        TypeError, ValueError, RuntimeError: it has no tensor, or one without numbers.
    """
    if np.ma.is_masked(array):
        raise ValueError  # of what is masked there are numbers too
    if not isinstance(array, Tensor):
        array = np.asarray(array)
        # torch knows neither strides below zero nor another order of bytes.
        array = array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
    tensor = torch.as_tensor(array).detach().cpu()
    kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else tensor.layout
    if kind is not torch.strided:
        found = str(kind).removeprefix("torch.")
        raise UsageError(f"data: {name} is {found}; expected a dense tensor")
    tensor.data_ptr()
    return tensor.resolve_conj().resolve_neg().as_subclass(Tensor)


def _no_numbers(name: str, array: Any) -> tuple[str, str | None]:
    """What it is that has no tensor, and what to do about that."""
    if isinstance(array, (tuple, list, Mapping)):
        return type_of(array), SEVERAL_INPUTS
    if isinstance(array, Tensor) or np.ma.is_masked(array):
        return type_of(array), None
    try:
        values = np.asarray(array)
    except Exception:  # it may be anything
        return type_of(array), None
    found = f"{type_of(array)} of {values.dtype}" if values.ndim else type_of(array)
    if values.ndim and values.dtype.kind in "fOUT":
        if not any(isinstance(value, str) for value in values.flat):
            return found, f'{name} = {name}.astype("float64")'
        if values.ndim == 1:
            hint = f"classes are whole numbers from 0 on: {name} = pandas.factorize({name})[0]"
            return f"{type_of(array)} of words", hint
    return found, None


def _others(arrays: Mapping[Any, Any]) -> str | None:
    """How what are no arrays is left out, as of a `Bunch` of scikit-learn."""
    names = [
        name
        for name, value in arrays.items()
        if isinstance(value, Tensor)
        or (isinstance(value, np.ndarray) and value.dtype.kind in "biuf")
    ]
    if len(names) < 2:
        return None
    return f"hesscli.compute(model, {{name: data[name] for name in {names}}})"
