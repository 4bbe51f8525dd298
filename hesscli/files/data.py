"""Data files: the samples in them that go into the model, and those that its output is compared with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hesscli.errors import MismatchError, UsageError
from hesscli.files.arrays import Arrays, load_arrays, not_finite
from hesscli.files.digest import sha256_of, sha256_of_all
from hesscli.files.roles import Roles

Tensors = dict[str, torch.Tensor]
Named = tuple[str, torch.Tensor]


@dataclass(frozen=True)
class Data:
    """What a data file holds, or what is in memory."""

    arrays: Tensors  # every numeric array, in file order
    inputs: Tensors  # the model's samples, in the order in which they are passed
    targets: Named | None  # the name and the samples of the targets
    sha256: str  # of the file, or of the arrays
    notes: tuple[str, ...]  # what was inferred or left out, one line each
    range: tuple[int, int]  # which samples of the file inputs and targets hold: from, up to
    recorded: int  # how many samples the file holds
    columns: bool  # whether the arrays are the columns of a table
    joined: Sequence[str]  # the columns of it that are side by side in the only input

    @property
    def samples(self) -> int:
        """How many; 1 if the arrays are one sample without an axis for samples."""
        return self.range[1] - self.range[0]

    def not_finite(self) -> tuple[str, str] | None:
        """The first input that holds NaN or infinity, by the column's name if several are side by side; and where."""
        named: Iterable[Named] = self.inputs.items()
        if self.joined:
            (table,) = self.inputs.values()
            named = zip(self.joined, table.unbind(1), strict=True)
        found = ((name, not_finite(name, array)) for name, array in named)
        return next(((name, where) for name, where in found if where is not None), None)


def load_data(
    source: Path | Arrays,
    *,
    inputs: Sequence[str] = (),
    targets: str | None = None,
    unbatched: bool = False,
    samples: tuple[int, int | None] | None = None,
    model_names: Sequence[str] = (),
    others: Collection[str] = (),
) -> Data:
    """Loads a data file or folder, told by its content, or takes arrays in memory, and picks inputs and targets.

    NaN in them may mean something, to the model or to the loss.

    Args:
        inputs: the arrays that go into the model, in its order; inferred from the names if empty. A name may also
            be the path of another `.npy` file: its array is called as the file is, without the folder.
        targets: the array the loss compares with; inferred if None. The file may hold none.
        unbatched: whether the arrays are one sample, without an axis for samples.
        samples: from which to which; all of them if None.
        model_names: what the model calls its inputs: arrays of these names are the inputs, if no others are.
        others: arrays that are neither inputs nor targets, unless they are named as such.

    Raises:
        UsageError: no such file, array or samples, or the names do not tell which is which.
        FileError: the file is damaged, unsupported or unsafe.
        MismatchError: no samples, or not as many inputs as targets.
        ResourceError: what must be in memory does not fit into it.
    """
    found = source if isinstance(source, Arrays) else load_arrays(source)
    roles = Roles(source, found, inputs, targets, model_names, others)
    chosen = {name: roles.arrays[name] for name in roles.inputs}
    target = None if roles.targets is None else (roles.targets, roles.arrays[roles.targets])
    recorded = _count(source, chosen, target, unbatched)
    start, stop = 0, recorded
    if samples is not None:
        start, stop = _range(source, samples, recorded, unbatched)
        chosen = {name: array[start:stop] for name, array in chosen.items()}
        target = target and (target[0], target[1][start:stop])
    return Data(
        arrays=roles.arrays,
        inputs=chosen,
        targets=target,
        sha256=sha256_of_all(roles.files) if found.files else sha256_of(roles.arrays),
        notes=tuple(roles.notes),
        range=(start, stop),
        recorded=recorded,
        columns=found.columns,
        joined=roles.joined,
    )


def _count(source: Path | Arrays, inputs: Tensors, targets: Named | None, unbatched: bool) -> int:
    """How many samples the arrays hold, the same in each: 1 if they are one without an axis for samples."""
    used = {f"inputs {name}": array for name, array in inputs.items()}
    if targets is not None:
        used[f"targets {targets[0]}"] = targets[1]
    for what, array in used.items():
        if array.numel() == 0:
            raise MismatchError(f"{source}: {what} {list(array.shape)} holds no samples")
        if array.dim() == 0 and not unbatched:
            raise MismatchError(
                f"{source}: {what} is a single number without an axis for samples", "--unbatched"
            )
    if unbatched:
        return 1
    (first, reference), *others = used.items()
    for what, array in others:
        if len(array) != len(reference):
            raise MismatchError(
                f"{source}: {first} {list(reference.shape)} and {what} {list(array.shape)} "
                "differ in the number of samples, their first axis",
                "--unbatched" if len(inputs) > 1 else None,
            )
    return len(reference)


def _range(
    source: Path | Arrays, asked: tuple[int, int | None], recorded: int, unbatched: bool
) -> tuple[int, int]:
    """Which of the samples were asked for: from, up to."""
    if unbatched:
        raise UsageError("--samples takes some of the samples, --unbatched says that there is one")
    start, stop = asked[0], recorded if asked[1] is None else asked[1]
    if not start < stop <= recorded:
        raise UsageError(
            f"{source}: holds {recorded} samples, --samples asks for {start} to {stop}",
            f"--samples {min(100, recorded)}",
        )
    return start, stop
