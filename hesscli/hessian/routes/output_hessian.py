"""The loss's own Hessian at a model's output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OutputHessian:
    """Lambda = d^2 l / df^2 / D = L^T R + diag(d) of each sample, C numbers of the output being its own.

    Attributes:
        left: L, [B, r, C]; None stands for the identity.
        right: R, [B, r, C]: no rows where the loss is elementwise, one behind a softmax.
        d: [B, C]; None for zeros.
    """

    left: Tensor | None
    right: Tensor
    d: Tensor | None = None

    @classmethod
    def elementwise(cls, d: Tensor) -> OutputHessian:
        """Lambda = diag(d)."""
        nothing = d.unsqueeze(1)[:, :0]
        return cls(nothing, nothing, d)

    @classmethod
    def softmax(cls, log_p: Tensor, gradient: Tensor) -> OutputHessian:
        """That of a loss <g, log p> with p = softmax f, both [B, C]: -(sum of g) (diag(p) - p p^T)."""
        p, total = log_p.exp(), -gradient.sum(1, keepdim=True)
        return cls(-(total * p).unsqueeze(1), p.unsqueeze(1), total * p)

    def of(self, samples: slice) -> OutputHessian:
        """Of some samples."""
        left = None if self.left is None else self.left[samples]
        d = None if self.d is None else self.d[samples]
        return OutputHessian(left, self.right[samples], d)

    def __matmul__(self, v: Tensor) -> Tensor:
        """Lambda v, [B, C, n]."""
        product = self.right @ v
        if self.left is not None:
            product = self.left.mT @ product
        return product if self.d is None else torch.addcmul(product, self.d.unsqueeze(2), v)
