"""The gradient that a command begins with, and which parameters the loss does not depend on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hesscli.errors import NumericalError
from hesscli.hessian.aten.definitions import right_gradients
from hesscli.hessian.guests import explaining
from hesscli.hessian.objective.problem import Problem, all_differentiated, parameters_at
from hesscli.hessian.objective.refusals import (
    UNREGISTERED,
    behind_reentrant,
    gradients_off,
    no_gradient,
)
from hesscli.widest import wide


def first_gradient(problem: Problem) -> tuple[dict[str, Tensor], float, set[str]]:
    """dL/dtheta by parameter, its norm, and the parameters that L does not depend on.

    Raises:
        NumericalError: it is not finite.
        MismatchError: `backward()` alone reaches a parameter, or none passes an operator between it and L, or model or
            loss turn gradients off.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", f".*{UNREGISTERED}")
        gradient = problem.gradient(list(problem.parameters))
    norm = math.sqrt(sum(float(wide(g).square().sum()) for g in gradient.values()))
    if not math.isfinite(norm):
        missing = any(not bool(x.isfinite().all()) for b in problem.batches for x in b.inputs)
        hint = "replace NaN and infinity before they meet a weight: x.nan_to_num(0, 0, 0)"
        raise NumericalError(
            f"the gradient's norm is {norm}; the Hessian would mean nothing",
            hint if missing else None,
        )
    return gradient, norm, _unused(problem, [n for n, g in gradient.items() if not bool(g.any())])


def _unused(problem: Problem, names: Sequence[str]) -> set[str]:
    """Those of the named parameters that L does not depend on, whatever the value of its gradient.

    Raises:
        MismatchError: `backward()` alone reaches one, as it does behind a reentrant checkpoint. That is entered only
            where something before it requires a gradient, too. Or L moves with the module's parameters, and has no
            gradient by any.
    """
    left = {name: problem.parameters[name] for name in names}
    followed = False  # whether L has a gradient by anything
    for batch in problem.batches:
        if not left:
            break
        with all_differentiated(problem.module):
            with right_gradients():
                value = problem.value(batch)
            if not value.requires_grad:
                continue
            followed = True
            with explaining(no_gradient, needed=True):
                grads = torch.autograd.grad(
                    value, list(left.values()), allow_unused=True, retain_graph=True
                )
                left = {name: left[name] for name, g in zip(left, grads, strict=True) if g is None}
                hidden = _reached_by_backward(value, problem.module, left) if left else []
        if hidden:
            raise behind_reentrant(hidden[0])
    if left and not followed and _moves(problem):
        raise gradients_off()
    return set(left)


def _moves(problem: Problem) -> bool:
    """Whether the loss of the first batch depends on the values of the module's parameters."""
    with all_differentiated(problem.module) as every, torch.no_grad():
        leaves = list(every.values())
        here = float(problem.value(problem.batches[0]))
        with parameters_at(leaves, [1.01 * leaf + 0.01 for leaf in leaves]):
            there = float(problem.value(problem.batches[0]))
    return not math.isclose(here, there, rel_tol=1e-6)


def _reached_by_backward(
    value: Tensor, module: nn.Module, leaves: Mapping[str, Tensor]
) -> list[str]:
    """Which leaves have a gradient once the whole graph was walked."""
    before = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        value.backward()
        return [name for name, leaf in leaves.items() if leaf.grad is not None]
    finally:
        for parameter, grad in before:
            parameter.grad = grad
