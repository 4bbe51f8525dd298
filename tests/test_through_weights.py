"""Parameters that enter through weights which the model makes of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import normal
from oracles import hessian, hessian_by_differences
from problems import (
    STRUCTURES,
    blocks_and_truth,
    blocks_of,
    compute_blocks,
    planner_of,
    problem_of,
    routes_of,
)
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.proofs.analysis import Analyses
from hesscli.hessian.routes import through_weights
from hesscli.hessian.routes.through_weights import ThroughWeights
from hesscli.job.matrix import memory

ROWS, IMAGES = normal(7, 4, seed=1), normal(5, 2, 4, 4, seed=1)


class Made(nn.Linear):
    """A layer whose weight is a function of its parameter."""

    def __init__(self, function: Callable[[Tensor], Tensor], *sizes: int) -> None:
        super().__init__(*sizes)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.function(self.weight), self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) * torch.rsqrt(variance + 1e-5)
        return F.conv2d(x, weight, self.bias, padding=1)


class Adapted(nn.Module):
    """A fixed matrix and the product of two small ones, of which directions and lengths are trained."""

    def __init__(self, inputs: int, outputs: int, by_length: bool = True) -> None:
        super().__init__()
        self.register_buffer("fixed", torch.randn(outputs, inputs))
        self.down = nn.Parameter(torch.randn(2, inputs))
        self.up = nn.Parameter(torch.randn(outputs, 2))
        self.length = nn.Parameter(torch.rand(outputs) + 1) if by_length else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fixed + self.up @ self.down
        if self.length is not None:
            weight = self.length.unsqueeze(1) * weight / weight.norm(dim=1, keepdim=True)
        return F.linear(x, weight)


class BothWays(nn.Module):
    """An encoder and a decoder of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.matrix)), self.matrix.T, self.bias)


class Scaled(nn.Module):
    """Scales that are exponentials, and normalised rows added to every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 5), nn.Linear(5, 3)
        self.log_scale, self.rows = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(x) * self.log_scale.exp()).unsqueeze(1)
        return self.out(torch.tanh(hidden + F.normalize(self.rows, dim=-1))).sum(1)


class Words(nn.Module):
    """A table of words that are looked up, and scored at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        words = self.table(x.argsort(1))
        return F.linear(torch.tanh(self.layer(words)).sum(1), self.table.weight)


class Shaped(nn.Module):
    """Rows that are normalised and added to ones, which are made in the likeness of what depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rows = nn.Linear(4, 5), nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(x))
        state = hidden.new_zeros(hidden.shape) + hidden
        return F.linear(state, F.normalize(self.rows, dim=-1) + hidden.new_ones(3, 5))


class Filled(nn.Module):
    """Rows that are normalised, and one number in all places of what depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.gate = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(x, F.normalize(self.rows, dim=-1)))
        return hidden * torch.fill(hidden, self.gate)


class Subtracted(nn.Module):
    """A layer whose bias is made of a parameter, and taken away."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = Made(torch.sin, 4, 5), nn.Linear(5, 3)
        self.threshold = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.layer(x) - self.threshold.exp()))


class Stopped(nn.Module):
    """Gates of a layer whose weights are made, through which no gradient passes."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.last = Made(torch.sin, 4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x * self.gates(x).sigmoid().detach())


def stack(first: nn.Module, activation: nn.Module, *rest: nn.Module) -> nn.Module:
    return nn.Sequential(first, activation, *rest)


def antisymmetric(weight: Tensor) -> Tensor:
    return torch.linalg.matrix_exp(weight - weight.T)


MADE = {  # the model, its inputs, and how many of its parameters have blocks through weights
    "weight-norm": (lambda: stack(weight_norm(nn.Linear(4, 5)), nn.Tanh(), weight_norm(nn.Linear(5, 3))),
        ROWS, 4),
    "normalised-relu": (lambda: stack(Made(lambda w: w / w.norm(dim=1, keepdim=True), 4, 5), nn.ReLU(),
        nn.Linear(5, 3)), ROWS, 1),
    "weight-norm-of-inputs": (lambda: stack(weight_norm(nn.Linear(4, 5), dim=1), nn.Tanh(), nn.Linear(5, 3)),
        ROWS, 2),
    "weight-norm-of-pixels": (lambda: stack(weight_norm(nn.Conv2d(2, 3, 1)), nn.Tanh(), nn.Flatten(),
        nn.Linear(48, 3)), IMAGES, 2),
    "spectral-norm": (lambda: stack(spectral_norm(nn.Linear(4, 5)), nn.Tanh(), spectral_norm(nn.Linear(5, 3))),
        ROWS, 2),
    "orthogonal": (lambda: stack(orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)), ROWS, 1),
    "antisymmetric": (lambda: stack(Made(antisymmetric, 4, 4), nn.Tanh(), nn.Linear(4, 3)), ROWS, 1),
    "softmax": (lambda: stack(Made(lambda w: w.softmax(1), 4, 5), nn.Tanh(), Made(torch.sin, 5, 3)), ROWS, 2),
    "standardised": (lambda: stack(Standardised(2, 3, 3), nn.GELU(), Standardised(3, 3, 3), nn.GELU(),
        nn.Flatten(), nn.Linear(48, 3)), IMAGES, 2),
    "standardised-relu": (lambda: stack(Standardised(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(3, 3)), IMAGES, 1),
    "adapted": (lambda: stack(Adapted(4, 5), nn.Tanh(), Adapted(5, 3)), ROWS, 6),
    "merged": (lambda: stack(Adapted(4, 5, False), nn.Tanh(), Adapted(5, 3, False)), ROWS, 4),
    "both-ways": (BothWays, ROWS, 1),
    "scaled": (Scaled, ROWS, 2),
    "words": (Words, ROWS, 1),
    "shaped": (Shaped, ROWS, 1),
    "detached": (lambda: stack(nn.Linear(4, 5), nn.Tanh(), Made(Tensor.detach, 5, 3)), ROWS, 1),
    "subtracted": (Subtracted, ROWS, 2),
    "stopped": (Stopped, ROWS, 1),
    "mask": (lambda: stack(nn.Linear(4, 5), nn.Tanh(), Made(lambda w: (w > 0).to(w.dtype), 5, 3)), ROWS, 1),
}  # fmt: skip

BY_NEURON = {  # those whose neurons are made of entries of their own
    "weight-norm", "weight-norm-of-pixels", "normalised-relu", "softmax", "standardised", "standardised-relu",
    "adapted", "merged", "shaped", "detached", "mask", "subtracted", "stopped",
}  # fmt: skip


def pose(name: str):
    make, x, count = MADE[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().double().eval()
    y = torch.arange(len(x)) % 3
    oracle = hessian_by_differences if name.startswith("weight-norm") else hessian
    truth = oracle(module, F.cross_entropy, (x,), y)
    assert truth.norm() > 1e-2
    return module, x, y, truth, count


def through(problem, kind: str = "preactivation", curvature: str = "hessian"):
    return routes_of(problem, curvature=curvature)[f"{kind}, through weights"]


def limit(name: str) -> float:
    return 1e-8 if name.startswith("weight-norm") else 1e-10  # of differences


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("name", MADE)
def test_blocks_through_weights(name, size):
    module, x, y, truth, count = pose(name)
    problem = problem_of(module, (x,), y, "cross-entropy", batch_size=size)
    right = dict.fromkeys(STRUCTURES, 0)
    for kind in ("preactivation", "gauss-newton"):
        route = through(problem, kind)
        for structure in STRUCTURES:
            for block, its in blocks_and_truth(problem, truth, structure):
                try:
                    found = compute_blocks(route, [block], structure == "elements")[block.name]
                except NotApplicable:
                    continue
                assert torch.linalg.norm(found - its) <= limit(name) * truth.norm(), (kind, block)
                right[structure] += kind == "preactivation"
    assert right["full"] == 1
    assert right["block_diagonal"] == right["elements"] == count


def test_a_number_that_fills_the_shape_of_data():
    torch.manual_seed(0)
    module, y = Filled().double(), torch.arange(len(ROWS)) % 3
    problem = problem_of(module, (ROWS,), y, "cross-entropy")
    ((block, truth),) = blocks_and_truth(
        problem, hessian(module, F.cross_entropy, (ROWS,), y), "full"
    )
    found = compute_blocks(through(problem), [block])[block.name]
    assert torch.linalg.norm(found - truth) <= 1e-10 * truth.norm()


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
@pytest.mark.parametrize("name", MADE)
def test_matrices_of_jacobians_through_weights(name, curvature):
    """J^T Lambda J, with the Jacobian of each sample; for Fisher, of its loss, and Lambda = 1 / D."""
    module, x, y, _, _ = pose(name)
    problem = problem_of(module, (x,), y, "cross-entropy")
    names = [n for n, _ in module.named_parameters()]

    def output(*values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    def differentiated(*values: Tensor) -> Tensor:
        f = output(*values)
        return f if curvature == "ggn" else F.cross_entropy(f, y, reduction="none").unsqueeze(1)

    values = tuple(p.detach() for p in module.parameters())
    parts = torch.autograd.functional.jacobian(differentiated, values)
    jacobian = torch.cat([part.flatten(2) for part in parts], -1)  # [B, C, P]
    p = output(*values).softmax(1)
    middle = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    if curvature == "fisher":
        middle = torch.ones_like(middle[:, :1, :1])
    truth = torch.einsum("bci,bcd,bdj->ij", jacobian, middle / len(x), jacobian)
    route = through(problem, "gauss-newton", curvature)
    for structure in ("full", "elements"):
        for block, its in blocks_and_truth(problem, truth, structure):
            if structure == "full" or not is_direct(problem, block.name):
                found = compute_blocks(route, [block], structure == "elements")[block.name]
                assert torch.linalg.norm(found - its) <= 1e-10 * truth.norm()


def is_direct(problem, parameter: str) -> bool:
    return parameter in Analyses(problem).of(problem.batches[0]).uses


@pytest.mark.parametrize("name", MADE)
def test_neurons_of_their_own(name):
    """Are found where there are some, and only there."""
    module, x, y, _, _ = pose(name)
    problem = problem_of(module, (x,), y, "cross-entropy")
    analysis = Analyses(problem).of(problem.batches[0])
    found = []
    for block in blocks_of(problem, "block_diagonal"):
        if block.name not in analysis.uses:
            made = analysis.weights_of(block)
            found.append(analysis.neurons_of(block, made) is not None)
    assert any(found) == (name in BY_NEURON)
    if name == "adapted":  # of two small matrices, one has columns for all neurons
        assert found == [False, True, True, False, True, True]


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("weight-norm", 32), ("weight-norm-of-pixels", 8), ("standardised", 800), ("adapted", 32)],
)
def test_squares_of_some_neurons_at_a_time(name, numbers, monkeypatch):
    module, x, y, truth, _ = pose(name)
    problem = problem_of(module, (x,), y, "cross-entropy")
    monkeypatch.setattr(through_weights, "_SQUARES", numbers)
    route = through(problem)
    blocks = [b for b in blocks_of(problem, "elements") if not is_direct(problem, b.name)]
    found = compute_blocks(route, blocks, True)
    for block, its in blocks_and_truth(problem, truth, "elements"):
        if block.name in found:
            assert torch.linalg.norm(found[block.name] - its) <= limit(name) * truth.norm()


def test_a_large_block_is_made_once(cli, tmp_path, monkeypatch, small_bands):
    """By one of two processes, while the other makes what is left."""
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "from torch.nn.utils.parametrizations import weight_norm\n"
        "net = lambda: nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))
    torch.save(model.state_dict(), "m.pt")
    np.savez("d.npz", x=np.ones((5, 3), "f4"), y=np.arange(5) % 3)
    made, whole = [], ThroughWeights.add

    def add(self, batch, parts):
        made.extend(part.block.name for part in parts)
        whole(self, batch, parts)

    monkeypatch.setattr(ThroughWeights, "add", add)
    monkeypatch.setattr(memory, "BAND", 30)  # two or three of the 12 rows
    words = ("compute", "m.pt", "d.npz", "--arch", "nets.py:net", "--method", "preactivation")
    for shard in ("1/2", "2/2"):
        ran = cli(*words, "--shard", shard)
        assert ran.code == 0, ran.stderr
    assert cli("merge", "hessian.safetensors").code == 0
    assert made.count("0.parametrizations.weight.original1") == 1
    assert cli(*words, "-o", "alone.safetensors").code == 0
    assert cli("diff", "hessian.safetensors", "alone.safetensors", "--rtol", "1e-5").code == 0


@pytest.mark.parametrize(("limit", "structure"), [("_ROWS", "full"), ("_SQUARES", "elements")])
def test_too_many_weights_are_refused(limit, structure, monkeypatch):
    module, x, y, _, _ = pose("adapted")
    problem = problem_of(module, (x,), y, "cross-entropy")
    monkeypatch.setattr(through_weights, limit, 10)
    blocks = [b for b in blocks_of(problem, structure) if not is_direct(problem, b.name)]
    with pytest.raises(NotApplicable, match="more weights than are held together"):
        compute_blocks(through(problem), blocks, structure == "elements")


class ByBatch(nn.Module):
    """Another weight for few samples, of the same value."""

    def __init__(self, other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(3, 4)), other

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.sin() if len(x) > 3 else self.other(self.weight)
        return torch.tanh(F.linear(x, weight))


@pytest.mark.parametrize("same", [True, False])
def test_batches_that_make_other_weights(same):
    """Are added up, each by what it makes of the parameters, if the weights are the same; else refused."""

    def other(weight: Tensor) -> Tensor:
        return weight.sin().detach() + 0 * weight if same else weight.cos()

    torch.manual_seed(0)
    module = ByBatch(other).double()
    x, y = normal(7, 4, seed=1), torch.arange(7) % 3

    def value(few: Tensor, many: Tensor) -> Tensor:
        return sum(F.cross_entropy(module(z), t, reduction="sum") for z, t in (few, many)) / 7

    problem = problem_of(module, (x,), y, "cross-entropy", batch_size=4)
    blocks = blocks_of(problem, "full")
    if not same:
        with pytest.raises(NotApplicable, match="different paths"):
            compute_blocks(through(problem), blocks)
        return
    parts = [
        hessian(
            module, lambda f, t: F.cross_entropy(f, t, reduction="sum") / 7, (x[mine],), y[mine]
        )
        for mine in (slice(0, 4), slice(4, 7))
    ]
    found = compute_blocks(through(problem), blocks)["hessian"]
    assert torch.linalg.norm(found - sum(parts)) <= 1e-10 * torch.linalg.norm(found)


def planned(module: nn.Module, x: Tensor, structure: str) -> dict[str, str]:
    problem = problem_of(
        module, (x,), torch.arange(len(x)) % 5, "cross-entropy", dtype=torch.float32
    )
    planner = planner_of(problem)
    diagonal = structure == "elements"
    return {b.name: str(planner.choices(b, diagonal)[0]) for b in blocks_of(problem, structure)}


def test_the_plan_goes_through_weights_where_that_is_cheaper():
    torch.manual_seed(0)
    module = stack(weight_norm(nn.Linear(40, 32)), nn.Tanh(), nn.Linear(32, 5))
    v = "0.parametrizations.weight.original1"
    x = torch.randn(512, 40)
    assert planned(module, x, "block_diagonal")[v].endswith(", through weights)")
    assert planned(module, x, "elements")[v] == "preactivation (chain, through weights)"
    few = planned(module, x[:2], "block_diagonal")
    assert few["0.parametrizations.weight.original0"].startswith("hvp")
    mixing = stack(
        Made(lambda w: w.softmax(1), 40, 32), nn.BatchNorm1d(32), nn.Linear(32, 5)
    ).train()
    assert planned(mixing, x, "full")["hessian"].startswith("hvp: ")
