"""Model file + data file + options -> the Problem, ready to be differentiated."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hesscli.errors import MismatchError, NumericalError, ResourceError, UsageError
from hesscli.files.data import Data, describe, load_data
from hesscli.files.models import SavedModel, load_model
from hesscli.hessian.blocks import select
from hesscli.hessian.losses import ELEMENT_WEIGHTED, LOSSES, Loss, check_arguments
from hesscli.hessian.operator import CURVATURES
from hesscli.hessian.plan import Sizes
from hesscli.hessian.problem import Problem, measure
from hesscli.job.batches import Source, move, split
from hesscli.job.options import EVERY, Listener, ProblemOptions
from hesscli.job.team import rank, ranks

if TYPE_CHECKING:
    from hesscli.job.share import Share


@dataclass(frozen=True)
class Opened:
    """A problem, and what is worth saying about where it came from."""

    problem: Problem
    value: float  # L(theta)
    sizes: Sizes
    tied: dict[str, list[str]]  # first name -> the other names of the same tensor
    frozen: list[str]  # parameters left out because they do not require a gradient
    facts: dict[str, Any]  # model, data and loss, as in the JSON document
    notes: list[str]


def open_problem(
    options: ProblemOptions,
    listener: Listener,
    rows: int | None = None,
    model: SavedModel | None = None,
    share: Share | None = None,
    abreast: bool = False,
) -> Opened:
    """Loads model and data, settles the loss, and makes one pass over the data.

    Args:
        options: what was asked for.
        listener: hears the notes.
        rows: the size of the largest block, if it is known to be smaller than all parameters together.
        model: one in memory, in place of the file that the options name.
        share: what other processes share the pass over the data through.
        abreast: batches will be worked on side by side.

    Raises:
        HesscliError: of any kind; see `errors.py`.
    """
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        listener.note(text)

    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = _device(options.device)
    # cuDNN's convolutions would use it by default, at three digits.
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    torch.backends.cudnn.allow_tf32 = options.tf32
    model = model or load_model(
        options.model,
        arch=options.arch,
        arch_args=options.arch_arguments,
        allow_pickle=options.allow_pickle,
        train_mode=options.train_mode,
        device=device,
    )
    for text in model.notes:
        note(text)
    dtype = _cast(model, options.dtype)
    data = load_data(
        options.data,
        inputs=options.inputs,
        targets=options.targets,
        unbatched=options.unbatched,
        samples=options.samples,
        arguments=model.arguments,
    )
    for text in data.notes:
        note(text)
    loss = _loss(options, data, lambda array: move(array, device, dtype), note)
    names = list(data.inputs)
    if (
        loss.name == "output"
        and not options.inputs
        and data.targets
        and _takes_targets(model, names)
    ):
        names.append(data.targets[0])
        note(f"the model returns the loss and takes the targets too: inputs are {', '.join(names)}")
    known = data.inputs | dict([data.targets] if data.targets else [])
    names, keywords = _keywords(options, model, names, known, note)
    parameters, tied, frozen = _parameters(model.module, options.params)
    if frozen:
        note(f"skipped, frozen: {', '.join(frozen)} (name them with --params to include them)")
    source = Source(
        tuple(known[name] for name in names),
        data.targets[1] if data.targets and loss.needs_target else None,
        data.samples,
        loss,
        _scales(options.scale, {name: known[name] for name in names}, note),
        keywords,
        device,
        dtype,
    )
    problem = Problem(
        model.module,
        parameters,
        (),
        loss,
        output_key=options.output_key,
        train=options.train_mode,
    )
    if data.columns:
        source = _as_columns(problem, source, note)
    parts = 1 if share is None else share.team.size
    problem, sizes = split(problem, source, options, model, rows, note, parts, abreast)
    if dtype is torch.float64:
        problem = problem.widened()
        if problem.wide:
            note("what the model itself computes in float32 is computed in float64")
    if share is None:
        problem, value = measure(problem)
    else:
        measured, value = measure(share.own(problem), share.totals)
        problem = replace(problem, denominator=measured.denominator)
    if not torch.isfinite(torch.tensor(value)):
        raise NumericalError(f"the loss is {value}; its derivatives would mean nothing")
    facts = {
        "curvature": CURVATURES[options.curvature],
        "model": {"path": str(options.model), "kind": model.kind, "sha256": model.sha256},
        "data": {
            "path": str(options.data),
            "sha256": data.sha256,
            "samples": data.samples,
            "inputs": names,
            "targets": data.targets[0] if source.target is not None and data.targets else None,
            **({"range": list(data.range)} if options.samples else {}),
            **({"scale": dict(options.scale)} if options.scale else {}),
        },
        "loss": {
            "name": problem.loss.name,
            "arguments": _printable(options.loss_arguments),
            "reduction": problem.loss.reduction,
            "denominator": problem.denominator,
            "value": value,
            "inferred": options.loss == "auto",
        },
    }
    return Opened(problem, value, sizes, tied, frozen, facts, notes)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks() > 1:  # one for each process
        name = f"cuda:{rank() % max(1, torch.cuda.device_count())}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"no device is called {name!r}", "--device cpu") from None
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise ResourceError(f"this machine has no device {name}", "--device cpu")
    return device


def _cast(model: SavedModel, name: str) -> torch.dtype:
    """Brings the module to the dtype asked for, and says which one that is."""
    floating = {p.dtype for p in model.module.parameters() if p.is_floating_point()}
    if not floating:
        raise MismatchError("the model has no floating-point parameters, so there is no Hessian")
    wanted = {"float32": torch.float32, "float64": torch.float64}.get(name)
    if wanted is None:
        wanted = torch.float64 if torch.float64 in floating else torch.float32
    if floating != {wanted}:
        model.module.to(wanted)
    return wanted


def _keywords(
    options: ProblemOptions,
    model: SavedModel,
    names: list[str],
    known: Mapping[str, Tensor],
    note: Callable[[str], None],
) -> tuple[list[str], tuple[str, ...]]:
    """The inputs in the order in which they are passed, and the last ones that are passed by name.

    By name go those that an exported model takes in no other way; and all, if each is called as one of forward's
    parameters is, and their order is another.

    Raises:
        MismatchError: one that the model takes by name is not among them.
    """
    for name in model.keywords:
        if name not in known:
            raise MismatchError(
                f"{options.model}: takes {', '.join(model.keywords)} by name, "
                f"the inputs are {', '.join(names)}",
                " ".join(f"--inputs {name}" for name in model.arguments),
            )
    if model.keywords:
        return [n for n in names if n not in model.keywords] + [*model.keywords], model.keywords
    in_order = tuple(names) == model.arguments[: len(names)]
    if model.kind == "exported" or in_order or not set(names) <= set(model.arguments):
        return names, ()
    note(f"inputs are passed by name: {', '.join(names)}")
    return names, tuple(names)


def _as_columns(problem: Problem, source: Source, note: Callable[[str], None]) -> Source:
    """A table's targets as what the loss wants: whole numbers as classes, others as a column [N, 1] like the output."""
    if source.target is None:
        return source
    if source.loss.name in ("cross-entropy", "nll"):
        classes = source.target.long()
        if source.target.is_floating_point() and bool((classes == source.target).all()):
            note("targets: whole numbers, taken as classes")
            return replace(source, target=classes)
        return source
    count = min(source.samples, 2)
    with torch.no_grad():
        output = problem.output(source.part(0, count))
    if output.shape != (count, 1) or source.target.dim() != 1:
        return source
    note("targets: taken as a column [N, 1], as the model's output is")
    return replace(source, target=source.target.unsqueeze(1))


def _scales(
    asked: Mapping[str, float], inputs: Mapping[str, Tensor], note: Callable[[str], None]
) -> dict[int, float]:
    """What each input is multiplied by, by its place."""
    for name in asked:
        if name not in inputs and name != EVERY:
            raise UsageError(
                f"--scale {name}: no input is called so; there are: {', '.join(inputs)}"
            )
    scales: dict[int, float] = {}
    for place, (name, array) in enumerate(inputs.items()):
        factor = asked.get(name, asked.get(EVERY))
        if factor is not None:
            scales[place] = factor
            note(f"scaled: {name} ({describe(array)}) is multiplied by {factor:.9g}")
    return scales


def _loss(
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
    elif ":" in name:
        function = _import_function(name)
    elif name not in LOSSES and name != "output":
        raise UsageError(
            f"no loss is called {name!r}; there are: auto, {', '.join(LOSSES)}, output, PKG.MOD:FN"
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
            if key == "weight" and name in ELEMENT_WEIGHTED and data.per_sample(array):
                array = array[slice(*data.range)]  # as its targets are
            arguments[key] = moved(array)
    check_arguments(name, arguments)
    return Loss(name, options.reduction, arguments, function)


def _import_function(spec: str) -> Callable[..., Tensor]:
    module_name, _, attribute = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"the loss {spec} cannot be imported: {error}") from None
    if not callable(function):
        raise UsageError(f"the loss {spec} is a {type(function).__name__}, not a function")
    return function


def _takes_targets(model: SavedModel, names: list[str]) -> bool:
    return model.inputs is not None and model.inputs > len(names)


def _parameters(
    module: nn.Module, patterns: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, list[str]], list[str]]:
    """The parameters to differentiate by, the other names of tied ones, and the frozen ones left out."""
    first: dict[tuple[Any, ...], str] = {}
    unique: dict[str, Tensor] = {}
    tied: dict[str, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if not p.is_floating_point():
            continue
        key = (p.data_ptr(), p.shape, p.stride()) if p.numel() else (name,)
        if key in first:
            tied.setdefault(first[key], []).append(name)
        else:
            first[key] = name
            unique[name] = p
    known = [*unique, *(other for others in tied.values() for other in others)]
    # A tied parameter is selected by any of its names.
    canonical = {other: name for name, others in tied.items() for other in others}
    chosen = {canonical.get(name, name) for name in select(known, patterns)}
    named = [p for p in patterns if not p.startswith("!")]
    asked = {canonical.get(n, n) for n in select(known, named)} if named else set()
    frozen = [n for n in unique if n in chosen and not unique[n].requires_grad and n not in asked]
    parameters = {n: p for n, p in unique.items() if n in chosen and n not in frozen}
    if not parameters:
        if not chosen:
            listed = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
            raise UsageError(
                f"no parameter matches {' '.join(patterns)}; the model has: {listed}",
                f"--params '{known[0]}'",
            )
        raise UsageError(
            f"every parameter is frozen (requires_grad=False): {', '.join(frozen[:10])}",
            "--params '*'",
        )
    for name, parameter in unique.items():
        parameter.requires_grad_(
            name in parameters
        )  # where no gradient is wanted, none is paid for
    return parameters, {n: tied[n] for n in parameters if n in tied}, frozen


def _printable(arguments: Mapping[str, object]) -> dict[str, object]:
    plain = (bool, int, float, str, type(None))
    return {k: v if isinstance(v, plain) else str(v) for k, v in arguments.items()}
