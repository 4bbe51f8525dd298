"""How fast this machine is, measured in a moment: for the seconds that `--dry-run` prints."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hesscli.hessian.costs import Rates
from hesscli.hessian.problem import Problem

_SIZE = 768


def measure_rates(problem: Problem) -> Rates:
    """Rates from a short matrix product, a short elementwise pass, and the time of one operator."""
    device, dtype = problem.device, problem.dtype
    a = torch.rand(_SIZE, _SIZE, device=device, dtype=dtype)
    big = torch.rand(1 << 21, device=device, dtype=dtype)
    small = torch.rand(16, device=device, dtype=dtype)
    product = _seconds(lambda: a @ a, device)
    moved = _seconds(lambda: torch.tanh(big), device)
    call = _seconds(lambda: small + small, device)
    return Rates(2 * _SIZE**3 / product, 2 * big.numel() * dtype.itemsize / moved, 8 * call)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The least of a few repetitions."""
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
