"""Model file + data file + options -> the Problem, ready to be differentiated."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hesscli.errors import MismatchError, NumericalError, ResourceError, UsageError
from hesscli.files.data import Data, load_data
from hesscli.files.models import SavedModel, load_model
from hesscli.files.resources import available_memory
from hesscli.hessian.blocks import select
from hesscli.hessian.losses import ELEMENT_WEIGHTED, LOSSES, Loss, check_arguments
from hesscli.hessian.plan import Sizes, choose_sizes
from hesscli.hessian.problem import Batch, Problem, measure, saved_bytes
from hesscli.job.options import Listener, ProblemOptions
from hesscli.job.team import rank, ranks


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


def open_problem(options: ProblemOptions, listener: Listener, rows: int | None = None) -> Opened:
    """Loads model and data, settles the loss, and makes one pass over the data.

    Args:
        options: what was asked for.
        listener: hears the notes.
        rows: the size of the largest block, if it is known to be smaller than all parameters together.

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
    model = load_model(
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
    inputs = options.inputs
    data = load_data(
        options.data, inputs=inputs, targets=options.targets, unbatched=options.unbatched
    )
    for text in data.notes:
        note(text)
    arrays = {name: _to(array, device, dtype) for name, array in data.arrays.items()}
    loss = _loss(options, data, arrays, note)
    names = list(data.inputs)
    if (
        loss.name == "output"
        and not options.inputs
        and data.targets
        and _takes_targets(model, names)
    ):
        names.append(data.targets[0])
        note(f"the model returns the loss and takes the targets too: inputs are {', '.join(names)}")
    parameters, tied, frozen = _parameters(model.module, options.params)
    if frozen:
        note(f"skipped, frozen: {', '.join(frozen)} (name them with --params to include them)")
    target = arrays[data.targets[0]] if data.targets and loss.needs_target else None
    whole = Batch(tuple(arrays[name] for name in names), target, loss.arguments)
    problem = Problem(
        model.module,
        parameters,
        [whole],
        loss,
        output_key=options.output_key,
        train=options.train_mode,
    )
    problem, sizes = _split(problem, options, model, data, rows, note)
    problem, value = measure(problem)
    if not torch.isfinite(torch.tensor(value)):
        raise NumericalError(f"the loss is {value}; its derivatives would mean nothing")
    facts = {
        "model": {"path": str(options.model), "kind": model.kind, "sha256": model.sha256},
        "data": {
            "path": str(options.data),
            "sha256": data.sha256,
            "samples": data.samples,
            "inputs": names,
            "targets": data.targets[0] if target is not None and data.targets else None,
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


def _to(array: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return array.to(device, dtype) if array.is_floating_point() else array.to(device)


def _loss(
    options: ProblemOptions, data: Data, arrays: Mapping[str, Tensor], note: Callable[[str], None]
) -> Loss:
    """The loss that was named, or the one that fits the targets."""
    name, function = options.loss, None
    if name == "auto":
        if data.targets is None:
            raise UsageError(
                f"{options.data}: holds no targets, and the loss needs them",
                "name them with --targets KEY, or use --loss output if the model returns its loss",
            )
        kind = str(data.targets[1].dtype).removeprefix("torch.")
        name = "mse" if data.targets[1].is_floating_point() else "cross-entropy"
        note(f"loss: {name}, inferred from {kind} targets")
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
            if value[1:] not in arrays:
                raise UsageError(
                    f"{options.data}: holds no array {value[1:]!r} for the loss argument {key}; "
                    f"it holds: {', '.join(arrays)}"
                )
            arguments[key] = arrays[value[1:]]
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


def _split(
    problem: Problem,
    options: ProblemOptions,
    model: SavedModel,
    data: Data,
    rows: int | None,
    note: Callable[[str], None],
) -> tuple[Problem, Sizes]:
    """Cuts the data into batches, unless model or loss want it whole."""
    whole, samples = problem.batches[0], data.samples
    few = _slice(whole, 0, min(samples, 2), samples, problem.loss)
    if options.unbatched:
        few = whole
    elif model.batch_size is not None:
        if samples % model.batch_size:
            raise MismatchError(
                f"the exported model accepts batches of exactly {model.batch_size} samples, "
                f"the data has {samples}",
                "export it with a dynamic batch axis (torch.export.Dim)",
            )
        few = _slice(whole, 0, model.batch_size, samples, problem.loss)
    if problem.loss.name not in LOSSES:
        with torch.no_grad():
            _, count = problem.total(few)
        if count == 1 and samples > 1:
            problem = replace(problem, loss=replace(problem.loss, whole=True))
            note("the loss is one number for all data, so the data is not split into batches")
    saved = saved_bytes(problem, few, problem.output) // max(
        1, len(few.inputs[0]) if few.inputs[0].dim() else 1
    )
    size = rows or sum(p.numel() for p in problem.parameters.values())
    sizes = choose_sizes(samples, saved, size, problem.dtype.itemsize, _free_memory(problem.device))
    batch = options.batch_size or sizes.batch
    if model.batch_size is not None:
        batch = model.batch_size
    if options.unbatched or problem.loss.whole or options.train_mode:
        batch = samples  # train-mode batch norm couples the samples of a batch
    batch = min(batch, samples)
    batches = (
        [whole]
        if options.unbatched
        else [
            _slice(whole, start, min(start + batch, samples), samples, problem.loss)
            for start in range(0, samples, batch)
        ]
    )
    return replace(problem, batches=batches), Sizes(batch, sizes.chunk)


def _slice(batch: Batch, start: int, stop: int, samples: int, loss: Loss) -> Batch:
    if start == 0 and stop == samples:
        return batch
    arguments, target = dict(batch.loss_arguments), batch.target
    weight = arguments.get("weight")
    if (
        loss.name in ELEMENT_WEIGHTED
        and isinstance(weight, Tensor)
        and target is not None
        and weight.dim() == target.dim() > 0
        and len(weight) == samples
    ):
        arguments["weight"] = weight[start:stop]  # one weight per element, not per class
    return Batch(
        tuple(x[start:stop] for x in batch.inputs),
        None if target is None else target[start:stop],
        arguments,
    )


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()


def _printable(arguments: Mapping[str, object]) -> dict[str, object]:
    plain = (bool, int, float, str, type(None))
    return {k: v if isinstance(v, plain) else str(v) for k, v in arguments.items()}
