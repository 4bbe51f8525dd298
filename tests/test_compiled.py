"""Models that `torch.compile` wraps, whole or in part: they are differentiated as they are written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracles import hessian, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import hesscli
from hesscli.files.models.architectures import build

X, Y = (
    torch.randn(7, 3, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1)
)


def forbidden(graph: object, inputs: object) -> Callable[..., Tensor]:
    raise AssertionError("compiled")


def squared(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).mean(1)


class Plain(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.act = nn.Linear(3, 4), nn.Linear(4, 3), act

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


def whole() -> nn.Module:
    return torch.compile(Plain(), backend=forbidden)


def in_part() -> nn.Module:
    model = Plain()
    model.a = torch.compile(model.a, backend=forbidden)
    return model


def in_place() -> nn.Module:
    model = Plain()
    model.compile(backend=forbidden)
    return model


def by_a_function() -> nn.Module:
    return Plain(torch.compile(torch.tanh, backend=forbidden))


@pytest.mark.parametrize("make", [Plain, whole, in_part, in_place, by_a_function])
@pytest.mark.parametrize("compiled_loss", [False, True])
def test_compiled_models(make: Callable[[], nn.Module], compiled_loss: bool) -> None:
    model = make().double()
    names = [name for name, _ in model.named_parameters()]
    loss = torch.compile(squared, backend=forbidden) if compiled_loss else squared
    found = hesscli.compute(model, (X, Y), blocks="full", loss=loss, framework="torch")
    assert relative_error(found.matrix(), hessian(Plain().double(), F.mse_loss, (X,), Y)) < 1e-9
    named = [parameter["name"] for parameter in found.metadata["parameters"]]
    assert named == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("factory", ["whole", "in_part"])
def test_architectures_that_are_compiled(factory: str) -> None:
    built = build(f"test_compiled:{factory}", {}, {})
    assert list(built.state_dict()) == list(Plain().state_dict())


def test_calls_within_what_is_compiled() -> None:
    """As of a training step that watches the curvature."""
    model, found = Plain().double(), list[np.ndarray]()

    @torch.compile(backend="eager")
    def step(x: Tensor) -> Tensor:
        output = model(x)
        found.append(hesscli.compute(model, (x, Y), blocks="full").matrix())
        found.append(hesscli.operator(model, (x, Y)) @ np.eye(31))
        return output

    torch.testing.assert_close(step(X), model(X))
    truth = hessian(Plain().double(), F.mse_loss, (X,), Y)
    for matrix in found:
        assert relative_error(torch.as_tensor(matrix), truth) < 1e-9
