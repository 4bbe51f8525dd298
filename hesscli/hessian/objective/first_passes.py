"""The first two passes of a model, which show whether one reaches the next.

What a model keeps is put back after each pass (see `state.py`), as far as it is found. What is not found shows here: a
second pass that goes on with what the first one computed, or that gives something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hesscli.errors import MismatchError
from hesscli.hessian.autodiff import graph_of
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.problem import Problem


class UnrepeatableError(MismatchError):
    """A model whose passes are not alike."""


def first_output(
    problem: Problem, batch: Batch, note: Callable[[str], None] | None = None
) -> Tensor:
    """The output of a model's first pass, of which the second is a repetition; `note` hears if its name tells it.

    Raises:
        UnrepeatableError: it is none.
        MismatchError: the model does not accept the batch, or gives no numbers.
    """
    problem = replace(problem, writes_inputs=True)  # perhaps
    with torch.enable_grad():  # without them, what is kept would be a constant, and not show
        first, second = problem.output(batch, note), problem.output(batch)
        again = _inner(first) & _inner(second)
    _demand_numbers(first)
    if again:
        raise UnrepeatableError(
            "the model keeps what it computes of its parameters, where it is not found and put back: the second "
            "pass goes on with a result of the first",
            "compute it in every pass, or keep it in an attribute of the module",
        )
    demand_alike(problem, first.detach(), second.detach())
    return first.detach()


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


def _inner(output: Tensor) -> set[Any]:
    """The nodes of an output's graph, but for those of the leaves, which all passes have in common."""
    return {node for node in graph_of(output) if not hasattr(node, "variable")}


def demand_alike(problem: Problem, first: Tensor, second: Tensor) -> None:
    """Refuses two passes of the same data through the model that give something else."""
    if not equal(first, second):
        asked = "leave out --train-mode, or build the model with a dropout of 0"
        saved = (
            "save it after model.eval(), as traced and exported models keep the mode they had; noise that it draws in "
            "eval mode too can be one of its inputs"
        )
        raise UnrepeatableError(
            "two passes of the same data through the model differ: it draws random numbers (dropout left on?), or "
            "writes to an array that is no buffer, so it has no Hessian",
            asked if problem.module.training else saved,
        )


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two passes give the same; LAPACK's last digits may go by where its memory lies."""
    if a.shape != b.shape:
        return False
    a, b = torch.nan_to_num(a), torch.nan_to_num(b)
    rounding = 16 * torch.finfo(a.dtype).eps if a.is_floating_point() or a.is_complex() else 0.0
    return float((a - b).abs().max()) <= rounding * float(a.abs().max()) if a.numel() else True
