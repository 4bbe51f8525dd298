"""Whether there is room for the result of a plan; if not, the command that would fit."""

from __future__ import annotations

import math

from hesscli.errors import ResourceError
from hesscli.files.hessians.result_names import partial_paths
from hesscli.files.resources import disk_used, free_disk
from hesscli.hessian.blocks import partition
from hesscli.hessian.words import STRUCTURES
from hesscli.job.matrix.planning import Plan
from hesscli.job.sizes import size


def require_room(plan: Plan) -> None:
    """Refuses what memory or disk cannot hold.

    Raises:
        ResourceError: with the command that would fit.
    """
    output, memory = plan.options.output, plan.memory
    needs = [(memory.needed(), memory.limit, "of memory", "may be used")]
    if output is not None:
        free = free_disk(output.parent) + sum(map(disk_used, partial_paths(output)))
        needs.append((plan.bytes, free, "of disk", f"is free in {output.parent}"))
    for needed, free, kind, where in needs:
        if needed > free:
            largest = max(block.size for block in plan.blocks)
            raise ResourceError(
                f"{plan.structure} needs {size(needed)} {kind} (its largest block is "
                f"{largest} x {largest}), {size(free)} {where}",
                _smaller(plan, free) if kind == "of disk" else _with_less(plan, needed),
            )


def _with_less(plan: Plan, needed: int) -> str:
    """The option with which the memory is enough: more of it, where no blocks take as little."""
    least = plan.memory.process + _bytes(plan, "elements")
    if plan.options.memory is None or least <= plan.memory.limit:
        return _smaller(plan, plan.memory.limit)
    return f"--memory {math.ceil(needed / 1e6)}MB"


def _smaller(plan: Plan, free: int) -> str:
    for option in ("module", "diag", "elements"):
        needed = _bytes(plan, option)
        if needed < plan.bytes and needed < free:
            break
    return f"--blocks {option}" if needed < plan.bytes else "-o elsewhere.safetensors"


def _bytes(plan: Plan, option: str) -> int:
    """Bytes of the result with this `--blocks`."""
    blocks = partition(plan.shapes, STRUCTURES[option])
    return sum(b.entries(option == "elements") for b in blocks) * plan.problem.dtype.itemsize
