"""What a command was asked to do. Importing this loads neither torch nor numpy."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from numbers import Integral, Real
from operator import contains
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from hesscli.errors import UsageError

if TYPE_CHECKING:
    from hesscli.files.arrays import Arrays
    from hesscli.files.models.model_file import SavedModel

EVERY = "*"  # every input
MOST_THREADS = 4096  # many more end the process
Progress = Callable[[int, int, str], None]  # hears how much is done, of how much, and of what
Note = Callable[[str], None]  # hears what the user should know

Reduction = Literal["mean", "sum"]
DType = Literal["auto", "float32", "float64"]
Method = Literal["auto", "preactivation", "gauss-newton", "hvp", "finite-difference"]
Curvature = Literal["hessian", "ggn", "fisher"]
Blocks = Literal["diag", "module", "full", "elements"]
Stats = Literal["basic", "auto", "all", "none"]
Which = Literal["largest", "smallest", "magnitude", "both"]


class Listener:
    """Who is told how a job goes; this one, for nobody."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def progress(self, done: int, total: int, doing: str) -> None:
        """How far the work has come."""


def wrong_option(name: str, value: object, expected: str) -> UsageError:
    """What to say of an option with a value that it cannot have; of a large one, an array say, its type."""
    found = repr(value)
    if len(found) > 80 or "\n" in found:
        found = f"a {type(value).__name__}"
    return UsageError(f"{name} is {found}; expected: {expected}")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _names(option: str, given: object) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    names = tuple(given) if isinstance(given, Iterable) else (None,)
    if not all(isinstance(name, str) for name in names):
        raise wrong_option(option, given, "a str, or several")
    return names


def _are_factors(value: object) -> bool:
    factors = value.values() if isinstance(value, Mapping) else [None]
    return all(
        not isinstance(factor, bool) and isinstance(factor, Real) and math.isfinite(factor)
        for factor in factors
    )


def _is_shard(value: object) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return value is None
    return all(map(_is_whole, value)) and 1 <= value[0] <= value[1]


def _is_range(value: object) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return value is None
    given = value[:1] if value[1] is None else value
    return all(_is_whole(place) and place >= 0 for place in given)


_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda v: isinstance(v, bool), "True or False"),
    "int": (lambda v: _is_whole(v) and -(2**63) <= v < 2**64, "a whole number of 64 bits"),
    "int | None": (
        lambda v: v is None or (_is_whole(v) and v > 0),
        "None, or a whole number from 1 on",
    ),
    "str | None": (lambda v: v is None or isinstance(v, str), "None, or a str"),
    "str | Callable[..., Any]": (
        lambda v: isinstance(v, str) or callable(v),
        "a name, or a function of output and targets",
    ),
    "Mapping[str, object]": (lambda v: isinstance(v, Mapping), "a dict"),
    "Mapping[str, float]": (_are_factors, 'a dict of numbers, as {"x": 1 / 255}'),
    "tuple[int, int | None] | None": (_is_range, "None, or (from, up to)"),
    "tuple[int, int] | None": (_is_shard, "None, or (I, N) with I from 1 to N"),
    **{
        name: (partial(contains, get_args(kind)), ", ".join(get_args(kind)))
        for name, kind in list(globals().items())
        if get_origin(kind) is Literal
    },
}
"""Type of an option -> whether a value can be its, and what can."""


@dataclass(frozen=True)
class ProblemOptions:
    """A model, its data and its loss: the options of every command that takes MODEL DATA.

    A name alone stands for a tuple of one, and torch's own dtype or device for its name.

    Raises:
        UsageError: an option has a value that it cannot have; the message says what it can be.
    """

    model: Path | SavedModel  # a file, or what is in memory
    data: Path | Arrays
    loss: str | Callable[..., Any] = "auto"
    loss_arguments: Mapping[str, object] = field(default_factory=dict)
    reduction: Reduction = "mean"
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
    dtype: DType = "auto"
    batch_size: int | None = None  # None: as many samples as fit
    seed: int = 0
    threads: int | None = None
    allow_pickle: bool = False
    train_mode: bool = False
    check: bool = True
    method: Method = "auto"
    tf32: bool = False
    curvature: Curvature = "hessian"

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that these options name: those of the model and the data, of arrays and of code."""
        code = [text.rpartition(":")[0] for text in (self.arch, self.loss) if isinstance(text, str)]
        named = (Path(name) for name in (*self.arrays, *code))
        files = [each for each in (self.model, self.data) if isinstance(each, Path)]
        return (*files, *(path for path in named if path.is_file()))

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of inputs and targets, as far as they were given."""
        return (*self.inputs, self.targets) if self.targets else self.inputs

    def __post_init__(self) -> None:
        put = partial(object.__setattr__, self)  # which is frozen once it is made
        for name in ("inputs", "params"):
            put(name, _names(name, getattr(self, name)))
        named = getattr(self.dtype, "__name__", str(self.dtype))  # numpy's are types
        put("dtype", named.removeprefix("torch."))
        put("device", str(self.device))
        if vars(self)["batch_size"] == "auto":  # as on the command line
            put("batch_size", None)
        if _is_whole(self.output_key):
            put("output_key", str(self.output_key))
        for each in fields(self):
            value = getattr(self, each.name)
            fits, expected = _EXPECTED.get(str(each.type), (lambda _: True, ""))
            if not fits(value):
                raise wrong_option(each.name, value, expected)
            if _is_whole(value):  # NumPy's are others
                put(each.name, int(value))
        put("scale", {name: float(f) for name, f in self.scale.items()})
        if self.threads is not None and self.threads > MOST_THREADS:
            expected = f"None, or a whole number from 1 to {MOST_THREADS}"
            raise wrong_option("threads", self.threads, expected)


@dataclass(frozen=True)
class ComputeOptions(ProblemOptions):
    """What `compute` was asked for: also what is written of the Hessian, and how."""

    blocks: Blocks = "diag"
    gradient: bool = False  # also write the gradient
    stats: Stats = "auto"
    output: Path | None = Path("hessian.safetensors")  # None: standard output
    force: bool = False  # replace any file, and what an interrupted run left
    max_shard_size: int | None = None  # bytes of tensors in one file; None: all
    memory: int | None = None  # bytes; None: a share of what is free
    resume: bool = False  # go on with what an interrupted run left
    shard: tuple[int, int] | None = None  # (I, N): only the I-th of N shares of the work, from 1


def command_of(options: ComputeOptions) -> dict[str, Any]:
    """The options as JSON, but for arrays in memory; arguments as Python has them, which tells a tuple from a list."""
    found = dict(vars(options))
    as_text = {"model", "data", "output"} | ({"loss"} if callable(options.loss) else set())
    found = {key: str(value) if key in as_text else value for key, value in found.items()}
    return found | {key: _each(_as_literal, found[key]) for key in _ARGUMENTS}


def options_of(command: Mapping[str, Any], output: Path) -> ComputeOptions:
    """The inverse of `command_of`, for the whole of a job that was computed in shares."""
    found: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in command.items()
    }
    found |= {"model": Path(found["model"]), "data": Path(found["data"]), "output": output}
    found |= {key: _each(of_literal, found[key]) for key in _ARGUMENTS}
    return ComputeOptions(**(found | {"shard": None, "resume": True, "force": False}))


_ARGUMENTS = ("loss_arguments", "arch_arguments")


def _each(function: Callable[[Any], Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: function(value) for name, value in arguments.items()}


def _as_literal(value: object) -> object:
    """A value as a literal of Python; itself, where that is none."""
    read = of_literal(repr(value))
    return repr(value) if type(read) is type(value) and read == value else value


def of_literal(text: object) -> object:
    """What a literal of Python stands for; itself, where it is none."""
    try:
        return ast.literal_eval(text) if isinstance(text, str) else text
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
