"""The data, cut into batches as model, loss and memory want them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch

from hesscli.errors import MismatchError
from hesscli.files.resources import available_memory
from hesscli.hessian.batch_size import PREFERRED_ROWS, Passes, choose_batch, choose_passes
from hesscli.hessian.chunk_sizes import chunk_sizes
from hesscli.hessian.objective.batch import Batch, Batches
from hesscli.hessian.objective.classes import class_axis
from hesscli.hessian.objective.first_passes import first_output
from hesscli.hessian.objective.loss import OF_ALL
from hesscli.hessian.objective.losses import LOSSES, OF_CLASSES
from hesscli.hessian.objective.problem import Problem, parameters_at
from hesscli.hessian.objective.saved import saved_sizes
from hesscli.hessian.objective.weight_writes import weight_writes
from hesscli.hessian.workers import graphs_for, workers
from hesscli.job.options import Note
from hesscli.job.setup.mixing import what_mixes, what_mixes_in_place
from hesscli.job.setup.own_loss import inspect_loss
from hesscli.job.setup.processes import Processes
from hesscli.job.setup.source import Source
from hesscli.job.setup.team import ranks_here

PROCESS = 256 << 20  # bytes that a process takes before it has any batch
_ENOUGH = 1 << 23  # bytes that a pass of a batch keeps at most; or half of the parameters, if more


def in_batches(
    problem: Problem,
    source: Source,
    batch_size: int | None,
    note: Note,
    processes: Processes,
    memory: int | None,
) -> tuple[Problem, Passes]:
    """The problem with its data in batches, unless model or loss want it whole.

    Args:
        processes: that share the batches; there is at least one for each, where that can be, and if threads work on
            them side by side, as many for each thread.
        memory: bytes of the host's that the process may use; None for what is free.

    Returns:
        the problem, with batches that leave room for second derivatives, and what of these goes through one at once.

    Raises:
        MismatchError: the data cannot be cut into batches that the model accepts.
    """
    shares = processes.size
    some, fewest, most = _accepted(problem, source, batch_size, note)
    _say_where_classes_are(problem, some, note)
    problem, kept = _watched(problem, some)
    saved, largest = (size(kept) // max(1, len(some)) for size in (sum, partial(max, default=0)))
    each = max(1, saved, 2 * source.bytes // source.samples)
    free = _free(problem, processes, memory)
    room = min(free, free_memory(problem.device) // ranks_here()) // (2 * each)
    if problem.loss.name not in LOSSES:
        problem, source, whole = inspect_loss(problem, source, some, room, note)
        if any(processes.agreed(whole)):  # one may lack the memory to try it
            fewest = most = source.samples
            if problem.loss.reduced:
                problem = replace(problem, loss=replace(problem.loss, reduced=OF_ALL))
    source = replace(source, fewest=fewest, most=most)
    usual = _usual_batch(problem, source, saved, processes, free)
    bounds = _bounds(source, batch_size or usual, shares)
    problem, bounds = _taken_apart(problem, source, bounds, room, note, processes)
    count = len(bounds) - 1
    if count < shares:
        listed = f"{count} batch" + ("es" if count > 1 else "")
        note(f"the data is {listed}, so {shares - count} of {shares} processes have nothing to do")
    most = max(b - a for a, b in itertools.pairwise(bounds))
    passes = _passes(problem, most * saved, most * largest, free)
    return replace(problem, batches=_batches(source, bounds, free)), passes


def _watched(problem: Problem, some: Batch) -> tuple[Problem, Collection[int]]:
    """The problem with what a pass writes to, weights or inputs; and the bytes of each tensor that autograd keeps."""
    as_given = [x._version for x in some.inputs]
    leaves = list(problem.parameters.values())
    grown = [1.001 * leaf.detach() for leaf in leaves]  # out of what a model keeps them in
    watched = weight_writes(problem.parameters, prevented=False)
    with parameters_at(leaves, grown), watched as written:
        kept = saved_sizes(problem, some, problem.output)
    writes_inputs = [x._version for x in some.inputs] != as_given
    return replace(problem, written=tuple(written), writes_inputs=writes_inputs), kept


def _say_where_classes_are(problem: Problem, some: Batch, note: Note) -> None:
    """Notes which axis of an output of several has the classes."""
    target = some.target
    if problem.loss.name not in OF_CLASSES or target is None or target.dim() < 2:
        return
    with torch.no_grad():
        output = problem.output(some)
    if class_axis(output.shape, target.shape) > 1:
        note(f"classes: {output.shape[-1]}, along the last axis of the model's output")
    elif target.shape == output.shape[:-1]:
        note(
            f"classes: {output.shape[1]}, along the second axis of the model's output, as "
            "PyTorch has them; the last would fit the targets too"
        )


def _accepted(
    problem: Problem, source: Source, batch_size: int | None, note: Note
) -> tuple[Batch, int, int | None]:
    """A few samples that the model takes; and the fewest and the most, if limited, that it takes at once.

    A model that refuses two samples may have been traced with another number (`--batch-size`), or wants all at once, as
    a graph network wants its nodes.
    """
    samples, count, fewest, most = source.samples, source.few, source.fewest, source.most
    if (fewest, most) != (1, None):
        _bounds(source, count, 1)  # before a pass of other samples fails
        batch = source.batch(0, count)
        first_output(problem, batch, note)
        return batch, fewest, most
    first = partial(first_output, problem, note=note)
    batch, output = source.first_accepted(first, count, batch_size or samples)
    if len(batch) == count:
        return batch, 1, None
    if len(batch) == 1 and samples in output.shape:
        with suppress(MismatchError):  # it may be broadcast to what the model holds of every sample
            batch, _ = source.first_accepted(first, samples)
    if len(batch) == samples:
        note(f"the model takes all {samples} samples at once, so all the data is one batch")
    return batch, len(batch), len(batch)


def _usual_batch(
    problem: Problem, source: Source, saved: int, processes: Processes, free: int
) -> int:
    """The samples of a batch, where `saved` bytes of a sample's forward pass are kept."""
    device, samples = problem.device, source.samples
    rows = 1 if processes.side_by_side and device.type == "cuda" else PREFERRED_ROWS
    sample, usual = source.bytes // samples, chunk_sizes(device)
    batch = choose_batch(samples, sample, saved, free, usual, rows)
    if processes.side_by_side and device.type == "cpu":
        enough = max(_ENOUGH, sum(p.nbytes for p in problem.parameters.values()) // 2)
        batch = min(batch, _for_threads(samples, saved, enough))
    return batch


def _passes(problem: Problem, saved: int, largest: int, free: int) -> Passes:
    """What goes through a batch at once, of whose forward pass so much is kept, and of one tensor at most `largest`."""
    size, device = sum(p.numel() for p in problem.parameters.values()), problem.device
    graphs = graphs_for(device, torch.iinfo(torch.int64).max)
    usual, itemsize = chunk_sizes(device), problem.dtype.itemsize
    return choose_passes(saved, largest, size, itemsize, free, usual, graphs)


def _free(problem: Problem, processes: Processes, memory: int | None) -> int:
    """Bytes that are free for passes, on the problem's device."""
    free = free_memory(problem.device)
    if problem.device.type != "cpu":
        return free
    if memory is not None:
        free = min(free, max(0, memory - PROCESS))
    return free // ranks_here() if processes.size > 1 else free


def _for_threads(samples: int, saved: int, enough: int) -> int:
    """Samples per batch, so that all threads have as many batches, and what they hold at once stays small.

    `saved` bytes of a sample's forward pass are kept, and `enough` are of a batch's.
    """
    threads = workers(torch.device("cpu"), samples)
    each = max(1, -(-samples * saved // (enough * threads)))
    return -(-samples // (each * threads))


def _bounds(source: Source, batch: int, shares: int) -> list[int]:
    """Where batches begin and end: as few as can be, and as equal, of no more samples than wanted where that can be.

    There are as many for each of the processes, so that each has the same samples whatever batches another has room
    for. Where the model does not accept that, there are as many as it accepts.
    """
    samples, fewest, most = source.samples, source.fewest, source.most or source.samples
    wanted = -(-samples // (min(batch, most) * shares))
    equal = (min(samples, each * shares) for each in range(wanted, 0, -1))
    for count in itertools.chain(equal, range(samples // fewest, 0, -1)):
        if samples // count >= fewest and -(-samples // count) <= most:
            return [index * samples // count for index in range(count + 1)]
    accepted = f"exactly {most}" if fewest == most else f"{fewest} to {most}"
    raise MismatchError(
        f"the model accepts batches of {accepted} samples, the data has {samples}",
        f"--samples {samples - samples % most}"
        if samples > most
        else "export it with a dynamic batch axis (torch.export.Dim)",
    )


def _taken_apart(
    problem: Problem, source: Source, bounds: list[int], room: int, note: Note, processes: Processes
) -> tuple[Problem, list[int]]:
    """The problem with whether its samples are separable, and the bounds of its batches: of one, if they are not.

    A process with more memory tries it with more samples, so what any of them sees counts for all.
    """
    limited = source.most is not None and source.most < source.samples
    mixing = None
    if limited:
        mixing = what_mixes_in_place(problem, source, bounds[1])
    elif len(bounds) > 2 and not problem.loss.is_one_number:
        mixing = what_mixes(problem, source, bounds, room, note)
    mixing = next((each for each in processes.agreed(mixing) if each is not None), None)
    if mixing is None:
        return replace(problem, separable=source.fewest == 1 and not limited), bounds
    sees = f"{mixing} sees several samples at once"
    if limited:
        note(f"{sees}: {bounds[1]} at a time, as the model accepts them")
        return replace(problem, separable=False), bounds
    note(f"{sees}, so all the data is one batch")
    return replace(problem, separable=False), [0, source.samples]


def _batches(source: Source, bounds: Sequence[int], free: int) -> Batches:
    """Each is kept where all take a small part of what is free; else it is made when it is needed."""

    def make(index: int) -> Batch:
        return source.batch(bounds[index], bounds[index + 1])

    return Batches(len(bounds) - 1, make, kept=source.bytes <= free // 8)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; what PyTorch keeps of a GPU's for itself is free too."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return available_memory()
