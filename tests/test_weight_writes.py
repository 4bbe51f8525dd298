"""Models that write to their own weights in forward: the Hessian is that of a model which has the written ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import hessian
from torch import Tensor, nn

import hesscli

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 1, 0, 1, 0])


class Net(nn.Module):
    def __init__(self, write: Callable[[Tensor], object] = lambda w: None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.fc, self.write = nn.Linear(3, 4), nn.Linear(4, 2), write
        self.fc.weight.data *= 3

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.fc.weight)
        return self.fc(torch.tanh(self.a(x)))


@torch.no_grad()
def clamped(w: Tensor) -> None:
    w.clamp_(-0.3, 0.3)


@torch.no_grad()
def part_clamped(w: Tensor) -> None:
    w[0].clamp_(-0.3, 0.3)


@torch.no_grad()
def bounded(w: Tensor) -> None:
    if w.norm() > 1:
        w /= w.norm()


@torch.no_grad()
def all_clamped(w: Tensor) -> None:
    torch._foreach_clamp_max_([w], 0.2)


def masked(w: Tensor) -> None:
    w.data.mul_(torch.tensor([1.0, 0, 1, 1]))


def renormed(w: Tensor) -> None:
    w.data = torch.renorm(w.data, 2, 0, 0.5)


WRITES = [clamped, part_clamped, bounded, all_clamped, masked, renormed]


class Script(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.fc.weight.clamp_(-0.3, 0.3)
        return self.fc(torch.tanh(self.a(x)))


def written(model: Net) -> np.ndarray:
    """The Hessian where the first pass leaves the weights."""
    plain = Net().double()
    model = copy.deepcopy(model).double()
    model(X.double())
    plain.load_state_dict(model.state_dict())
    return hessian(plain, F.cross_entropy, (X.double(),), Y).numpy()


@pytest.mark.parametrize("method", ["auto", "finite-difference"])
@pytest.mark.parametrize("write", WRITES)
def test_weights_that_are_written_to(write: Callable[[Tensor], object], method: str) -> None:
    model = Net(write)
    before = model.fc.weight.detach().clone()
    for again in range(2):
        found = hesscli.compute(model, (X, Y), blocks="full", dtype="float64", method=method)
        np.testing.assert_allclose(found.matrix(), written(model), atol=1e-8)
        notes = "".join(found.metadata["notes"])
        assert "writes to its weights (fc.weight): the Hessian is at what it writes" in notes
        assert again or torch.equal(model.fc.weight, before)
        model(X)


def test_a_script_that_writes_to_its_weights() -> None:
    found = hesscli.compute(torch.jit.script(Script()), (X, Y), blocks="full", dtype="float64")
    np.testing.assert_allclose(found.matrix(), written(Net(clamped)), atol=1e-8)


class Words(nn.Module):
    def __init__(self, most: float | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.fc = nn.Embedding(9, 2, max_norm=most), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.words(x).tanh().mean(1))


@pytest.mark.parametrize("curvature", ["hessian", "fisher"])
def test_rows_of_a_table_that_are_bounded(curvature: str) -> None:
    """Each batch writes to rows of its own."""
    x, plain = torch.arange(12).reshape(6, 2) % 9, Words(None)
    plain.words.weight.data = torch.renorm(plain.words.weight.data, 2, 0, 0.5)
    options = {"blocks": "full", "dtype": "float64", "curvature": curvature}
    whole = hesscli.compute(plain, (x, Y), **options).matrix()
    found = hesscli.compute(Words(0.5), (x, Y), batch_size=2, **options)
    np.testing.assert_allclose(found.matrix(), whole, atol=1e-7)


class Cache(Net):
    """A frozen parameter is memory."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.zeros(9, 3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.kept.data[: len(x)] = x
        return super().forward(self.kept[: len(x)].clone())


def test_memory_that_no_one_differentiates_by() -> None:
    whole = hesscli.compute(Net(), (X, Y), blocks="full", dtype="float64").matrix()
    found = hesscli.compute(Cache(), (X, Y), blocks="full", dtype="float64", batch_size=2)
    np.testing.assert_allclose(found.matrix(), whole, atol=1e-9)


class Quantized(Net):
    def forward(self, x: Tensor) -> Tensor:
        kept = self.fc.weight.data.clone()
        self.fc.weight.data.copy_(kept.sign())
        y = super().forward(x)
        self.fc.weight.data.copy_(kept)
        return y


def test_weights_that_are_written_for_a_while() -> None:
    """Their Hessian was that of the weights as they are before and after."""
    with pytest.raises(
        hesscli.HesscliError, match="computes something else where it cannot"
    ) as caught:
        hesscli.compute(Quantized(), (X, Y))
    assert caught.value.exit_code == 4
    assert caught.value.hint
