"""Numbers with more or fewer digits."""

from __future__ import annotations

from torch import Tensor, dtype, nn


def in_precision(tensor: Tensor, precision: dtype) -> Tensor:
    """Real numbers in a floating dtype, complex ones in the complex dtype of as many digits; others as they are."""
    if tensor.is_complex():
        return tensor.to(precision.to_complex())
    return tensor.to(precision) if tensor.is_floating_point() else tensor


def in_precision_(module: nn.Module, precision: dtype) -> nn.Module:
    """The module, its parameters and buffers changed to that. `module.to` would drop imaginary parts."""
    return module._apply(lambda tensor: in_precision(tensor, precision))
