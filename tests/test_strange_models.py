"""Models that do what few do: differentiate inside, compute with complex numbers, draw random ones."""

from __future__ import annotations

import inspect
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import labels, normal
from conftest import read
from oracles import hessian, hessian_by_differences, relative_error
from problems import Net
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.utils.prune import l1_unstructured
from torch.utils.checkpoint import checkpoint

import hesscli
from hesscli.errors import HesscliError, MismatchError
from hesscli.hessian.aten.precision import default_of, in_precision_

X = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X.sin().sum(1, keepdim=True)


class Residual(nn.Module):
    """A physics-informed network: u'' + u of a network u, by derivatives that it takes itself."""

    def __init__(self, functional: bool = False):
        super().__init__()
        self.u = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        if self.functional:
            jacobian = torch.func.jacrev(torch.func.jacrev(lambda z: self.u(z).squeeze(-1)))
            return torch.func.vmap(jacobian)(x).diagonal(0, 1, 2).sum(1, keepdim=True) + self.u(x)
        x = x.detach().requires_grad_()
        u = self.u(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        bends = [torch.autograd.grad(s.sum(), x, create_graph=True)[0][:, i]
                 for i, s in enumerate(slope.unbind(1))]  # fmt: skip
        return u + sum(bends).unsqueeze(1)


class Fourier(nn.Module):
    """A layer that multiplies frequencies."""

    def __init__(self):
        super().__init__()
        self.w, self.o = nn.Parameter(torch.randn(2, 2)), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(self.w), n=2)
        return ((torch.tanh(self.o(h)) - 1) ** 2).sqrt()


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_model_that_differentiates(functional, batch_size):
    torch.manual_seed(0)
    model = Residual(functional).double()
    found = hesscli.compute(model, (X, Y), blocks="full", framework="torch", batch_size=batch_size)
    truth = hessian(model, nn.functional.mse_loss, (X,), Y)
    torch.testing.assert_close(found.matrix(), truth, rtol=1e-9, atol=1e-12)


def test_complex_numbers_are_no_kinks():
    torch.manual_seed(0)
    model = Fourier().double()
    found = hesscli.compute(
        model, (X, Y), blocks="full", method="finite-difference", framework="torch"
    )
    truth = hessian(model, nn.functional.mse_loss, (X,), Y)
    torch.testing.assert_close(found.matrix(), truth, rtol=1e-7, atol=1e-8)


def test_complex_parameters_are_said():
    model = nn.Linear(2, 1).double()
    model.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.cfloat)))
    found = hesscli.compute(model, (X, Y))
    assert "skipped, complex: phase" in found.metadata["notes"]


def test_complex_parameters_alone_are_refused():
    with pytest.raises(MismatchError, match="the model's parameters are complex"):
        hesscli.compute(nn.Linear(2, 1, dtype=torch.cfloat), (X, Y))


class Positioned(nn.Module):
    """A network that scales its hidden layer by a function of positions."""

    def __init__(self, scale):
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(2, 3), nn.Linear(3, 1), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) * self.scale(x))


def angles(x: Tensor) -> Tensor:
    return (torch.arange(3, dtype=x.dtype) * 0.7 + 0.1).cos()


def multiples(x: Tensor) -> Tensor:
    return 1 + torch.arange(3) * 0.1 / 3 - 0.2


@pytest.mark.parametrize("scale", [angles, multiples])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("kind", ["trace", "exported"])
def test_a_file_has_the_digits_of_its_module(tmp_path, scale, dtype, tolerance, kind):
    model, path = Positioned(scale), tmp_path / "net.pt2"
    x, y = X.float(), Y.float()
    if kind == "trace":
        torch.jit.trace(model, x).save(path)
    else:
        torch.export.save(torch.export.export(model, (x,)), path)
    of_file, of_module = (
        hesscli.compute(each, {"x": x, "y": y}, blocks="full", dtype=dtype, framework="torch")
        for each in (path, model)
    )
    assert relative_error(of_file.matrix(), of_module.matrix()) < tolerance


class Noisy(nn.Module):
    """The same numbers in every pass."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.Generator().manual_seed(0)
        h = torch.tanh(self.a(x))
        return self.b(h + torch.empty_like(h).normal_(generator=numbers))


@pytest.mark.parametrize("check", [True, False])
def test_random_numbers_are_not_replayed(check):
    torch.manual_seed(0)
    model = Noisy().double()
    found = hesscli.compute(
        model, (X, Y), blocks="full", framework="torch", check=check, batch_size=9
    )
    truth = hessian(model, nn.functional.mse_loss, (X,), Y)
    torch.testing.assert_close(found.matrix(), truth)


class Bags(nn.Module):
    def __init__(self, mode: str, sparse: bool = False):
        super().__init__()
        self.e = nn.EmbeddingBag(5, 3, mode=mode, sparse=sparse)
        self.o = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.e(x)))


@pytest.mark.parametrize(("mode", "sparse"), [("max", False), ("sum", True)])
def test_embeddings_that_autograd_has_less_of(mode, sparse):
    torch.manual_seed(0)
    model = Bags(mode, sparse).double()
    words = torch.randint(0, 5, (9, 4))
    found = hesscli.compute(model, (words, Y), params="o.*", blocks="full", framework="torch")
    h = torch.tanh(model.e(words)).detach()
    h = torch.cat([h, torch.ones(9, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(found.matrix(), 2 * h.T @ h / 9)
    everything = hesscli.compute(model, (words, Y))
    assert everything.metadata["check"]["relative_error"] < 1e-6


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("lengths", [(4, 4, 4), (3, 0, 4)])
@pytest.mark.parametrize("sparse", [False, True])
def test_bags_of_rows_that_are_trained_less_the_more_they_occur(mode, lengths, sparse):
    """In float64 the check takes gradients by the module's own operators, which would divide them."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.EmbeddingBag(5, 3, mode=mode, scale_grad_by_freq=True, sparse=sparse)
            self.o = nn.Linear(3, 1)

        def forward(self, x):
            offsets = torch.tensor([0, *lengths[:-1]]).cumsum(0)
            bags = torch.stack([self.e(words[: sum(lengths)], offsets) for words in x])
            return self.o(torch.tanh(bags)).sum(1)

    torch.manual_seed(0)
    model, words = Model().double(), torch.arange(108).view(9, 12) ** 2 % 5
    found = hesscli.compute(model, (words, Y), params="e.*", blocks="full", framework="torch")

    def summed(weight):
        rows = weight[words[:, : sum(lengths)]].split(lengths, 1)
        of = torch.Tensor.sum if mode == "sum" else torch.Tensor.mean
        bags = [of(bag, 1) if bag.shape[1] else weight.new_zeros(9, 3) for bag in rows]
        return F.mse_loss(model.o(torch.tanh(torch.stack(bags, 1))).sum(1), Y)

    truth = torch.autograd.functional.hessian(summed, model.e.weight.detach()).view(15, 15)
    torch.testing.assert_close(found.matrix(), truth)


@pytest.mark.parametrize("kind", ["module", "trace", "program"])
@pytest.mark.parametrize("blocks", ["full", "diag"])
@pytest.mark.parametrize("method", ["auto", "hvp", "finite-difference"])
def test_rows_that_are_trained_less_the_more_they_occur(kind, blocks, method, tmp_path):
    """As with `scale_grad_by_freq`: it is the loss that is differentiated."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(5, 3, scale_grad_by_freq=True), nn.Tanh(), nn.Flatten(), nn.Linear(6, 1)
    ).double()
    words = torch.arange(18).view(9, 2) ** 2 % 5
    given = model
    if kind == "trace":
        given = tmp_path / "net.pt"
        torch.jit.trace(model, words).save(given)
    elif kind == "program":
        given = tmp_path / "net.pt2"
        torch.export.save(torch.export.export(model, (words,)), given)
    found = hesscli.compute(given, (words, Y), blocks=blocks, method=method, framework="torch")
    plain = nn.Sequential(nn.Embedding(5, 3), *model[1:])
    plain.load_state_dict(model.state_dict())
    truth = hessian(plain.double(), F.mse_loss, (words,), Y)
    part = truth if blocks == "full" else truth[:15, :15]
    mine = found.matrix() if blocks == "full" else found.block("0.weight")
    assert relative_error(mine, part) < (1e-7 if method == "finite-difference" else 1e-12)


def test_the_largest_of_uneven_bags():
    class Net(nn.Module):
        def __init__(self, by_hand: bool):
            super().__init__()
            self.e, self.o, self.by_hand = nn.Embedding(5, 3), nn.Linear(3, 1), by_hand

        def forward(self, x: Tensor) -> Tensor:
            starts = [0, 1, 4]
            if self.by_hand:
                parts = zip(starts, [*starts[1:], len(x)], strict=True)
                bags = torch.stack([self.e(x[start:stop]).amax(0) for start, stop in parts])
            else:
                bags = F.embedding_bag(x, self.e.weight, torch.tensor(starts), mode="max")
            return self.o(torch.tanh(bags))

    torch.manual_seed(0)
    model, by_hand = Net(False).double(), Net(True).double()
    by_hand.load_state_dict(model.state_dict())
    words, y = torch.arange(9) % 5, Y[:3]
    found = hesscli.compute(model, (words, y), blocks="full", framework="torch", unbatched=True)
    assert {block["method"] for block in found.metadata["blocks"]} == {"finite-difference"}
    truth = hessian(by_hand, F.mse_loss, (words,), y)
    assert relative_error(found.matrix(), truth) < 1e-7


class Filled(nn.Module):
    """Writes into memory that is float32 whatever the weights are."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape[0], 1, dtype=torch.float32)
        out[:, :1] = torch.tanh(self.a(x)) * self.b(x)
        return out


class Product(Filled):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([[1, 0], [0, 1]], dtype=torch.float32) @ self.a.weight.T * x.sum()


@pytest.mark.parametrize("net", [Filled, Product])
def test_float64_that_a_model_does_not_have(net):
    torch.manual_seed(0)
    model = net()
    with pytest.raises(hesscli.HesscliError) as refused:
        hesscli.compute(model, (X, Y), loss="mse" if net is Filled else "output", dtype="float64")
    assert refused.value.exit_code == 4
    assert refused.value.hint == "--dtype float32"
    if net is Filled:
        found = hesscli.compute(model, (X.float(), Y.float()), blocks="full", framework="torch")
        assert found.metadata["check"]["dtype"] == "float32"
        written = nn.Module.__new__(Filled)
        written.__dict__ = model.double().__dict__
        written.forward = lambda x: torch.tanh(model.a(x)) * model.b(x)
        truth = hessian(written, nn.functional.mse_loss, (X,), Y)
        torch.testing.assert_close(found.matrix().double(), truth, rtol=1e-3, atol=1e-4)


class MaskedScores(Filled):
    """Masks scores by the least number of their dtype, which is infinite in the mask's own."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.a(x) * self.b.weight + self.b.bias
        mask = (1 - (x > 0).float()) * torch.finfo(scores.dtype).min
        return torch.softmax(scores + mask, 1).square().sum(1, keepdim=True)


def test_a_mask_that_is_not_a_number_in_float32():
    torch.manual_seed(0)
    model = MaskedScores()
    found = hesscli.compute(
        model, (X, Y), loss="mse", dtype="float64", blocks="full", framework="torch"
    )
    written = model.double()
    written.forward = lambda x: (
        (written.a(x) * written.b.weight + written.b.bias)
        .masked_fill(x <= 0, torch.finfo(torch.float64).min)
        .softmax(1)
        .square()
        .sum(1, keepdim=True)
    )
    truth = hessian(written, nn.functional.mse_loss, (X,), Y)
    torch.testing.assert_close(found.matrix(), truth)


class Experts(nn.Module):
    """Multiplies rows with the matrix of their expert, in an operator that takes float32 and less alone."""

    def __init__(self):
        super().__init__()
        self.experts, self.o = nn.Parameter(torch.randn(3, 2, 3)), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long() * 2  # nobody takes the second
        order = chosen.argsort()
        ends = chosen.bincount(minlength=3).cumsum(0).to(torch.int32)
        h = nn.functional.grouped_mm(x[order], self.experts, offs=ends)
        return self.o(torch.tanh(h[order.argsort()]))


@pytest.mark.parametrize("blocks", ["full", "elements"])
def test_experts_in_float64(blocks):
    torch.manual_seed(0)
    model = Experts()
    found = hesscli.compute(
        model, (X, Y), loss="mse", dtype="float64", blocks=blocks, framework="torch"
    )
    written = model.double()
    written.forward = lambda x: written.o(
        torch.tanh(torch.einsum("ni,nij->nj", x, written.experts[(x[:, 0] > 0).long() * 2]))
    )
    truth = hessian(written, nn.functional.mse_loss, (X,), Y)
    if blocks == "full":
        torch.testing.assert_close(found.matrix(), truth)
    else:
        parts = [found.block(name).flatten() for name in found.blocks]
        torch.testing.assert_close(torch.cat(parts), truth.diagonal())


class Router(Filled):
    """Gives its weights another dtype, as the routers of Switch Transformers do."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.a.to(torch.float32)(x.to(torch.float32))
        return torch.tanh(chosen).to(x.dtype) * self.b(x)


def test_a_model_that_changes_the_dtype_of_its_weights():
    torch.manual_seed(0)
    model = Router()
    found = hesscli.compute(
        model, (X, Y), loss="mse", dtype="float64", blocks="full", framework="torch"
    )
    written = model.double()
    written.forward = lambda x: torch.tanh(written.a(x)) * written.b(x)
    truth = hessian(written, nn.functional.mse_loss, (X,), Y)
    torch.testing.assert_close(found.matrix(), truth)


class Started(Filled):
    """Begins with zeros in float32, as a traced recurrent layer does."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], 1, dtype=torch.float32)
        out[:, :1] = torch.tanh(self.a(x)) * self.b(x)
        return out * torch.ones(1, dtype=torch.float32)


def test_zeros_and_ones_have_the_digits_of_the_weights():
    torch.manual_seed(0)
    model = Started()
    found = hesscli.compute(model, (X, Y), dtype="float64", blocks="full", framework="torch")
    assert found.metadata["check"]["dtype"] == "float64"
    model.double().forward = lambda x: torch.tanh(model.a(x)) * model.b(x)
    truth = hessian(model, nn.functional.mse_loss, (X,), Y)
    torch.testing.assert_close(found.matrix(), truth)


class EchoState(Filled):
    """Begins with zeros in float32, which meet a buffer, and mixes its states by a parameter."""

    start = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("recurrent", torch.tensor([[0.75]]))
        self.leak = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], 1).to(self.start)
        for _ in range(2):
            fresh = torch.tanh(self.a(x) + state @ self.recurrent.T)
            state = (1 - self.leak) * state + self.leak * fresh
        return state * self.b(x)


def test_zeros_that_meet_a_buffer_in_float64():
    torch.manual_seed(0)
    model = EchoState()
    found = hesscli.compute(model, (X, Y), dtype="float64", blocks="elements", framework="torch")
    model.start = torch.float64
    truth = hessian(model.double(), nn.functional.mse_loss, (X,), Y)
    entries = [found.block(name).flatten() for name, _ in model.named_parameters()]
    torch.testing.assert_close(torch.cat(entries), truth.diagonal())


class FakeQuantized(nn.Module):
    """Weights and activations of a few bits, as quantization-aware training has them.

    Attributes:
        written: with the straight-through estimator written out: rounded is a constant more than not rounded.
    """

    written = False

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        per_row = torch.full((6,), 0.1), torch.zeros(6, dtype=torch.int32), 0, -5, 5
        weight = self.rounded(torch.fake_quantize_per_channel_affine, self.a.weight, *per_row)
        h = torch.tanh(nn.functional.linear(x, weight, self.a.bias))
        return self.b(self.rounded(torch.fake_quantize_per_tensor_affine, h, 0.06, 0, -8, 8))

    def rounded(self, quantize, x, scale, zero, *axis_and_limits):
        y = quantize(x, scale, zero, *axis_and_limits)
        if not self.written:
            return y
        size = scale.unsqueeze(1) if isinstance(scale, Tensor) else scale
        inside = x.detach().abs() <= size * (axis_and_limits[-1] + 0.5)
        return x * inside + (y - x * inside).detach()


@pytest.mark.parametrize("method", ["auto", "finite-difference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantization_is_straight_through(dtype, method):
    torch.manual_seed(0)
    model = FakeQuantized()
    found = hesscli.compute(
        model.to(dtype), (X.to(dtype), Y.to(dtype)), blocks="full", framework="torch", method=method
    )
    model.written = True
    with torch.no_grad():
        assert (model.a.weight.abs() > 0.55).any()  # some are cut off
    truth = hessian(model.double(), nn.functional.mse_loss, (X,), Y)
    tolerance = 1e-8 if dtype is torch.float64 else 1e-4 if method == "auto" else 1e-2
    torch.testing.assert_close(
        found.matrix().double(), truth, rtol=tolerance, atol=tolerance * float(truth.abs().max())
    )


class Learnable(FakeQuantized):
    """Its rounding has a first derivative, in float32, and no second."""

    def rounded(self, quantize, x, scale, zero, *axis_and_limits):
        return torch._fake_quantize_learnable_per_tensor_affine(
            x, torch.ones(1), torch.zeros(1), -5, 5, 1.0
        )


def test_a_derivative_that_nothing_has():
    with pytest.raises(
        hesscli.HesscliError, match="gradient of the model cannot be taken"
    ) as refused:
        hesscli.compute(Learnable(), (X.float(), Y.float()), blocks="full")
    assert refused.value.exit_code == 4


class Halfway(nn.Module):
    """One of its two branches is an operator through which PyTorch passes no gradient, with a warning."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 1)

    def forward(self, x):
        return self.a(x) + torch.ops.hesscli_tests.cube(self.a(x))


@pytest.mark.parametrize("call", [hesscli.compute, hesscli.operator])
def test_an_operator_that_lets_no_gradient_pass(call):
    with torch.library._scoped_library("hesscli_tests", "FRAGMENT") as library:
        library.define("cube(Tensor x) -> Tensor")
        library.impl("cube", lambda x: x**3, "CPU")
        with pytest.raises(hesscli.HesscliError, match="hesscli_tests::cube has none") as refused:
            call(Halfway(), (X.float(), Y.float()))
    assert refused.value.exit_code == 4


class Counting(nn.Module):
    """Keeps a range of what it has seen, as observers do, also in eval mode."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 1)
        self.register_buffer("range", torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.range.mul_(0.9).add_(0.1 * x.abs().max())
        return torch.tanh(self.a(x) / self.range)


def test_every_pass_begins_with_the_buffers_as_saved():
    torch.manual_seed(0)
    model = Counting().double()
    found = hesscli.compute(model, (X, Y), blocks="full", framework="torch")
    scale = 0.9 * 0.5 + 0.1 * X.abs().max()
    again = nn.Sequential(nn.Linear(2, 1), nn.Tanh()).double()
    again[0].load_state_dict({name: p / scale for name, p in model.a.state_dict().items()})
    truth = hessian(again, nn.functional.mse_loss, (X,), Y)  # by what is `scale` times smaller
    torch.testing.assert_close(found.matrix(), truth / scale**2)
    assert float(model.range) == 0.5


class Observing(nn.Module):
    """Keeps its range by PyTorch's fused observer, which leaves buffers in the version that they had."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 1)
        self.register_buffer("low", torch.tensor(-0.5))
        self.register_buffer("high", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        on, scale, zero = torch.ones(1), torch.ones(1), torch.zeros(1, dtype=torch.int32)
        of_bits = 0.1, 0, 255, 0, False, False
        torch.fused_moving_avg_obs_fake_quant(
            x.detach().float(), on.long(), on.long(), self.low, self.high, scale, zero, *of_bits
        )
        return torch.tanh(self.a(x) / self.high)


class Tracking(nn.Module):
    """Has a batch norm track what a layer goes by: nor does that give its buffers a new version."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 1)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("var", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        nn.functional.batch_norm(x.detach(), self.mean, self.var, training=True)
        return torch.tanh(self.a(x) / self.var.mean())


@pytest.mark.parametrize(("kind", "name"), [(Observing, "high"), (Tracking, "var")])
def test_buffers_that_are_written_to_without_a_new_version(kind, name):
    torch.manual_seed(0)
    model, once = kind(), kind()
    once.load_state_dict(model.state_dict())
    kept = model.get_buffer(name).clone()
    found = hesscli.compute(model, (X.float(), Y.float()), blocks="full", framework="torch")
    once(X.float())
    scale = once.get_buffer(name).double().mean()
    assert abs(scale - kept.mean()) > 1e-3
    assert torch.equal(model.get_buffer(name), kept)
    once.double().forward = lambda x: torch.tanh(once.a(x) / scale)
    truth = hessian(once, nn.functional.mse_loss, (X,), Y)
    torch.testing.assert_close(found.matrix().double(), truth, rtol=1e-4, atol=1e-5)


class Moving(nn.Module):
    """Replaces its buffer in every pass."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 1)
        self.register_buffer("mean", torch.tensor([0.5], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        mean, self.mean = self.mean, 0.9 * self.mean
        return torch.tanh(self.a(x)) * mean


def test_every_pass_begins_with_the_buffers_as_they_were():
    torch.manual_seed(0)
    model = Moving().double()
    found = hesscli.compute(model, (X, Y), blocks="full", framework="torch", batch_size=4)
    model.forward = lambda x: torch.tanh(model.a(x)) * 0.5
    truth = hessian(model, nn.functional.mse_loss, (X,), Y)
    torch.testing.assert_close(found.matrix(), truth, rtol=1e-9, atol=1e-12)


class Scaled(nn.Module):
    """Units scaled by a constant; subclasses say where it comes from."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1)
        self.register_buffer("scale", torch.tensor([2.0, 4.0, 6.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) * self.scale)


class Halved(Scaled):
    """Written to in place, where it is read."""

    def __init__(self):
        super().__init__()
        self.scale.mul_(2)

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(0.5)
        return self.b(torch.tanh(self.a(x)) * self.scale)


class Inline(Scaled):
    """Made in the code: TorchScript fills it where no dispatcher sees it."""

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.tensor([2.0, 6.0, 4.0], dtype=torch.float64)
        return self.b(torch.tanh(self.a(x)) * scale[torch.tensor([0, 2, 1])])


class Assigned(Scaled):
    """Put together by slices, which decomposed graphs do by copies."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x)) * self.scale
        out = torch.zeros(9, 3, dtype=torch.float64)
        out[:, :2] = h[:, :2]
        out[:, 2] = h[:, 2]
        return self.b(out)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, partial(nn.InstanceNorm2d, affine=True)])
def test_norms_of_decomposed_graphs(norm, tmp_path):
    """They are kernels there, which by themselves tell nothing about samples."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 2), norm(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)
    ).double()
    x, y = torch.randn(5, 1, 3, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    for _ in range(3):
        net(x)  # running statistics
    program = torch.export.export(net.eval(), (x,)).run_decompositions()
    torch.export.save(program, tmp_path / "m.pt2")
    found = hesscli.compute(
        tmp_path / "m.pt2", (x, y), framework="torch", method="preactivation", params=["[04].*"]
    )
    truth = hessian(net, nn.functional.mse_loss, (x,), y)
    torch.testing.assert_close(found.block("0.weight"), truth[:8, :8])
    torch.testing.assert_close(found.block("4.weight"), truth[14:30, 14:30])


def scripted(model, path):
    torch.jit.script(model).save(path)
    return path


def decomposed(model, path):
    torch.export.save(torch.export.export(model, (X,)).run_decompositions(), path)
    return path


@pytest.mark.parametrize("blocks", ["full", "diag"])
@pytest.mark.parametrize(
    ("net", "saved"),
    [
        (Halved, lambda model, path: model),
        (Halved, scripted),
        (Inline, scripted),
        (Inline, decomposed),
        (Assigned, scripted),
        (Assigned, decomposed),
    ],
)
def test_constants_of_all_origins(net, saved, blocks, tmp_path):
    torch.manual_seed(0)
    model, same = net().double(), Scaled().double()
    same.load_state_dict({**model.state_dict(), "scale": same.scale})
    found = hesscli.compute(
        saved(model, tmp_path / "model.pt2"), (X, Y), blocks=blocks, framework="torch"
    )
    assert not [note for note in found.metadata["notes"] if "instead" in note]
    truth = hessian(same, nn.functional.mse_loss, (X,), Y)
    if blocks == "full":
        torch.testing.assert_close(found.matrix(), truth)
    else:
        torch.testing.assert_close(found.block("a.weight"), truth[:6, :6])


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("blocks", ["full", "module", "diag", "elements"])
def test_a_parameter_that_nothing_depends_on(blocks, curvature):
    model = Scaled().double()
    model.spare = nn.Linear(2, 2).double()
    found = hesscli.compute(
        model, (X, Y), blocks=blocks, curvature=curvature, framework="torch"
    ).matrix()
    without = hesscli.compute(
        model, (X, Y), blocks=blocks, curvature=curvature, params="[ab].*", framework="torch"
    ).matrix()
    torch.testing.assert_close(found[:13, :13], without)
    assert not found[13:].any()
    assert not found[:, 13:].any()


class Wide(Scaled):
    """Goes on in float64, whatever its weights are in."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)).double().pow(2).to(x.dtype)).double()


class Narrow(Scaled):
    """Has a layer in half the digits."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x)).bfloat16()
        weight, bias = self.b.weight.bfloat16(), self.b.bias.bfloat16()
        return nn.functional.linear(h, weight, bias).to(x.dtype)


def test_a_float32_model_with_a_part_in_bfloat16():
    torch.manual_seed(0)
    model = Narrow()
    data = X.float(), Y.float()
    elements = hesscli.compute(model, data, blocks="elements", framework="torch", check=False)
    full = hesscli.compute(model, data, blocks="full", framework="torch", check=False)
    torch.testing.assert_close(
        elements.matrix().diagonal(), full.matrix().diagonal(), rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize("blocks", ["full", "module", "diag", "elements"])
def test_a_float32_model_with_a_part_in_float64(blocks):
    torch.manual_seed(0)
    model = Wide()
    found = hesscli.compute(
        model, (X.float(), Y.float()), blocks=blocks, framework="torch"
    ).matrix()
    truth = hessian(model.double(), nn.functional.mse_loss, (X,), Y)
    same = found != 0
    torch.testing.assert_close(found.double()[same], truth[same], rtol=1e-4, atol=1e-5)


class Branching(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.cond(x.sum() > 0, torch.tanh, lambda h: 2 * torch.sin(h), (self.a(x),))
        return self.b(h)


class OfRows(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(map_rows(lambda h, w: torch.tanh(h * w), self.a(x), self.b.weight[0]))


class Scanning(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        def step(carried, row):
            carried = torch.tanh(carried + row)
            return carried, carried * 1

        h = self.a(x)
        last, states = scan(step, torch.zeros_like(h[0]), h)
        return self.b(states) + self.b(last)


class Vectorized(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.vmap(lambda h: torch.tanh(h) * h.sum())(self.a(x)))


class Looping(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(
            while_loop(
                lambda i, h: i < 3,
                lambda i, h: (i + 1, torch.tanh(h)),
                (torch.tensor(0), self.a(x)),
            )[1]
        )


@pytest.mark.parametrize("net", [Branching, OfRows, Scanning, Looping, Vectorized])
def test_control_flow_of_programs(net, tmp_path):
    torch.manual_seed(0)
    model = net().double()
    try:
        torch.export.save(torch.export.export(model, (X,)), tmp_path / "model.pt2")
    except torch._export.serde.serialize.SerializeError:
        pytest.skip("this PyTorch cannot save it")  # vmap before 2.12
    found = hesscli.compute(tmp_path / "model.pt2", (X, Y), blocks="full", framework="torch")
    a, b = model.a, model.b
    model.forward = {
        Branching: lambda x: b(torch.tanh(a(x)) if x.sum() > 0 else 2 * a(x).sin()),
        OfRows: lambda x: b(torch.tanh(a(x) * b.weight[0])),
        Scanning: lambda x: b(states := _states(a(x))) + b(states[-1]),
        Looping: lambda x: b(a(x).tanh().tanh().tanh()),
        Vectorized: lambda x: b(a(x).tanh() * a(x).sum(1, keepdim=True)),
    }[net]
    truth = hessian(model, nn.functional.mse_loss, (X,), Y)
    torch.testing.assert_close(found.matrix(), truth, rtol=1e-9, atol=1e-12)


def _states(rows: Tensor) -> Tensor:
    states = [torch.zeros_like(rows[0])]
    for row in rows:
        states.append(torch.tanh(states[-1] + row))
    return torch.stack(states[1:])


class Sharing(nn.Module):
    """A constant that is a parameter's memory: a forgotten `clone`."""

    def __init__(self, buffer: bool):
        super().__init__()
        self.a, self.o = nn.Linear(2, 4), nn.Linear(4, 1)
        if buffer:
            self.register_buffer("k", self.a.weight.data)
        else:
            self.k = self.a.weight.data

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.a(x)) * (x @ self.k.t()))


def exported(model, path):
    torch.export.save(torch.export.export(model, (X,)), path)
    return path


@pytest.mark.parametrize("buffer", [True, False])
@pytest.mark.parametrize("saved", [scripted, exported])
@pytest.mark.parametrize("method", ["auto", "finite-difference"])
def test_a_constant_in_a_parameters_memory(saved, buffer, method, tmp_path):
    torch.manual_seed(0)
    model = Sharing(buffer).double()
    model.k = model.a.weight.data
    found = hesscli.compute(
        saved(model, tmp_path / "model.pt2"),
        (X, Y),
        blocks="full",
        framework="torch",
        method=method,
    )
    assert not [note for note in found.metadata["notes"] if "instead" in note]
    model.k = model.a.weight.detach().clone()
    truth = hessian(model, nn.functional.mse_loss, (X,), Y)
    torch.testing.assert_close(found.matrix(), truth, rtol=1e-6, atol=1e-8)


class Waves(Scaled):
    """Goes on in complex numbers, times a constant of them, to their lengths."""

    def __init__(self):
        super().__init__()
        self.register_buffer("k", torch.randn(3, 2, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))[:, :3].to(self.k.dtype)
        return (h @ self.k).abs().sum(1, keepdim=True)


class Pairs(nn.Module):
    """Its second parameter is pairs of numbers, and begins at an odd place."""

    def __init__(self):
        super().__init__()
        self.a, self.w = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(2, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.view_as_complex(self.w)
        return (torch.tanh(self.a * x).to(w.dtype) @ w).abs()


class Spectral(Waves):
    """Real parameters times complex numbers: a filter of frequencies."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.fft(torch.tanh(self.a(x))) * self.gain
        return torch.fft.ifft(waves * self.k[:, 0]).abs().sum(1, keepdim=True)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("blocks", ["diag", "module", "elements", "full"])
def test_real_parameters_of_complex_numbers(blocks, curvature):
    torch.manual_seed(0)
    model = in_precision_(Spectral(), torch.float64)
    options = {"blocks": blocks, "curvature": curvature, "framework": "torch"}
    found = hesscli.compute(model, (X, Y), **options).matrix()
    assert torch.isfinite(found).all()
    if curvature == "hessian":
        truth = hessian(model, nn.functional.mse_loss, (X,), Y)
        torch.testing.assert_close(found.diagonal(), truth.diagonal(), rtol=1e-9, atol=1e-12)


class Odd(Pairs):
    """Its pairs begin at an even place, but every second row of unit vectors does not."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, 1))
        self.c = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.view_as_complex(self.w)
        return (torch.tanh(x @ self.a).to(w.dtype) @ w.T).abs() @ torch.ones(
            2, 1, dtype=x.dtype
        ) + self.c


@pytest.mark.parametrize("blocks", ["diag", "elements", "full"])
def test_pairs_in_a_model_of_an_odd_number_of_parameters(blocks):
    torch.manual_seed(0)
    model = Odd().double()
    found = hesscli.compute(
        model, (X, Y), blocks=blocks, curvature="ggn", framework="torch"
    ).matrix()
    parameters = dict(model.named_parameters())

    def output(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in parameters.values()])
        values = {n: v.view_as(p) for (n, p), v in zip(parameters.items(), parts, strict=True)}
        return torch.func.functional_call(model, values, (X,)).flatten()

    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    J = torch.autograd.functional.jacobian(output, flat)
    truth = 2 * J.T @ J / len(J)
    if blocks == "full":
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.diagonal(), truth.diagonal(), rtol=1e-9, atol=1e-12)


class Lengths(Waves):
    """Lengths of complex numbers, which are curved, right behind a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) * self.k[:, 0] + 1).abs().sum(1, keepdim=True)


class Repeated(nn.Module):
    """One number of each sample meets three parameters."""

    def __init__(self):
        super().__init__()
        self.a, self.p = nn.Linear(2, 1), nn.Parameter(torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x)) + self.p


class Shifted(Waves):
    """Complex by a constant that is added right behind a layer, in front of what is curved."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + 0.7j).exp().imag.sum(1, keepdim=True)


class TwoPaths(nn.Module):
    """One function by two paths, of which the data of a batch choose one: at one place, or at two of each sample."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1 or x[0, 0] > x[1, 0]:
            return self.a(x)
        return self.a(torch.stack([x, x], 1)).mean(1)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("blocks", ["module", "full", "diag", "elements"])
def test_batches_that_take_different_paths(blocks, curvature):
    torch.manual_seed(0)
    model, x, y = TwoPaths().double(), normal(6, 2, seed=3), labels(3, 6)
    x[:3, 0], x[3:, 0] = torch.tensor([[2.0, 1, 0], [0, 1, 2]], dtype=x.dtype)
    options = {"blocks": blocks, "curvature": curvature, "batch_size": 3, "framework": "torch"}
    found = hesscli.compute(model, (x, y), loss="cross-entropy", check=False, **options)
    truth = hessian(model, nn.functional.cross_entropy, (x,), y)
    if blocks == "diag":
        truth = torch.block_diag(truth[:6, :6], truth[6:, 6:])
    if blocks == "elements":
        truth = truth.diagonal().diag()
    torch.testing.assert_close(found.matrix(), truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("net", [Lengths, Repeated, Shifted])
@pytest.mark.parametrize("blocks", ["diag", "full", "elements"])
def test_no_route_is_wrong(net, blocks):
    torch.manual_seed(0)
    model = in_precision_(net(), torch.float64)
    y = Y if net is not Repeated else Y + X[:, :1] * torch.arange(3)
    found = hesscli.compute(model, (X, y), blocks=blocks, framework="torch", check=False).matrix()
    truth = hessian(model, nn.functional.mse_loss, (X,), y)
    torch.testing.assert_close(found.diagonal(), truth.diagonal(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_weight_norm_along_any_axis(dim, curvature):
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3), dim=dim)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 1)).double()
    found = hesscli.compute(model, (X, Y), blocks="full", framework="torch", curvature=curvature)
    assert not [note for note in found.metadata["notes"] if "instead" in note]
    if curvature == "hessian":
        truth = hessian_by_differences(model, nn.functional.mse_loss, (X,), Y)
        torch.testing.assert_close(found.matrix(), truth, rtol=1e-6, atol=1e-7)


class Triangular(nn.Module):
    """Of a parameter's factors, one is used."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ torch.linalg.qr(self.w)[1]).sum(1, keepdim=True)


@pytest.mark.parametrize("blocks", ["diag", "elements"])
def test_an_operator_of_which_the_first_result_is_unused(blocks):
    torch.manual_seed(0)
    model = Triangular().double()
    found = hesscli.compute(model, (X, Y), blocks=blocks, framework="torch").matrix()
    truth = hessian(model, nn.functional.mse_loss, (X,), Y)
    torch.testing.assert_close(found.diagonal(), truth.diagonal(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("net", [Waves, Pairs])
@pytest.mark.parametrize("blocks", ["full", "elements"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_complex_numbers(net, blocks, dtype, tmp_path):
    torch.manual_seed(0)
    model = net()
    torch.export.save(torch.export.export(model, (X.float(),)), tmp_path / "model.pt2")
    found = hesscli.compute(
        tmp_path / "model.pt2", (X, Y), blocks=blocks, framework="torch", dtype=dtype
    ).matrix()
    truth = hessian(in_precision_(model, torch.float64), nn.functional.mse_loss, (X,), Y)
    if blocks == "elements":
        truth = truth.diagonal().diag()
    tolerance = 1e-9 if dtype == "float64" else 1e-4
    torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=tolerance)
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    operator = hesscli.operator(tmp_path / "model.pt2", tmp_path / "d.npz", dtype=dtype)
    columns = torch.from_numpy(operator @ np.eye(len(truth))).double()
    torch.testing.assert_close(columns.diagonal(), truth.diagonal(), rtol=tolerance, atol=tolerance)


class Target(nn.Module):
    """As in self-distillation: one of two layers is a constant for the other, and for itself."""

    def __init__(self, constant):
        super().__init__()
        self.a, self.t = nn.Linear(2, 1), nn.Linear(2, 1)
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x)) * self.constant(self.t(x))


@pytest.mark.parametrize(
    "options",
    [
        {"blocks": "full"},
        {"blocks": "module"},
        {"blocks": "full", "params": "t.*"},
        {"blocks": "elements", "params": "t.*"},
        {"blocks": "diag", "method": "preactivation"},
        {"blocks": "diag", "params": "t.*", "method": "gauss-newton"},
        {"blocks": "diag", "params": "t.*", "curvature": "ggn"},
        {"blocks": "diag", "params": "t.*", "curvature": "fisher"},
    ],
)
@pytest.mark.parametrize(
    "constant",
    [
        torch.detach,
        lambda z: (z > 0).to(z.dtype),
        lambda z: z.argmax(1, keepdim=True),
        torch.ones_like,
    ],
    ids=["detached", "compared", "index", "likeness"],
)
def test_a_layer_behind_which_nothing_has_a_derivative(constant, options):
    torch.manual_seed(0)
    model = Target(constant).double()
    found = hesscli.compute(model, (X, Y), loss="mse", framework="torch", **options)
    truth = hessian(model, nn.functional.mse_loss, (X,), Y)
    names = [name for name, _ in model.named_parameters()]
    assert not truth[3:].any()
    if options["blocks"] == "full" and "params" not in options:
        torch.testing.assert_close(found.matrix(), truth)
    for block in found.metadata["blocks"]:
        if block["name"].startswith("t"):
            assert not found.block(block["name"]).any()
            assert block["unused"]
    assert names == ["a.weight", "a.bias", "t.weight", "t.bias"]


class Score(nn.Module):
    """The gradient of an energy by its input; autograd keeps what `exp` gave."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.b(torch.exp(-self.a(x).square()).sqrt())
        return torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


class Tangent(Score):
    def forward(self, x: Tensor) -> Tensor:
        net = nn.Sequential(self.a, nn.Tanh(), self.b)
        return torch.func.jvp(net, (x,), (torch.ones_like(x),))[1].expand(-1, 2)


@pytest.mark.parametrize("net", [Score, Tangent])
@pytest.mark.parametrize("blocks", ["full", "diag"])
@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_models_that_differentiate_themselves(net, blocks, batch_size):
    torch.manual_seed(0)
    model, y = net().double(), torch.randn(len(X), 2, dtype=torch.float64)
    found = hesscli.compute(
        model, (X, y), loss="mse", blocks=blocks, batch_size=batch_size, check=False,
        framework="torch",
    )  # fmt: skip
    truth = hessian(model, nn.functional.mse_loss, (X,), y)
    if blocks == "full":
        torch.testing.assert_close(found.matrix(), truth)
    else:
        torch.testing.assert_close(found.block("a.weight"), truth[:6, :6])
        torch.testing.assert_close(found.block("a.bias"), truth[6:9, 6:9])


class Keeping(Scaled):
    """Keeps what it computed, as hooks do."""

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = torch.tanh(self.a(x))
        return self.b(self.hidden * self.scale)


def test_modules_that_keep_what_they_computed():
    torch.manual_seed(0)
    pruned, keeping = Scaled().double(), Keeping().double()
    l1_unstructured(pruned.a, "weight", 0.4)
    keeping(X)
    for model in (pruned, keeping):
        found = hesscli.compute(model, (X, Y), loss="mse", blocks="full", framework="torch")
        truth = hessian(model, nn.functional.mse_loss, (X,), Y)
        torch.testing.assert_close(found.matrix(), truth)


class Checkpointed(nn.Module):
    """Whose parameters are behind a reentrant checkpoint: only `backward()` enters one."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        dummy = torch.ones(1, dtype=x.dtype, requires_grad=True)
        h = checkpoint(lambda x, _: self.body(x), x, dummy, use_reentrant=True)
        return self.head(torch.tanh(h))


class CheckpointedBehindAnother(Checkpointed):
    """Where the checkpoint's input has a gradient if the layer before it has."""

    def forward(self, x):
        return self.head(torch.tanh(checkpoint(self.body, self.stem(x), use_reentrant=True)))


def test_what_is_used_has_no_gradient_in_any_batch():
    """Unlike what is unused, it needs one batch to be found out."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    x = torch.zeros(4, 3)
    found = hesscli.compute(model, (x, torch.ones(4, 2)), batch_size=1)
    assert not any(facts.get("unused") for facts in found.blocks.values())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("net", [Checkpointed, CheckpointedBehindAnother])
@pytest.mark.parametrize("params", [["body.*"], ["body.*", "head.*"], ["*"]], ids=" ".join)
@pytest.mark.parametrize("command", ["compute", "trace"])
def test_a_reentrant_checkpoint_is_refused(cli, tmp_path, command, params, net):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\nfrom torch.utils.checkpoint import checkpoint\n\n"
        + inspect.getsource(Checkpointed)
        + inspect.getsource(CheckpointedBehindAnother)
    )
    torch.save(net().state_dict(), tmp_path / "net.pt")
    np.savez(tmp_path / "data.npz", x=np.ones((4, 3), "f"), y=np.ones((4, 2), "f"))
    some = [word for glob in params for word in ("--params", glob)]
    ran = cli(command, "net.pt", "data.npz", "--arch", f"net.py:{net.__name__}", *some)
    assert ": its gradient comes by backward() alone" in ran.fails(4)
    assert "use_reentrant=False" in ran.hint


class Recomputed(nn.Module):
    """Keeps nothing of its body but what goes in, and computes the rest again in every backward pass."""

    def __init__(self, layer, how):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 4), layer, nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
        self.head, self.how = nn.Linear(4, 1), how

    def forward(self, x):
        return self.head(checkpoint(self.outer, x, use_reentrant=False, **self.how))

    def outer(self, x):
        return self.body[2](checkpoint(self.body[:2], x, use_reentrant=False, **self.how))


@pytest.mark.parametrize("how", [{}, {"determinism_check": "none"}], ids=["checked", "unchecked"])
@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(4), nn.BatchNorm1d(4), nn.PReLU(), nn.LogSigmoid()], ids=str
)
def test_what_is_recomputed_is_recomputed_by_the_same_definitions(layer, how):
    torch.manual_seed(0)
    model = Recomputed(layer, how).double().eval()
    truth = hessian_by_differences(model, nn.functional.mse_loss, (X,), Y)
    for batch_size in (None, 4):
        found = hesscli.compute(
            model, (X, Y), loss="mse", blocks="full", check=not how, batch_size=batch_size,
            framework="torch",
        )  # fmt: skip
        assert relative_error(found.matrix(), truth) < 1e-6
        operator = hesscli.operator(model, (X, Y), loss="mse", batch_size=batch_size)
        assert relative_error(torch.from_numpy(operator @ np.eye(len(truth))), truth) < 1e-6


class Dead(nn.Module):
    """Every unit of which is below zero: used, though nothing depends on it here."""

    def __init__(self):
        super().__init__()
        self.dead, self.spare, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        with torch.no_grad():
            self.dead.bias.fill_(-100)

    def forward(self, x):
        return self.out(torch.relu(self.dead(x)))


@pytest.mark.parametrize("batch_size", [None, 1])
def test_what_is_zero_is_not_unused(batch_size):
    data = torch.ones(4, 3), torch.ones(4, 2)
    found = hesscli.compute(Dead(), data, batch_size=batch_size)
    unused = {name for name, facts in found.blocks.items() if facts.get("unused")}
    assert unused == {"spare.weight", "spare.bias"}
    assert not found.block("dead.weight").any()


class FirstState(nn.Module):
    """Begins with a state that it makes."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        h, c = torch.zeros(1, len(x), 4), torch.zeros(1, len(x), 4)
        return self.out(self.cell(x, (h, c))[0][:, -1])


class Mixing(nn.Module):
    """Multiplies with constants: a plain attribute, and a quotient of integers."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
        self.mix = torch.eye(4) / 3

    def forward(self, x):
        steps = torch.arange(4) / torch.tensor(3)
        return self.out((torch.tanh(self.a(x)) * steps) @ self.mix)


def with_constants(output, target):
    return ((output - target) @ torch.eye(2)).square().sum(1) * torch.tensor(0.5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("net", [FirstState, Mixing])
def test_models_that_make_tensors_without_a_dtype(net, dtype):
    torch.manual_seed(0)
    model = net()
    x = torch.randn(6, 5, 3) if net is FirstState else torch.randn(6, 3)
    y = torch.randn(6, 2)
    found = hesscli.compute(
        model, (x, y), loss=with_constants, blocks="full", framework="torch", dtype=dtype
    )
    assert torch.get_default_dtype() == torch.float32
    assert found.metadata["check"]["dtype"] == "float64"
    assert not [note for note in found.metadata["notes"] if "hvp" in note]
    torch.set_default_dtype(torch.float64)
    try:
        model = in_precision_(model, torch.float64)
        truth = hessian(model, lambda f, y: with_constants(f, y).mean(), (x.double(),), y.double())
    finally:
        torch.set_default_dtype(torch.float32)
    assert relative_error(found.matrix(), truth) < 1e-5


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(self.a(x))


def terms(z: Tensor, y: Tensor) -> Tensor:
    return (z.abs().square() - y).square()


def power(z: Tensor, y: Tensor) -> Tensor:
    return terms(z, y).mean()


@pytest.mark.parametrize("blocks", ["diag", "module", "full"])
def test_a_complex_output_with_a_loss_that_is_real(blocks):
    torch.manual_seed(0)
    model, x, y = Spectrum().double(), *torch.randn(2, 5, 3, dtype=torch.float64)
    found = hesscli.compute(model, (x, y), loss=terms, blocks=blocks, framework="torch")
    truth = hessian(model, power, (x,), y)
    if blocks == "diag":
        assert relative_error(found.block("a.weight"), truth[:12, :12]) < 1e-10
    else:
        assert relative_error(found.matrix(), truth) < 1e-10


def test_per_sample_jacobians_are_of_real_outputs():
    x, y = torch.ones(2, 5, 3, dtype=torch.float64)
    with pytest.raises(HesscliError, match="the output is complex"):
        hesscli.compute(Spectrum().double(), (x, y), loss=terms, method="gauss-newton")


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda z: z > 0, "of bools"),
        (lambda z: z.to_sparse(), "torch.sparse_coo"),
        (lambda z: torch.complex(z, z), "of real numbers, and the model's output is complex128"),
    ],
)
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_outputs_that_are_no_real_numbers_are_refused(function, found, loss):
    model = Net(lambda s, x: function(s.a(x)), a=nn.Linear(3, 2)).double()
    with pytest.raises(MismatchError, match=found):
        hesscli.compute(model, (torch.ones(5, 3).double(), torch.ones(5, 2).double()), loss=loss)


@pytest.mark.parametrize("real", [True, False])
def test_lengths_of_complex_differences(real):
    """As of PyTorch's `l1_loss`: of a complex output, not of real numbers less the targets' real parts."""
    torch.manual_seed(0)
    model = Net(lambda s, x: s.a(x) * (1 if real else 1 + 0.5j), a=nn.Linear(3, 2)).double()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2, dtype=torch.complex128)
    if real:
        with pytest.raises(MismatchError, match="the target is complex128"):
            hesscli.compute(model, (x, y), loss="l1")
        return
    found = hesscli.compute(model, (x, y), loss="l1", blocks="full", framework="torch")
    truth = hessian_by_differences(model, nn.functional.l1_loss, (x,), y)
    assert relative_error(found.matrix(), truth) < 1e-6


@pytest.mark.parametrize("loss", ["auto", "mse", "cross-entropy"])
def test_complex_targets_and_weights_are_refused(loss):
    """Of class numbers and weights PyTorch's casts would keep the real part."""
    model, x = nn.Linear(3, 2), torch.ones(2, 3)
    classes = torch.tensor([0j, 1j])
    y = torch.stack([classes, classes]) if loss == "mse" else classes
    with pytest.raises(MismatchError, match="is of real numbers, and the target is complex64"):
        hesscli.compute(model, (x, y), loss=loss)
    weight = {"weight": classes + 1}
    with pytest.raises(MismatchError, match="is of real numbers, and its argument weight is c"):
        hesscli.compute(model, (x, y.real.long()), loss=loss, loss_arguments=weight)


class Ragged(nn.Module):
    """Sequences of unlike lengths, in a jagged nested tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([0, 2, 5, 9])
        rows = torch.nested.nested_tensor_from_jagged(x, ends)
        return torch.nested.to_padded_tensor(self.b(torch.tanh(self.a(rows))), 0.0).sum(1)


def test_jagged_tensors():
    torch.manual_seed(0)
    model, y = Ragged().double(), torch.randn(3, 2, dtype=torch.float64)
    found = hesscli.compute(model, (X, y), unbatched=True, blocks="full", framework="torch")
    truth = hessian_by_differences(model, nn.functional.mse_loss, (X,), y)
    assert relative_error(found.matrix(), truth) < 1e-6


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyLinear(1))


def test_lazy_modules_whose_weights_are_loaded():
    torch.manual_seed(0)
    eager, model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double(), lazy()
    model.load_state_dict(eager.state_dict())
    found = hesscli.compute(model.double(), (X, Y), blocks="full", framework="torch")
    truth = hessian(eager, nn.functional.mse_loss, (X,), Y)
    assert relative_error(found.matrix(), truth) < 1e-10
    assert isinstance(model[0], nn.LazyLinear)


class Constant(nn.Module):
    """A constant that is no buffer, and meets what the layers compute."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 3)
        self.scales = torch.tensor([1.0, 2.0, 3.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))) @ torch.diag(self.scales)


class Weighed(Constant):
    """The same, as a vector that the layers' output is multiplied by."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.b(torch.tanh(self.a(x))) @ self.scales).unsqueeze(1).expand(-1, 3)


class Masked(nn.Module):
    """Attention over pairs of rows, of which some are left out by a mask that a trace bakes a dtype into."""

    def __init__(self):
        super().__init__()
        self.a = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(3, 3, 2)
        mask = x[..., 0] > x[..., :1, 0]
        x = x + self.a(x, x, x, key_padding_mask=mask)[0]
        return (
            x.reshape(9, 2) @ torch.full((2, 2), 0.5) + torch.ones_like(mask, dtype=x.dtype).sum()
        )


class Written(nn.Module):
    """Numbers in the code, which a trace keeps as a constant."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x) @ torch.tensor([[0.5, 1.0], [2.0, 0.0], [0.0, -1.0]])))


class Ruled(nn.Module):
    """Positions, in whole and in other numbers, and a matrix that is one but for its corner."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        like = {"dtype": x.dtype}  # which a trace writes down
        places = torch.arange(3, **like).unsqueeze(1) + torch.arange(0, 6, 2, **like).unsqueeze(1)
        rules = torch.eye(3, **like) @ torch.eye(3, 3, **like)[:, [1, 2, 0]]
        rules = rules + places @ torch.linspace(1, 2, 3, **like).unsqueeze(0)
        return self.b(torch.tanh(self.a(x) @ rules)) * torch.arange(1, 4)[-1]


TRACE = partial(torch.jit.trace, example_inputs=X.float())


@pytest.mark.parametrize("blocks", ["full", "diag"])
@pytest.mark.parametrize(
    ("kind", "save"),
    [
        (Constant, torch.jit.script),
        (Weighed, torch.jit.script),
        (Weighed, TRACE),
        (Masked, TRACE),
        (Written, TRACE),
        (Ruled, TRACE),
    ],
)
def test_constants_that_are_made_in_float32(kind, save, blocks, tmp_path):
    torch.manual_seed(0)
    model = kind().eval()
    save(model).save(str(tmp_path / "model.pt"))
    y = X[:, :1].expand(9, 3 if issubclass(kind, Constant) else 2).contiguous()
    options = {"dtype": "float64", "unbatched": True, "blocks": blocks, "framework": "torch"}
    found = hesscli.compute(tmp_path / "model.pt", (X, y), **options)
    in_precision_(model, torch.float64)
    with default_of(torch.float64):
        truth = hessian_by_differences(model, nn.functional.mse_loss, (X,), y)
    if blocks == "full":
        assert relative_error(found.matrix(), truth) < 1e-7
    else:
        size = next(model.parameters()).numel()
        (first, *_) = dict(model.named_parameters())
        assert relative_error(found.block(first), truth[:size, :size]) < 1e-7


def test_a_part_in_double_precision_without_casts():
    """Its output alone is multiplied by a constant of another type than the weights are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 1), nn.Tanh())
    shear = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    model.register_forward_pre_hook(lambda module, given: (given[0] @ shear,))
    x, y = X.float(), Y.float()
    with pytest.raises(hesscli.HesscliError, match="same dtype") as refused:
        hesscli.compute(model, (x, y))
    assert refused.value.hint == "--dtype float64"
    found = hesscli.compute(model, (x, y), dtype="float64", blocks="full", framework="torch")
    truth = hessian(model.double(), nn.functional.mse_loss, (x.double(),), y.double())
    torch.testing.assert_close(found.matrix(), truth)
    with pytest.raises(hesscli.HesscliError, match="got Long and Double") as refused:
        hesscli.compute(nn.Linear(2, 1).double(), (x.long(), y))
    assert refused.value.hint == "--scale 1"


def test_a_part_in_half_precision_with_casts(cli, tmp_path):
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Half(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1).half()\n\n"
        "    def forward(self, x):\n        return self.b(torch.tanh(self.a(x)).half()).float()\n"
    )
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1).half())
    names = {"0": "a", "2": "b"}
    weights = {f"{names[n[0]]}{n[1:]}": p for n, p in plain.state_dict().items()}
    torch.save(weights, tmp_path / "half.pt")
    np.savez(tmp_path / "d.npz", x=X.float().numpy(), y=Y.float().numpy())
    words = ("compute", "half.pt", "d.npz", "--arch", "nets.py:Half", "-b", "full", "-o", "h")
    ran = cli(*words)
    ran.fails(4)
    assert ran.hint.endswith("--dtype float64")
    assert cli(*words, "--dtype", "float64").code == 0
    x, y = X.float().double(), Y.float().double()
    truth = hessian(plain.double(), nn.functional.mse_loss, (x,), y)
    assert relative_error(read(tmp_path / "h")[1]["hessian"], truth) < 1e-10


class Graph(nn.Module):
    """Nodes that read their neighbours, by number: a part of them is none."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 1)

    def forward(self, x: Tensor, to: Tensor) -> Tensor:
        return self.a(x[to])


def test_what_a_graph_network_does_not_accept_is_said_of_all_nodes(cli, tmp_path):
    torch.jit.script(Graph()).save(str(tmp_path / "graph.pt"))
    x, y = np.ones((5, 3), np.float32), np.ones((5, 1), np.float32)
    np.savez(tmp_path / "d.npz", x=x, to=np.array([4, 3, 2, 1, 0]), y=y)
    said = cli("compute", "graph.pt", "d.npz").fails(4)
    assert "float32 [5, 3], int64 [5]" in said
    assert "5x3 and 2x1" in said


class WithoutGradients(nn.Module):
    def __init__(self, when: str) -> None:
        super().__init__()
        self.a, self.b, self.when = nn.Linear(2, 3), nn.Linear(3, 1), when

    def forward(self, x: Tensor) -> Tensor:
        if self.when == "first":
            torch.set_grad_enabled(False)
        h = torch.tanh(self.a(x))
        if self.when == "between":
            with torch.no_grad():
                h = h.clone()
        y = self.b(h)
        if self.when == "last":
            torch.set_grad_enabled(False)
        return y.detach() if self.when == "detached" else y


@pytest.mark.parametrize("job", ["compute", "operator"])
@pytest.mark.parametrize("when", ["first", "detached"])
def test_a_model_without_gradients_is_refused(when, job):
    torch.manual_seed(0)
    with pytest.raises(MismatchError, match="no gradient by any parameter, though") as refused:
        getattr(hesscli, job)(WithoutGradients(when).double(), (X, Y))
    assert refused.value.exit_code == 4
    assert "no_grad" in refused.value.hint
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("when", "like"), [("between", "between"), ("last", "never")])
def test_gradients_that_are_off_in_part(when, like):
    torch.manual_seed(0)
    model, its = WithoutGradients(when).double(), WithoutGradients(like).double()
    its.load_state_dict(model.state_dict())
    found = hesscli.compute(model, (X, Y), blocks="full", framework="torch")
    assert torch.is_grad_enabled()
    assert relative_error(found.matrix(), hessian(its, nn.functional.mse_loss, (X,), Y)) < 1e-9


def test_an_output_that_no_parameter_moves():
    """Nothing is wrong with a Hessian of zero."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :1]

    found = hesscli.compute(Constant().double(), (X, Y), blocks="full")
    assert not found.matrix().any()
    unused = "hessian: unused, detached or under torch.no_grad, so its block is zero"
    assert unused in found.metadata["notes"]


class Flow(nn.Module):
    """Keeps constants in what is no module: a list, a dict, and a distribution of a distribution."""

    def __init__(self):
        super().__init__()
        self.masks = [torch.tensor([[1.0, 0.0], [0.1, 1.0]]), (torch.ones(2, 2) / 3,)]
        self.named = {"turn": torch.tensor([[0.6, -0.8], [0.8, 0.6]])}
        normal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2) / 3)
        self.base = torch.distributions.TransformedDistribution(normal, [])
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = nn.functional.linear(torch.tanh(self.a(x) @ self.masks[0]), self.named["turn"])
        return -self.base.log_prob(self.b(z) @ self.masks[1][0])


def test_constants_in_what_is_no_module():
    torch.manual_seed(0)
    model = Flow()
    own = {"loss": "output", "blocks": "full", "framework": "torch", "dtype": "float64"}
    found = hesscli.compute(model, {"x": X}, **own)
    assert model.masks[0].dtype is model.base.base_dist.loc.dtype is torch.float32
    model.double()
    model.masks = [model.masks[0].double(), (model.masks[1][0].double(),)]
    model.named = {"turn": model.named["turn"].double()}
    base = model.base.base_dist
    model.base = torch.distributions.MultivariateNormal(
        base.loc.double(), scale_tril=base.scale_tril.double()
    )
    truth = hessian(model, lambda terms, _: terms.mean(), (X,), None)
    assert relative_error(found.matrix(), truth) < 1e-12
