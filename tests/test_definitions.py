"""What runs in place of PyTorch's operators on a GPU, here on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, expected, labels, normal
from oracles import hessian, relative_error
from problems import blocks_of, compute_blocks, problem_of, problem_of_case, routes_of
from torch import Tensor, nn

import hesscli
from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.aten import definitions, formulas, normalisations
from hesscli.hessian.aten.dense_gradients import make_dense

RECURRENT = [case for case in CASES if "recurrent" in case.tags and "cell" not in case.name]


@pytest.mark.parametrize("case", RECURRENT, ids=str)
def test_recurrent_layers_step_by_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def noted(name: str, definition: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            ran.append(name)
            return definition(*arguments)

        return run

    steps = {name: noted(name, definition) for name, definition in definitions.STEP_BY_STEP.items()}
    monkeypatch.setattr(definitions, "DEFINITIONS", definitions.DEFINITIONS | steps)
    problem = problem_of_case(case)
    (block,) = blocks_of(problem, "full")
    tried = 0
    for route in routes_of(problem).values():
        if route.name == "finite-difference":
            continue
        try:
            found = compute_blocks(route, [block])["hessian"]
        except NotApplicable:
            continue
        tried += 1
        assert relative_error(found, expected(case)) < 1e-10
    assert tried
    assert ran


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_weight_norm_of_all_digits(dim: int) -> None:
    v = normal(3, 4, seed=1).requires_grad_()
    g = normal(*((3, 1) if dim == 0 else (1, 4)), seed=2).requires_grad_()
    theirs = torch._weight_norm(v, g, dim)
    ours, _ = normalisations.weight_norm_of_all_digits(v, g, dim)
    torch.testing.assert_close(ours, theirs)
    seed = normal(3, 4, seed=3)
    for a, b in zip(
        torch.autograd.grad(ours, (v, g), seed), torch.autograd.grad(theirs, (v, g), seed),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


class Positions(nn.Module):
    """Angles of positions in float32, whatever its own dtype, as rotary embeddings have them."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([[0.7, 0.3]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(3).unsqueeze(1).float() @ self.rate.float()
        return x * angles.to(x.dtype).sin().sum()


def test_integers_stay_with_what_is_wide() -> None:
    x, y = normal(4, 2, seed=1), normal(4, 2, seed=2)
    problem, output = problem_of(Positions(), [x], y).widened()
    assert problem.loss.wide
    rate = problem.parameters["rate"].detach()
    angles = torch.arange(3, dtype=torch.float64).unsqueeze(1) @ rate
    torch.testing.assert_close(problem.output(problem.batches[0]), x * angles.sin().sum())
    torch.testing.assert_close(output, x * angles.sin().sum())


SUMS = {
    "sum": lambda x, dtype: x.sum(1, keepdim=True, dtype=dtype),
    "sum-all": lambda x, dtype: x.sum(dtype=dtype) + x,
    "mean": lambda x, dtype: x.mean(1, keepdim=True, dtype=dtype),
    "mean-all": lambda x, dtype: x.mean(dtype=dtype) + x,
    "nansum": lambda x, dtype: x.nansum(1, keepdim=True, dtype=dtype),
    "prod": lambda x, dtype: x.prod(1, keepdim=True, dtype=dtype),
    "prod-all": lambda x, dtype: x.prod(dtype=dtype) + x,
    "cumsum": lambda x, dtype: x.cumsum(1, dtype=dtype),
    "cumprod": lambda x, dtype: x.cumprod(1, dtype=dtype),
    "norm": lambda x, dtype: torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype),
    "length": lambda x, dtype: x.norm(2, 1, True, dtype=dtype),
    "of-integers": lambda x, dtype: (x > 0).sum(1, keepdim=True, dtype=dtype) / 7 * x,
}


class Summed(nn.Module):
    """A layer, and a sum in the dtype that it is told."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.name, self.dtype = name, dtype

    def forward(self, x: Tensor) -> Tensor:
        return SUMS[self.name](self.layer(x), self.dtype).to(x.dtype).tanh()


@pytest.mark.parametrize("form", ["module", "trace"])
@pytest.mark.parametrize("name", SUMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "error::UserWarning")
def test_sums_that_are_told_to_be_narrower(tmp_path: Path, name: str, form: str) -> None:
    torch.manual_seed(0)
    model = Summed(name, torch.float32)
    x, y = torch.randn(6, 3), torch.zeros(6, 4)
    y = y[:, : model(x).shape[1]]
    saved: Any = model
    if form == "trace":
        saved = tmp_path / "net.pt"
        torch.jit.trace(model, x).save(saved)
    found = hesscli.compute(saved, (x, y), blocks="full", dtype="float64", framework="torch")
    assert found.metadata["check"]["dtype"] == "float64"
    wide = Summed(name, torch.float64).double()
    wide.load_state_dict(model.state_dict())
    truth = hessian(wide, F.mse_loss, (x.double(),), y.double())
    assert relative_error(found.matrix(), truth) < 1e-9
    found = hesscli.compute(saved, (x, y), blocks="full", framework="torch")
    assert found.metadata["check"]["dtype"] == "float64"
    assert relative_error(found.matrix().double(), truth) < 1e-4


class Sparse(nn.Module):
    """Words and positions, whose gradients are sparse."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.word = nn.Embedding(5, 3, padding_idx=1, sparse=sparse)
        self.position = nn.Parameter(torch.randn(4, 3))
        self.bag = nn.EmbeddingBag(5, 3, sparse=sparse)
        self.head = nn.Linear(3, 5)
        self.sparse = sparse

    def forward(self, words: Tensor) -> Tensor:
        positions = torch.arange(words.shape[1], device=words.device)
        where = F.embedding(positions, self.position, sparse=self.sparse)
        hidden = torch.tanh(self.word(words) + where).mean(1)
        if self.sparse:
            return self.head(hidden + self.bag(words))
        return self.head(hidden + self.bag.weight[words].mean(1))  # which has a second derivative


@pytest.mark.parametrize("blocks", ["full", "elements"])
@pytest.mark.parametrize("form", ["module", "trace", "script", "exported"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_sparse_gradients(tmp_path: Path, form: str, blocks: str) -> None:
    make_dense(False)  # a command before this one leaves them dense
    torch.manual_seed(0)
    model = Sparse(sparse=True)
    words, y = torch.randint(0, 5, (6, 4)), torch.arange(6) % 5
    saved: Any = model if form == "module" else tmp_path / "net"
    if form == "trace":
        torch.jit.trace(model, words).save(saved)
    elif form == "script":
        torch.jit.script(model).save(saved)
    elif form == "exported":
        saved = tmp_path / "net.pt2"
        torch.export.save(torch.export.export(model, (words,)), saved)
    options: Any = {"blocks": blocks, "dtype": "float64", "framework": "torch"}
    found = hesscli.compute(saved, (words, y), **options)
    assert not [note for note in found.metadata["notes"] if "derivative" in note]
    dense = Sparse(sparse=False).double()
    dense.load_state_dict(model.state_dict())
    truth = hessian(dense, F.cross_entropy, (words,), y)
    matrix = found.matrix()
    if blocks == "elements":
        matrix, truth = matrix.diagonal(), truth.diagonal()
    assert relative_error(matrix, truth) < 1e-9
    F.embedding(words, leaf := torch.ones(5, 3, requires_grad=True), sparse=True).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.is_sparse  # as before


LARGE = [
    0.0,
    1e-12,
    1e-3,
    -0.04,
    0.079,
    0.081,
    0.5,
    -1.0,
    20.0,
    -20.0,
    100.0,
    -100.0,
    1e3,
    -1e3,
    1e4,
    -1e4,
]
SMOOTH = {
    # What is given: phi'' by hand, without overflow or cancellation.
    "logaddexp": (lambda z: torch.logaddexp(z, z * 0 + 1), lambda z: bump(z - 1)),
    "logaddexp2": (
        lambda z: torch.logaddexp2(z * 0 + 1, z),
        lambda z: math.log(2) * bump((z - 1) * math.log(2)),
    ),
    "logcumsumexp": (
        lambda z: torch.stack([z, z * 0 + 1]).logcumsumexp(0)[1], lambda z: bump(z - 1)
    ),
    "mish": (F.mish, lambda z: bend_of_mish(z)),
}  # fmt: skip


def bump(z: Tensor) -> Tensor:
    """sigmoid'(z)"""
    return torch.sigmoid(z) * torch.sigmoid(-z)


def bend_of_mish(z: Tensor) -> Tensor:
    """The second derivative of z t, with t = tanh(log(1 + exp z))."""
    t, p = torch.tanh(F.softplus(z)), torch.sigmoid(z)
    slope = (1 - t**2) * p
    return 2 * slope + z * (slope * (1 - p) - 2 * t * slope * p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SMOOTH)
def test_second_derivatives_where_an_exponential_overflows(name: str, dtype: torch.dtype) -> None:
    phi, bend = SMOOTH[name]
    z = torch.tensor(LARGE, dtype=dtype, requires_grad=True)
    with definitions.exact_derivatives():
        y = phi(z)
    torch.testing.assert_close(y.detach(), phi(z.detach()))
    (slope,) = torch.autograd.grad(y.sum(), z, create_graph=True)
    torch.testing.assert_close(slope, torch.autograd.grad(phi(z).sum(), z)[0])
    (found,) = torch.autograd.grad(slope.sum(), z)
    expected = bend(z.detach().double()).to(dtype)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sinc_near_zero(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1e-30, 1e-9, 1e-5, 1e-3, 0.02, 0.0795, 0.0796, 0.3, 1e20], dtype=dtype)
    x.requires_grad_()
    y = formulas.sinc(x)
    torch.testing.assert_close(y, torch.sinc(x))
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(slope.sum(), x)
    # sinc(x) is the mean of cos(pi x t) over t from 0 to 1; here by Gauss's rule of twenty points.
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(20))
    angle = torch.pi * (nodes + 1) / 2
    expected = -(angle**2 * torch.cos(x.detach().double()[:-1, None] * angle)) @ (weights / 2)
    torch.testing.assert_close(
        found[:-1], expected.to(dtype), rtol=1e-9 if dtype.itemsize > 4 else 1e-4, atol=0
    )
    assert found[-1].abs() < 1e-10


PADS = [(1, 2, 2, 1), (2, -1, 0, 1), (-1, 2, -1, 1), (-1, -1, 1, 2), (0, 0, 0, 0)]


@pytest.mark.parametrize("pad", PADS, ids=str)
def test_padding_in_a_circle(pad: tuple[int, ...]) -> None:
    x = normal(2, 3, 4, 5)
    assert torch.equal(formulas.pad_circular(x, pad), torch.ops.aten._pad_circular(x, pad))


@pytest.mark.parametrize("shape", [(2, 40), (40,)], ids=["signals", "signal"])
@pytest.mark.parametrize(
    "options",
    [{"hop_length": 3, "win_length": 5}, {"win_length": 6, "window": torch.arange(6.0).double()},
     {"window": torch.arange(8.0).double(), "normalized": True}, {"onesided": False},
     {"win_length": 5, "align_to_window": True}, {"return_complex": False}],
    ids=lambda options: "-".join(options),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:A window was not provided", "ignore:stft with return_complex")
def test_transforms_of_frames(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    x, options = normal(*shape), {"n_fft": 8, "return_complex": True} | options
    torch.testing.assert_close(formulas.stft(x, **options), torch.stft(x, center=False, **options))
    of_complex = {"window": torch.arange(8.0) * 1j, "n_fft": 8, "return_complex": True}
    torch.testing.assert_close(
        formulas.stft(x.float(), **of_complex), torch.stft(x.float(), center=False, **of_complex)
    )


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_sums_of_exponentials(dim: int) -> None:
    x = normal(6, 7)
    x[0] = x[:, 0] = x[3, 4] = -torch.inf
    torch.testing.assert_close(formulas.logcumsumexp(x, dim), torch.logcumsumexp(x, dim))
    finite = x.isfinite()

    def of_finite(values: Tensor) -> Tensor:
        sums = formulas.logcumsumexp(x.masked_scatter(finite, values), dim)
        return sums[sums.isfinite()]

    assert torch.autograd.gradcheck(of_finite, x[finite].requires_grad_())
    assert torch.autograd.gradgradcheck(of_finite, x[finite].requires_grad_())
    assert formulas.logcumsumexp(torch.tensor(-3.0), 0) == -3


def test_hard_sigmoids_in_place() -> None:
    x = (4 * normal(9)).requires_grad_()
    with definitions.exact_derivatives():
        y = F.hardsigmoid(x + 0, inplace=True)
    torch.testing.assert_close(y, F.hardsigmoid(x))
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(bend, (x.abs() < 3) / x.new_tensor(18.0))


@pytest.mark.parametrize("p", [2, 1, 3, 0, torch.inf, -torch.inf, 2.5, 0.5, -1.5])
@pytest.mark.parametrize("axes", [None, [0], [1, 2], [-1]], ids=str)
def test_norms_of_vectors(p: float, axes: list[int] | None) -> None:
    x = normal(2, 3, 4)
    x[:, 1] = 0
    for values in (x, torch.complex(x, x.flip(2)), x.float()):
        for keepdim in (False, True):
            theirs = torch.linalg.vector_norm(values, p, axes, keepdim)
            torch.testing.assert_close(formulas.vector_norm(values, p, axes, keepdim), theirs)
    scalar = torch.tensor(-3.0)
    assert formulas.vector_norm(scalar, p) == torch.linalg.vector_norm(scalar, p)
    wide = formulas.vector_norm(x.float(), p, axes, dtype=torch.float64)
    torch.testing.assert_close(
        wide, torch.linalg.vector_norm(x.float(), p, axes, dtype=torch.float64)
    )


@pytest.mark.parametrize("options", [{}, {"correction": 0}, {"keepdim": True}], ids=str)
@pytest.mark.parametrize("axes", [None, [0], [1, 2]], ids=str)
def test_standard_deviations(axes: list[int] | None, options: dict[str, int]) -> None:
    x = normal(2, 3, 4)
    for values in (x, x.float(), torch.zeros_like(x)):
        theirs = torch.std_mean(values, axes, **options)
        torch.testing.assert_close(formulas.std_mean(values, axes, **options), theirs)


class Padded(nn.Module):
    """Features on the unit sphere, of tokens that padding sets to zero: by a product in front, or afterwards."""

    def __init__(self, norm: Callable[[Tensor], Tensor], multiplied: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.norm, self.multiplied = norm, multiplied

    def forward(self, x: Tensor) -> Tensor:
        mask = (x != 0).any(-1, keepdim=True)
        h = torch.tanh(self.a(x))
        if self.multiplied:
            h = h * mask
            return self.b((h / self.norm(h).clamp(min=1e-12)).mean(1))
        return self.b((h / self.norm(h)).masked_fill(~mask, 0).mean(1))


NORMS = {
    "vector_norm": lambda h: torch.linalg.vector_norm(h, dim=-1, keepdim=True),
    "norm": lambda h: h.norm(dim=-1, keepdim=True),
    "distance": lambda h: torch.dist(h[0, 0], h[0, 0]) + h.norm(2, -1, True),
    "aten": lambda h: torch.ops.aten.norm.ScalarOpt_dim(h, 2, [-1], True),
    "p": lambda h: h.norm(1.5, -1, keepdim=True),
    "std": lambda h: h.std(-1, keepdim=True),
    "std_mean": lambda h: sum(torch.std_mean(h, -1, correction=0, keepdim=True)).abs(),
}


@pytest.mark.parametrize("structure", ["full", "diag", "elements"])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_of_zeros(norm: str, structure: str) -> None:
    torch.manual_seed(0)
    model = Padded(NORMS[norm], True).double()
    by_hand = Padded(NORMS["norm" if norm == "distance" else norm], False).double()
    by_hand.load_state_dict(model.state_dict())
    x, y = normal(6, 3, 3), normal(6, 2)
    x[2, 2] = x[4, 1:] = 0
    found = hesscli.compute(model, (x, y), blocks=structure, framework="torch")
    assert not any("instead" in note for note in found.metadata["notes"])
    truth = hessian(by_hand, nn.functional.mse_loss, (x,), y)
    assert relative_error(found.matrix().diagonal(), truth.diagonal()) < 1e-10


class Scan(nn.Module):
    """A minimal GRU, in parallel over time; or step by step, which needs no definition."""

    def __init__(self, parallel: bool) -> None:
        super().__init__()
        self.a, self.b, self.parallel = nn.Linear(2, 4), nn.Linear(2, 3), parallel

    def forward(self, x: Tensor) -> Tensor:
        gate, h = self.a(x).chunk(2, -1)
        decay = -nn.functional.softplus(gate).cumsum(1)
        y = nn.functional.logsigmoid(gate) + h - decay
        if self.parallel:
            sums = y.logcumsumexp(1)
        else:
            sums = torch.stack([y[:, : i + 1].logsumexp(1) for i in range(y.shape[1])], 1)
        return self.b((decay + sums).exp()[:, -1])


class Sinc(nn.Module):
    def __init__(self, by_pytorch: bool) -> None:
        super().__init__()
        self.a, self.by_pytorch = nn.Linear(3, 4, bias=False), by_pytorch

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        if self.by_pytorch:
            return torch.sinc(z)
        return (
            (torch.linspace(0, 1, 2001, dtype=x.dtype) * torch.pi * z.unsqueeze(-1)).cos().mean(-1)
        )


class Angles(nn.Module):
    """Angles of numbers that are zero for a padded sample: constants there, by hand."""

    def __init__(self, angle: Callable[[Tensor, Tensor], Tensor], by_hand: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
        self.angle, self.by_hand = angle, by_hand

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.a(x), self.b(x)
        if self.by_hand:
            zero = (x == 0).all(1, keepdim=True)
            return self.angle(y.masked_fill(zero, 0), z.masked_fill(zero, 1))
        return self.angle(y, z)


ANGLES = {
    "atan2": torch.atan2,
    "angle": lambda y, x: torch.angle(torch.complex(x, y)),
    "of-real": lambda y, x: torch.angle(y) * x,
    "sgn": lambda y, x: torch.view_as_real(torch.sgn(torch.complex(x, y))).sum(-1),
    "sgn-of-real": lambda y, x: torch.sgn(y) * x * x,
    "abs": lambda y, x: torch.complex(x, y).abs(),
    "modrelu": lambda y, x: (torch.relu(x.abs() - 0.1) * torch.sgn(torch.complex(x, y))).real,
}


@pytest.mark.parametrize("structure", ["full", "diag", "elements"])
@pytest.mark.parametrize("angle", ANGLES)
def test_angles_of_zeros(angle: str, structure: str) -> None:
    torch.manual_seed(0)
    model, by_hand = Angles(ANGLES[angle], False).double(), Angles(ANGLES[angle], True).double()
    by_hand.load_state_dict(model.state_dict())
    x, y = normal(6, 3), normal(6, 4)
    x[2] = 0
    found = hesscli.compute(model, (x, y), blocks=structure, framework="torch")
    assert not any("instead" in note for note in found.metadata["notes"])
    truth = hessian(by_hand, nn.functional.mse_loss, (x,), y)
    assert relative_error(found.matrix().diagonal(), truth.diagonal()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_angles_of_all_quarters(dtype: torch.dtype) -> None:
    numbers = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.5, -3e-9, 1e-30, 7e9], dtype=dtype)
    y, x = torch.meshgrid(numbers, numbers, indexing="ij")
    y, x = y.clone().requires_grad_(), x.clone().requires_grad_()
    theirs, whole = torch.atan2(y, x), torch.angle(x)
    with definitions.exact_derivatives():
        ours, real = torch.atan2(y, x), torch.angle(x)
        slopes = torch.autograd.grad(ours.sum() + real.sum(), (y, x))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(real, whole)
    wanted = torch.autograd.grad(theirs.sum() + whole.sum(), (y, x))
    if dtype is torch.float64:  # in float32 the square of 1e-30 is zero to PyTorch
        torch.testing.assert_close(slopes, wanted)


@pytest.mark.parametrize("structure", ["full", "diag", "elements"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_a_parallel_scan(structure: str, curvature: str) -> None:
    torch.manual_seed(0)
    model, by_hand = Scan(True).double(), Scan(False).double()
    by_hand.load_state_dict(model.state_dict())
    data = (normal(5, 6, 2), labels(3, 5))
    options = {"blocks": structure, "curvature": curvature, "framework": "torch"}
    found, truth = (hesscli.compute(net, data, **options) for net in (model, by_hand))
    assert relative_error(found.matrix().diagonal(), truth.matrix().diagonal()) < 1e-9


@pytest.mark.parametrize("zero", ["sample", "weights"])
def test_sinc_at_zero(zero: str) -> None:
    """The integral of cos(pi z t) over t from 0 to 1, here as a mean."""
    torch.manual_seed(0)
    model, by_hand = Sinc(True).double(), Sinc(False).double()
    x, y = normal(5, 3), normal(5, 4)
    with torch.no_grad():
        (x if zero == "sample" else model.a.weight)[0] = 0
    by_hand.load_state_dict(model.state_dict())
    found = hesscli.compute(model, (x, y), blocks="full", framework="torch")
    assert not any("instead" in note for note in found.metadata["notes"])
    assert relative_error(found.matrix(), hessian(by_hand, nn.functional.mse_loss, (x,), y)) < 1e-2


class Masked(nn.Module):
    """Attention whose mask is added to its scores: it has samples as they have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.tanh(self.attend(h, h, h, key_padding_mask=mask)[0]).mean(1))


def circular() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular"), nn.Tanh()),
        *(nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(32, 2)),
    )


@pytest.mark.parametrize("name", ["masked", "circular"])
def test_samples_that_are_seen_to_go_their_own_way(name: str) -> None:
    torch.manual_seed(0)
    model = (Masked() if name == "masked" else circular()).double().eval()
    inputs = {"x": normal(6, 5, 3) if name == "masked" else normal(6, 1, 4, 4)}
    if name == "masked":
        inputs["mask"] = torch.arange(30).view(6, 5) % 7 > 4
    y = labels(2, 6)
    data, options = inputs | {"y": y}, {"inputs": tuple(inputs), "framework": "torch"}
    found = hesscli.compute(model, data, blocks="diag", **options)
    assert "hvp" not in {block["method"] for block in found.metadata["blocks"]}
    truth = hessian(model, nn.functional.cross_entropy, tuple(inputs.values()), y)
    assert relative_error(found.matrix().diagonal(), truth.diagonal()) < 1e-9
    fisher = hesscli.compute(model, data, blocks="full", curvature="fisher", **options).matrix()
    rows = []
    for i in range(6):
        output = model(*(array[i : i + 1] for array in inputs.values()))
        loss = nn.functional.cross_entropy(output, y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    assert relative_error(fisher, torch.stack(rows).T @ torch.stack(rows) / 6) < 1e-9


def test_an_operator_that_cannot_be_differentiated_twice_has_differences() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            pairs = torch.tensor([0, 0, 1, 1]).expand(len(x), 4)
            ones = torch.ones(len(x), 2, dtype=x.dtype)
            return self.b(ones.scatter_reduce(1, pairs, h, "prod"))

    torch.manual_seed(1)
    data = (normal(12, 3), normal(12, 2, seed=1))
    found = hesscli.compute(Products().double(), data, blocks="full", framework="torch")
    assert found.metadata["method"] == "finite-difference"


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, torch.inf])
def test_distances(p: float) -> None:
    x = normal(5, 3).double().requires_grad_()
    y = torch.cat([normal(2, 3, seed=1).double(), x[:1].detach()]).requires_grad_()
    with definitions.exact_derivatives():
        pairs, own = torch.cdist(x, y, p), torch.pdist(x, p)
        (slope,) = torch.autograd.grad(pairs.sum() + torch.cdist(x, x, p).sum() + own.sum(), x)
    torch.testing.assert_close(pairs, torch.cdist(x, y, p))
    torch.testing.assert_close(own, torch.pdist(x, p))
    theirs = torch.cdist(x, y, p).sum() + torch.cdist(x, x, p).sum() + torch.pdist(x, p).sum()
    torch.testing.assert_close(slope, torch.autograd.grad(theirs, x)[0])
    apart = y.detach()[:2].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a, b: formulas.cdist(a, b, p), (x, apart))
    assert torch.autograd.gradgradcheck(lambda a: formulas.pdist(a, p), (x,))
