"""`hesscli compute --dry-run`: the blocks, the route of each, and what they would take.

The rates of this machine and the time of one gradient, of which differences are made, are measured; the rest of the
time is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from hesscli.hessian.differences.check import gradients
from hesscli.hessian.routes.base import Choice, seconds_of
from hesscli.hessian.routes.finite_difference import GRADIENTS
from hesscli.hessian.routes.rates import Rates, measure_rates, seconds
from hesscli.hessian.words import FINITE_DIFFERENCE
from hesscli.job import documents
from hesscli.job.json_form import Document
from hesscli.job.matrix.planning import Plan
from hesscli.spectrum.statistics import QUICK_LIMIT

START = 0.2  # seconds: what happens once, whatever the model
WRITING = 1e9  # bytes per second
_EIGENVALUES = 1e10  # floating-point operations per second, in LAPACK's symmetric solver


def forecast(plan: Plan) -> Document:
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
        "memory": plan.memory.needed(),
        "estimated_seconds": _seconds(plan),
    }
    return document


def _seconds(plan: Plan) -> float:
    dtype, choices = plan.problem.dtype, plan.first_choices(plan.blocks)
    problem, stats = plan.opened.reference, plan.options.stats
    pairs = zip(plan.blocks, choices, strict=True)
    differences = sum(b.size for b, choice in pairs if choice.method == FINITE_DIFFERENCE)
    taken: float = GRADIENTS * differences
    if plan.options.check:
        taken += gradients(len(plan.blocks), dtype, problem.dtype)
    gradient = partial(problem.gradient, list(problem.parameters))
    if taken:  # the faster of two: the first one is slower
        taken *= seconds(gradient, problem.device, repeats=2)
    quick = {"all": math.inf, "auto": QUICK_LIMIT}.get(stats, -1)  # rows with extreme eigenvalues
    return estimate(
        [choice for choice in choices if choice.method != FINITE_DIFFERENCE],
        measure_rates(plan.problem.device, dtype),
        taken,
        [b.size for b in plan.blocks if b.size <= quick and not plan.diagonal],
        plan.bytes,
    )


def estimate(
    choices: Sequence[Choice], rates: Rates, check: float, decomposed: Sequence[int], size: int
) -> float:
    """What a plan takes, in seconds, those of its check included; eigenvalues are wanted of blocks of these sizes."""
    statistics = sum(2 * n**3 for n in decomposed) / _EIGENVALUES
    return START + seconds_of(choices, rates) + check + statistics + size / WRITING
