"""What the blocks of a plan take of the memory, and how large blocks are cut so that it is enough."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from hesscli.files.resources import available_memory
from hesscli.hessian.blocks import Block
from hesscli.hessian.objective.batch import held_bytes
from hesscli.hessian.words import HVP, PREACTIVATION
from hesscli.job.setup.batches import PROCESS, free_memory
from hesscli.job.setup.team import ranks_here

if TYPE_CHECKING:
    from hesscli.hessian.routes.base import Route
    from hesscli.job.matrix.planning import Plan

BAND = 1 << 23  # numbers in a band, or a thirty-second of the upper half
LONG_BAND = 1 << 26  # and in one of a matrix of more rows than `LONG`, for longer runs on the disk
LONG = 1 << 15
_ROWS = 1 << 24  # numbers that are put together and written of a band at a time
_SHARE = 0.6  # of the free memory, unless a limit is given
_ASKED = (
    24  # bytes of each number that is differentiated by: itself, its gradient, and both in float64
)
# Of the check, in float64, measured: a number of the copy that its gradients are of; the gradient at theta, and what is
# being added up to it; of a block, a direction, where it leads, and the quotient along it.
_COPIED, _CHECKED, _ALONG = 8, 24, 24


class Memory:
    """The memory that a plan may use, `limit` bytes of the host's, and what blocks, and the `process`, take of it."""

    def __init__(self, plan: Plan) -> None:
        self.plan: Plan = weakref.proxy(plan)  # which holds this
        self.on_host = plan.problem.device.type == "cpu"  # that passes are
        self.itemsize = plan.problem.dtype.itemsize
        numbers = sum(math.prod(shape) for shape in plan.shapes.values())
        constants = self.on_host * max(0, _numbers(plan.problem.module) - numbers)
        # What the process has taken is not free, and counts below.
        data = self.on_host * held_bytes(plan.problem.batches)
        taken = PROCESS + constants * self.itemsize + data
        self.limit = plan.options.memory or taken + int(_SHARE * available_memory()) // ranks_here()
        copied = self.on_host * (numbers * _CHECKED + self._of_copied_data())
        checked = plan.options.check * (constants * _COPIED + copied)
        passes = plan.cut_bytes + self._of_passes()
        self.process = taken + checked + passes + _ASKED * numbers

    def _of_copied_data(self) -> int:
        """Bytes of the batches that the check takes gradients with, if they are others."""
        batches = self.plan.opened.reference.batches
        return 0 if batches is self.plan.problem.batches else held_bytes(batches)

    def _of_passes(self) -> int:
        """Bytes of graphs that are differentiated again, if the first route of any block has them, and of rows that go
        through them; of directions along pre-activations, a route counts what they hold.
        """
        methods = [choice.method for choice in self.plan.first_choices(self.plan.blocks)]
        first, passes = set(methods), self.plan.opened.passes
        pairs = zip(self.plan.blocks, methods, strict=True)
        most = max((block.size for block, method in pairs if method == HVP), default=0)
        rows = min(passes.rows, max(most, self.plan.cut_rows))
        twice = self.on_host and not first.isdisjoint((HVP, PREACTIVATION))
        return replace(passes, rows=rows).bytes if twice else 0

    def held_on(self, block: Block) -> torch.device | None:
        """The device that holds what later rows of a large block need; None where others write too."""
        return None if self.plan.divided else self._with_room(block)

    def _with_room(self, block: Block) -> torch.device | None:
        """The device with room for what later rows of a block need, the problem's rather than the host."""
        device = self.plan.problem.device
        # A GPU's memory is taken at once, the host's as it is written to.
        whole = (block.size**2 // 2 + _under_way(block)) * self.itemsize
        if device.type == "cuda" and whole <= _SHARE * free_memory(device):
            return device
        needed = self.process + self._kept_and_checked(block) + _held(block) * self.itemsize
        return torch.device("cpu") if needed <= self.limit else None

    def kept_beside(self, block: Block) -> int:
        """Bytes of the host's memory that the first route of a block keeps beside it."""
        choice = self.plan.choices[block.name][0]
        alone = sum(choice.reached.values())
        reached = alone if block in self.plan.large else self._reached[choice.route]
        return self.on_host * (choice.held + reached) * self.itemsize

    def _kept_and_checked(self, block: Block) -> int:
        """The same, and what the check of it takes."""
        return (
            self.kept_beside(block) + self.on_host * self.plan.options.check * _ALONG * block.size
        )

    @cached_property
    def _reached(self) -> dict[Route, int]:
        """Numbers that the first routes of small blocks keep for all of these together."""
        found: dict[Route, dict[int, int]] = {}
        for choice in self.plan.first_choices(self.plan.small):
            found.setdefault(choice.route, {}).update(choice.reached)
        return {route: sum(reached.values()) for route, reached in found.items()}

    def band(self, block: Block) -> int:
        """How many numbers of a large block are computed at once."""
        # One is computed, one is written, and parts of it are turned.
        room = (self.limit - self.process - self._kept_and_checked(block)) // (3 * self.itemsize)
        return max(block.size, min(_band(block), room))

    def needed(self) -> int:
        """Bytes of the host's memory that the work holds at most."""
        held = {block: block.entries(self.plan.diagonal) for block in self.plan.small}
        for block in self.plan.large:
            device = self._with_room(block)
            if device is None or device.type == "cpu":
                held[block] = _held(block) if device else 3 * self.band(block)
        taken = (n * self.itemsize + self._kept_and_checked(block) for block, n in held.items())
        return max(taken, default=0) + self.process


def _numbers(module: nn.Module) -> int:
    """Numbers in all parameters and buffers of a module."""
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


def _band(block: Block) -> int:
    """Numbers in a band of a block, where there is room for them."""
    return LONG_BAND if block.size > LONG else max(BAND, block.size**2 // 64)


def _under_way(block: Block) -> int:
    """Numbers in the band that is computed, the one that is written, and in what is done of both at a time."""
    return 2 * _band(block) + _ROWS


def _held(block: Block) -> int:
    """Numbers that the host holds of a block: what later rows need, a quarter of it at most, and the bands."""
    return block.size**2 // 4 + _under_way(block)
