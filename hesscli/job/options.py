"""What a command was asked to do. Importing this loads neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol


class Listener(Protocol):
    """Who is told how a job goes."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def progress(self, done: int, total: int, doing: str) -> None:
        """How far the work has come."""


@dataclass(frozen=True)
class ProblemOptions:
    """A model, its data and its loss: the options of every command that takes MODEL DATA."""

    model: Path
    data: Path
    loss: str | Callable[..., Any] = "auto"
    loss_arguments: Mapping[str, object] = field(default_factory=dict)
    reduction: str = "mean"
    arch: str | None = None
    arch_arguments: Mapping[str, object] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    targets: str | None = None
    samples: tuple[int, int | None] | None = None  # from, up to; None: all
    scale: Mapping[str, float] = field(default_factory=dict)  # input, or EVERY -> factor
    output_key: str | None = None
    unbatched: bool = False
    params: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None  # None: as many samples as fit
    seed: int = 0
    threads: int | None = None
    allow_pickle: bool = False
    train_mode: bool = False
    check: bool = True
    method: str = "auto"
    tf32: bool = False
    curvature: str = "hessian"


@dataclass(frozen=True)
class ComputeOptions(ProblemOptions):
    blocks: str = "diag"
    gradient: bool = False
    stats: str = "auto"
    output: Path | None = Path("hessian.safetensors")  # None: standard output
    force: bool = False
    max_shard_size: int | None = None  # bytes of tensors in one file; None: all
    memory: int | None = None  # bytes; None: a share of what is free
    resume: bool = False
    shard: tuple[int, int] | None = None  # (I, N): only the I-th of N shares of the work, from 1


def command_of(options: ComputeOptions) -> dict[str, Any]:
    """The options as JSON."""
    found = asdict(options)
    as_text = {"model", "data", "output"} | ({"loss"} if callable(options.loss) else set())
    return {key: str(value) if key in as_text else value for key, value in found.items()}


def options_of(command: Mapping[str, Any], output: Path) -> ComputeOptions:
    """The inverse of `command_of`, for the whole of a job that was computed in shares."""
    found: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in command.items()
    }
    found |= {"model": Path(found["model"]), "data": Path(found["data"]), "output": output}
    return ComputeOptions(**(found | {"shard": None, "resume": True, "force": False}))


EVERY = "*"  # every input
METHODS = ("auto", "preactivation", "gauss-newton", "hvp", "finite-difference")
STATS = ("basic", "auto", "all", "none")
CURVATURES = ("hessian", "ggn", "fisher")
