"""The widest numbers of a device, in which sums are taken: MPS has no float64."""

from __future__ import annotations

import torch
from torch import Tensor


def widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def wide(x: Tensor) -> Tensor:
    """The same numbers, as wide as its device has them."""
    return x.to(widest(x.device))
