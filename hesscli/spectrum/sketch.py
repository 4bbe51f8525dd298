"""The leading directions of a symmetric operator, from its products with a few random vectors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Sketch:
    """H z_i = Q c_i of some random vectors z_i (Halko, Martinsson and Tropp, SIAM Review 53, 2011).

    Args:
        products: H z_i, [k, n].
    """

    def __init__(self, products: Tensor) -> None:
        columns, triangle = torch.linalg.qr(products.T)
        self._basis = columns.T  # Q^T [d, n], d = min(k, n)
        self._products = triangle.T.double()  # c_i [k, d]

    def left(self) -> np.ndarray:
        """||(I - P) H||^2 / ||H||^2 for projections P onto the 0, 1, ..., k - 1 leading directions.

        Estimated by leaving one out: what the leading directions of the other products leave of each.
        """
        inside = []
        for i, own in enumerate(self._products):
            others = torch.cat([self._products[:i], self._products[i + 1 :]])
            inside.append((leading(others) @ own).square().cumsum(0))
        whole = self._products.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        return 1 - np.r_[0, (torch.stack(inside).sum(0) / whole).cpu().numpy()]

    def directions(self, count: int) -> Tensor:
        """The leading ones, orthonormal: [count, n]."""
        return leading(self._products)[:count].to(self._basis.dtype) @ self._basis


def leading(rows: Tensor) -> Tensor:
    """Orthonormal directions, those first in which the rows are largest."""
    return torch.linalg.svd(rows, full_matrices=False)[2]
