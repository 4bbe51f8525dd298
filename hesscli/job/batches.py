"""The data, cut into batches as model, loss and memory want them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from hesscli.errors import MismatchError
from hesscli.files.models import SavedModel
from hesscli.files.resources import available_memory
from hesscli.hessian.batch import Batch, Batches
from hesscli.hessian.losses import LOSSES, OF_CLASSES, classes_last
from hesscli.hessian.plan import Sizes, choose_sizes
from hesscli.hessian.problem import Problem, saved_bytes
from hesscli.job.options import ProblemOptions
from hesscli.job.source import Source
from hesscli.job.team import ranks_here
from hesscli.job.together import coupled, coupled_in_place, taken

_EACH = 2  # batches of each thread, where they are worked on side by side
_WORTH = 1 << 21  # bytes that a batch's pass keeps at least, to be worth one
_ENOUGH = 1 << 23  # and at most, or half of the parameters' bytes: it makes a vector of theirs


def split(
    problem: Problem,
    source: Source,
    options: ProblemOptions,
    model: SavedModel,
    note: Callable[[str], None],
    parts: int = 1,
    side_by_side: bool = False,
) -> tuple[Problem, Sizes]:
    """The problem with its data in batches, unless model or loss want it whole.

    Args:
        parts: how many processes share the batches; there is at least one for each, where that can be.
        side_by_side: batches will be worked on side by side: a few for each thread, unless they would be small.

    Raises:
        MismatchError: the data cannot be cut into batches that the model accepts.
    """
    samples = source.samples
    some, fewest, most = _accepted(problem, source, options, model, note)
    if problem.loss.name in OF_CLASSES and some.target is not None and some.target.dim() > 1:
        with torch.no_grad():
            output = problem.output(some)
        if classes_last(output.shape, some.target.shape):
            note(f"classes: {output.shape[-1]}, along the last axis of the model's output")
    if problem.loss.name not in LOSSES:
        fixed = _fixed(problem, source, some)
        if fixed:
            note(
                f"loss arguments as long as the data, but the same for all samples: {', '.join(fixed)}"
            )
            source = replace(source, loss=replace(source.loss, fixed=frozenset(fixed)))
            some = source.part(0, len(some))
        tried, terms = _terms(problem, source, some)
        with torch.no_grad():
            output = problem.output(tried)
        if problem.loss.reads_others(output, tried.target, tried.loss_arguments):
            note(
                f"the loss {problem.loss.name} depends on parameters besides the model's output: "
                "they are constants here"
            )
        if len(tried) > len(some):
            note(f"the loss takes all {samples} samples at once, so all the data is one batch")
            fewest = most = samples
        if terms.numel() == 1 and samples > 1 and (not terms.dim() or len(tried) > 1):
            problem = replace(problem, loss=replace(problem.loss, whole=True))
            note(
                "the loss is one number for all data, so the data is not split into batches; "
                "a loss that returns a term for each sample would be, and faster"
            )
            fewest = most = samples
    as_given = [x._version for x in some.inputs]
    sizes = _sizes(problem, some, samples, parts, side_by_side)
    if [x._version for x in some.inputs] != as_given:
        problem = replace(problem, writes=True)
    batch, bounds = min(options.batch_size or sizes.batch, samples), None
    if fewest > 1 or most is not None:
        bounds = _within(samples, batch, fewest, most or samples, parts)
        batch = bounds[1]
        seeing = coupled_in_place(problem, source, batch)
        if seeing is not None:
            note(
                f"{seeing} sees several samples at once: {batch} at a time, as the model accepts them"
            )
    elif batch < samples or parts > 1:
        seeing = coupled(problem, source, batch)
        if seeing is not None:
            note(f"{seeing} sees several samples at once, so all the data is one batch")
            batch = samples
        elif parts > 1:
            batch, bounds = _even(samples, batch, parts)
    if bounds is None:
        bounds = _within(samples, batch, 1, batch, 1)
    count = len(bounds) - 1
    if count < parts:
        batches = f"{count} batch" + ("es" if count > 1 else "")
        note(f"the data is {batches}, so {parts - count} of {parts} processes have nothing to do")
    return replace(problem, batches=_batches(source, bounds, parts)), Sizes(batch, sizes.chunk)


def _accepted(
    problem: Problem,
    source: Source,
    options: ProblemOptions,
    model: SavedModel,
    note: Callable[[str], None],
) -> tuple[Batch, int, int | None]:
    """A few samples that the model takes; and the fewest and the most, if limited, that it takes at once.

    What does not take two may have been traced with another number, `--batch-size`; or takes all at once, as the nodes
    of a graph.
    """
    samples, (fewest, most) = source.samples, model.batch_sizes
    if options.unbatched:
        return source.whole(), samples, samples
    count = few(source, options, model)
    if (fewest, most) != (1, None):
        _within(samples, count, fewest, most or samples, 1)  # before a pass of other samples fails
        return source.part(0, count), fewest, most
    if options.train_mode:  # batch norm couples the samples of a batch
        return source.part(0, count), samples, samples
    asked = min(options.batch_size or samples, samples)
    batch, _ = taken(problem.output, source, list(dict.fromkeys([count, asked, samples])))
    if len(batch) == count:
        return batch, 1, None
    if len(batch) == samples:
        note(f"the model takes all {samples} samples at once, so all the data is one batch")
    return batch, len(batch), len(batch)


def few(source: Source, options: ProblemOptions, model: SavedModel) -> int:
    """How many samples are enough to see what the model makes of them."""
    if options.unbatched:
        return source.samples
    fewest, most = model.batch_sizes
    return min(source.samples, max(2, fewest), most or source.samples)


def _fixed(problem: Problem, source: Source, few: Batch) -> list[str]:
    """Arguments of a loss of the user's own that have as many entries as there are samples, but not one for each.

    A few samples accept them whole, as they do the weights of as many classes.
    """
    if source.samples <= len(few):
        return []
    fixed = []
    with torch.no_grad():
        output = problem.output(few)
        for name, value in source.loss.arguments.items():
            if source.goes_along(name, value):
                try:
                    whole = {**few.loss_arguments, name: value}
                    terms = problem.loss.terms(output, few.target, whole)
                except MismatchError:
                    continue
                if terms.dim() and len(terms) == len(few):
                    fixed.append(name)
    return fixed


def _terms(problem: Problem, source: Source, few: Batch) -> tuple[Batch, Tensor]:
    """A few samples that the loss takes, or all there are, and its terms."""

    def terms(batch: Batch) -> Tensor:
        return problem.loss.terms(problem.output(batch), batch.target, batch.loss_arguments)

    if source.samples == 1:
        return few, terms(few).detach()
    return taken(terms, source, list(dict.fromkeys([len(few), source.samples])))


def _sizes(problem: Problem, few: Batch, samples: int, parts: int, side_by_side: bool) -> Sizes:
    """How much goes through at once, by what a few samples take."""
    saved = saved_bytes(problem, few, problem.output) // max(1, len(few))
    size = sum(p.numel() for p in problem.parameters.values())
    free = free_memory(problem.device)
    if parts > 1 and problem.device.type == "cpu":
        free //= ranks_here()
    sizes = choose_sizes(samples, saved, size, problem.dtype.itemsize, free)
    if side_by_side and problem.device.type == "cpu":
        enough = max(_ENOUGH, size * problem.dtype.itemsize // 2)
        sizes = replace(sizes, batch=min(sizes.batch, _for_threads(samples, saved, enough)))
    return sizes


def _for_threads(samples: int, saved: int, enough: int) -> int:
    """Samples per batch, so that each thread has some batches, and what all threads hold at once stays small.

    `saved` bytes of a sample's forward pass are kept, and `enough` are of a batch's.
    """
    threads = torch.get_num_threads()
    few = min(_EACH * threads, samples * saved // _WORTH) if threads > 1 else 1
    many = -(-samples * saved // (enough * threads)) * threads
    return -(-samples // max(1, few, many))


def _within(samples: int, batch: int, fewest: int, most: int, parts: int) -> list[int]:
    """Where batches begin and end: as equal as can be, and of no more samples than wanted where the model accepts that.

    Raises:
        MismatchError: there are none that it accepts.
    """
    for count in range(min(samples, max(parts, -(-samples // min(batch, most)))), 0, -1):
        if samples // count >= fewest and -(-samples // count) <= most:
            return [index * samples // count for index in range(count + 1)]
    accepted = f"exactly {most}" if fewest == most else f"{fewest} to {most}"
    raise MismatchError(
        f"the model accepts batches of {accepted} samples, the data has {samples}",
        f"--samples {samples - samples % most}"
        if samples > most
        else "export it with a dynamic batch axis (torch.export.Dim)",
    )


def _even(samples: int, most: int, parts: int) -> tuple[int, list[int]]:
    """As few batches as can be, so many for each of the processes, and as equal as can be: the largest, all bounds."""
    count = min(samples, -(-samples // (most * parts)) * parts)
    bounds = [index * samples // count for index in range(count + 1)]
    return -(-samples // count), bounds


def _batches(source: Source, bounds: Sequence[int], parts: int) -> Sequence[Batch]:
    """All batches at once where they take a small part of the memory; else each when it is needed."""

    def make(index: int) -> Batch:
        return source.part(bounds[index], bounds[index + 1])

    small = source.bytes <= free_memory(source.device) // 8
    if parts > 1:  # a process needs its own alone
        return Batches(len(bounds) - 1, cache(make) if small else make)
    lazy = Batches(len(bounds) - 1, make)
    return list(lazy) if small else lazy


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()
