"""Losses that PyTorch cannot differentiate twice, against its own values, gradients, and differences of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import labels, normal
from torch import Tensor, nn

import hesscli
from hesscli.hessian.aten.definitions import exact_derivatives

Loss = Callable[[Tensor], Tensor]


def slope_of(loss: Loss, x: Tensor, **options: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What a loss gives, where, and the gradient of its sum; losses of infinity left out."""
    x = x.detach().requires_grad_()
    value = loss(x)
    finite = value.where(value.isfinite(), 0).sum()
    return value, x, torch.autograd.grad(finite, x, **options)[0]


def differentiates_twice(loss: Loss, x: Tensor) -> None:
    value, _, slope = slope_of(loss, x)
    with exact_derivatives():
        ours, at, gradient = slope_of(loss, x, create_graph=True)
    torch.testing.assert_close(ours, value)
    torch.testing.assert_close(gradient, slope)
    v, h = normal(*x.shape, seed=9), 1e-5
    (found,) = torch.autograd.grad(gradient, at, v, materialize_grads=True)
    along = (slope_of(loss, x + h * v)[2] - slope_of(loss, x - h * v)[2]) / (2 * h)
    torch.testing.assert_close(found, along, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("p", "margin"), [(1, 1.0), (2, 0.6)])
@pytest.mark.parametrize("shape", [(6, 4), (4,), (1, 4)])
def test_multi_margin(shape: tuple[int, ...], p: int, margin: float, reduction: str) -> None:
    y = labels(4, 6)[: shape[0]] if len(shape) == 2 else torch.tensor(2)
    for weight in (None, torch.tensor([1.0, 0.5, 2.0, 0.1], dtype=torch.float64)):
        options = {"p": p, "margin": margin, "weight": weight, "reduction": reduction}
        differentiates_twice(lambda x, o=options: F.multi_margin_loss(x, y, **o), normal(*shape))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_multilabel_margin(reduction: str) -> None:
    y = torch.tensor([[0, 3, -1, 1], [2, 2, -1, 0], [-1, 0, 1, 2], [3, 1, 0, 2]])
    for target in (y, y[0]):
        differentiates_twice(
            lambda x, t=target: F.multilabel_margin_loss(x, t, reduction=reduction) ** 2,
            normal(*target.shape),
        )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    "weighted", [[], ["weight"], ["pos_weight"], ["weight", "pos_weight"]], ids=str
)
def test_binary_cross_entropy_with_logits(weighted: list[str], reduction: str) -> None:
    options: dict[str, Any] = {name: normal(4, seed=len(name)).abs() for name in weighted}
    y = labels(2, 6, 4).double()
    differentiates_twice(
        lambda x: F.binary_cross_entropy_with_logits(x, y, reduction=reduction, **options),
        normal(6, 4),
    )


T, C = 7, 5
LABELS = torch.tensor([[1, 2, 3], [2, 2, 4], [3, 1, 1], [4, 1, 2]])
LONG = torch.tensor([3, 2, 1, 0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"input_lengths": torch.tensor([7, 4, 1, 5])},
        {"input_lengths": torch.tensor([2, 7, 0, 0])},  # of which two are too short
        {"targets": torch.cat([row[:n] for row, n in zip(LABELS, LONG, strict=True)])},
        {"input_lengths": (7, 6, 5, 4), "target_lengths": (3, 3, 3, 3)},
        {"targets": LABELS - 1, "blank": 4},
        {"targets": LABELS[:, :0], "target_lengths": torch.zeros(4, dtype=torch.long)},
    ],
    ids=["all", "lengths", "too-short", "in-a-row", "numbers", "blank", "no-labels"],
)
@pytest.mark.parametrize("of_softmax", [True, False])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_connectionist_temporal_classification(
    options: dict[str, object], of_softmax: bool, reduction: str
) -> None:
    whole = {"targets": LABELS, "input_lengths": torch.full((4,), T), "target_lengths": LONG}
    given = whole | options | {"reduction": reduction, "zero_infinity": True}
    differentiates_twice(
        lambda x: F.ctc_loss(x.log_softmax(-1) if of_softmax else x, **given), normal(T, 4, C)
    )


def test_what_cannot_have_happened_is_infinite() -> None:
    x = normal(2, 1, 3).log_softmax(-1)
    x[:, :, 2] = -torch.inf
    for row in ([1, 1], [2, 1]):
        with exact_derivatives():
            assert F.ctc_loss(x, torch.tensor([row]), (2,), (2,)) == torch.inf


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))).log_softmax(-1)


def heard(output: Tensor, target: Tensor) -> Tensor:
    count = len(output)
    return F.ctc_loss(output.transpose(0, 1), target, (T,) * count, (3,) * count, reduction="none")


def margins(output: Tensor, target: Tensor) -> Tensor:
    return F.multi_margin_loss(output, target, p=2, reduction="none")


def several_margins(output: Tensor, target: Tensor) -> Tensor:
    return F.multilabel_margin_loss(output, target, reduction="none")


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("loss", [heard, margins, several_margins])
def test_models_with_such_losses(loss: Callable[..., Tensor], curvature: str) -> None:
    torch.manual_seed(0)
    x = normal(8, T, 3) if loss is heard else normal(8, 3)
    target = {heard: LABELS.repeat(2, 1), margins: labels(C, 8)}.get(loss)
    if target is None:
        target = torch.tensor([[0, 3, -1, 1, 1], [2, -1, 0, 0, 0]]).repeat(4, 1)
    model = Words().double()
    found = hesscli.compute(model, (x, target), loss=loss, blocks="full", curvature=curvature)
    assert "finite-difference" not in found.metadata["method"]
    assert found.metadata["check"]["relative_error"] < 1e-8
