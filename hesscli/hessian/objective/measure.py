"""One pass over all data: the denominator of its mean, and the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from hesscli.errors import MismatchError
from hesscli.hessian.aten.custom_functions import applied_by
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.first_passes import demand_alike, equal
from hesscli.hessian.objective.losses import LOSSES, Total
from hesscli.hessian.objective.problem import Problem
from hesscli.texts import listed


def protected(problem: Problem) -> Problem:
    """The problem of a model that writes to its weights, with them as a pass over the data leaves them.

    Raises:
        MismatchError: it computes something else where they stay so.
    """
    _, written = measure(problem)
    problem = replace(problem, protected=True)
    _, value = measure(problem)
    rounding = 1e-4 if problem.dtype == torch.float32 else 1e-8
    if not math.isclose(written, value, rel_tol=rounding) and math.isfinite(written):
        raise MismatchError(
            f"the model writes to its weights ({listed(problem.written)}), and computes something else "
            f"where it cannot: its loss is {value:.3g} then, and not {written:.3g}",
            "leave them as they are, and compute with a function of them: F.linear(x, f(self.weight))",
        )
    return problem


def measure(
    problem: Problem, summed: Callable[[float, float], tuple[float, float]] | None = None
) -> tuple[Problem, float]:
    """One pass over the data without derivatives: the problem with its denominator and whether Functions are applied,
    and L(theta).

    Args:
        problem: with the default denominator.
        summed: adds to the sums over these batches those over other ones, which are elsewhere.

    Raises:
        MismatchError: model, data and loss do not fit, two passes differ (dropout), or every target is ignored.
    """
    total, denominator, applied = 0.0, 0.0, False

    def noting(apply: Callable[[], object], _: tuple[object, ...]) -> object:
        nonlocal applied
        applied = True
        return apply()

    with torch.no_grad(), applied_by(noting):
        for index, batch in enumerate(problem.batches):
            batch_total, share = _total(problem, batch, twice=index == 0)
            total += float(batch_total)
            denominator += share
    if summed is not None:
        total, denominator = summed(total, denominator)
    if problem.loss.reduction == "sum":
        denominator = 1.0
    if denominator == 0:
        if problem.loss.name not in LOSSES:
            raise MismatchError(f"the loss {problem.loss.name} has no terms: the mean divides by 0")
        raise MismatchError("every target is ignored or has weight 0: the mean divides by 0")
    return replace(problem, denominator=denominator, functions=applied), total / denominator


def _total(problem: Problem, batch: Batch, twice: bool) -> Total:
    """The sum of a batch's loss terms, and its share of the denominator; `twice`, if both passes are to be alike."""
    output = problem.output(batch)
    if twice:
        demand_alike(problem, output, problem.output(batch))
    twice = twice and problem.loss.function is not None
    again = output.clone() if twice else output  # a loss may write to it
    total, share = problem.loss.total(output, batch)
    if total.is_complex():
        raise MismatchError(
            f"the loss {problem.loss.name} of a {output.dtype} output is complex; expected a loss of "
            "your own that is real"
        )
    if twice and not equal(total, problem.loss.total(again, batch)[0]):
        raise MismatchError(
            f"the loss {problem.loss.name} gives the same output two values: it draws random "
            "numbers, so it has no Hessian"
        )
    return total, share
