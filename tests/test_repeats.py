"""Convolutions that a difference does not compute again: it has the same bits as if it did."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from cases import normal
from problems import blocks_of, problem_of
from torch import Tensor, nn
from torch.nn import functional as F

from hesscli.hessian.blocks import Block
from hesscli.hessian.differences import repeats
from hesscli.hessian.differences.check import Certificate
from hesscli.hessian.differences.directional import DirectionalDifference
from hesscli.hessian.differences.here import Here
from hesscli.hessian.objective.problem import Problem

STEP = 1e-3


class Residual(nn.Module):
    """Writes to what its convolutions give, and to what they got."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm, self.short = nn.BatchNorm2d(4), nn.Conv2d(2, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu_())
        y = self.norm(y)
        y += self.short(x)
        return y.relu_().mean((2, 3))


class Again(nn.Module):
    """The same kernels for what is not the same, the same of both but for its stretch; and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(2, 2, 3, padding=1)
        self.back = nn.ConvTranspose1d(2, 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        y = self.back(torch.tanh(self.a(torch.tanh(self.a(x)))))
        stretched = F.conv1d(x, self.a.weight, self.a.bias, padding=2, dilation=2)
        return y.mean(2) + stretched.square().mean(2)


class Scratch(nn.Module):
    """Writes past autograd to kernels, to inputs and to what it was given, and puts back what it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            kept = self.a.weight.data.clone()
            self.a.weight.data.mul_(2)
            shift, scratch = self.a(x).mul_(3), x.clone()
            self.a.weight.data.copy_(kept)
            shift += self.a(scratch.add_(1))
            shift += self.a(scratch.zero_())
        return self.b(torch.tanh(self.a(x) + shift)).mean((2, 3))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The arguments of the convolutions that are computed, of which none is too small to be noted."""
    seen, own = list[tuple](), repeats._convolution
    monkeypatch.setattr(repeats, "_convolution", lambda *x: seen.append(x) or own(*x))
    monkeypatch.setattr(repeats, "_WORTH", 0)
    return seen


def posed(net: nn.Module, samples: int = 3, batch_size: int | None = None) -> Problem:
    torch.manual_seed(0)
    return problem_of(net.eval(), [normal(samples, 2, 6, 6)], torch.zeros(samples, _outputs(net)),
                      batch_size=batch_size)  # fmt: skip


def _outputs(net: nn.Module) -> int:
    return 4 if isinstance(net, Residual) else 2


def noting(problem: Problem) -> Here:
    here = Here(problem)
    here.noted = 6
    return here


def quotients(problem: Problem, here: Here, block: Block) -> tuple[Tensor, Tensor]:
    """As it is made, and of gradients that are computed whole."""
    v = torch.ones(block.size, dtype=torch.float64)
    along = DirectionalDifference(problem, block, v, here)
    moved, still = along.gradient(STEP), problem.flat_gradient(block.parameters)
    return along.one_sided_quotient(STEP), (moved - still) / (STEP * along.scale)


@pytest.mark.parametrize("batch_size", [3, 1])
@pytest.mark.parametrize("net", [Residual, Again, Scratch], ids=lambda net: net.__name__)
def test_a_difference_has_the_same_bits(computed, net, batch_size):
    problem = posed(net(), batch_size=batch_size)
    here, counts = noting(problem), []
    for block in blocks_of(problem, "block_diagonal"):
        here.gradient(block.parameters)
        computed.clear()
        found, expected = quotients(problem, here, block)
        assert torch.equal(found, expected), block.name
        assert bool(expected.any()), block.name
        counts.append(len(computed))
    assert min(counts) < max(counts)


def test_what_lies_before_the_parameters_that_moved_is_not_computed(computed):
    problem = posed(Residual())
    here = noting(problem)
    here.gradient(["a.weight"])
    assert len(computed) == 3
    counts = {}
    for block in blocks_of(problem, "block_diagonal"):
        computed.clear()
        quotients(problem, here, block)
        counts[block.name] = len(computed)
    assert counts == {
        "a.weight": 2, "a.bias": 2, "b.weight": 1, "b.bias": 1, "norm.weight": 0, "norm.bias": 0,
        "short.weight": 1,
    }  # fmt: skip


def test_of_many_batches_the_first_few_are_noted(computed):
    problem = posed(Again(), samples=8, batch_size=1)
    here = noting(problem)
    here.gradient(["back.bias"])
    (block,) = [b for b in blocks_of(problem, "block_diagonal") if b.name == "back.bias"]
    assert len(computed) == 6 * 4
    computed.clear()
    quotients(problem, here, block)
    assert len(computed) == 6 * 1 + 2 * 4


def test_small_convolutions_are_not_noted():
    problem = posed(Residual())
    here = noting(problem)
    here.gradient(["a.weight"])
    assert isinstance(here.repeats.repeating(), nullcontext)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_gradient_at_theta_is_the_problems(batch_size):
    problem = posed(Residual(), samples=8, batch_size=batch_size)
    names = list(problem.parameters)
    assert torch.equal(noting(problem).gradient(names), problem.flat_gradient(names))


def test_nothing_is_kept_beside_large_blocks(computed):
    problem = posed(Residual())
    blocks = blocks_of(problem, "block_diagonal")
    certificate = Certificate(problem, torch.float32, 0)
    for block in blocks:
        certificate.matrix(block, torch.eye(block.size))
    assert not computed
    certificate = Certificate(problem, torch.float32, 0)
    for block in blocks:
        certificate.diagonal(block, torch.ones(block.size))
    assert computed
