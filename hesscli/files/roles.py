"""Which arrays of a data file are the inputs, and which the targets: those that were named, or by their names."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from hesscli.errors import FileError, UsageError
from hesscli.files.arrays import Arrays, describe, load_arrays
from hesscli.texts import listed

_INPUT_NAMES: tuple[str, ...] = ("x", "X", "input", "inputs", "data", "images", "features")
_INDEX = ("", "Unnamed: 0", "__index_level_0__")  # what the index is called in tables of pandas
_KEYS = "--inputs KEY --targets KEY"
TARGET_NAMES: tuple[str, ...] = ("y", "Y", "target", "targets", "label", "labels")


def is_other_file(name: str) -> bool:
    """Whether the name of inputs or targets is the path of a file beside the data, unless an array is called so."""
    return name.endswith(".npy") and os.path.exists(name)


class Roles:
    """Which arrays are inputs and targets.

    Args and attributes are those of `load_data` and `Data`, where inputs and targets are names; `skipped` says of the
    other arrays why, one line each.

    Raises:
        UsageError: the names do not tell which is which, or an array that was named is not there.
        FileError: there are no arrays of numbers.
    """

    def __init__(
        self,
        source: Path | Arrays,
        found: Arrays,
        inputs: Sequence[str],
        targets: str | None,
        model_names: Sequence[str],
        others: Collection[str],
    ) -> None:
        self.source, self.found, self.model_names, self.others = source, found, model_names, others
        self.arrays, self.files = dict(found.numbers), list(found.files)
        self.skipped = [f"array {n} skipped: {each.why}" for n, each in found.skipped.items()]
        self.notes = [*self.skipped, *found.notes]
        self.joined: list[str] = []
        named = (*inputs, *([targets] if targets else []))
        called = {name: self._called(name) for name in named}
        self.inputs = [called[name] for name in inputs]
        self.targets = called[targets] if targets else None
        self._demand_named()
        if found.columns:
            self._choose_columns()
        else:
            self.inputs = self.inputs or self._likely_inputs()
            self.targets = self.targets or self._likely_targets()
            if not inputs:
                self._note_others()

    def _called(self, name: str) -> str:
        """What an array is called whose name may be the path of another `.npy` file, which is taken in."""
        if name in self.arrays or not is_other_file(name):
            return name
        other = load_arrays(name)
        self.files += other.files
        if not other.numbers:
            why = next((each.why for each in other.skipped.values()), "holds no arrays")
            raise self._unclear(f"{name}: {why}", _KEYS)
        file = os.path.basename(name)
        file = name if file in self.arrays else file
        self.arrays[file] = next(iter(other.numbers.values()))
        return file

    def _demand_named(self) -> None:
        """Refuses names that no array of numbers has, and a file without any."""
        if not self.arrays:
            why = f" ({self.skipped[0]})" if self.skipped else ""
            raise FileError(
                f"{self.source}: holds no numeric arrays{why}", "np.savez('data.npz', x=x, y=y)"
            )
        for name in (*self.inputs, *([self.targets] if self.targets else [])):
            if name not in self.arrays:
                if name == self.targets:
                    self._demand_usable(name)
                option = "--targets" if name == self.targets else "--inputs"
                raise self._unclear(
                    f"no array of numbers is called {name}", f"{option} {self._likely(option)}"
                )
        if len(set(self.inputs)) < len(self.inputs):
            raise UsageError(f"--inputs names an array twice: {', '.join(self.inputs)}")

    def _demand_usable(self, targets: str) -> None:
        """Refuses targets that are no numbers."""
        if targets in self.found.skipped:
            array = self.found.skipped[targets]
            remedy = array.remedy.format(targets)
            raise FileError(f"{self.source}: the targets {targets} are {array.why}", remedy or None)

    # Arrays: those that were not named, by their names

    def _likely_inputs(self) -> list[str]:
        free = [name for name in self.arrays if name != self.targets and name not in self.others]
        known = [name for name in free if name in _INPUT_NAMES]
        others = [name for name in free if self.targets or name not in TARGET_NAMES]
        called = [name for name in self.model_names if name in others]
        if len(known) == 1 and (len(called) < 2 or known[0] not in called):
            return [self._noted("inputs", known[0], "from its name")]
        if called:
            return self._as_called(called)
        if len(known) > 1:
            raise self._unclear(f"{' and '.join(known)} may all be the inputs")
        if self._two and len(others) == 1:
            return [self._noted("inputs", others[0], "as the only other array")]
        if self.targets and not others:  # of an autoencoder
            return [self._noted("inputs", self.targets, "as the only array: the targets too")]
        raise self._unclear("the names do not tell the inputs")

    def _likely_targets(self) -> str | None:
        free = [n for n in self.arrays if n not in self.inputs and n not in self.others]
        known = [name for name in free if name in TARGET_NAMES]
        if len(known) == 1:
            return self._noted("targets", known[0], "from its name")
        if len(known) > 1:
            raise self._unclear(f"{' and '.join(known)} may all be the targets")
        if self._two and len(free) == 1:
            return self._noted("targets", free[0], "as the only other array")
        return None  # a model that returns its loss needs none

    @property
    def _two(self) -> bool:
        """Whether there are inputs and targets, and no more."""
        return sum(name not in self.others for name in self.arrays) == 2

    # The columns of a table: those of single numbers are one input, side by side

    def _choose_columns(self) -> None:
        self.targets = self.targets or self._column_of_targets()
        if self.targets is None and len(self.arrays) > 1 and not self.inputs:
            last = shlex.quote(list(self.arrays)[-1])
            raise self._unclear("the names do not tell the targets", f"--targets {last}")
        left = (self.targets, *_INDEX, *self.others)
        columns = self.inputs or [name for name in self.arrays if name not in left]
        called = [name for name in self.model_names if name in columns]
        if len(called) > 1 and (not self.inputs or len(called) == len(self.inputs)):
            if not self.inputs:
                self.inputs = self._as_called(called)
                self._note_others()
            return
        if not self.inputs:
            index = (name for name in self.arrays if name in _INDEX and name != self.targets)
            self.notes.extend(f"column {name!r} left out: an index, by its name" for name in index)
        if not columns:
            raise self._unclear("there is no column but the targets")
        if any(self.arrays[name].dim() > 1 for name in columns):
            self.inputs = self.inputs or self._likely_inputs()
        else:
            self._join(columns)

    def _column_of_targets(self) -> str | None:
        named = [name for name in self.arrays if name in TARGET_NAMES]
        unusable = [name for name in self.found.skipped if name in TARGET_NAMES]
        if unusable and not (named or self.inputs):
            self._demand_usable(unusable[0])
        free = [name for name in named if name not in self.inputs]
        return self._noted("targets", free[0], "from its name") if len(free) == 1 else None

    def _join(self, columns: list[str]) -> None:
        name = "columns" if self.targets != "columns" else "inputs"
        array = torch.stack([self.arrays[column].double() for column in columns], 1)
        plural = "column" if len(columns) == 1 else "columns"
        self.notes.append(f"inputs: the {plural} {listed(columns)} ({describe(array)})")
        self.arrays[name] = array
        self.inputs, self.joined = [name], columns

    # What is said

    def _note_others(self) -> None:
        """Arrays with as many entries as the inputs that are nothing: a mask that the model does not take, say."""
        sizes = {self.arrays[name].shape[:1] for name in self.inputs}
        used = (*self.inputs, self.targets, *self.others, *(_INDEX if self.found.columns else ()))
        left = [
            f"{name} ({describe(array)})"
            for name, array in self.arrays.items()
            if name not in used and array.dim() and array.shape[:1] in sizes
        ]
        if left:
            self.notes.append(f"not used: {listed(left)}")

    def _as_called(self, names: list[str]) -> list[str]:
        found = ", ".join(f"{name} ({describe(self.arrays[name])})" for name in names)
        self.notes.append(f"inputs: {found}, inferred from what the model calls its inputs")
        return names

    def _noted(self, role: str, name: str, how: str) -> str:
        self.notes.append(f"{role}: {name} ({describe(self.arrays[name])}), inferred {how}")
        return name

    def _likely(self, option: str) -> str:
        """The name of an array that may be the targets, or the inputs."""
        taken = (self.targets, *self.inputs, *self.others)
        known, others = TARGET_NAMES, _INPUT_NAMES
        names = [name for name in self.arrays if name not in taken][::-1]
        if option == "--inputs":
            known, others, names = others, known, names[::-1]
        free = [name for name in names if name not in others]
        return shlex.quote(([name for name in names if name in known] or free or ["KEY"])[0])

    def _likely_roles(self) -> str:
        """The options that name what may be meant."""
        inputs = [*map(shlex.quote, self.inputs)] or [self._likely("--inputs")]
        targets = shlex.quote(self.targets) if self.targets else self._likely("--targets")
        if "KEY" in inputs or targets in ("KEY", *inputs):
            return _KEYS
        return " ".join([*(f"--inputs {name}" for name in inputs), f"--targets {targets}"])

    def _unclear(self, problem: str, hint: str | None = None) -> UsageError:
        hint = hint or self._likely_roles()
        found = ", ".join(f"{name} ({describe(array)})" for name, array in self.arrays.items())
        said = [problem, f"it holds {found}", *self.skipped]
        return UsageError(f"{self.source}: {'; '.join(said)}", hint)
