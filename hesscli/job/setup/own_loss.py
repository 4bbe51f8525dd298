"""What a loss of the user's own, or the model's, does: which of its arguments go along with the samples, what else it
depends on, what it is of where it is one number, and whether it wants all samples at once."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import permutations

import torch
from torch import Tensor

from hesscli.errors import MismatchError
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.loss import OF_ALL, SUM
from hesscli.hessian.objective.outputs import described, pick_output
from hesscli.hessian.objective.problem import Problem
from hesscli.job.options import Note
from hesscli.job.setup.broadcasting import demand_no_pairs
from hesscli.job.setup.reduction import reduction
from hesscli.job.setup.source import Source
from hesscli.widest import wide

_TURNED = 256  # samples of which the order is changed
_ROUNDING = 1e-5


def of_outputs(problem: Problem, source: Source, note: Note) -> Problem:
    """The problem with whether a loss of the user's own takes all that the model returns, as that is no one tensor."""
    if problem.loss.function is None or problem.output_key is not None:
        return problem
    try:
        _, returned = source.first_accepted(problem.returned)
    except MismatchError:  # which the first pass of all says, too
        return problem
    try:
        pick_output(returned, None)
        return problem
    except MismatchError:
        note(
            f"the model returns {described(returned)}: the loss {problem.loss.name} takes all of it"
        )
        return replace(problem, loss=replace(problem.loss, whole=True))


def inspect_loss(
    problem: Problem, source: Source, some: Batch, room: int, note: Note
) -> tuple[Problem, Source, bool]:
    """The problem and its source with what there is to know of the loss, and whether it wants all samples at once.

    Args:
        note: hears of what makes the data one batch, and of arguments that are the same for all samples.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what does not fit: it is tried whether it does
        fixed = _fixed(problem, source, some)
    if fixed:
        listed = ", ".join(fixed)
        note(f"loss arguments as long as the data, but the same for all samples: {listed}")
        source = _with_fixed(source, fixed)
    if problem.loss.is_output and not problem.one_sample:
        given = dict(zip(source.inputs, some.inputs, strict=True))
        demand_no_pairs(problem, some, _by_sample(given, some, source))
    tried, terms = _terms(problem, source, len(some))
    with torch.no_grad():
        output = problem.output(tried)
    if problem.loss.reads_others(output, tried):
        note(
            f"the loss {problem.loss.name} depends on parameters besides the model's output: "
            "they are constants here"
        )
    wants_all = len(tried) > len(some)
    if wants_all:
        note(f"the loss takes all {source.samples} samples at once, so all the data is one batch")
    if terms.numel() == 1 and source.samples > 1 and (not terms.dim() or len(tried) > 1):
        of = OF_ALL if wants_all else reduction(problem, source, output.numel() // len(tried), room)
        loss = replace(problem.loss, reduced=of)
        if of == OF_ALL:
            note(
                "the loss is one number for all data, so the data is not split into batches; "
                "with a loss that returns one term per sample it would be, and faster"
            )
        else:
            idle = ", so --reduction sum has no effect" if loss.reduction == SUM != of else ""
            note(f"the loss {loss.name} is one number, the {of} over the samples{idle}")
            loss = replace(loss, reduction=of)
        problem = replace(problem, loss=loss)
    return problem, source, wants_all or problem.loss.reduced == OF_ALL


def _fixed(problem: Problem, source: Source, some: Batch) -> list[str]:
    """Arguments that have as many entries as there are samples, but not one for each.

    Another number of samples accepts them whole, as it does the weights of as many classes. It accepts those of which
    the first entries are taken, too: `w[order]`, of the samples in some order. Which of them they are shows where the
    order of the samples changes: the loss stays the same if the entries of each go along, or only if none do.
    """
    counts = range(max(2, source.fewest), (source.most or source.recorded + source.fewest + 2) + 1)
    # Not one, which any array broadcasts to, nor what divides theirs: terms of that length would tell nothing.
    count = next((count for count in counts if source.recorded % count), None)
    if not source.per_sample or source.recorded < 2 or count is None:
        return []
    tried = _picked(some, torch.arange(count) % len(some), source.per_sample)  # copies of a few
    fixed = []
    with torch.no_grad():
        try:
            problem.output(tried)
        except MismatchError:  # of copies
            return []
        for name in source.per_sample:
            arguments = {**tried.loss_arguments, name: source.arguments[name]}
            if _accepts(problem, replace(tried, loss_arguments=arguments)):
                fixed.append(name)
        if not (fixed and _accepts(problem, tried)):
            return fixed
        whole = _with_fixed(source, fixed)
        if not _keeps_order_out(problem, source) and _keeps_order_out(problem, whole):
            return fixed
    return []


def _accepts(problem: Problem, batch: Batch) -> bool:
    """Whether the loss takes a batch, and makes terms of each sample, or one number."""
    try:
        terms = problem.loss.terms(problem.output(batch), batch)
    except MismatchError:
        return False
    return not terms.dim() or len(terms) % len(batch) == 0


def _keeps_order_out(problem: Problem, source: Source) -> bool:
    """Whether samples in the other order, with their entries of the arguments, have the same loss."""

    def totals(batch: Batch) -> tuple[float, float]:
        turned = _picked(batch, torch.arange(len(batch)).flip(0), source.per_sample)
        output = problem.output(batch)
        by_sample = not problem.loss.is_output and output.shape[:1] == (len(batch),)
        moved = output.flip(0) if by_sample else problem.output(turned)
        pairs = ((output, batch), (moved, turned))
        first, second = (float(wide(problem.loss.terms(*pair)).sum()) for pair in pairs)
        return first, second

    try:
        _, (first, second) = source.first_accepted(totals, _TURNED)
    except MismatchError:
        return False
    return math.isclose(first, second, rel_tol=_ROUNDING)


def _with_fixed(source: Source, fixed: Collection[str]) -> Source:
    """The same source with arguments that are the same for all samples."""
    left = [name for name in source.per_sample if name not in fixed]
    return replace(source, per_sample=left)


def _picked(batch: Batch, index: Tensor, per_sample: Collection[str]) -> Batch:
    """These samples of a batch; loss arguments of these names have an entry for each."""
    index = index.to(batch.inputs[0].device)
    arguments = dict(batch.loss_arguments)
    for name in per_sample:
        value = arguments[name]
        assert isinstance(value, torch.Tensor)
        arguments[name] = value[index]
    return replace(
        batch,
        inputs=tuple(x[index] for x in batch.inputs),
        target=None if batch.target is None else batch.target[index],
        loss_arguments=arguments,
    )


def _terms(problem: Problem, source: Source, count: int) -> tuple[Batch, Tensor]:
    """So many samples, or all there are if the loss does not take them, and its terms.

    Raises:
        MismatchError: it takes none; or it compares samples with each other where only broadcasting makes shapes fit,
            of which some of PyTorch's losses warn.
    """

    def terms(batch: Batch) -> Tensor:
        output = problem.output(batch)
        with warnings.catch_warnings():
            sizes = [output.shape] if batch.target is None else [output.shape, batch.target.shape]
            for first, second in permutations(sizes, 2):
                warned = (
                    f"Using a target size ({first}) that is different to the input size ({second})"
                )
                warnings.filterwarnings("error", re.escape(warned))
            terms = problem.loss.terms(output, batch)
        if not problem.loss.is_output:
            demand_no_pairs(problem, batch, _by_sample({}, batch, source))
        return terms

    return source.first_accepted(terms, count)


def _by_sample(given: Mapping[str, Tensor], batch: Batch, source: Source) -> dict[str, Tensor]:
    """What has an entry for each sample of the batch, of what is given, the target and arguments of the loss."""
    arguments = {name: batch.loss_arguments[name] for name in source.per_sample}
    return {
        name: value
        for name, value in {**arguments, **given, "target": batch.target}.items()
        if isinstance(value, Tensor) and value.shape[:1] == (len(batch),)
    }
