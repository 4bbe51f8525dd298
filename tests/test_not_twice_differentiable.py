"""Losses that have no second derivative where the parameters are, and one whose only looks like that."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import hessian, hessian_by_differences, relative_error
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import hesscli
from hesscli.hessian.applicability import NotApplicable, explained

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X.sin().sum(1, keepdim=True)

NET = """
import torch

class Length(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.l = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.l(x).norm(dim=1, keepdim=True)
"""


@pytest.fixture
def length(tmp_path):
    """The length of a vector that is zero in all samples: its gradient jumps, though PyTorch says it is zero."""
    (tmp_path / "net.py").write_text(NET)
    torch.save({"l.weight": torch.zeros(2, 3), "l.bias": torch.zeros(2)}, tmp_path / "w.pt")
    np.savez(tmp_path / "d.npz", x=X.numpy(), y=Y.numpy())
    return ["w.pt", "d.npz", "--arch", "net.py:Length"]


@pytest.mark.parametrize("method", ["auto", "finite-difference"])
@pytest.mark.parametrize(
    "command",
    ["compute", "compute -b full", "compute -b elements", "eigen", "trace", "density",
     "hvp --vector random"],
)  # fmt: skip
def test_a_length_of_zero(length, command, method, cli, tmp_path):
    name, *options = command.split()
    said = cli(name, *length, *options, "--method", method).fails(5)
    assert "not finite" in said or "differs from" in said
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_length_of_zero_without_a_check(length, cli):
    """As at any other kink it is constant, as PyTorch's gradient says: nothing is left that moves."""
    document = cli("eigen", *length, "--no-check", "--json").document
    assert not any(document["eigenvalues"])


class Gate(torch.autograd.Function):
    """relu(x)^2.5, whose derivative is right, while that of the derivative has a root of what is negative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.relu(x) ** 2.5

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * torch.where(x > 0, 2.5 * x**1.5, 0)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 1)
        self.gate = Gate.apply

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.gate(self.a(x)))


@pytest.mark.parametrize(
    ("dtype", "hint"), [("float32", "--dtype float64"), ("float64", "--method finite-difference")]
)
def test_what_is_not_finite_has_a_hint(dtype, hint):
    torch.manual_seed(0)
    model = Gated()
    with pytest.raises(hesscli.HesscliError, match="not finite") as caught:
        hesscli.compute(model, (X, Y), blocks="full", dtype=dtype)
    assert caught.value.hint == hint


@pytest.mark.parametrize("blocks", ["diag", "elements"])
@pytest.mark.parametrize("method", ["auto", "finite-difference"])
def test_differences_that_float32_does_not_hold(blocks, method):
    """They are in float64, where 2e40 is a number."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1e-19)
    data = torch.full((3, 1), 1e20), torch.zeros(3, 1)
    with pytest.raises(hesscli.HesscliError, match="weight: its Hessian is not finite") as caught:
        hesscli.compute(model, data, blocks=blocks, method=method)
    assert (caught.value.exit_code, caught.value.hint) == (5, "--dtype float64")
    found = hesscli.compute(model, data, blocks=blocks, method=method, dtype="float64")
    np.testing.assert_allclose(found.block("weight").item(), 2e40, rtol=1e-6)


class Once(torch.autograd.Function):
    """A sine with one derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


@pytest.mark.parametrize(
    ("dtype", "hint"), [("float32", "--dtype float64"), ("float64", "--method finite-difference")]
)
def test_a_wrong_second_derivative_has_a_hint(dtype, hint):
    torch.manual_seed(0)
    model = Gated()
    model.gate = Once.apply
    for command in (hesscli.compute, hesscli.operator):
        with pytest.raises(hesscli.HesscliError, match=r"hvp differs from .*, more than") as caught:
            command(model, (X, Y), method="hvp", dtype=dtype)
        assert (caught.value.exit_code, caught.value.hint) == (5, hint)
    with pytest.raises(hesscli.HesscliError, match="hvp differs from") as caught:
        hesscli.compute(model, (X, Y), curvature="ggn", dtype=dtype)
    assert caught.value.hint == (hint if dtype == "float32" else "--curvature hessian")
    found = hesscli.compute(model, (X, Y), blocks="full", dtype=dtype, framework="torch")
    (said,) = (note for note in found.metadata["notes"] if "differs" in note)
    assert said.startswith("hessian: hvp differs from gradients by ")
    assert said.endswith("; finite-difference instead")
    model.gate = torch.sin
    truth = hessian(model.double(), F.mse_loss, (X,), Y)
    assert relative_error(found.matrix().double(), truth) < 1e-6


def certain(f, y):
    """A variance that is below the loss's eps, and is clamped there with gradients off."""
    return F.gaussian_nll_loss(f[:, :1], y, 9e-7 * f[:, 1:].sigmoid())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", ["auto", "hvp", "finite-difference"])
@pytest.mark.parametrize("job", [hesscli.compute, hesscli.operator])
def test_a_gradient_that_is_not_the_derivative_of_the_loss(job, method, dtype):
    torch.manual_seed(0)
    with pytest.raises(hesscli.HesscliError, match="not the derivative of the loss") as caught:
        job(nn.Linear(3, 2), (X, Y), loss=certain, method=method, dtype=dtype)
    assert (caught.value.exit_code, caught.value.hint) == (5, None)


class Refusing(torch.autograd.Function):
    """A sine whose backward pass refuses to be differentiated, with an error of its own."""

    error: Exception

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise Refusing.error
        return gradient * x.cos()


@pytest.mark.parametrize("blocks", ["full", "diag", "elements"])
@pytest.mark.parametrize(
    ("error", "said"),
    [(RuntimeError("only once"), "only once"), (ValueError("only once"), "only once"),
     (KeyError("once"), "KeyError: 'once'")],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_differences_where_a_backward_pass_refuses(monkeypatch, error, said, blocks):
    torch.manual_seed(0)
    model = Gated().double()
    monkeypatch.setattr(Refusing, "error", error, raising=False)
    model.gate = Refusing.apply
    found = hesscli.compute(model, (X, Y), blocks=blocks, framework="torch")
    note = f"no second derivative ({said}): finite-difference instead of hvp"
    assert note in found.metadata["notes"]
    for command in (hesscli.compute, hesscli.operator):
        with pytest.raises(hesscli.HesscliError, match=r"no second derivative \(") as caught:
            command(model, (X, Y), method="hvp")
        assert caught.value.exit_code == 5
    model.gate = torch.sin
    truth = hessian(model, F.mse_loss, (X,), Y)
    if blocks == "full":
        assert relative_error(found.matrix(), truth) < 1e-6
    assert relative_error(found.matrix().diagonal(), truth.diagonal()) < 1e-6


CALLING = """
import torch

class Calling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return torch.nn.functional.gaussian_nll_loss(gradient, gradient, -gradient)
"""


@pytest.mark.parametrize(("package", "is_ours"), [("hesscli.hessian", True), ("nets", False)])
def test_a_bug_of_our_own_is_no_missing_derivative(package, is_ours):
    """Also where PyTorch's code, called by ours, is what raises."""
    names = {"__name__": package}
    exec(CALLING, names)
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="negative") as caught:
        torch.autograd.grad(names["Calling"].apply(x).sum(), x)
    assert isinstance(explained(caught.value), NotApplicable) is not is_ours


def test_differences_where_a_second_derivative_is_not_finite():
    torch.manual_seed(0)
    model = Gated().double()
    found = hesscli.compute(
        model, (X, Y), blocks="full", method="finite-difference", framework="torch"
    )
    model.gate = lambda x: torch.relu(x) ** 2.5
    truth = hessian(model, F.mse_loss, (X,), Y)
    assert relative_error(found.matrix(), truth) < 1e-6


class Power(nn.Module):
    """Its derivatives of a unit that is off are zero, though those of the power there are infinite."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) ** 1.5)


@pytest.mark.parametrize("blocks", ["full", "diag", "elements"])
def test_a_power_of_units_that_are_off(blocks):
    torch.manual_seed(0)
    model = Power().double()
    found = hesscli.compute(model, (X, Y), blocks=blocks, framework="torch")
    truth = hessian(model, nn.functional.mse_loss, (X,), Y)
    torch.testing.assert_close(found.matrix().diagonal(), truth.diagonal(), rtol=1e-9, atol=1e-12)


HOOKED = """
import torch

class Hooked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient * (1 + h.detach() ** 2))
        return self.b(h)
"""


@pytest.mark.parametrize("command", ["compute", "compute -b full", "eigen", "trace", "density",
                                     "hvp --vector random"])  # fmt: skip
@pytest.mark.parametrize("method", ["auto", "finite-difference"])
def test_gradients_of_no_function(cli, tmp_path, command, method):
    """A hook that changes gradients on their way makes what no function has: no matrix of theirs is a Hessian."""
    torch.manual_seed(0)
    (tmp_path / "net.py").write_text(HOOKED)
    weights = {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(2)}
    torch.save(weights | {"b.weight": torch.randn(1, 2), "b.bias": torch.randn(1)}, "w.pt")
    np.savez("d.npz", x=X.numpy(), y=Y.numpy())
    name, *options = command.split()
    options += ["--method", method, "--dtype", "float64"]
    ran = cli(name, "w.pt", "d.npz", "--arch", "net.py:Hooked", *options)
    ran.fails(5)
    assert "hint" not in ran.stderr  # neither more digits nor another method would do
    assert not list(tmp_path.glob("*.safetensors"))


def by_numpy(u: Tensor, slope: Tensor) -> Tensor:
    return torch.from_numpy(u.numpy()) * slope


def into_memory_of_its_own(u: Tensor, slope: Tensor) -> Tensor:
    return torch.mul(u, slope, out=torch.empty_like(u))


def only_once(u: Tensor, slope: Tensor) -> Tensor:
    if u.requires_grad:
        raise ValueError("for training alone")
    return u * slope


class Sine(torch.autograd.Function):
    """sin x, with a backward pass that can be run, but not differentiated."""

    @staticmethod
    def forward(ctx, x, pulled):
        ctx.save_for_backward(x)
        ctx.pulled = pulled
        return x.sin()

    @staticmethod
    def backward(ctx, u):
        return ctx.pulled(u, ctx.saved_tensors[0].cos()), None


class Waves(nn.Module):
    def __init__(self, pulled):
        super().__init__()
        self.l, self.o, self.pulled = nn.Linear(3, 3), nn.Linear(3, 1), pulled

    def forward(self, x: Tensor) -> Tensor:
        return self.o(Sine.apply(self.l(x), self.pulled))


@pytest.mark.parametrize("pulled", [by_numpy, into_memory_of_its_own, only_once])
def test_a_backward_pass_that_fails_where_it_is_differentiated(pulled):
    model = Waves(pulled).double()
    expected = hessian_by_differences(model, F.mse_loss, (X,), Y)
    found = hesscli.compute(model, (X, Y), blocks="full", framework="torch")
    assert found.blocks["hessian"]["method"] == "finite-difference"
    assert relative_error(found.matrix(), expected) < 1e-8
    note = r"no second derivative \(.+\): finite-difference instead of hvp"
    assert any(re.fullmatch(note, each) for each in found.metadata["notes"])
    with pytest.raises(hesscli.HesscliError, match="hvp is not exact here: no second") as refused:
        hesscli.compute(model, (X, Y), curvature="ggn")
    assert (refused.value.exit_code, refused.value.hint) == (5, "--curvature hessian")


def in_float32(u: Tensor, slope: Tensor) -> Tensor:
    return u * torch.tensor(slope.detach().numpy(), dtype=torch.float32)


@pytest.mark.parametrize("blocks", ["full", "diag", "elements"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_backward_pass_that_rounds_is_no_constant(dtype, blocks):
    """Along a step that is small to float32 it looks like one, to a product of autograd's as well."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = Waves(in_float32)
        found = hesscli.compute(model, (X, Y), blocks=blocks, dtype=dtype, framework="torch")
        smooth = Waves(lambda u, slope: u * slope).double()
        smooth.load_state_dict(model.state_dict())
        expected = hessian(smooth, F.mse_loss, (X,), Y)
        if blocks != "full":
            sizes = torch.tensor([p.numel() for p in model.parameters()])
            block = torch.repeat_interleave(torch.arange(4), sizes)
            expected = expected * (block == block[:, None])
        if blocks == "elements":
            expected = torch.diag(expected.diag())
        assert relative_error(found.matrix(), expected) < 1e-3
        assert found.metadata["check"]["dtype"] == "float32"
        assert found.metadata["check"]["tolerance"] == 5e-2


class Equilibrium(nn.Module):
    """Iterates to a fixed point with gradients off; a hook solves for the gradient there, not for its derivative."""

    def __init__(self):
        super().__init__()
        self.w, self.u, self.o = nn.Linear(3, 3, bias=False), nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(24):  # each is closer by a factor of more than four
                z = self.step(z, x)
        z = self.step(z, x)
        fixed = z.detach().requires_grad_()
        after = self.step(fixed, x)

        def solve(gradient: Tensor) -> Tensor:
            total = gradient
            for _ in range(24):
                (back,) = torch.autograd.grad(after, fixed, total, retain_graph=True)
                total = back + gradient
            return total

        if z.requires_grad:
            z.register_hook(solve)
        return self.o(z)

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.3 * self.w(z) + self.u(x))


@pytest.mark.parametrize("method", ["auto", "finite-difference"])
def test_an_implicit_layer_with_a_hook(method):
    """What it detaches moves along, as its gradients know."""
    torch.manual_seed(0)
    model = Equilibrium().double()
    truth = hessian_by_differences(model, F.mse_loss, (X,), Y)
    options = {"framework": "torch", "method": method}
    found = hesscli.compute(model, (X, Y), blocks="full", **options)
    assert relative_error(found.matrix(), truth) < 1e-6
    v = np.ones(len(truth))
    product = hesscli.operator(model, (X, Y), method=method) @ v
    assert relative_error(torch.tensor(product), truth @ torch.tensor(v)) < 1e-6


@pytest.mark.parametrize("params", [(), ("u.*",)])
def test_products_of_an_implicit_layer_with_a_hook_are_asymmetric(params):
    """They agree with differences in which the fixed point is held: of its diagonal, and of its products, nothing else
    shows it."""
    torch.manual_seed(0)
    model = Equilibrium().double()
    truth = hessian_by_differences(model, F.mse_loss, (X,), Y)
    first = model.w.weight.numel() if params else 0
    last = first + 12 if params else len(truth)
    truth = truth[first:last, first:last]
    options = {"framework": "torch", "params": params}
    found = hesscli.compute(model, (X, Y), blocks="elements", **options)
    diagonal = torch.cat([found.block(name).flatten() for name in found.parameters])
    assert relative_error(diagonal, truth.diagonal()) < 1e-6
    v = np.ones(len(truth))
    product = hesscli.operator(model, (X, Y), params=params) @ v
    assert relative_error(torch.tensor(product), truth @ torch.tensor(v)) < 1e-6


def test_differences_hold_what_is_detached_where_the_gradient_is_zero():
    class Following(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            return (z - z.detach()).square().mean(1)

    model = Following(3, 2).double()
    options = {"loss": "output", "blocks": "full", "framework": "torch"}
    found = hesscli.compute(model, {"x": X}, method="finite-difference", **options)
    truth = hessian(model, lambda terms, _: terms.mean(), (X,), None)
    assert relative_error(found.matrix(), truth) < 1e-6
