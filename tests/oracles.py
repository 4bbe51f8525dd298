"""What the Hessian ought to be, computed three ways that share no code with each other.

`hessian` differentiates twice, `hessian_by_differences` only once, and the closed forms not at all.
Nothing here imports the package under test. `torch.func.hessian` is avoided on purpose: it is
silently wrong for LayerNorm and InstanceNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[Any, Any], Tensor]  # (output, target) -> scalar, averaged as the loss says


def hessian(
    module: nn.Module,
    loss: Loss,
    inputs: tuple[Tensor, ...],
    target: Tensor | None,
    names: Sequence[str] | None = None,
) -> Tensor:
    """[P, P] by reverse over reverse, over the parameters in `named_parameters` order.

    Without `names`, all parameters that require a gradient. Wrong where PyTorch's own second
    derivative is (weight_norm): ask `hessian_by_differences` there.
    """
    chosen = {
        name: parameter.detach()
        for name, parameter in module.named_parameters()
        if (parameter.requires_grad if names is None else name in names)
    }
    if any(value.dtype != torch.float64 for value in chosen.values()):
        raise TypeError("an oracle wants float64: call module.double() first")
    sizes = [value.numel() for value in chosen.values()]

    def objective(theta: Tensor) -> Tensor:
        parts = zip(chosen.items(), theta.split(sizes), strict=True)
        # Times one: a copy in every derivative, as at an odd place a pair is no complex number.
        values = {name: (part * 1).view(value.shape) for (name, value), part in parts}
        return loss(torch.func.functional_call(module, values, inputs), target)

    theta = torch.cat([value.reshape(-1) for value in chosen.values()])
    with _twice_differentiable_attention():
        return torch.autograd.functional.hessian(objective, theta)


@contextmanager
def _twice_differentiable_attention() -> Iterator[None]:
    """The fused attention kernels have no second derivative."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def hessian_by_differences(
    module: nn.Module,
    loss: Loss,
    inputs: tuple[Tensor, ...],
    target: Tensor | None,
    names: Sequence[str] | None = None,
    step: float = 1e-4,
) -> Tensor:
    """[P, P] by central differences of plain gradients, of fourth order in `step`.

    Moves the module's own parameters and puts them back, bit by bit as they were. In float64 the
    relative error is about 1e-11, as long as no kink lies within two steps.
    """
    named = list(module.named_parameters())
    parameters = [p for n, p in named if (p.requires_grad if names is None else n in names)]
    if any(p.dtype != torch.float64 for p in parameters):
        raise TypeError("an oracle wants float64: call module.double() first")
    frozen = [p for p in parameters if not p.requires_grad]

    def gradient() -> Tensor:
        value = loss(module(*inputs), target)
        slopes = torch.autograd.grad(value, parameters, allow_unused=True)
        pairs = zip(slopes, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])

    def rows() -> Iterator[Tensor]:
        for parameter in parameters:
            entries = parameter.detach().view(-1)  # the same memory
            for i, origin in enumerate(entries.tolist()):

                def slope_at(offset: float, entries=entries, i=i, origin=origin) -> Tensor:
                    entries[i] = origin + offset
                    return gradient()

                try:
                    near = slope_at(step) - slope_at(-step)
                    far = slope_at(2 * step) - slope_at(-2 * step)
                finally:
                    entries[i] = origin
                yield (8 * near - far) / (12 * step)

    for p in frozen:
        p.requires_grad_(True)
    try:
        return torch.stack(list(rows()))
    finally:
        for p in frozen:
            p.requires_grad_(False)


def closed_form_linear_regression(x: Tensor, outputs: int, bias: bool = True) -> Tensor:
    """`nn.Linear` under the mean squared error: 2/(N O) J'J, whatever the weights and targets."""
    J = _affine_jacobian(x, outputs, bias)
    return 2 / (len(x) * outputs) * torch.einsum("nop,noq->pq", J, J)


def closed_form_softmax_regression(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, sample_weights: Tensor | None = None
) -> Tensor:
    """`nn.Linear` under the mean cross-entropy: the average of J'(diag p - pp')J.

    The average is weighted by `sample_weights`: a sample's class weight, or 0 where its target
    is ignored.
    """
    J = _affine_jacobian(x, len(weight), bias is not None)
    z = x @ weight.T + (0 if bias is None else bias)
    p = (z - z.amax(1, keepdim=True)).exp()
    p = p / p.sum(1, keepdim=True)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    w = torch.ones(len(x), dtype=x.dtype) if sample_weights is None else sample_weights
    return torch.einsum("n,nop,noi,niq->pq", w, J, curvature, J) / w.sum()


def closed_form_logistic_regression(
    x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`nn.Linear` under the mean binary cross-entropy of logits: the average of J's(1 - s)J."""
    J = _affine_jacobian(x, len(weight), bias is not None)
    z = x @ weight.T + (0 if bias is None else bias)
    s = 1 / (1 + (-z).exp())
    return torch.einsum("nop,no,noq->pq", J, s * (1 - s), J) / z.numel()


def _affine_jacobian(x: Tensor, outputs: int, bias: bool) -> Tensor:
    """[N, O, P] of `Wx + b`: the weight's columns row by row, then the bias's, as `nn.Linear`."""
    eye = torch.eye(outputs, dtype=x.dtype)
    by_weight = torch.einsum("oi,nd->noid", eye, x).flatten(2)
    by_bias = eye.expand(len(x), -1, -1)
    return torch.cat([by_weight, by_bias], 2) if bias else by_weight


def relative_error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in the Frobenius norm; 0 when both vanish."""
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.double(), b.double()
    tiny = torch.finfo(torch.float64).tiny
    return float(torch.linalg.norm(a - b) / torch.linalg.norm(b).clamp_min(tiny))
