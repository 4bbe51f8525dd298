"""The loss's own Hessian at a model's output, of each site: a sample, or one of its positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OutputHessian:
    """Lambda = d^2 l / df^2 / D = L^T R + diag(d) of each of B sites, C numbers of the output being its own.

    Attributes:
        left: L, [B, r, C]; None stands for the identity.
        right: R, [B, r, C]: no rows where the loss is elementwise, two for each softmax.
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
    def softmax(cls, log_p: Tensor, w: Tensor, s: Tensor) -> OutputHessian:
        """w s (diag(p) - p p^T) s, with p = softmax(s f), that is of -w log p_y: all [B, C], w [B, 1].

        What remains of p_m, the largest, is the sum of the others, q, which keeps all digits where p_m is almost one:

            diag(p) - p p^T = diag(q + p_m (1 - p_m) e_m) - q (q + p_m e_m)^T - p_m e_m q^T
        """
        m = log_p.argmax(1, keepdim=True)
        q = log_p.exp().scatter(1, m, 0)
        rest = q.sum(1, keepdim=True)
        largest = torch.zeros_like(q).scatter(1, m, 1 - rest)
        left = torch.stack([q, largest], 1) * (-w * s).unsqueeze(1)
        right = torch.stack([q + largest, q], 1) * s.unsqueeze(1)
        return cls(left, right, w * s * s * (q + largest * rest))

    @classmethod
    def sum(cls, parts: Sequence[OutputHessian]) -> OutputHessian:
        """Of several that have their rows and a diagonal each."""
        left, right, d = zip(*((part.left, part.right, part.d) for part in parts), strict=True)
        return cls(torch.cat(left, 1), torch.cat(right, 1), torch.stack(d).sum(0))

    def of(self, sites: slice) -> OutputHessian:
        """Of some sites."""
        left = None if self.left is None else self.left[sites]
        d = None if self.d is None else self.d[sites]
        return OutputHessian(left, self.right[sites], d)

    def __matmul__(self, v: Tensor) -> Tensor:
        """Lambda v, [B, C, n]."""
        product = self.right @ v
        if self.left is not None:
            product = self.left.mT @ product
        return product if self.d is None else torch.addcmul(product, self.d.unsqueeze(2), v)
