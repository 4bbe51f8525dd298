"""The data, cut into batches as model, loss and memory want them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from hesscli.errors import MismatchError
from hesscli.files.models import SavedModel
from hesscli.files.resources import available_memory
from hesscli.hessian.losses import ELEMENT_WEIGHTED, LOSSES, OF_CLASSES, Loss, classes_last
from hesscli.hessian.plan import Sizes, choose_sizes
from hesscli.hessian.problem import Batch, Batches, Problem, saved_bytes
from hesscli.job.options import ProblemOptions
from hesscli.job.team import ranks_here

_EACH = 2  # batches of each thread, where they are worked on side by side
_WORTH = 1 << 21  # bytes that a batch's pass keeps at least, to be worth one
_FEWEST, _TRIED = (
    4,
    32,
)  # samples passed together and apart, to see whether they matter to each other
_ENOUGH = 1 << 23  # and at most, or half of the parameters' bytes: it makes a vector of theirs


@dataclass(frozen=True)
class Source:
    """What batches are cut from: arrays on the CPU that may lie in a file larger than the memory.

    Args:
        inputs: in the order of the model's.
        target: what the loss compares with.
        samples: the length of their first axis; 1 if they are one sample without that axis.
        loss: whose arguments go with each batch, weights per element cut like the target.
        scales: what inputs are multiplied by, by their place.
        keywords: the names of the last inputs, if they are passed by name.
        device, dtype: of the batches.
    """

    inputs: tuple[Tensor, ...]
    target: Tensor | None
    samples: int
    loss: Loss
    scales: Mapping[int, float]
    keywords: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """What all batches take together."""
        arrays = [*self.inputs, *([] if self.target is None else [self.target])]
        return sum(
            array.numel() * max(array.itemsize, self.dtype.itemsize if _floats(array) else 0)
            for array in arrays
        ) + sum(self.inputs[place].numel() * self.dtype.itemsize for place in self.scales)

    def whole(self) -> Batch:
        inputs = tuple(
            self._scaled(place, move(array, self.device, self.dtype))
            for place, array in enumerate(self.inputs)
        )
        target = None if self.target is None else move(self.target, self.device, self.dtype)
        return Batch(inputs, target, self.loss.arguments, self.keywords)

    def part(self, start: int, stop: int) -> Batch:
        if start == 0 and stop == self.samples:
            return self.whole()
        part = replace(
            self,
            inputs=tuple(array[start:stop] for array in self.inputs),
            target=None if self.target is None else self.target[start:stop],
            samples=stop - start,
            loss=replace(self.loss, arguments=self._arguments(start, stop)),
        )
        return part.whole()

    def _arguments(self, start: int, stop: int) -> Mapping[str, object]:
        return {
            name: value[start:stop] if self._goes_along(name, value) else value  # type: ignore[index]
            for name, value in self.loss.arguments.items()
        }

    def _goes_along(self, name: str, value: object) -> bool:
        """Whether a loss argument has an entry for each sample: weights per element, or an array for one's own loss."""
        if not isinstance(value, Tensor) or not value.dim() or len(value) != self.samples:
            return False
        weighted = name == "weight" and self.loss.name in ELEMENT_WEIGHTED  # or per class
        of_target = self.target is not None and value.dim() == self.target.dim()
        return self.loss.function is not None or (weighted and of_target)

    def _scaled(self, place: int, array: Tensor) -> Tensor:
        return array.to(self.dtype) * self.scales[place] if place in self.scales else array


def move(array: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The array on the device, in memory of its own, floating-point numbers in the dtype."""
    wanted = dtype if _floats(array) else array.dtype
    return torch.empty(array.shape, dtype=wanted, device=device).copy_(array)


def _floats(array: Tensor) -> bool:
    return array.is_floating_point()


def split(
    problem: Problem,
    source: Source,
    options: ProblemOptions,
    model: SavedModel,
    rows: int | None,
    note: Callable[[str], None],
    parts: int = 1,
    side_by_side: bool = False,
) -> tuple[Problem, Sizes]:
    """The problem with its data in batches, unless model or loss want it whole.

    Args:
        parts: how many processes share the batches; there is at least one for each, where that can be.
        side_by_side: batches will be worked on side by side: a few for each thread, unless they would be small.
    """
    samples = source.samples
    few = source.whole() if options.unbatched else source.part(0, min(samples, 2))
    if model.batch_size is not None and not options.unbatched:
        if samples % model.batch_size:
            raise MismatchError(
                f"the exported model accepts batches of exactly {model.batch_size} samples, "
                f"the data has {samples}",
                "export it with a dynamic batch axis (torch.export.Dim)",
            )
        few = source.part(0, model.batch_size)
    if problem.loss.name in OF_CLASSES and few.target is not None and few.target.dim() > 1:
        with torch.no_grad():
            output = problem.output(few)
        if classes_last(output.shape, few.target.shape):
            note(f"classes: {output.shape[-1]}, along the last axis of the model's output")
    if problem.loss.name not in LOSSES:
        with torch.no_grad():
            _, count = problem.total(few)
        if count == 1 and samples > 1:
            problem = replace(problem, loss=replace(problem.loss, whole=True))
            note(
                "the loss is one number for all data, so the data is not split into batches; "
                "a loss that returns a term for each sample would be, and faster"
            )
    saved = saved_bytes(problem, few, problem.output) // max(
        1, len(few.inputs[0]) if few.inputs[0].dim() else 1
    )
    size = rows or sum(p.numel() for p in problem.parameters.values())
    free = free_memory(problem.device)
    if parts > 1 and problem.device.type == "cpu":
        free //= ranks_here()
    sizes = choose_sizes(samples, saved, size, problem.dtype.itemsize, free)
    if side_by_side and problem.device.type == "cpu":
        enough = max(_ENOUGH, size * problem.dtype.itemsize // 2)
        sizes = replace(sizes, batch=min(sizes.batch, _for_threads(samples, saved, enough)))
    batch, bounds = min(options.batch_size or sizes.batch, samples), None
    whole = options.unbatched or problem.loss.whole or options.train_mode
    if model.batch_size is not None and not whole:
        batch = model.batch_size
    elif not whole and (batch < samples or parts > 1):
        coupled = _coupled(problem, source, batch)
        if coupled is not None:
            note(f"{coupled} sees several samples at once, so all the data is one batch")
        whole = coupled is not None
        if not whole and parts > 1:
            batch, bounds = _even(samples, batch, parts)
    if whole:
        batch = samples  # train-mode batch norm couples the samples of a batch
    if bounds is None:
        bounds = [*range(0, samples, batch), samples]
    count = len(bounds) - 1
    if count < parts:
        batches = f"{count} batch" + ("es" if count > 1 else "")
        note(f"the data is {batches}, so {parts - count} of {parts} processes have nothing to do")
    return replace(problem, batches=_batches(source, bounds, parts)), Sizes(batch, sizes.chunk)


def _coupled(problem: Problem, source: Source, batch: int) -> str | None:
    """What makes something else of samples together than of the same ones apart: the model, the loss, or nothing."""
    count = min(source.samples, max(_FEWEST, min(batch, _TRIED)))
    together = source.part(0, count)
    apart = [source.part(0, count // 2), source.part(count // 2, count)]
    with torch.no_grad():
        output = problem.output(together)
        try:
            outputs = [problem.output(part) for part in apart]
        except MismatchError:  # a trace that holds the number of samples it was made with
            return None
        if not _same(output, outputs):
            return "the model"
        if problem.loss.function is None:
            return None

        def terms(output: Tensor, of: Batch) -> Tensor:
            return problem.loss.terms(output, of.target, of.loss_arguments)

        parts = [terms(output, of) for output, of in zip(outputs, apart, strict=True)]
        return None if _same(terms(output, together), parts) else f"the loss {problem.loss.name}"


def _same(together: Tensor, apart: Sequence[Tensor]) -> bool:
    joined = torch.cat([part.reshape(-1) for part in apart])
    if joined.numel() != together.numel():
        return False
    rounding = 1e-7 if together.dtype is torch.float64 else 1e-4
    size = float(together.abs().nan_to_num(0, 0, 0).max()) if together.numel() else 0.0
    return torch.allclose(together.reshape(-1), joined, rounding, rounding * size, equal_nan=True)


def _for_threads(samples: int, saved: int, enough: int) -> int:
    """Samples per batch, so that each thread has some batches, and what all threads hold at once stays small.

    `saved` bytes of a sample's forward pass are kept, and `enough` are of a batch's.
    """
    threads = torch.get_num_threads()
    few = min(_EACH * threads, samples * saved // _WORTH) if threads > 1 else 1
    many = -(-samples * saved // (enough * threads)) * threads
    return -(-samples // max(1, few, many))


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
