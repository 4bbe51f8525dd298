"""Smooth functions with derivatives that are kept: the same as PyTorch's own, to any order, in fewer operators."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from oracles import hessian
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hesscli
from hesscli.hessian.aten.smooth import smooth
from hesscli.hessian.autodiff import batched_grad, seeded_grad

aten = torch.ops.aten
FUNCTIONS = {
    "elu": (aten.elu.default, (1.3, 1.1, 0.7), {}),
    "gelu": (aten.gelu.default, (), {}),
    "gelu-tanh": (aten.gelu.default, (), {"approximate": "tanh"}),
    "mish": (aten.mish.default, (), {}),
    "silu": (aten.silu.default, (), {}),
    "softplus": (aten.softplus.default, (2, 15), {}),
    "tanh": (aten.tanh.default, (), {}),
}


def parts(name, made):
    """y, and three derivatives of a function of it along fixed directions, each with a graph."""
    operator, arguments, named = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 5, generator=generator, dtype=torch.float64) * 3
    z[0] = torch.tensor([0.0, -30.0, 30.0, 8.0, -8.0])
    u, v, w = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    x = z.requires_grad_()
    y = made(operator)(x * 1.0, *arguments, **named)
    (first,) = torch.autograd.grad((y**2 * u).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first * v).sum(), x, create_graph=True)
    (third,) = torch.autograd.grad((second * w).sum(), x)
    return y.detach(), first.detach(), second.detach(), third


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_are_those_of_pytorch(name):
    for mine, theirs in zip(parts(name, smooth), parts(name, lambda f: f), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)  # far out


class Called(TorchDispatchMode):
    """Counts operators by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_directions_share_the_operators_of_one_pass(name):
    operator, arguments, named = FUNCTIONS[name]
    x = torch.linspace(-3, 3, 12).requires_grad_()
    y = smooth(operator)(x * 2, *arguments, **named)
    (gradient,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    counts = []
    for directions in (2, 30):
        with Called() as called:
            (rows,) = batched_grad(gradient, [x], torch.eye(30, 12)[:directions])
        assert rows.shape == (directions, 12)
        counts.append(called.counts)
    assert counts[0] == counts[1]


def test_without_gradients_it_is_the_operator():
    x = torch.linspace(-3, 3, 7)
    with torch.no_grad():
        found = smooth(aten.gelu.default)(x.requires_grad_())
    assert torch.equal(found, torch.nn.functional.gelu(x))
    assert not found.requires_grad


def test_complex_numbers_have_pytorchs_own_derivatives():
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()

    def first(tanh):
        y = tanh(torch.complex(x, x * 0.5))
        (gradient,) = torch.autograd.grad(y.abs().square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    assert torch.allclose(first(smooth(aten.tanh.default)), first(torch.tanh), rtol=1e-12)


def test_passes_where_internals_of_pytorch_have_moved(monkeypatch):
    x, unused = (torch.linspace(-1, 1, size).requires_grad_() for size in (5, 2))
    (gradient,) = torch.autograd.grad((x.tanh() ** 3).sum(), x, create_graph=True)
    expected, _ = batched_grad(gradient, [x, unused], torch.eye(5))
    monkeypatch.setitem(sys.modules, "torch._vmap_internals", None)
    monkeypatch.delattr("torch.autograd.graph._engine_run_backward")
    found, nothing = batched_grad(gradient, [x, unused], torch.eye(5))
    torch.testing.assert_close(found, expected)
    assert nothing is None
    first, nothing = seeded_grad(gradient, [x, unused], torch.eye(5)[0])
    torch.testing.assert_close(first, expected[0])
    assert nothing is None


@pytest.mark.parametrize(
    ("method", "blocks"),
    [("preactivation", "elements"), ("preactivation", "full"), ("auto", "diag"), ("hvp", "full")],
)
def test_mish_where_an_exponential_overflows_in_float32(method, blocks):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Mish(), nn.Linear(3, 3), nn.Mish(True), nn.Linear(3, 1))
    x = torch.randn(8, 2) * torch.tensor([1.0, 900.0])
    assert net[:1](x).max() > 89
    assert net[:3](x).max() > 89
    found = hesscli.compute(net, (x, x[:, :1]), method=method, blocks=blocks, framework="torch")
    truth = hessian(net.double(), nn.functional.mse_loss, (x.double(),), x[:, :1].double())
    start = 0
    for name in found.blocks:
        mine = found.block(name).double()
        stop = start + (mine.numel() if blocks == "elements" else len(mine))
        part = truth[start:stop, start:stop]
        part = part.diagonal().view(mine.shape) if blocks == "elements" else part
        torch.testing.assert_close(mine, part, rtol=1e-4, atol=1e-5 * float(part.abs().max()))
        start = stop
    assert start == len(truth)
