"""Small random networks, built from a description that fits into a command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Spec = Sequence[Sequence[Any]]

ACTIVATIONS = {
    name: getattr(nn, name)
    for name in "Tanh GELU SiLU ReLU Sigmoid Softplus ELU LeakyReLU Hardtanh Mish CELU Softsign "
    "Tanhshrink LogSigmoid SELU ReLU6 Hardswish Identity".split()
}


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Scale(nn.Module):
    """A gain per feature and one number for all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(width))
        self.shift = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.shift


class Gated(nn.Module):
    """A product of two branches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Linear(width, width)
        self.gate = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * torch.sigmoid(self.gate(x))


class Attention(nn.Module):
    """Self-attention over the features taken as a sequence of pairs, by its formula."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.qkv = nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.stack([x, x * x], -1)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        scores = torch.softmax(q @ k.transpose(-1, -2) / 2**0.5, -1)
        return (scores @ v).mean(-1)


class Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(1, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.unsqueeze(-1))[0][:, -1]


def _layer(kind: str, *sizes: Any) -> nn.Module:
    if kind in ACTIVATIONS:
        return ACTIVATIONS[kind]()
    if kind == "weight_norm":
        return nn.utils.parametrizations.weight_norm(nn.Linear(*sizes))
    if kind == "Twice":  # one layer, applied twice
        shared = nn.Linear(*sizes)
        return nn.Sequential(shared, nn.Tanh(), shared)
    own = {"Residual": Residual, "Scale": Scale, "Gated": Gated, "Attention": Attention}
    own["Recurrent"] = Recurrent
    return own[kind](*sizes) if kind in own else getattr(nn, kind)(*sizes)


def build(spec: Spec, seed: int) -> nn.Module:
    """The network, in eval mode, with random weights and statistics."""
    torch.manual_seed(seed)
    net = nn.Sequential(*(_layer(*layer) for layer in spec))
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
        for p in net.parameters():
            if p.dim() < 2:
                p.add_(0.3 * torch.randn_like(p))
    return net.eval()
