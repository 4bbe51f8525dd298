"""Losses of predictions so sure that p rounds to 1: their derivatives are 1 - p, down to the last digit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import normal
from safetensors.torch import save_file
from torch import Tensor, nn

import hesscli
from hesscli.hessian.aten import formulas, loss_formulas

X = torch.tensor([[1.0, 2.0], [1.0, -0.5], [1.0, 0.25]])
OWN = """
import torch.nn.functional as F

def cross_entropy(output, target):
    return F.cross_entropy(output, target, reduction="none")

def bce(output, target):
    return F.binary_cross_entropy_with_logits(output, target, reduction="none").squeeze(1)

def log_sigmoid(output, target):
    return -F.logsigmoid(output).squeeze(1)
"""


def _of_classes(margin: float) -> nn.Linear:
    """Logits (margin, 0), nearly, of the first class."""
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[margin, 0.5], [0, 0]]))
    return layer


def _of_one(margin: float) -> nn.Linear:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[margin, 0.5]]))
    return layer


ZEROS, ONES = torch.zeros(3, dtype=torch.long), torch.ones(3, 1)
# model, targets, loss; what is own has its name alone.
LOSSES: dict[str, tuple[Callable[[float], nn.Module], Tensor, str]] = {
    "cross-entropy": (_of_classes, ZEROS, "cross-entropy"),
    "of probabilities": (_of_classes, F.one_hot(ZEROS, 2).float(), "cross-entropy"),
    "of the model": (lambda m: nn.Sequential(_of_classes(m), nn.LogSoftmax(1)), ZEROS, "nll"),
    "own cross-entropy": (_of_classes, ZEROS, "cross_entropy"),
    "bce": (_of_one, ONES, "bce-with-logits"),
    "own bce": (_of_one, ONES, "bce"),
    "own log-sigmoid": (_of_one, ONES, "log_sigmoid"),
}


def _truth(margin: float, classes: bool) -> Tensor:
    """The mean of p (1 - p) x x^T, for each pair of classes with its sign, p being far from 1 / 2."""
    x = X.double()
    away = (-(x @ torch.tensor([margin, 0.5], dtype=torch.float64))).exp()
    of_logits = away / (1 + away) ** 2
    one = (x.T * of_logits) @ x / len(x)
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) if classes else torch.ones(1, 1)
    return torch.kron(signs.double(), one)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("margin", [20.0, 40.0])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_cancels(tmp_path: Path, name: str, margin: float, dtype: str) -> None:
    make, target, loss = LOSSES[name]
    if name.startswith("own"):
        (tmp_path / "own.py").write_text(OWN)
        loss = f"{tmp_path / 'own.py'}:{loss}"
    truth = _truth(margin, classes=target is not ONES)
    model, data = str(tmp_path / "model.pt"), str(tmp_path / "data.safetensors")
    torch.jit.trace(make(margin), X).save(model)
    save_file({"x": X, "y": target}, data)
    given = {"loss": loss, "dtype": dtype}
    for method in ("auto", "hvp"):
        found = hesscli.compute(model, data, blocks="full", method=method, **given)
        assert _error(found.matrix(), truth) < 1e-5, method
    for curvature in ("hessian", "ggn"):
        if curvature == "ggn" and loss == "nll":  # linear in what such a model returns
            continue
        found = hesscli.operator(model, data, curvature=curvature, **given) @ np.eye(len(truth))
        assert _error(found, truth) < 1e-5, curvature


def test_nothing_cancels_in_decomposed_graphs(tmp_path: Path) -> None:
    model = nn.Sequential(_of_classes(40), nn.LogSoftmax(1))
    program = torch.export.export(model, (X,)).run_decompositions()
    torch.export.save(program, tmp_path / "model.pt2")
    found = hesscli.compute(tmp_path / "model.pt2", (X, ZEROS), blocks="full", loss="nll")
    assert _error(found.matrix(), _truth(40, classes=True)) < 1e-5


def _error(found: np.ndarray, truth: Tensor) -> float:
    return float((torch.as_tensor(found).double() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_log_softmax(dim: int) -> None:
    x = normal(4, 5)
    x[1, 2] = x[2] = -torch.inf
    x[3, 3] = x[3].max()  # a tie
    torch.testing.assert_close(formulas.log_softmax(x, dim), x.log_softmax(dim), equal_nan=True)


@pytest.mark.parametrize("x", [normal(), normal(0, 3), normal(3, 1)], ids=["scalar", "none", "one"])
def test_log_softmax_of_little(x: Tensor) -> None:
    assert torch.equal(formulas.log_softmax(x, -1), x.log_softmax(-1))


def test_log_sigmoid() -> None:
    x = torch.tensor([-800.0, -30, -1, 0, 1, 30, 800], dtype=torch.float64, requires_grad=True)
    y = formulas.log_sigmoid(x)
    torch.testing.assert_close(y, F.logsigmoid(x))
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(slope, torch.sigmoid(-x), rtol=1e-15, atol=0)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    expected = [-math.exp(-abs(t)) / (1 + math.exp(-abs(t))) ** 2 for t in x.tolist()]
    torch.testing.assert_close(curvature, torch.tensor(expected).double(), rtol=1e-7, atol=1e-300)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_bce_with_weights(reduction: str) -> None:
    x, target = normal(4, 3), normal(4, 3).sigmoid()
    weight, positive = normal(4, 3, seed=1).abs(), normal(3, seed=2).abs()
    theirs = F.binary_cross_entropy_with_logits(
        x, target, weight, pos_weight=positive, reduction=reduction
    )
    number = {"none": 0, "mean": 1, "sum": 2}[reduction]
    ours = loss_formulas.binary_cross_entropy_with_logits(x, target, weight, positive, number)
    torch.testing.assert_close(ours, theirs)
