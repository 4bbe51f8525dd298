"""Products by central differences of gradients: for models without second derivatives in PyTorch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hesscli.hessian.differences.quotients import AGREEMENT, Quotients, quotients_of
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.operator import LinearMap


class Differences(LinearMap):
    """H v by central differences of gradients, where PyTorch lacks a second derivative.

    `(g(theta + h v) - g(theta - h v)) / 2h`, batch by batch, extrapolated (see `quotients.py`).
    """

    def __init__(self, problem: Problem, quotient: Quotients | None = None) -> None:
        super().__init__(problem)
        self.quotient = quotient or quotients_of(problem)

    def __call__(self, vectors: Tensor) -> Tensor:
        if vectors.dim() == 2:
            return torch.stack([self(v) for v in vectors])
        self.count += 1
        norm = float(torch.linalg.norm(vectors))
        total = torch.zeros(self.size, dtype=self.problem.dtype, device=vectors.device)
        if not norm:
            return total.to(vectors.dtype)
        direction = vectors.to(self.problem.dtype) / norm
        scale = max(1.0, float(sum(leaf.detach().square().sum() for leaf in self.leaves)) ** 0.5)
        for problem in self.problem.by_batch():
            total += self.quotient(partial(problem.moved_gradient, self.names, direction), scale)
        return (total * norm).to(vectors.dtype)


def freed(products: Differences, v: Tensor, along: Tensor) -> Quotients:
    """The quotients of some products, `free` from now on where nothing needs to be held.

    So it is where the product with a random v is the same as `along`, where all is held that can be: whatever is held
    would move along v.
    """
    quotient, problem = products.quotient, products.problem
    if quotient.holds and problem.dtype is torch.float64:
        plain = Differences(problem, Quotients(problem.dtype, holds=False))
        difference = float(torch.linalg.norm(plain(v) - along))
        quotient.free = difference <= AGREEMENT[problem.dtype] * float(torch.linalg.norm(along))
    return quotient
