"""The data, cut into batches as model, loss and memory want them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import torch

from hesscli.errors import MismatchError
from hesscli.files.resources import available_memory
from hesscli.hessian.batch_size import PREFERRED_ROWS, Sizes, choose_sizes
from hesscli.hessian.chunk_sizes import chunk_sizes
from hesscli.hessian.objective.batch import Batch, Batches
from hesscli.hessian.objective.first_passes import first_output
from hesscli.hessian.objective.losses import LOSSES, OF_CLASSES, classes_last
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.objective.saved import saved_bytes
from hesscli.job.setup.own_loss import inspect_loss
from hesscli.job.setup.source import Source
from hesscli.job.setup.team import ranks_here
from hesscli.job.setup.together import coupled, coupled_in_place, first_accepted

_EACH = 2  # batches per thread, where they are worked on side by side
_WORTH = 1 << 21  # bytes that a batch's pass keeps at least
_ENOUGH = 1 << 23  # and at most; or half of the parameters' bytes, if that is more


def split(
    problem: Problem,
    source: Source,
    batch_size: int | None,
    note: Callable[[str], None],
    parts: int = 1,
    side_by_side: bool = False,
) -> tuple[Problem, int]:
    """The problem with its data in batches, unless model or loss want it whole; and the rows of a chunk.

    Args:
        problem: the problem, without its batches.
        source: its data.
        batch_size: samples per batch, if asked for.
        note: hears what is made of the data.
        parts: how many processes share the batches; there is at least one for each, where that can be.
        side_by_side: batches will be worked on side by side: a few for each thread, unless they would be small.

    Raises:
        MismatchError: the data cannot be cut into batches that the model accepts.
    """
    samples = source.samples
    some, fewest, most = _accepted(problem, source, batch_size, note)
    if problem.loss.name in OF_CLASSES and some.target is not None and some.target.dim() > 1:
        with torch.no_grad():
            output = problem.output(some)
        if classes_last(output.shape, some.target.shape):
            note(f"classes: {output.shape[-1]}, along the last axis of the model's output")
        elif output.dim() > 2 and some.target.shape == output.shape[:-1]:
            note(
                f"classes: {output.shape[1]}, along the second axis of the model's output, as "
                "PyTorch has them; the last would fit the targets too"
            )
    if problem.loss.name not in LOSSES:
        problem, source, whole = inspect_loss(problem, source, some, note)
        if whole:
            fewest = most = samples
    as_given = [x._version for x in some.inputs]
    saved = saved_bytes(problem, some, problem.output) // max(1, len(some))
    sizes = _sizes(problem, saved, samples, parts, side_by_side)
    if [x._version for x in some.inputs] != as_given:
        problem = replace(problem, writes=True)
    batch = min(batch_size or sizes.batch, samples)
    if (fewest, most) == (1, None):
        bounds = _even(samples, batch, parts)
    else:
        bounds = _within(samples, batch, fewest, most or samples, parts)
    if most is not None and most < samples:
        if (seeing := coupled_in_place(problem, source, bounds[1])) is not None:
            how = f"{bounds[1]} at a time, as the model accepts them"
            note(f"{seeing} sees several samples at once: {how}")
        problem = replace(problem, separable=False)
    else:
        problem = replace(problem, separable=fewest == 1)
        each = max(1, saved, 2 * source.bytes // samples)
        room = free_memory(problem.device) // (2 * ranks_here() * each)
        if len(bounds) > 2 and (seeing := coupled(problem, source, bounds, room, note)) is not None:
            note(f"{seeing} sees several samples at once, so all the data is one batch")
            problem, bounds = replace(problem, separable=False), [0, samples]
    count = len(bounds) - 1
    if count < parts:
        listed = f"{count} batch" + ("es" if count > 1 else "")
        note(f"the data is {listed}, so {parts - count} of {parts} processes have nothing to do")
    return replace(problem, batches=_batches(source, bounds, parts)), sizes.chunk


def _accepted(
    problem: Problem, source: Source, batch_size: int | None, note: Callable[[str], None]
) -> tuple[Batch, int, int | None]:
    """A few samples that the model takes; and the fewest and the most, if limited, that it takes at once.

    A model that refuses two samples may have been traced with another number (`--batch-size`), or wants all at once, as
    a graph network wants its nodes.
    """
    samples, count, fewest, most = source.samples, source.few, source.fewest, source.most
    if (fewest, most) != (1, None):
        _within(samples, count, fewest, most or samples, 1)  # before a pass of other samples fails
        batch = source.part(0, count)
        first_output(problem, batch, note)
        return batch, fewest, most
    asked = min(batch_size or samples, samples)
    counts = list(dict.fromkeys([count, asked, samples]))
    first = partial(first_output, problem, note=note)
    batch, _ = first_accepted(first, source, counts)
    if len(batch) == count:
        return batch, 1, None
    if len(batch) == samples:
        note(f"the model takes all {samples} samples at once, so all the data is one batch")
    return batch, len(batch), len(batch)


def _sizes(problem: Problem, saved: int, samples: int, parts: int, side_by_side: bool) -> Sizes:
    """How much goes through at once, where `saved` bytes of a sample's forward pass are kept."""
    size = sum(p.numel() for p in problem.parameters.values())
    free = free_memory(problem.device)
    if parts > 1 and problem.device.type == "cpu":
        free //= ranks_here()
    usual = chunk_sizes(problem.device)
    rows = 1 if side_by_side and problem.device.type == "cuda" else PREFERRED_ROWS
    sizes = choose_sizes(samples, saved, size, problem.dtype.itemsize, free, usual, rows)
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


def _even(samples: int, most: int, parts: int) -> list[int]:
    """Where batches begin and end: as few as can be, so many for each of the processes, and as equal as can be."""
    count = min(samples, -(-samples // (most * parts)) * parts)
    return [index * samples // count for index in range(count + 1)]


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
