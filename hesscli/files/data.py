"""Data files: the arrays in them, and which are inputs and targets."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hesscli.errors import FileError, MismatchError, NumericalError, UsageError
from hesscli.files.arrays import load_arrays
from hesscli.files.digest import sha256

INPUT_NAMES = ("x", "X", "input", "inputs", "data", "images", "features")
TARGET_NAMES = ("y", "Y", "target", "targets", "label", "labels")


@dataclass(frozen=True)
class Data:
    """What a data file holds."""

    arrays: dict[str, torch.Tensor]  # every numeric array of the file, in file order
    inputs: dict[str, torch.Tensor]  # in the order they are passed to the model
    targets: tuple[str, torch.Tensor] | None
    sha256: str
    notes: tuple[str, ...]  # what was inferred or left out, one line each
    samples: int  # the length of the inputs' first axis; 1 if unbatched


def load_data(
    path: str | os.PathLike[str],
    *,
    inputs: Sequence[str] = (),
    targets: str | None = None,
    unbatched: bool = False,
) -> Data:
    """Loads `.npz`, `.safetensors` or `.pt`, told by its content, and picks inputs and targets.

    Args:
        path: the file.
        inputs: the arrays that go into the model, in its order; inferred from the names if empty.
        targets: the array the loss compares with; inferred if None. The file may hold none.
        unbatched: whether the arrays are one sample, without an axis for samples.

    Raises:
        UsageError: no such file or array, or the names do not tell which is which.
        FileError: the file is damaged, unsupported or unsafe.
        MismatchError: no samples, or not as many inputs as targets.
        NumericalError: an array holds NaN or infinity.
    """
    arrays, skipped = load_arrays(path)
    notes = [f"array {name} skipped: {why}" for name, why in skipped.items()]
    if not arrays:
        raise FileError(
            f"{path}: holds no numeric arrays" + (f" ({notes[0]})" if notes else ""),
            "np.savez('data.npz', x=x, y=y)",
        )
    for name in (*inputs, *([targets] if targets else [])):
        if name not in arrays:
            why = f": {skipped[name]}" if name in skipped else ""
            raise _unclear(path, arrays, f"no array is called {name}{why}")
    if len(set(inputs)) < len(inputs):
        raise UsageError(f"--inputs names an array twice: {', '.join(inputs)}")
    names = list(inputs) or [_infer_inputs(path, arrays, targets, notes)]
    target = targets or _infer_targets(path, arrays, names, notes)
    data = Data(
        arrays,
        {name: arrays[name] for name in names},
        None if target is None else (target, arrays[target]),
        sha256(path),
        tuple(notes),
        1 if unbatched or not arrays[names[0]].dim() else len(arrays[names[0]]),
    )
    _check_samples(path, data, unbatched)
    for name, array in arrays.items():
        _check_finite(path, name, array)
    return data


def _infer_inputs(
    path: str | os.PathLike[str],
    arrays: Mapping[str, torch.Tensor],
    targets: str | None,
    notes: list[str],
) -> str:
    free = [name for name in arrays if name != targets]
    named = [name for name in free if name in INPUT_NAMES]
    if len(named) == 1:
        return _noted("inputs", named[0], arrays, "from its name", notes)
    if len(named) > 1:
        raise _unclear(path, arrays, f"{' and '.join(named)} may all be the inputs")
    others = [name for name in free if targets is not None or name not in TARGET_NAMES]
    if len(arrays) == 2 and len(others) == 1:
        return _noted("inputs", others[0], arrays, "as the only other array", notes)
    raise _unclear(path, arrays, "the names do not tell the inputs")


def _infer_targets(
    path: str | os.PathLike[str],
    arrays: Mapping[str, torch.Tensor],
    inputs: Sequence[str],
    notes: list[str],
) -> str | None:
    free = [name for name in arrays if name not in inputs]
    named = [name for name in free if name in TARGET_NAMES]
    if len(named) == 1:
        return _noted("targets", named[0], arrays, "from its name", notes)
    if len(named) > 1:
        raise _unclear(path, arrays, f"{' and '.join(named)} may all be the targets")
    if len(arrays) == 2 and len(free) == 1:
        return _noted("targets", free[0], arrays, "as the only other array", notes)
    return None  # a model that returns its loss needs none


def _noted(
    role: str, name: str, arrays: Mapping[str, torch.Tensor], how: str, notes: list[str]
) -> str:
    notes.append(f"{role}: {name} ({describe(arrays[name])}), inferred {how}")
    return name


def describe(array: torch.Tensor) -> str:
    """dtype and shape, as in `float32 [1, 3]`."""
    return f"{str(array.dtype).removeprefix('torch.')} {list(array.shape)}"


def _unclear(
    path: str | os.PathLike[str], arrays: Mapping[str, torch.Tensor], problem: str
) -> UsageError:
    listed = ", ".join(f"{name} ({describe(array)})" for name, array in arrays.items())
    return UsageError(
        f"{path}: {problem}; it holds {listed}",
        f"hesscli compute MODEL {shlex.quote(str(path))} --inputs KEY --targets KEY",
    )


def _check_samples(path: str | os.PathLike[str], data: Data, unbatched: bool) -> None:
    used = {f"inputs {name}": array for name, array in data.inputs.items()}
    if data.targets is not None:
        used.setdefault(f"targets {data.targets[0]}", data.targets[1])
    for what, array in used.items():
        if array.numel() == 0:
            raise MismatchError(f"{path}: {what} {list(array.shape)} holds no samples")
        if array.dim() == 0 and not unbatched:
            raise MismatchError(
                f"{path}: {what} is a single number without an axis for samples", "--unbatched"
            )
    if unbatched:
        return
    (first, reference), *others = used.items()
    for what, array in others:
        if len(array) != len(reference):
            raise MismatchError(
                f"{path}: {first} {list(reference.shape)} and {what} {list(array.shape)} "
                "differ in the number of samples, their first axis",
                "--unbatched",
            )


def _check_finite(path: str | os.PathLike[str], name: str, array: torch.Tensor) -> None:
    if not (array.is_floating_point() or array.is_complex()):
        return
    bad = ~torch.isfinite(array)
    count = int(bad.sum())
    if count:
        where = bad.nonzero()[0].tolist()
        raise NumericalError(
            f"{path}: array {name} ({describe(array)}) holds NaN or infinity "
            f"in {count} place{'s' if count > 1 else ''}, the first at {where}",
            f"drop these samples, or replace the values: np.nan_to_num({name})",
        )
