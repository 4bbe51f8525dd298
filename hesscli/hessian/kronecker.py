"""Sums over samples of Kronecker products, the Hessian blocks of linear layers."""

from __future__ import annotations

import torch
from torch import Tensor

_WORKSPACE = 1 << 23  # numbers; small enough to stay warm, large enough for the matrix product


def add_kronecker_rows(out: Tensor, first: int, s: Tensor, a: Tensor) -> None:
    """out[(p, q), (i, j)] += sum_b s[p, b, i] a[b, q] a[b, j], for rows p = first, ... and columns i >= first.

    The matrix is symmetric in (p, i), and in (q, j) for fixed p and i: only i >= first is filled (`mirror_` does the
    rest), and only the pairs q <= j go through the matrix product.

    Args:
        out: [n m, n m].
        first: the first row p in s.
        s: [rows, B, n - first].
        a: [B, m].
    """
    rows, samples, n = s.shape
    m = a.shape[1]
    if m == 1:
        out[first : first + rows, first : first + n] += torch.einsum("pbi,b->pi", s, a[:, 0] ** 2)
        return
    q, j = torch.triu_indices(m, m, device=a.device)
    pairs = a[:, q] * a[:, j]  # [B, m (m + 1) / 2]
    pair = torch.empty(m, m, dtype=torch.long, device=a.device)
    pair[q, j] = pair[j, q] = torch.arange(len(q), device=a.device)
    target = out.view(out.shape[0] // m, m, out.shape[1] // m, m)
    step = max(1, _WORKSPACE // (n * len(q)))
    for start in range(0, rows, step):
        part = s[start : start + step].transpose(1, 2).reshape(-1, samples)  # [step n, B]
        product = (part @ pairs).view(-1, n, len(q))
        p = first + start
        for row in range(m):
            target[p : p + len(product), row, first : first + n] += product[:, :, pair[row]]


def mirror_(matrix: Tensor, tile: int = 512) -> None:
    """Copies the upper triangle of a matrix onto the lower, in place."""
    n = matrix.shape[0]
    for i in range(0, n, tile):
        for j in range(i, n, tile):
            upper = matrix[i : i + tile, j : j + tile]
            if i == j:
                upper.copy_(upper.triu() + upper.triu(1).T)
            else:
                matrix[j : j + tile, i : i + tile].copy_(upper.T)
