"""The spectral density of a symmetric operator, estimated by stochastic Lanczos quadrature.

m steps of Lanczos from a random unit vector give a tridiagonal T, whose eigenvalues with the squared first components
of its eigenvectors are the Gauss quadrature of that vector's spectral measure. The mean over random vectors estimates
the density, with a Wasserstein error of about the spectrum's width over m, plus what is left of the chance,
1 / sqrt(n probes).

Source: S. Ubaru, J. Chen and Y. Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, 2017.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hesscli.spectrum.density import Density
from hesscli.spectrum.finite import finite, norm


def lanczos_quadrature(
    multiply: Callable[[Tensor], Tensor],
    size: int,
    probes: int,
    steps: int,
    generator: torch.Generator,
    like: Tensor,
    report: Callable[[int, int, str], None] = lambda done, total, doing: None,
) -> Density:
    """The density of an operator.

    Args:
        steps: products for each, at most n.
        like: a tensor of the dtype and on the device of the vectors.
        report: hears (products done, products in all, what is done).

    Ctrl-C ends it with the probes that are complete.
    """
    steps = min(steps, size)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    interrupted = False
    basis = torch.zeros(steps, size, dtype=like.dtype, device=like.device)
    try:
        for probe in range(probes):

            def said(step: int, probe: int = probe) -> None:
                done = probe * steps + step
                report(done, probes * steps, f"{done} products, probe {probe + 1} of {probes}")

            start = torch.randn(size, generator=generator, dtype=torch.float64)
            found.append(_quadrature(multiply, start.to(basis), basis, said))
    except KeyboardInterrupt:
        interrupted = True
    nodes = np.concatenate([values for values, _ in found]) if found else np.zeros(0)
    weights = np.concatenate([weights for _, weights in found]) if found else np.zeros(0)
    order = np.argsort(nodes, kind="stable")
    weights = weights[order] / max(1, len(found))
    return Density(nodes[order], weights, False, len(found), interrupted)


def _quadrature(
    multiply: Callable[[Tensor], Tensor],
    start: Tensor,
    basis: Tensor,
    report: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of one vector's spectral measure, by Lanczos with full reorthogonalisation."""
    steps = len(basis)
    diagonal: list[float] = []
    off: list[float] = []
    v = start / norm(start)
    scale = 0.0
    for j in range(steps):
        basis[j] = v
        w = finite(multiply(v))
        scale = max(scale, norm(w))
        diagonal.append(float(v @ w))
        w = w - diagonal[-1] * v
        if j:
            w -= off[-1] * basis[j - 1]
        w -= (basis[: j + 1] @ w) @ basis[: j + 1]  # what rounding left of the basis
        report(j + 1)
        left = norm(w)
        if j + 1 == steps or left <= 16 * torch.finfo(w.dtype).eps * scale:
            break
        off.append(left)
        v = w / left
    T = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
    values, columns = np.linalg.eigh(T)
    return values, columns[0] ** 2
