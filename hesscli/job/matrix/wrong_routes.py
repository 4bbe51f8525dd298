"""Whether second derivatives are those of the loss, found out by products before any row is made."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from functools import partial

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import Block, partition
from hesscli.hessian.routes.base import ByRows, Choice, seconds_of
from hesscli.hessian.words import FINITE_DIFFERENCE, HVP
from hesscli.job.matrix.planning import Plan

SOON = 1.0
"""Seconds: a plan that would take less by differences alone finds out as it goes."""


def leave_out_wrong_routes(plan: Plan) -> None:
    """Takes out of a plan the routes that products show to be wrong, and notes what is taken instead.

    An implicit layer's hook, or a `Function`, may have no second derivative, or that of something else. Each route
    would find out when it has made all rows of a block, and again with the next one. A product with all parameters
    tells whether all is well; if not, one of each block does, by the check that its rows would have.
    """
    last = [ranked[-1] for ranked in plan.choices.values()]
    possible = all(choice.method == FINITE_DIFFERENCE for choice in last)
    possible = possible and plan.options.method == "auto" and plan.options.check
    # Other routes are fast, and need operators that are known.
    slow = [block for block in plan.blocks if plan.choices[block.name][0].method == HVP]
    if not (possible and slow and seconds_of(last, plan.rates) >= SOON):
        return
    (whole,) = partition(plan.shapes, "full")
    route, certificate = plan.choices[slow[0].name][0].route, plan.certificate
    assert isinstance(route, ByRows)
    assert certificate is not None
    if len(plan.blocks) > 1:  # or else its own product is the same
        with suppress(NotApplicable):
            if certificate.passed(max(certificate.product(whole, partial(route.product, whole)))):
                return
    plan.replan(plan.choices | {block.name: _right_routes(plan, block) for block in slow})


def _right_routes(plan: Plan, block: Block) -> list[Choice]:
    """The routes of a block that one product does not show to be wrong.

    Where the product is another one, PyTorch's derivatives are those of something else, whichever route takes them.
    Where there is none, another route may do without. One that is not finite is refused later on: differences would be
    numbers also where there is no second derivative.
    """
    (first, *left), certificate = plan.choices[block.name], plan.certificate
    assert isinstance(first.route, ByRows)
    assert certificate is not None
    try:
        error = max(certificate.product(block, partial(first.route.product, block)))
    except NotApplicable as reason:
        why = str(reason)
    else:
        if certificate.passed(error) or not math.isfinite(error):
            return [first, *left]
        why, left = f"{first.route.name} differs from gradients by {error:.1e}", left[-1:]
    plan.opened.listener.note(f"{block.name}: {why}; {left[0].route.name} instead")
    return [replace(left[0], reason=why), *left[1:]]
