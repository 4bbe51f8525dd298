"""Whether memory and disk are enough for a plan."""

from __future__ import annotations

import math
from dataclasses import replace

from hesscli.errors import NumericalError, ResourceError
from hesscli.files.hessians.result_names import partial_paths
from hesscli.files.resources import disk_used, free_disk
from hesscli.job.matrix.planning import Plan
from hesscli.job.setup.batches import PROCESS
from hesscli.job.sizes import size


def require_memory(plan: Plan) -> None:
    """Refuses what the memory cannot hold, by the routes that are to be taken.

    Raises:
        ResourceError: with the option that would fit.
    """
    needed, limit = plan.memory.needed(), plan.memory.limit
    if needed > limit:
        # With more memory passes take more: up to three eighths.
        finer = _smaller_batches(plan, needed) or _finer_blocks(plan, _free(plan))
        raise ResourceError(
            f"{_named(plan)} needs {size(needed)} of memory, {size(limit)} may be used",
            finer or f"--memory {math.ceil((PROCESS + 8 * (needed - PROCESS) / 5) / 1e6)}MB",
        )


def require_disk(plan: Plan) -> None:
    """Refuses what the disk cannot hold, by whatever routes.

    Raises:
        ResourceError: with the option that would fit.
    """
    free = _free(plan)
    if plan.bytes > free:
        where = plan.options.output.parent if plan.options.output else ""
        raise ResourceError(
            f"{_named(plan)} needs {size(plan.bytes)} of disk, {size(int(free))} is free in {where}",
            _finer_blocks(plan, free) or "-o elsewhere.safetensors",
        )


def _free(plan: Plan) -> float:
    """Bytes of the disk that the result may take."""
    output = plan.options.output
    if output is None:
        return math.inf
    return free_disk(output.parent) + sum(map(disk_used, partial_paths(output)))


def _named(plan: Plan) -> str:
    """The structure, and what makes it large."""
    rows = max(block.size for block in plan.blocks)
    return plan.structure + ("" if plan.diagonal else f" (its largest block is {rows} x {rows})")


def _smaller_batches(plan: Plan, needed: int) -> str | None:
    """The batches that fit, if it is they that take the memory."""
    kept = max(map(plan.memory.kept_beside, plan.blocks))
    left = plan.memory.limit - needed + kept
    samples = len(plan.problem.batches[0])
    if plan.problem.separable and samples * left >= kept > 0:  # it grows with the samples
        return f"--batch-size {samples * left // kept}"
    return None


def _finer_blocks(plan: Plan, free: float) -> str | None:
    """The first blocks that fit into the memory, and into so many bytes of the disk."""
    for option in ("module", "diag", "elements"):
        try:
            finer = Plan(replace(plan.options, blocks=option), plan.opened, plan.divided)
        except NumericalError:  # by the method that is asked for
            continue
        fits = finer.memory.needed() <= finer.memory.limit and finer.bytes <= free
        if fits and finer.bytes < plan.bytes:
            return f"--blocks {option}"
    return None
