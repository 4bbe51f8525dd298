"""How the data is passed to the model: in which order, by which names, scaled, and as what."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hesscli.errors import MismatchError, UsageError
from hesscli.files.arrays import describe
from hesscli.files.data import Data
from hesscli.files.models.call_signature import CallSignature
from hesscli.files.models.model_file import SavedModel
from hesscli.files.roles import TARGET_NAMES
from hesscli.hessian.objective.first_passes import first_output
from hesscli.hessian.objective.loss import Loss
from hesscli.hessian.objective.losses import LOSSES, OF_CLASSES
from hesscli.hessian.objective.problem import Problem
from hesscli.job.options import EVERY, Note, ProblemOptions
from hesscli.job.setup.source import Source, per_sample


def model_inputs(
    options: ProblemOptions, model: SavedModel, data: Data, loss: Loss, note: Note
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """What the model is given, in its order, and the names of the last inputs, which are passed by name.

    The targets are among the inputs of a model that returns its loss and takes them.
    """
    names, known = list(data.inputs), dict(data.inputs)
    if data.targets:
        target, known[target] = data.targets
        if options.loss == "auto" and target in _left(model.signature, names):
            note(f"the model takes {target} too; --loss output is the loss that it returns then")
        if loss.name == "output" and not options.inputs:
            name = _target_of(model.signature, names, target)
            if name is not None:
                names.append(name)
                known[name] = data.targets[1]
                listed = ", ".join(names)
                note(f"the model returns the loss and takes the targets too: inputs are {listed}")
            elif model.signature.most is None:
                both = " ".join(f"--inputs {shlex.quote(each)}" for each in (*names, target))
                note(f"the model takes any number of inputs: {both} gives it the targets too")
        if loss.name == "output" and options.targets and target not in names:
            note("--targets has no effect: the model returns its loss and takes no targets")
    if containers(model.signature, names):
        return {name: known[name] for name in names}, tuple(names)
    if model.form != "exported":
        _demand_all(options, model.signature, names, data)
    names, keywords = _ordered(options, model, names, known, note)
    return {name: known[name] for name in names}, keywords


def containers(signature: CallSignature, names: Collection[str]) -> list[type]:
    """What a model may take inputs of these names in, all at once: it says so, or takes one alone and does not say."""
    required = [name for name in signature.names if name not in signature.optional]
    alone = len(required) == 1 and not signature.keywords and signature.most is not None
    if set(names) <= set(signature.names) or signature.first is Tensor:
        return []
    if signature.first is not None:
        return [signature.first] if alone or signature.first is dict else []
    return [dict, tuple] if alone and len(names) > 1 else []


def in_one(
    problem: Problem, source: Source, signature: CallSignature, note: Note
) -> tuple[Problem, Source]:
    """The problem with all inputs in the first container that the model accepts, if it may take them in one.

    If it accepts none, they go in by position, as far as it takes so many.
    """
    kinds = containers(signature, source.inputs)
    if not kinds:
        return problem, source
    tried = [replace(problem, container=kind) for kind in kinds]
    accepted = (each for each in tried if len(tried) == 1 or _is_accepted(each, source))
    found = next(accepted, None)
    if found is None and len(source.inputs) <= (signature.most or 0):
        return problem, replace(source, keywords=())
    found = found or tried[0]  # which is refused where all of it is passed
    kind = getattr(found.container, "__name__", "")
    note(f"inputs are passed in one {kind}: {', '.join(source.inputs)}")
    return found, source


def _demand_all(
    options: ProblemOptions, signature: CallSignature, names: Sequence[str], data: Data
) -> None:
    """Refuses inputs without arrays of the file that the model cannot do without: the targets, say."""
    left = _left(signature, names) if set(names) <= set(signature.names) else []
    missing = [name for name in left if name not in signature.optional]
    if not missing or not set(missing) <= set(data.arrays):
        return
    wanted = [name for name in signature.names if name in (*names, *missing)]
    hint = " ".join(f"--inputs {shlex.quote(name)}" for name in wanted)
    inferred = options.loss == "auto" and not options.targets
    if inferred and data.targets and data.targets[0] in missing:
        hint = "--loss output"
    raise MismatchError(
        f"the model takes {', '.join(wanted)}; the inputs are {', '.join(names)}", hint
    )


def _left(signature: CallSignature, names: Sequence[str]) -> list[str]:
    """What the model calls those of its inputs that these do not go to, by their names or else by their places."""
    if set(names) <= set(signature.names):
        return [name for name in signature.names if name not in names]
    return [name for name in signature.names if name not in signature.positional[: len(names)]]


def _ordered(
    options: ProblemOptions,
    model: SavedModel,
    names: list[str],
    known: Mapping[str, Tensor],
    note: Note,
) -> tuple[list[str], tuple[str, ...]]:
    """The inputs in the order in which they are passed, and the last ones that are passed by name.

    By name go those that the model takes in no other way; and all, if each is called as one of forward's parameters
    is, and their order is another.
    """
    exported, signature = model.form == "exported", model.signature
    if signature.any_name:
        note(f"inputs are passed by name: {', '.join(names)}")
        return names, tuple(names)
    keywords = signature.keywords
    for name in keywords if exported else ():
        if name not in known:
            raise MismatchError(
                f"{options.model}: takes {', '.join(keywords)} by name, "
                f"the inputs are {', '.join(names)}",
                " ".join(f"--inputs {shlex.quote(name)}" for name in signature.names),
            )
    if not exported:
        keywords = tuple(name for name in names if name in keywords)
    others = [name for name in names if name not in keywords]
    positional = signature.positional
    if others == positional[: len(others)] or not set(others) <= set(positional):
        return [*others, *keywords], keywords
    note(f"inputs are passed by name: {', '.join(names)}")
    if exported:  # which has an order alone
        named = [name for name in positional if name in others]
        return [*named, *keywords], keywords
    return [*others, *keywords], (*others, *keywords)


def as_columns(problem: Problem, source: Source, note: Note) -> Source:
    """A table's numbers as what model and loss want.

    Inputs: whole numbers as indices, if the model takes them as nothing else. Targets: whole numbers as classes,
    others as a column [N, 1] like the output.
    """
    source = _as_indices(problem, source, note)
    if source.target is None:
        return source
    if problem.loss.name in OF_CLASSES:
        classes = source.target.long()
        if source.target.is_floating_point() and bool((classes == source.target).all()):
            note("targets: whole numbers, taken as classes")
            return replace(source, target=classes)
        return source
    with torch.no_grad():
        output = problem.output(source.batch(0, source.few))
    if output.shape != (source.few, 1) or source.target.dim() != 1:
        return source
    note("targets: taken as a column [N, 1], as the model's output is")
    source = replace(source, target=source.target.unsqueeze(1))
    if problem.loss.name not in LOSSES:
        return source
    columns = {name: source.arguments[name].unsqueeze(1) for name in source.per_sample}
    arguments = {**source.arguments, **columns}
    names = per_sample(problem.loss, arguments, source.target, source.recorded)
    return replace(source, arguments=arguments, per_sample=names)


def _as_indices(problem: Problem, source: Source, note: Note) -> Source:
    if _is_accepted(problem, source):
        return source
    whole = {n: x.long() if bool((x == x.long()).all()) else x for n, x in source.inputs.items()}
    indices = replace(source, inputs=whole)
    if _is_accepted(problem, indices):
        note("inputs: whole numbers, taken as indices")
        return indices
    return source  # which is refused where all of it is passed


def _is_accepted(problem: Problem, source: Source) -> bool:
    """Whether the model takes some of the samples, or all of them at once."""
    try:
        source.first_accepted(partial(first_output, problem))
    except MismatchError:
        return False
    return True


def scales(
    asked: Mapping[str, float], inputs: Mapping[str, Tensor], note: Note
) -> dict[str, float]:
    """What inputs are multiplied by."""
    for name in asked:
        if name not in inputs and name != EVERY:
            raise UsageError(
                f"--scale {name}: no input is called so; there are: {', '.join(inputs)}",
                f"--scale {shlex.quote(f'{next(iter(inputs))}={asked[name]:g}')}",
            )
    found = {}
    for name, array in inputs.items():
        factor = asked.get(name, asked.get(EVERY))
        if factor is not None:
            found[name] = factor
            note(f"scaled: {name} ({describe(array)}) is multiplied by {factor:.9g}")
    return found


def _target_of(signature: CallSignature, names: Sequence[str], target: str) -> str | None:
    """What a model that returns its own loss calls the targets, beside inputs of these names; None if it takes none."""
    if set(names) <= set(signature.names):
        left = _left(signature, names)
        for wanted in (target, *TARGET_NAMES):
            if wanted in left:
                return wanted
        return next((name for name in left if name not in signature.optional), None)
    if signature.most is None or signature.most <= len(names):
        return None
    following = signature.positional[len(names) :]
    optional = following and following[0] in signature.optional and following[0] not in TARGET_NAMES
    return None if optional else target
