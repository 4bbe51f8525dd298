"""Smooth elementwise functions whose first two derivatives are made once, for any number of passes.

A direction goes twice through y = phi(z): what comes back, g phi'(z), moves by phi'(z) with g and by g phi''(z) with z.
PyTorch evaluates these functions' derivatives anew in every pass, and for one direction after the other. Kept, they are
one product each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Elementwise = Callable[[Tensor], Tensor]


def slope_and_bend(phi: Elementwise, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """phi'(z) and phi''(z); None where phi'' is zero."""
    with torch.enable_grad():
        at = z.detach().clone().requires_grad_()
        y = phi(at)
        if not y.requires_grad:
            return torch.zeros_like(z), None
        (slope,) = torch.autograd.grad(y.sum(), at, create_graph=True)
        if not slope.requires_grad:
            return slope, None
        (bend,) = torch.autograd.grad(slope.sum(), at, allow_unused=True)
    return slope.detach(), bend


def smooth(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator phi(z, ...), which gives the same with the same derivatives. Of complex z, it is PyTorch's own."""

    def apply(z: Tensor, *arguments: object, **named: object) -> Tensor:
        def phi(z: Tensor) -> Tensor:
            return operator(z, *arguments, **named)

        followed = torch.is_grad_enabled() and z.requires_grad and not z.is_complex()
        return _Smooth.apply(z, phi) if followed else phi(z)

    return apply


class _Smooth(Function):
    """z -> phi(z)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, phi: Elementwise) -> Tensor:
        ctx.save_for_backward(z)
        ctx.phi, ctx.kept = phi, None
        return phi(z)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (z,) = ctx.saved_tensors
        if ctx.kept is None:
            ctx.kept = slope_and_bend(ctx.phi, z)
        if torch.is_grad_enabled():
            return _Scaled.apply(g, z, ctx.phi, *ctx.kept), None
        return g * ctx.kept[0], None


class _Scaled(Function):
    """g, z -> g phi'(z)."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, z: Tensor, phi: Elementwise, slope: Tensor, bend: Tensor
    ) -> Tensor:
        ctx.save_for_backward(g, z)
        ctx.phi, ctx.kept = phi, (slope, g * bend)
        return g * slope

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Any:
        if not torch.is_grad_enabled():
            slope, bent = ctx.kept
            return c * slope, c * bent, None, None, None
        # For third derivatives, PyTorch's own. Of views: g itself may be made of z.
        g, z = (x.view_as(x) for x in ctx.saved_tensors)
        (pulled,) = torch.autograd.grad(ctx.phi(z), z, g, create_graph=True)
        return *torch.autograd.grad(pulled, (g, z), c, create_graph=True), None, None, None
