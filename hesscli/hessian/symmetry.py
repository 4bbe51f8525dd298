"""A Hessian is symmetric: what was computed is measured against its transpose, and averaged with it; or mirrored."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hesscli.hessian.chunk_sizes import chunk_sizes
from hesscli.widest import wide, widest


def symmetrise_(matrix: Tensor) -> float:
    """Replaces H by (H + H^T) / 2; returns ||H - H^T||_F / ||H||_F of what it was before, 0 for a zero matrix."""
    difference = average_(matrix)
    norm = float(torch.linalg.norm(matrix))
    return difference**0.5 / norm if norm else 0.0


def average_(matrix: Tensor) -> float:
    """Replaces H by (H + H^T) / 2, in place and in tiles; returns ||H - H^T||_F^2 of what it was before."""
    difference = torch.zeros((), dtype=widest(matrix.device), device=matrix.device)
    for upper, lower, on_diagonal in _tiles(matrix):
        gap = upper - lower.T
        weight = 1 if on_diagonal else 2
        difference += weight * wide(gap).square().sum()
        mean = lower.T + gap / 2
        if on_diagonal:  # rounding differs above and below the diagonal of a tile
            mean = mean.triu() + mean.triu(1).T
        upper.copy_(mean)
        lower.copy_(mean.T)
    return float(difference)


def mirror_(matrix: Tensor) -> None:
    """Copies the upper triangle of a matrix onto the lower, in place."""
    for upper, lower, on_diagonal in _tiles(matrix):
        lower.copy_(upper.triu() + upper.triu(1).T if on_diagonal else upper.T)


def _tiles(matrix: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Each tile on or above the diagonal, the one that it mirrors, and whether that is itself."""
    n, tile = len(matrix), chunk_sizes(matrix.device).tile
    for i in range(0, n, tile):
        for j in range(i, n, tile):
            yield matrix[i : i + tile, j : j + tile], matrix[j : j + tile, i : i + tile], i == j
