"""Devices by their names on the command line."""

from __future__ import annotations

import torch

from hesscli.errors import ResourceError, UsageError
from hesscli.job.setup.team import rank_here, ranks


def device_called(name: str) -> torch.device:
    """A device of this machine, by what `--device` calls it.

    Raises:
        UsageError: it is no name of a device.
        ResourceError: this machine has none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks() > 1:  # one for each process
        name = f"cuda:{rank_here() % max(1, torch.cuda.device_count())}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"no device is called {name!r}", "--device cpu") from None
    available = {
        "cpu": not device.index,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise ResourceError(f"this machine has no device {name}", "--device cpu")
    return device
