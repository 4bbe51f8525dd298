"""Whether there is room for the result of a plan; if not, the command that would fit."""

from __future__ import annotations

import math
from collections.abc import Callable

from hesscli.errors import ResourceError
from hesscli.files.hessians.result_names import partial_paths
from hesscli.files.resources import disk_used, free_disk
from hesscli.hessian.blocks import partition
from hesscli.hessian.words import STRUCTURES
from hesscli.job.matrix.planning import Plan
from hesscli.job.setup.batches import PROCESS
from hesscli.job.sizes import size


def require_room(plan: Plan) -> None:
    """Refuses what memory or disk cannot hold.

    Raises:
        ResourceError: with the command that would fit.
    """
    output, needed, limit = plan.options.output, plan.memory.needed(), plan.memory.limit
    if needed > limit:
        raise ResourceError(
            f"{_named(plan)} needs {size(needed)} of memory, {size(limit)} may be used",
            _with_less_memory(plan, needed),
        )
    if output is None:
        return
    free = free_disk(output.parent) + sum(map(disk_used, partial_paths(output)))
    if plan.bytes > free:
        raise ResourceError(
            f"{_named(plan)} needs {size(plan.bytes)} of disk, {size(free)} is free in {output.parent}",
            _blocks(plan, lambda sizes: sum(sizes) < free) or "-o elsewhere.safetensors",
        )


def _named(plan: Plan) -> str:
    """The structure, and what makes it large."""
    rows = max(block.size for block in plan.blocks)
    return plan.structure + ("" if plan.diagonal else f" (its largest block is {rows} x {rows})")


def _with_less_memory(plan: Plan, needed: int) -> str:
    """The option with which the memory is enough: smaller batches, blocks of which the largest fits, or more of it."""
    kept = max(map(plan.memory.kept_beside, plan.blocks))
    left = plan.memory.limit - needed + kept
    samples = len(plan.problem.batches[0])
    if plan.problem.separable and samples * left >= kept > 0:  # it grows with the samples
        return f"--batch-size {samples * left // kept}"
    most = max(block.entries(plan.diagonal) for block in plan.blocks) * plan.problem.dtype.itemsize
    room = min(plan.memory.limit - plan.memory.process, most - 1)
    fitting = _blocks(plan, lambda sizes: max(sizes) <= room)
    if fitting:
        return fitting
    # With more of it passes take more: up to three eighths.
    enough = PROCESS + 8 * (needed - PROCESS) / 5
    return f"--memory {math.ceil(enough / 1e6)}MB"


def _blocks(plan: Plan, fit: Callable[[list[int]], bool]) -> str | None:
    """The first `--blocks` whose bytes fit, block by block."""
    for option in ("module", "diag", "elements"):
        blocks = partition(plan.shapes, STRUCTURES[option])
        entries = [block.entries(option == "elements") for block in blocks]
        if fit([count * plan.problem.dtype.itemsize for count in entries]):
            return f"--blocks {option}"
    return None
