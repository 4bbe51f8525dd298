"""What a command would compute, how, and what that takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch

from hesscli.errors import ResourceError
from hesscli.files.resources import available_memory, disk_used, free_disk
from hesscli.files.result_names import partial_paths
from hesscli.hessian.analysis import Analyses
from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import Block, partition
from hesscli.hessian.check import Certificate, gradients
from hesscli.hessian.curvatures import CURVATURES
from hesscli.hessian.cuts import Cuts
from hesscli.hessian.planner import Choice, seconds_of
from hesscli.hessian.problem import Problem
from hesscli.hessian.rates import measure_rates, usual_rates
from hesscli.hessian.routes.base import Route
from hesscli.hessian.words import HVP, STRUCTURES
from hesscli.job import documents
from hesscli.job.batches import free_memory
from hesscli.job.estimate import Estimate, estimate, gradient_seconds
from hesscli.job.json_form import Document
from hesscli.job.opening import Opened
from hesscli.job.options import ComputeOptions, Listener
from hesscli.job.remedies import inexact
from hesscli.job.sizes import size
from hesscli.job.team import ranks_here
from hesscli.spectrum.statistics import QUICK_LIMIT

LARGE = 4096
"""Blocks of more rows than this are computed in bands, each written while the next one is computed."""

BAND = 1 << 24  # numbers in a band
LONG_BAND = 1 << 26  # and in one of a matrix of more rows than `LONG`, for longer runs on the disk
LONG = 1 << 15
_SHARE = 0.6  # of the free memory, unless a limit is given
_PROCESS = 256 << 20  # bytes that activations and the like are counted for


class Plan:
    """The blocks of a Hessian, the routes of each, and what they take.

    Args:
        options: what was asked for.
        opened: the problem.
        listener: hears the notes.
        shared: other processes compute parts of it.

    Raises:
        NumericalError: the method asked for would not be exact.
    """

    def __init__(
        self, options: ComputeOptions, opened: Opened, listener: Listener, shared: bool = False
    ) -> None:
        self.shared = shared
        self.options, self.opened, self.listener = options, opened, listener
        self.problem = opened.problem
        self.rates = usual_rates(self.problem.device)
        self.structure = STRUCTURES[options.blocks]
        self.diagonal = self.structure == "elements"
        self.shapes = {name: tuple(p.shape) for name, p in self.problem.parameters.items()}
        self.blocks = partition(self.shapes, self.structure)
        self.bytes = _output_bytes(self.blocks, self.diagonal, self.problem.dtype)
        self.limit = options.memory or int(_SHARE * available_memory()) // ranks_here()
        self.routes: dict[str, Route] = {}
        self.choices: dict[str, list[Choice]] = {}
        self.cut_bytes = 0  # that are kept where a deep model is cut
        self._settle()
        # Numbers per band of each large block. Whoever goes on with another's file cuts as that one did.
        self.bands = {b.name: self._band(b) for b in self.blocks if self.is_large(b)}

    def _settle(self) -> None:
        problem, curvature = self.problem, CURVATURES[self.options.curvature]
        analyses, cuts = Analyses(problem), Cuts(problem, self.opened.sizes.chunk)
        self.routes = curvature.routes(problem, analyses, cuts, lambda: self.reference)
        curvature.require(problem, analyses)
        planner = curvature.planner(problem, analyses, cuts)
        method = self.options.method
        for block in self.blocks:
            try:
                self.choices[block.name] = (
                    planner.choices(block, self.diagonal)
                    if method == "auto"
                    else planner.forced(block, self.diagonal, method)
                )
            except NotApplicable as reason:
                raise inexact(self.options, block, method, reason) from None
        self.cut_bytes = cuts.bytes
        if planner.refused and method == "auto":
            self.opened.note(f"no fast route: {planner.refused}; hvp takes one pass per parameter")

    def by_rows(self) -> float:
        """Seconds of the whole as products with unit vectors, one per row, by the measure of `work`."""
        every = [choice for ranked in self.choices.values() for choice in ranked]
        return seconds_of([choice for choice in every if choice.method == HVP], self.rates)

    @cached_property
    def reference(self) -> Problem:
        """Where gradients are taken that are compared with each other: in float64 if the model runs in it."""
        return self.problem.double() or self.problem

    @cached_property
    def certificate(self) -> Certificate | None:
        """What checks the blocks, if that is asked for."""
        if not self.options.check:
            return None
        options, dtype = self.options, self.problem.dtype
        return CURVATURES[options.curvature].certificate(self.reference, dtype, options.seed)

    # Large blocks

    def is_large(self, block: Block) -> bool:
        return not self.diagonal and block.size > LARGE

    def held_on(self, block: Block) -> torch.device | None:
        """The device that holds the upper half of a large block until it is written; None where others write too."""
        return None if self.shared else self._roomy(block)

    def _roomy(self, block: Block) -> torch.device | None:
        """The device with room for the upper half of a block, the problem's rather than the host."""
        device, itemsize = self.problem.device, self.problem.dtype.itemsize
        if device.type == "cuda" and _upper(block) * itemsize <= _SHARE * free_memory(device):
            return device
        needed = self._process() + _upper(block) * itemsize
        return torch.device("cpu") if needed <= self.limit else None

    def _band(self, block: Block) -> int:
        # One is computed, one is written, and parts of it are turned.
        room = (self.limit - self._process()) // (3 * self.problem.dtype.itemsize)
        return max(block.size, min(LONG_BAND if block.size > LONG else BAND, room))

    # What it takes

    def work(self, blocks: Sequence[Block]) -> float:
        """Seconds that some blocks take on a machine of no particular speed, to compare parts by."""
        chosen = [self.choices[block.name][0] for block in blocks]
        return seconds_of(chosen, self.rates)

    def dry_run(self) -> Document:
        """The document that says what the command would take."""
        document = documents.skeleton(self.opened, self.structure)
        chosen = [self.choices[block.name][0] for block in self.blocks]
        document["blocks"] = [
            documents.block_facts(self.opened, block)
            | {
                "method": choice.method,
                "reason": choice.reason,
                "plan": str(choice),
                "bytes": _output_bytes([block], self.diagonal, self.problem.dtype),
            }
            for block, choice in zip(self.blocks, chosen, strict=True)
        ]
        document["total"] = {
            "size": sum(block.size for block in self.blocks),
            "bytes": self.bytes,
            "memory": self.memory(),
            "estimated_seconds": self._estimate(chosen).seconds,
        }
        return document

    def _estimate(self, chosen: Sequence[Choice]) -> Estimate:
        dtype, count = self.problem.dtype, 0
        if self.options.check:
            count = gradients(len(self.blocks), self.diagonal, dtype, self.reference.dtype)
        return estimate(
            chosen,
            measure_rates(self.problem.device, dtype),
            gradients=count,
            gradient=gradient_seconds(self.reference) if count else 0.0,
            decomposed=[]
            if self.diagonal
            else [b.size for b in self.blocks if self._decomposed(b)],
            size=self.bytes,
        )

    def _decomposed(self, block: Block) -> bool:
        """Whether the extreme eigenvalues of a block are wanted."""
        quick = block.size <= QUICK_LIMIT
        return self.options.stats == "all" or (self.options.stats == "auto" and quick)

    def memory(self) -> int:
        """Bytes of the host's memory that the work holds at most."""
        itemsize = self.problem.dtype.itemsize
        whole = [b for b in self.blocks if not self.is_large(b)]
        needs = [_output_bytes([b], self.diagonal, self.problem.dtype) for b in whole]
        for block in (b for b in self.blocks if self.is_large(b)):
            device = self._roomy(block)
            if device is None or device.type == "cpu":
                held = _upper(block) if device else 3 * self.bands[block.name]
                needs.append(held * itemsize)
        return max(needs, default=0) + self._process()

    def _process(self) -> int:
        numbers = sum(math.prod(shape) for shape in self.shapes.values())
        return _PROCESS + self.cut_bytes + 24 * numbers

    def fits(self) -> None:
        """Refuses what memory or disk cannot hold.

        Raises:
            ResourceError: with the command that would fit.
        """
        output = self.options.output
        needs = [(self.memory(), self.limit, "of memory", "may be used")]
        if output is not None:
            free = free_disk(output.parent) + sum(map(disk_used, partial_paths(output)))
            needs.append((self.bytes, free, "of disk", f"is free in {output.parent}"))
        for needed, free, kind, where in needs:
            if needed > free:
                largest = max(block.size for block in self.blocks)
                raise ResourceError(
                    f"{self.structure} needs {size(needed)} {kind} (its largest block is "
                    f"{largest} x {largest}), {size(free)} {where}",
                    self._smaller(free) if kind == "of disk" else self._with_less(needed, free),
                )

    def _with_less(self, needed: int, free: int) -> str:
        """The option with which the memory is enough: more of it, where no blocks take as little."""
        if self.options.memory is None or self._process() + self.bytes_of("elements") <= free:
            return self._smaller(free)
        return f"--memory {math.ceil(needed / 1e6)}MB"

    def _smaller(self, free: int) -> str:
        for option in ("module", "diag", "elements"):
            needed = self.bytes_of(option)
            if needed < self.bytes and needed < free:
                break
        return f"--blocks {option}" if needed < self.bytes else "-o elsewhere.safetensors"

    def bytes_of(self, option: str) -> int:
        """Bytes of the output with this `--blocks`."""
        blocks = partition(self.shapes, STRUCTURES[option])
        return _output_bytes(blocks, option == "elements", self.problem.dtype)


def _upper(block: Block) -> int:
    """Numbers in the upper half of a block, and in what is computed and written of it."""
    return block.size**2 // 2 + 4 * BAND


def _output_bytes(blocks: Sequence[Block], diagonal: bool, dtype: torch.dtype) -> int:
    return sum(b.size if diagonal else b.size**2 for b in blocks) * dtype.itemsize
