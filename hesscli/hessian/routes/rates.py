"""How fast a machine is: what is usual, to rank routes by, or measured in a moment, for the seconds of `--dry-run`."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from dataclasses import dataclass

import torch

_CALLS = 32
_EACH = 8  # times an addition: what an operator costs in a backward pass that is recorded


@dataclass(frozen=True)
class Rates:
    """The defaults are a CPU's."""

    flops: float = 5e10  # per second, in matrix products
    memory: float = 1.2e10  # bytes per second, in elementwise operations, of what the cache holds
    call: float = 1.5e-5  # seconds per operator


def usual_rates(device: torch.device) -> Rates:
    """Those that routes are ranked by, the same on all machines of a kind, so that the same command takes the same."""
    return Rates(1e13, 5e11, 1.5e-5) if device.type == "cuda" else Rates()


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates from a short matrix product, two short elementwise passes, and the time of one operator."""
    size, count = (4096, 1 << 26) if device.type == "cuda" else (768, 1 << 19)
    a = torch.rand(size, size, device=device, dtype=dtype)
    big = torch.rand(count, device=device, dtype=dtype)
    small = torch.rand(16, device=device, dtype=dtype)

    def calls() -> None:
        for _ in range(_CALLS):
            small + small

    product = seconds(lambda: a @ a, device)
    moved = seconds(lambda: (torch.tanh(big), big + big), device)  # a slow one and a quick one
    call = seconds(calls, device) / _CALLS
    return Rates(2 * size**3 / product, 4 * count * dtype.itemsize / moved, _EACH * call)


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The least of a few repetitions, to the end of what a GPU still has to do."""

    def timed() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return min(timeit.repeat(timed, number=1, repeat=repeats))
