"""The loss's own Hessian at a model's output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class OutputHessian:
    """Lambda = d^2 l / df^2 / D of each sample, C numbers of the output being its own.

    Attributes:
        values: [B, C, C]; or [B, C], the diagonal, which is all there is where the loss is elementwise.
    """

    values: Tensor

    @property
    def is_diagonal(self) -> bool:
        return self.values.dim() == 2

    def of(self, samples: slice) -> OutputHessian:
        return OutputHessian(self.values[samples])

    def __matmul__(self, v: Tensor) -> Tensor:
        """Lambda v, [B, C, n]."""
        return self.values.unsqueeze(2) * v if self.is_diagonal else self.values @ v
