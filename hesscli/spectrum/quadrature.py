"""The spectral density of a symmetric operator, estimated by stochastic Lanczos quadrature.

m steps of Lanczos from a random unit vector give a tridiagonal T, whose eigenvalues with the squared first components
of its eigenvectors are the Gauss quadrature of that vector's spectral measure. The mean over random vectors estimates
the density, with a Wasserstein error of about the spectrum's width over m, plus what is left of the chance,
1 / sqrt(n probes).

Source: S. Ubaru, J. Chen and Y. Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from hesscli.spectrum.density import Density
from hesscli.spectrum.krylov import Krylov


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
    found: list[np.ndarray] = []  # nodes and weights of each complete probe
    with suppress(KeyboardInterrupt):
        for probe in range(probes):
            krylov = Krylov(multiply, size, steps, generator, like.new_zeros(size))
            new = True
            while new and krylov.count < steps:
                new = krylov.step()
                done = probe * steps + krylov.count
                report(done, probes * steps, f"{done} products, probe {probe + 1} of {probes}")
            krylov.solve()
            found.append(np.stack([krylov.values, krylov.columns[0] ** 2]))
            del krylov  # its basis, before there is another
    count = len(found)
    nodes, weights = np.hstack([np.zeros((2, 0)), *found])
    order = np.argsort(nodes, kind="stable")
    return Density(nodes[order], weights[order] / count, False, count, count < probes)
