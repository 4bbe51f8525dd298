"""One pass over all data: the denominator of its mean, and the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from hesscli.errors import MismatchError
from hesscli.hessian.objective.first_passes import demand_alike, equal
from hesscli.hessian.objective.losses import LOSSES
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
    """One pass over the data without derivatives: the problem with its denominator, and L(theta).

    Args:
        problem: with the default denominator.
        summed: adds to the sums over these batches those over other ones, which are elsewhere.

    Raises:
        MismatchError: model, data and loss do not fit, two passes differ (dropout), or every target is ignored.
    """
    total, denominator = 0.0, 0.0
    with torch.no_grad():
        for index, batch in enumerate(problem.batches):
            output = problem.output(batch)
            if index == 0:
                demand_alike(problem, output, problem.output(batch))
            again = output.clone()  # a loss may write to it
            batch_total, share = problem.loss.total(output, batch)
            if batch_total.is_complex():
                raise MismatchError(
                    f"the loss {problem.loss.name} of a {output.dtype} output is complex; expected a loss of "
                    "your own that is real"
                )
            if index == 0 and problem.loss.function is not None:
                again, _ = problem.loss.total(again, batch)
                if not equal(batch_total, again):
                    raise MismatchError(
                        f"the loss {problem.loss.name} gives the same output two values: it draws random "
                        "numbers, so it has no Hessian"
                    )
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
    return replace(problem, denominator=denominator), total / denominator
