"""One pass over all data: the denominator of its mean, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hesscli.errors import MismatchError
from hesscli.hessian.problem import Problem


def measure(
    problem: Problem,
    summed: Callable[[float, float], tuple[float, float]] = lambda total, denominator: (
        total,
        denominator,
    ),
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
            _demand_numbers(output)
            if index == 0 and not _equal(output, problem.output(batch)):
                raise MismatchError(
                    "two passes of the same data through the model differ: it draws random numbers "
                    "(dropout left on?), or writes to a tensor that is no buffer, so it has no Hessian",
                    "save it after model.eval(); a traced or exported model keeps the mode it was saved in",
                )
            again = output.clone()  # a loss may write to it
            batch_total, share = problem.loss.total(output, batch.target, batch.loss_arguments)
            if batch_total.is_complex():
                raise MismatchError(
                    f"the loss {problem.loss.name} of a {output.dtype} output is complex; expected a loss of "
                    "your own that is real"
                )
            if index == 0 and problem.loss.function is not None:
                again, _ = problem.loss.total(again, batch.target, batch.loss_arguments)
                if not _equal(batch_total, again):
                    raise MismatchError(
                        f"the loss {problem.loss.name} gives the same output two values: it draws random "
                        "numbers, so it has no Hessian"
                    )
            total += float(batch_total)
            denominator += share
    total, denominator = summed(total, denominator)
    if problem.loss.reduction == "sum":
        denominator = 1.0
    if denominator == 0:
        raise MismatchError("every target is ignored or has weight 0: the mean divides by 0")
    return replace(problem, denominator=denominator), total / denominator


def _demand_numbers(output: Tensor) -> None:
    """Raises MismatchError where the output is nothing to compare, or to differentiate."""
    kinds = {
        "nested": output.is_nested,
        "quantized": output.is_quantized,
        "on the meta device": output.is_meta,
        f"of layout {output.layout}": output.layout is not torch.strided,
        "of bools": output.dtype is torch.bool,
    }
    for kind, found in kinds.items():
        if found:
            raise MismatchError(f"the model's output is {kind}; expected a dense tensor of numbers")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two passes give the same; LAPACK's last digits may go by where its memory lies."""
    if a.shape != b.shape:
        return False
    a, b = torch.nan_to_num(a), torch.nan_to_num(b)
    rounding = 16 * torch.finfo(a.dtype).eps if a.is_floating_point() or a.is_complex() else 0.0
    return float((a - b).abs().max()) <= rounding * float(a.abs().max()) if a.numel() else True
