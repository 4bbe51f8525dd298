"""Whether second derivatives are those of the loss, found out by products before any row is made."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import Block, partition
from hesscli.hessian.curvatures import HESSIAN
from hesscli.hessian.objective.batch import doubled
from hesscli.hessian.operator import Products
from hesscli.hessian.routes.base import ByRows, Choice, seconds_of
from hesscli.hessian.words import FINITE_DIFFERENCE, HVP
from hesscli.job.matrix.planning import Plan

SOON = 1.0
"""Seconds: a plan that would take less by differences alone finds out as it goes."""


def leave_out_wrong_routes(plan: Plan) -> None:
    """Takes out of a plan the routes that products show to be wrong, and notes what is taken instead.

    An implicit layer's hook, or a `Function`, may have no second derivative, or that of something else. Each route
    would find out when it has made all rows of a block, and again with the next one. A product with a few samples tells
    whether all is well; if not, one of each block does, by the check that its rows would have.
    """
    last = [ranked[-1] for ranked in plan.choices.values()]
    possible = all(choice.method == FINITE_DIFFERENCE for choice in last)
    possible = possible and plan.options.method == "auto" and plan.options.check
    # Other routes are fast, and need operators that are known.
    slow = any(choice.method == HVP for choice in plan.first_choices(plan.blocks))
    if possible and slow and seconds_of(last, plan.rates) >= SOON and not _is_right(plan):
        plan.replan({block.name: _right_routes(plan, block) for block in plan.blocks})


def _is_right(plan: Plan) -> bool:
    """Whether a product with all parameters, of a few samples, agrees with differences."""
    few, reference = replace(plan.problem, batches=plan.opened.few), plan.opened.double
    if reference is not None:
        original = few if reference.original is not None else None
        reference = replace(reference, batches=doubled(few.batches), original=original)
    certificate = HESSIAN.certificate(reference or few, few.dtype, plan.options.seed)
    (whole,) = partition(plan.shapes, "full")
    try:
        products = Products(few)
        error = certificate.product(whole, lambda v: products(v.to(few.dtype)))
    except NotApplicable:
        return False
    return certificate.passed(max(error))


def _right_routes(plan: Plan, block: Block) -> list[Choice]:
    """The routes of a block that one product does not show to be wrong.

    Where the product is another one, PyTorch's derivatives are those of something else, whichever route takes them.
    Where there is none, another route may do without. One that is not finite is refused later on: differences would be
    numbers also where there is no second derivative.
    """
    ranked, certificate = plan.choices[block.name], plan.certificate
    rows = next(choice for choice in ranked if isinstance(choice.route, ByRows))
    assert isinstance(rows.route, ByRows)
    assert certificate is not None
    left = [choice for choice in ranked if choice is not rows]
    try:
        error = max(certificate.product(block, partial(rows.route.product, block)))
    except NotApplicable as reason:
        why = str(reason)
    else:
        if certificate.passed(error) or not math.isfinite(error):
            return ranked
        why, left = f"{rows.route.name} differs from gradients by {error:.1e}", ranked[-1:]
    first, *others = left
    if first is ranked[0]:
        return left
    plan.opened.listener.note(f"{block.name}: {why}; {first.route.name} instead")
    return [replace(first, reason=why), *others]
