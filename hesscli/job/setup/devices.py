"""Devices by their names on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hesscli.errors import FileError, ResourceError, UsageError
from hesscli.job.setup.team import rank_here, ranks


def device_called(name: str) -> torch.device:
    """A device of this machine, by what `--device` calls it.

    Raises:
        UsageError: it is no name of a device.
        ResourceError: this machine has none.
    """
    if name == "auto":
        name = "cuda" if cuda_devices() else "cpu"
    if name == "cuda" and ranks() > 1:  # one for each process
        name = f"cuda:{rank_here() % max(1, cuda_devices())}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"no device is called {name!r}", "--device cpu") from None
    available = {
        "cpu": not device.index,
        "cuda": (device.index or 0) < cuda_devices(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise ResourceError(f"this machine has no device {name}", "--device cpu")
    return device


def cuda_devices() -> int:
    """How many GPUs this process may use: none if it was forked from one that did, as CUDA has it."""
    usable = torch.cuda.is_available() and not torch.cuda._is_in_bad_fork()
    return torch.cuda.device_count() if usable else 0


@contextmanager
def demanding_float64() -> Iterator[None]:
    """Inside, that a device lacks float64 is told as what it is, and not as a bug, or a damaged file.

    Raises:
        ResourceError: MPS has none.
    """
    try:
        yield
    except (TypeError, FileError) as error:
        if "MPS" in str(error) and "float64" in str(error):
            raise ResourceError(
                "a device mps has no float64, in which the model's numbers are, or are asked for",
                "--device cpu",
            ) from error
        raise
