"""Data files: the arrays in them, and which are inputs and targets."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hesscli.errors import FileError, MismatchError, NumericalError, UsageError
from hesscli.files.arrays import Arrays, load_arrays
from hesscli.files.digest import sha256_of_all
from hesscli.texts import dtype_name, listed

_INPUT_NAMES: tuple[str, ...] = ("x", "X", "input", "inputs", "data", "images", "features")
_STEP = 1 << 24  # numbers looked at together
_INDEX = ("", "Unnamed: 0", "__index_level_0__")  # what the index is called in tables of pandas
TARGET_NAMES: tuple[str, ...] = ("y", "Y", "target", "targets", "label", "labels")


@dataclass(frozen=True)
class Data:
    """What a data file holds."""

    arrays: dict[str, torch.Tensor]  # every numeric array of the file, in file order
    inputs: dict[str, torch.Tensor]  # the model's samples, in the order in which they are passed
    targets: tuple[str, torch.Tensor] | None  # the name and the samples of the targets
    sha256: str  # of the file
    notes: tuple[str, ...]  # what was inferred or left out, one line each
    range: tuple[int, int]  # which samples of the file inputs and targets hold: from, up to
    recorded: int  # how many samples the file holds
    columns: bool = False  # whether the arrays are the columns of a table

    @property
    def samples(self) -> int:
        """How many; 1 if the arrays are one sample without an axis for samples."""
        return self.range[1] - self.range[0]


def load_data(
    path: Path,
    *,
    inputs: Sequence[str] = (),
    targets: str | None = None,
    unbatched: bool = False,
    samples: tuple[int, int | None] | None = None,
    arguments: Sequence[str] = (),
    others: Collection[str] = (),
) -> Data:
    """Loads a data file or folder, told by its content, and picks inputs and targets.

    Args:
        path: the file.
        inputs: the arrays that go into the model, in its order; inferred from the names if empty. A name may also
            be the path of another `.npy` file: its array is called as the file is, without the folder.
        targets: the array the loss compares with; inferred if None. The file may hold none.
        unbatched: whether the arrays are one sample, without an axis for samples.
        samples: from which to which; all of them if None.
        arguments: what the model calls its inputs: arrays of these names are the inputs, if no others are.
        others: arrays that are neither inputs nor targets, unless they are named as such.

    Raises:
        UsageError: no such file, array or samples, or the names do not tell which is which.
        FileError: the file is damaged, unsupported or unsafe.
        MismatchError: no samples, or not as many inputs as targets.
        NumericalError: inputs hold NaN or infinity. Those of targets may mean something to the loss.
        ResourceError: what must be in memory does not fit into it.
    """
    found = load_arrays(path)
    choice = _Choice(path, found, arguments, others)
    called = {name: choice.called(name) for name in (*inputs, *([targets] if targets else []))}
    inputs, targets = [called[name] for name in inputs], targets and called[targets]
    choice.demand(inputs, targets)
    choose = choice.of_columns if found.columns else choice.of_arrays
    names, target = choose(inputs, targets)
    arrays = choice.arrays
    count = 1 if unbatched or not arrays[names[0]].dim() else len(arrays[names[0]])
    whole = Data(
        arrays,
        {name: arrays[name] for name in names},
        None if target is None else (target, arrays[target]),
        sha256_of_all(choice.files),
        tuple(choice.notes),
        (0, count),
        count,
        found.columns,
    )
    _check_samples(path, whole, unbatched)
    data = _selected(path, whole, unbatched, samples)
    for name, array in data.inputs.items():
        parts = (
            zip(choice.beside, array.unbind(1), strict=True) if choice.beside else [(name, array)]
        )
        for part in parts:
            check_finite(path, *part)
    return data


def is_other_file(name: str) -> bool:
    """Whether the name of inputs or targets is the path of a file beside the data, unless an array is called so."""
    return name.endswith(".npy") and os.path.exists(name)


def _selected(
    path: Path,
    data: Data,
    unbatched: bool,
    samples: tuple[int, int | None] | None,
) -> Data:
    """The data with some of its samples alone."""
    if samples is None:
        return data
    if unbatched:
        raise UsageError("--samples takes some of the samples, --unbatched says that there is one")
    start, stop = samples[0], data.samples if samples[1] is None else samples[1]
    if not start < stop <= data.samples:
        raise UsageError(
            f"{path}: holds {data.samples} samples, --samples asks for {start} to {stop}",
            f"--samples {min(100, data.samples)}",
        )
    part = slice(start, stop)
    return replace(
        data,
        inputs={name: array[part] for name, array in data.inputs.items()},
        targets=None if data.targets is None else (data.targets[0], data.targets[1][part]),
        range=(start, stop),
    )


@dataclass
class _Choice:
    """Which arrays are inputs and targets.

    Attributes:
        arrays: those of the file, of others that were named, and a table's columns together.
        files: that were read.
        skipped: the other arrays and why, one line each.
        notes: that, and what was inferred.
        beside: the columns that are put side by side.
    """

    path: Path
    found: Arrays  # in the file
    arguments: Sequence[str]  # what the model calls its inputs
    others: Collection[str]  # arrays that are neither, by what else they are for

    def __post_init__(self) -> None:
        self.arrays, self.files = dict(self.found.numbers), list(self.found.files)
        skipped = self.found.skipped.items()
        self.skipped = [f"array {name} skipped: {each.why}" for name, each in skipped]
        self.notes = [*self.skipped, *self.found.notes]
        self.beside: list[str] = []

    def called(self, name: str) -> str:
        """What an array is called whose name may be the path of another `.npy` file, which is taken in."""
        if name in self.arrays or not is_other_file(name):
            return name
        other = load_arrays(name)
        self.files += other.files
        if not other.numbers:
            why = next((each.why for each in other.skipped.values()), "holds no arrays")
            raise self.unclear(f"{name}: {why}")
        file = os.path.basename(name)
        file = name if file in self.arrays else file
        self.arrays[file] = next(iter(other.numbers.values()))
        return file

    def demand(self, inputs: Sequence[str], targets: str | None) -> None:
        """Refuses names that no array of numbers has, and a file without any."""
        if not self.arrays:
            why = f" ({self.skipped[0]})" if self.skipped else ""
            raise FileError(
                f"{self.path}: holds no numeric arrays{why}", "np.savez('data.npz', x=x, y=y)"
            )
        for name in (*inputs, *([targets] if targets else [])):
            if name not in self.arrays:
                if name == targets:
                    self._demand_usable(name)
                option = "--targets" if name == targets else "--inputs"
                raise self.unclear(
                    f"no array of numbers is called {name}", f"{option} {self.likely(option)}"
                )
        if len(set(inputs)) < len(inputs):
            raise UsageError(f"--inputs names an array twice: {', '.join(inputs)}")

    def _demand_usable(self, targets: str) -> None:
        """Refuses targets that are no numbers."""
        if targets in self.found.skipped:
            array = self.found.skipped[targets]
            remedy = array.remedy.format(targets)
            raise FileError(f"{self.path}: the targets {targets} are {array.why}", remedy or None)

    def of_arrays(self, inputs: Sequence[str], targets: str | None) -> tuple[list[str], str | None]:
        """Inputs and targets: those that were asked for, the others by their names."""
        names = list(inputs) or self._inputs(targets)
        return names, targets or self._targets(names)

    def of_columns(
        self, inputs: Sequence[str], targets: str | None
    ) -> tuple[list[str], str | None]:
        """The same of a table: columns of single numbers are put side by side, as one input.

        But those that are called as several of the model's inputs are.
        """
        meant = [name for name in self.found.skipped if name in TARGET_NAMES]
        if meant and not (inputs or targets or any(name in self.arrays for name in TARGET_NAMES)):
            self._demand_usable(meant[0])
        known = [name for name in self.arrays if name in TARGET_NAMES and name not in inputs]
        target = targets or (known[0] if len(known) == 1 else None)
        if target is not None and targets is None:
            self._noted("targets", target, "from its name")
        if target is None and len(self.arrays) > 1 and not inputs:
            last = shlex.quote(list(self.arrays)[-1])
            raise self.unclear("the names do not tell the targets", f"--targets {last}")
        left = (target, *_INDEX, *self.others)
        chosen = list(inputs) or [name for name in self.arrays if name not in left]
        called = [name for name in self.arguments if name in chosen]
        if len(called) > 1 and (not inputs or len(called) == len(inputs)):
            return list(inputs) or self._called(called), target
        if not inputs:
            index = (name for name in self.arrays if name in _INDEX and name != target)
            self.notes.extend(f"column {name!r} left out: an index, by its name" for name in index)
        if not chosen:
            raise self.unclear("there is no column but the targets")
        if any(self.arrays[name].dim() > 1 for name in chosen):
            return list(inputs) or self._inputs(target), target
        self.beside.extend(chosen)
        name = "columns" if target != "columns" else "inputs"
        self.arrays[name] = torch.stack([self.arrays[name].double() for name in chosen], 1)
        plural = "column" if len(chosen) == 1 else "columns"
        self.notes.append(f"inputs: the {plural} {listed(chosen)} ({describe(self.arrays[name])})")
        return [name], target

    def _inputs(self, targets: str | None) -> list[str]:
        free = [name for name in self.arrays if name != targets and name not in self.others]
        named = [name for name in free if name in _INPUT_NAMES]
        others = [name for name in free if targets is not None or name not in TARGET_NAMES]
        called = [name for name in self.arguments if name in others]
        if len(named) == 1 and (len(called) < 2 or named[0] not in called):
            return [self._noted("inputs", named[0], "from its name")]
        if called:
            return self._called(called)
        if len(named) > 1:
            raise self.unclear(f"{' and '.join(named)} may all be the inputs")
        if self._two and len(others) == 1:
            return [self._noted("inputs", others[0], "as the only other array")]
        raise self.unclear("the names do not tell the inputs")

    @property
    def _two(self) -> bool:
        """Whether there are inputs and targets, and no more."""
        return sum(name not in self.others for name in self.arrays) == 2

    def _called(self, names: list[str]) -> list[str]:
        found = ", ".join(f"{name} ({describe(self.arrays[name])})" for name in names)
        self.notes.append(f"inputs: {found}, inferred from what the model calls its inputs")
        return names

    def _targets(self, inputs: Sequence[str]) -> str | None:
        free = [n for n in self.arrays if n not in inputs and n not in self.others]
        named = [name for name in free if name in TARGET_NAMES]
        if len(named) == 1:
            return self._noted("targets", named[0], "from its name")
        if len(named) > 1:
            raise self.unclear(f"{' and '.join(named)} may all be the targets")
        if self._two and len(free) == 1:
            return self._noted("targets", free[0], "as the only other array")
        return None  # a model that returns its loss needs none

    def _noted(self, role: str, name: str, how: str) -> str:
        self.notes.append(f"{role}: {name} ({describe(self.arrays[name])}), inferred {how}")
        return name

    def likely(self, option: str) -> str:
        """The name of an array that may be the targets, or the inputs."""
        known, others, names = TARGET_NAMES, _INPUT_NAMES, list(self.arrays)[::-1]
        if option == "--inputs":
            known, others, names = others, known, names[::-1]
        free = [name for name in names if name not in others]
        return shlex.quote(([name for name in names if name in known] or free or ["KEY"])[0])

    def unclear(self, problem: str, hint: str = "--inputs KEY --targets KEY") -> UsageError:
        found = ", ".join(f"{name} ({describe(array)})" for name, array in self.arrays.items())
        said = [problem, f"it holds {found}", *self.skipped]
        return UsageError(f"{self.path}: {'; '.join(said)}", hint)


def describe(array: torch.Tensor) -> str:
    """dtype and shape, as in `float32 [1, 3]`."""
    return f"{dtype_name(array.dtype)} {list(array.shape)}"


def _check_samples(path: Path, data: Data, unbatched: bool) -> None:
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
                "--unbatched" if len(data.inputs) > 1 else None,
            )


def check_finite(path: Path, name: str, array: torch.Tensor) -> None:
    """Looks at the array in parts, so that one larger than the memory passes through it.

    Raises:
        NumericalError: it holds NaN or infinity.
    """
    if not (array.is_floating_point() or array.is_complex()):
        return
    count, where = 0, None
    parts = (
        array.split(max(1, _STEP * len(array) // max(1, array.numel()))) if array.dim() else [array]
    )
    start = 0
    for part in parts:
        bad = ~torch.isfinite(part)
        found = int(bad.sum())
        if found and where is None:
            where = bad.nonzero()[0].tolist()
            if where:
                where[0] += start
        count += found
        start += len(part) if part.dim() else 0
    if count:
        raise NumericalError(
            f"{path}: array {name} ({describe(array)}) holds NaN or infinity "
            f"in {count} place{'s' if count > 1 else ''}, the first at {where}",
            f"drop these samples, or replace the values: np.nan_to_num({name})",
        )
