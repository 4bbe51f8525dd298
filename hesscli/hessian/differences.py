"""Products by central differences of gradients: for models without second derivatives in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscli.hessian.operator import Flat
from hesscli.hessian.problem import Problem


class Differences(Flat):
    """H v by central differences of gradients, where PyTorch lacks a second derivative.

    `(g(theta + h v) - g(theta - h v)) / 2h`, extrapolated from steps h and h/2; smaller ones where a kink lies between.

    Args:
        problem: in float64, if the model runs in it.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        double = problem.dtype == torch.float64
        self.steps = (1e-4, 1e-5, 1e-6) if double else (3e-2, 3e-3)
        self.agreement = 1e-6 if double else 1e-2

    def __call__(self, vectors: Tensor) -> Tensor:
        if vectors.dim() == 2:
            return torch.stack([self(v) for v in vectors])
        self.count += 1
        norm = float(torch.linalg.norm(vectors))
        if not norm:
            return torch.zeros_like(vectors)
        direction = vectors.to(self.problem.dtype) / norm
        scale = max(1.0, float(sum(leaf.detach().square().sum() for leaf in self.leaves)) ** 0.5)
        for step in self.steps:
            h = step * scale
            coarse, fine = self._central(direction, h), self._central(direction, h / 2)
            if torch.linalg.norm(fine - coarse) <= self.agreement * torch.linalg.norm(fine):
                break
        return ((4 * fine - coarse) * (norm / 3)).to(vectors.dtype)

    def _central(self, direction: Tensor, h: float) -> Tensor:
        return (self._gradient(direction, h) - self._gradient(direction, -h)) / (2 * h)

    def _gradient(self, direction: Tensor, h: float) -> Tensor:
        values = [leaf.detach().clone() for leaf in self.leaves]
        try:
            for leaf, part in zip(self.leaves, direction.split(self.sizes), strict=True):
                leaf.data.add_(part.view_as(leaf), alpha=h)
            return self.gradient()
        finally:
            for leaf, value in zip(self.leaves, values, strict=True):
                leaf.data.copy_(value)
