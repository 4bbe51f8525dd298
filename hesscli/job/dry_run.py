"""`hesscli compute --dry-run`: the blocks, the route of each, and what they would take."""

from __future__ import annotations

from hesscli.hessian.blocks import Block
from hesscli.hessian.check import gradients
from hesscli.hessian.rates import measure_rates
from hesscli.job import documents
from hesscli.job.estimate import Estimate, estimate, gradient_seconds
from hesscli.job.json_form import Document
from hesscli.job.memory import Memory
from hesscli.job.planning import Plan
from hesscli.spectrum.statistics import QUICK_LIMIT


def forecast(plan: Plan, memory: Memory) -> Document:
    """The document that says what the command would take."""
    itemsize = plan.problem.dtype.itemsize
    document = documents.skeleton(plan.opened, plan.structure)
    document["blocks"] = [
        documents.block_facts(plan.opened, block)
        | {
            "method": choice.method,
            "reason": choice.reason,
            "plan": str(choice),
            "bytes": block.entries(plan.diagonal) * itemsize,
        }
        for block, choice in zip(plan.blocks, plan.first_choices(plan.blocks), strict=True)
    ]
    document["total"] = {
        "size": sum(block.size for block in plan.blocks),
        "bytes": plan.bytes,
        "memory": memory.needed(),
        "estimated_seconds": _estimate(plan).seconds,
    }
    return document


def _estimate(plan: Plan) -> Estimate:
    dtype, count = plan.problem.dtype, 0
    if plan.options.check:
        count = gradients(len(plan.blocks), plan.diagonal, dtype, plan.reference.dtype)
    return estimate(
        plan.first_choices(plan.blocks),
        measure_rates(plan.problem.device, dtype),
        gradients=count,
        gradient=gradient_seconds(plan.reference) if count else 0.0,
        decomposed=[block.size for block in plan.blocks if _decomposed(plan, block)],
        size=plan.bytes,
    )


def _decomposed(plan: Plan, block: Block) -> bool:
    """Whether the extreme eigenvalues of a block are wanted, and take long."""
    quick = plan.options.stats == "auto" and block.size <= QUICK_LIMIT
    return not plan.diagonal and (quick or plan.options.stats == "all")
