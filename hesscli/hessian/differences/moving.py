"""Whether what a model detaches moves along with its parameters, as far as its gradients are concerned.

To most models it is a constant: the target of a Q-network. An implicit layer finds a fixed point with gradients off,
and its backward pass, a hook say, solves for the gradient of the loss as it is, the fixed point being where the
parameters move it.
"""

from __future__ import annotations

import torch

from hesscli.hessian.objective.problem import Problem, parameters_moved

_STEP = 1e-4  # relative to the parameters, in float64
_AGREEMENT = 1e-6


def detached_moves(problem: Problem) -> bool:
    """Whether the gradient along a random direction is that of the loss, by differences in which all moves.

    If nothing is detached it is, but for kinks. A gradient of zero tells nothing.
    """
    if problem.dtype is not torch.float64:
        return False
    names, leaves = list(problem.parameters), list(problem.parameters.values())
    theta = torch.cat([leaf.detach().reshape(-1) for leaf in leaves])
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(0), dtype=theta.dtype)
    v = v.to(theta.device) * (_STEP * max(1.0, float(theta.norm())) / float(v.norm()))

    def value(step: float) -> float:
        with torch.no_grad(), parameters_moved(leaves, v, step):
            return sum(float(problem.value(batch)) for batch in problem.batches)

    slope = (8 * (value(1) - value(-1)) - (value(2) - value(-2))) / 12
    expected = float(problem.flat_gradient(names) @ v)
    return bool(expected) and abs(slope - expected) <= _AGREEMENT * abs(expected)
