"""Model file + data file + options -> the Problem, ready to be differentiated."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hesscli.errors import MismatchError, NumericalError, ResourceError, UsageError
from hesscli.files.data import describe, load_data
from hesscli.files.models import SavedModel, load_model
from hesscli.hessian.losses import OF_CLASSES
from hesscli.hessian.operator import CURVATURES
from hesscli.hessian.plan import Sizes
from hesscli.hessian.precision import in_precision_
from hesscli.hessian.problem import Problem, measure
from hesscli.job.batches import split
from hesscli.job.loss import loss_of, printable
from hesscli.job.options import EVERY, Listener, ProblemOptions
from hesscli.job.parameters import chosen_parameters, unmatched
from hesscli.job.settings import settle
from hesscli.job.source import Source, move
from hesscli.job.team import rank_here, ranks

if TYPE_CHECKING:
    from hesscli.job.share import Share


@dataclass(frozen=True)
class Opened:
    """A problem, and what is worth saying about where it came from."""

    problem: Problem
    sizes: Sizes
    tied: dict[str, list[str]]  # first name -> the other names of the same tensor
    frozen: list[str]  # parameters left out because they do not require a gradient
    facts: dict[str, Any]  # model, data and loss, as in the JSON document
    notes: list[str]


def open_problem(
    options: ProblemOptions,
    listener: Listener,
    model: SavedModel | None = None,
    share: Share | None = None,
    side_by_side: bool = False,
) -> Opened:
    """Loads model and data, settles the loss, and makes one pass over the data.

    Args:
        options: what was asked for.
        listener: hears the notes.
        model: one in memory, in place of the file that the options name.
        share: what other processes share the pass over the data through.
        side_by_side: batches will be worked on side by side.

    Raises:
        HesscliError: of any kind; see `errors.py`.
    """
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        listener.note(text)

    torch.manual_seed(options.seed)
    settle(options)
    device = _device(options.device)
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
    loss = loss_of(options, data, lambda array: move(array, device, dtype), note)
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
    parameters, tied, frozen = chosen_parameters(model.module, options.params)
    skipped = [name for name, p in model.module.named_parameters() if p.is_complex()]
    if skipped:
        note(f"skipped, complex: {', '.join(skipped)}")
    for pattern in unmatched(model.module, options.params):
        note(f"no parameter matches {pattern}")
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
        wide=dtype is torch.float64,
    )
    if data.columns:
        source = _as_columns(problem, source, note)
    parts = 1 if share is None else share.team.size
    problem, sizes = split(problem, source, options, model, note, parts, side_by_side)
    if dtype is torch.float64:
        problem, _ = problem.widened()
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
            "arguments": printable(options.loss_arguments),
            "reduction": problem.loss.reduction,
            "denominator": problem.denominator,
            "value": value,
            "inferred": options.loss == "auto",
        },
    }
    return Opened(problem, sizes, tied, frozen, facts, notes)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks() > 1:  # one for each process
        name = f"cuda:{rank_here() % max(1, torch.cuda.device_count())}"
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
        in_precision_(model.module, wanted)
    return wanted


def _keywords(
    options: ProblemOptions,
    model: SavedModel,
    names: list[str],
    known: Mapping[str, Tensor],
    note: Callable[[str], None],
) -> tuple[list[str], tuple[str, ...]]:
    """The inputs in the order in which they are passed, and the last ones that are passed by name.

    By name go those that the model takes in no other way; and all, if each is called as one of forward's parameters
    is, and their order is another.

    Raises:
        MismatchError: one that an exported model takes by name is not among them.
    """
    exported, keywords = model.kind == "exported", model.keywords
    for name in keywords if exported else ():
        if name not in known:
            raise MismatchError(
                f"{options.model}: takes {', '.join(keywords)} by name, "
                f"the inputs are {', '.join(names)}",
                " ".join(f"--inputs {shlex.quote(name)}" for name in model.arguments),
            )
    if not exported:
        keywords = tuple(name for name in names if name in keywords)
    others = [name for name in names if name not in keywords]
    positional = [name for name in model.arguments if name not in model.keywords]
    if others == positional[: len(others)] or not set(others) <= set(positional):
        return [*others, *keywords], keywords
    note(f"inputs are passed by name: {', '.join(names)}")
    if exported:  # which has an order alone
        named = [name for name in positional if name in others]
        return [*named, *keywords], keywords
    return [*others, *keywords], (*others, *keywords)


def _as_columns(problem: Problem, source: Source, note: Callable[[str], None]) -> Source:
    """A table's targets as what the loss wants: whole numbers as classes, others as a column [N, 1] like the output."""
    if source.target is None:
        return source
    if source.loss.name in OF_CLASSES:
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


def _takes_targets(model: SavedModel, names: list[str]) -> bool:
    return model.inputs is not None and model.inputs > len(names)
