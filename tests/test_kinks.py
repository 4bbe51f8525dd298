"""Differences of gradients with every kink held: right with steps that carry hundreds of units across one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import count, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import hessian, relative_error
from problems import blocks_of, compute_blocks, problem_of
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import hesscli
from hesscli.errors import HesscliError
from hesscli.hessian.blocks import Block
from hesscli.hessian.curvatures import CURVATURES
from hesscli.hessian.differences import quotients
from hesscli.hessian.differences.check import Certificate
from hesscli.hessian.differences.directional import DirectionalDifference
from hesscli.hessian.differences.here import Here
from hesscli.hessian.differences.kinks import held_difference
from hesscli.hessian.differences.products import Differences
from hesscli.hessian.guests import guest
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.operator import Products
from hesscli.hessian.routes.finite_difference import FiniteDifference
from hesscli.job.matrix import planning


class Between(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor], inner: int = 24) -> None:
        super().__init__()
        self.a, self.function = nn.Linear(4, 24), function
        self.b = nn.Linear(inner, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(3 * self.a(x)))


TABLE = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
QUANTIZED = (torch.tensor(0.2), torch.tensor(0, dtype=torch.int32))  # the step, and what is zero


def of_three(pick: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
    """What is picked of three units each."""
    return lambda z: pick(z.view(-1, 8, 3), 2)[0]


@torch.jit.script
def heaviside(z: Tensor) -> Tensor:
    """Of what no `TorchFunctionMode` sees to be a constant."""
    return z * torch.heaviside(z.detach(), torch.ones([], dtype=z.dtype))


def observed(z: Tensor) -> Tensor:
    """Fake quantization by what an observer has seen; of float32 alone."""
    seen = (torch.tensor([low]) for low in (1, 1, -4.0, 4.0, 0.2, 0))
    return torch.fused_moving_avg_obs_fake_quant(z.float(), *seen, 0.01, -30, 30, -1).to(z.dtype)


class Cosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.cos()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return -gradient * x.sin()


class Sine(torch.autograd.Function):
    """Applies another."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 1 * Cosine.apply(x - torch.pi / 2)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


class SineByCosine(Sine):
    """Applies another for its derivative, too."""

    @staticmethod
    def backward(ctx, gradient):
        return gradient * Cosine.apply(*ctx.saved_tensors)


class Parts(torch.autograd.Function):
    """Two results."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x), 2 * x

    @staticmethod
    def backward(ctx, first, second):
        return first + 2 * second


class Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask):
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, gradient):
        (mask,) = ctx.saved_tensors
        return gradient * mask, None


def in_place(z: Tensor) -> Tensor:
    """The result is what was written to."""
    y = z + 0
    y.relu_()
    return y


KINKED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "relu": (F.relu, 24),
    "relu-in-place": (in_place, 24),
    "relu-twice": (lambda z: F.relu(F.relu(z) - 0.5), 24),
    "leaky": (lambda z: F.leaky_relu(z, 0.3), 24),
    "leaky-in-place": (lambda z: F.leaky_relu_(z + 0, 0.3), 24),
    "prelu": (lambda z: F.prelu(z, torch.tensor([0.3], dtype=z.dtype)), 24),
    "relu6": (lambda z: F.relu6(3 * z), 24),
    "relu6-twice": (lambda z: F.relu6(F.relu6(3 * z)), 24),
    "hardtanh-in-place": (lambda z: F.hardtanh_(z + 0, -0.5, 0.25), 24),
    "rrelu": (F.rrelu, 24),
    "elu": (lambda z: F.elu(z, 2.0), 24),
    "threshold": (lambda z: F.threshold(z, 0.2, -1.0), 24),
    "hardswish": (lambda z: F.hardswish(2 * z), 24),
    "hardsigmoid": (lambda z: F.hardsigmoid(2 * z), 24),
    "hardshrink": (lambda z: F.hardshrink(z, 0.3), 24),
    "softshrink": (lambda z: F.softshrink(z, 0.3), 24),
    "abs": (torch.abs, 24),
    "clamp": (lambda z: z.clamp(-0.5, 0.5), 24),
    "clamp-above": (lambda z: z.clamp_min(0.1), 24),
    "clamp-below": (lambda z: z.clamp_max(-0.1), 24),
    "where": (lambda z: torch.where(z > 0, z, z.square()), 24),
    "maximum": (lambda z: torch.maximum(z[:, :12], z[:, 12:]), 12),
    "max-pool": (lambda z: F.max_pool1d(z.unsqueeze(1), 3).squeeze(1), 8),
    "max-pool-3d": (lambda z: F.max_pool3d(z.view(-1, 1, 4, 2, 3), (2, 1, 3)).flatten(1), 4),
    "adaptive-max-pool": (lambda z: F.adaptive_max_pool2d(z.view(-1, 1, 4, 6), 2).flatten(1), 4),
    "adaptive-max-pool-3d": (
        lambda z: F.adaptive_max_pool3d(z.view(-1, 1, 4, 2, 3), (2, 1, 2)).flatten(1),
        4,
    ),
    "amax": (lambda z: z.view(-1, 6, 4).amax(2), 6),
    "sort": (lambda z: z.sort(1)[0] * torch.linspace(0, 1, 24, dtype=z.dtype), 24),
    "top": (lambda z: z.topk(5, 1)[0], 5),
    "max": (of_three(torch.max), 8),
    "min": (of_three(torch.min), 8),
    "median": (of_three(torch.median), 8),
    "nanmedian": (of_three(torch.nanmedian), 8),
    "kth": (lambda z: z.view(-1, 8, 3).kthvalue(2, 2)[0], 8),
    "mode": (of_three(torch.mode), 8),
    "cummax": (lambda z: z.cummax(1)[0], 24),
    "cummin": (lambda z: z.cummin(1)[0], 24),
    "sign": (lambda z: z * z.sign(), 24),
    "floor": (lambda z: z * z.floor(), 24),
    "ceil": (lambda z: z * z.ceil(), 24),
    "round": (lambda z: z * z.round(), 24),
    "round-in-place": (lambda z: z * (z + 0).round_(), 24),
    "trunc": (lambda z: z * z.trunc(), 24),
    "heaviside": (heaviside, 24),
    "quantized": (lambda z: torch.fake_quantize_per_tensor_affine(z, 0.2, 0, -5, 5), 24),
    "quantized-by-tensors": (
        lambda z: torch.fake_quantize_per_tensor_affine(z, *QUANTIZED, -5, 5),
        24,
    ),
    "quantized-by-channel": (
        lambda z: torch.fake_quantize_per_channel_affine(
            z, *(x.expand(24) for x in QUANTIZED), 1, -5, 5
        ),
        24,
    ),
    "observed": (observed, 24),
    "table": (lambda z: z * TABLE[(2 * z).long().clamp(0, 2)], 24),
    "function-in-a-function": (lambda z: F.relu(Sine.apply(z)), 24),
    "function-of-two-results": (lambda z: F.relu(sum(Parts.apply(z))), 24),
    "function-of-a-mask": (lambda z: F.relu(Masked.apply(z, TABLE[:1] > 0)), 24),
    "function-of-data": (lambda z: F.relu(z) * Sine.apply(TABLE).sum(), 24),
    "complex": (lambda z: F.relu(torch.fft.fft(z).real), 24),
    "complex-sign": (lambda z: F.relu(torch.complex(z, z + 9).sgn().real), 24),
    "dead": (lambda z: F.relu(F.relu(-z.square()) + z * 0), 24),  # each unit lies at its corner
}


# Here units that cross do not go on in a straight line, but as they really do: that is off by a share of the step.
CROSSING = {"hardswish", "abs", "where", "maximum", "amax"}
LIMITS = {  # those that bend, and one of float32
    "elu": 2e-3,
    "function-in-a-function": 2e-3,
    "complex-sign": 1e-4,
    "observed": 1e-5,
}


def pose(function: Callable[[Tensor], Tensor], inner: int) -> Problem:
    torch.manual_seed(0)
    module = Between(function, inner).double()
    x, y = torch.randn(300, 4, dtype=torch.float64), torch.randn(300, 2, dtype=torch.float64)
    return problem_of(module, (x,), y, "mse", batch_size=120)


def along_weight(problem: Problem) -> tuple[DirectionalDifference, Tensor]:
    """A random direction in the first weight, and the product with it by double backward."""
    weight = problem.parameters["a.weight"]
    problem = Problem(**{**vars(problem), "parameters": {"a.weight": weight}})
    v = torch.randn(weight.numel(), dtype=torch.float64)
    product = Products(problem)(v)
    block = Block("a.weight", ("a.weight",), (weight.numel(),))
    return DirectionalDifference(problem, block, v, Here(problem)), product


@pytest.mark.parametrize("name", KINKED)
def test_a_long_step_meets_no_kink_that_is_held(name):
    along, product = along_weight(pose(*KINKED[name]))
    held, plain = along.held_quotient(1e-2), along.quotient(1e-2)
    assert held is not None
    error, size = float((held - product).norm()), float(product.norm())
    if name == "dead":
        assert error == size == 0
        return
    assert float((plain - product).norm()) > max(0.1 * size, 20 * error)
    assert name in CROSSING or error <= LIMITS.get(name, 1e-6) * size


def test_nothing_is_held_where_all_is_smooth():
    assert along_weight(pose(torch.tanh, 24))[0].held_quotient(1e-2) is None


@pytest.mark.parametrize("rest", [[1.0], [0.0, 1.0]], ids=["alone", "beside another"])
@pytest.mark.parametrize("is_zero", [lambda x: x == 0, lambda x: ~(x != 0)])
def test_a_piece_that_is_one_point_is_not_held(is_zero, rest):
    def gradient(h):
        x = torch.tensor([h, *rest])
        return x.where(is_zero(x), 3 * x)

    assert held_difference(gradient, 0.1) is None


@pytest.mark.parametrize("written", [True, False])
def test_a_write_through_a_view_without_gradients_is_not_held(written):
    def gradient(h):
        x = torch.tensor([h, 1.0], requires_grad=True) * 2
        with guest(lambda reason, error: HesscliError(reason)), torch.no_grad():
            view = x.view(1, 2)
            if written:
                view[:, 0].mul_(3)
        return x.detach() * x.detach()

    assert (held_difference(gradient, 0.1) is None) == written


@pytest.mark.parametrize(
    "other",
    [
        torch.tanh,
        lambda z: F.relu(F.relu(z)),
        lambda z: F.relu(z.view(-1, 8, 3)).flatten(1),
        lambda z: z.sort(1)[0],
    ],
    ids=["fewer", "more", "of another shape", "of another kind"],
)
def test_a_pass_with_other_calls_is_not_trusted(other):
    calls = iter([F.relu, other, F.relu] * 9)
    along, _ = along_weight(pose(F.relu, 24))
    along.problem.module.function = lambda z: next(calls)(z)
    assert along.held_quotient(1e-2) is None


def test_a_pass_that_the_model_refuses_is_not_trusted():
    comparisons = iter(range(3))

    def solver(z):
        assert not next(comparisons), "underflow in dt"  # where steps are others than it chose
        return F.relu(z)

    along, _ = along_weight(pose(F.relu, 24))
    along.problem.module.function = solver
    assert along.held_quotient(1e-2) is None
    assert not list(comparisons)


class Deep(nn.Module):
    """A quarter of a million ReLUs: some lie so close to their corner that every step crosses it, or right at it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        nn.init.zeros_(self.first.bias)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu6(self.second(F.relu(self.first(x))))
        return self.last(z.mean((2, 3)))


def test_many_kinks_are_no_reason_to_refuse_what_is_right():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, 32, 32, generator=generator)
    x[:, :, :4] = 0  # an empty border
    y = torch.randint(3, (8,), generator=generator)
    problem = problem_of(Deep().double(), (x.double(),), y, "cross-entropy")
    bias = problem.parameters["first.bias"]
    alone = Problem(**{**vars(problem), "parameters": {"first.bias": bias}})
    block = Block("first.bias", ("first.bias",), (bias.numel(),))
    matrix = Products(alone).matrix_rows(0, bias.numel())
    narrow, certificate = (
        Certificate(problem, dtype, 0) for dtype in (torch.float32, torch.float64)
    )
    assert narrow.passed(narrow.matrix(block, matrix))
    assert certificate.passed(certificate.matrix(block, matrix))
    assert not certificate.passed(certificate.matrix(block, matrix + 0.01 * matrix.diag().diag()))
    diagonal = matrix.diag()
    assert certificate.passed(certificate.diagonal(block, diagonal))
    assert not certificate.passed(certificate.diagonal(block, 1.01 * diagonal))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("blocks", ["diag", "elements", "full"])
def test_units_that_lie_at_their_corner(cli, tmp_path, blocks, curvature, dtype):
    """Biases start at zero, and images have empty borders: there every step is one across a kink."""
    torch.manual_seed(0)
    first = nn.Conv2d(1, 3, 3, padding=1)
    nn.init.zeros_(first.bias)
    module = nn.Sequential(
        *(first, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 2), nn.LeakyReLU(0.2)),
        *(nn.Flatten(), nn.Linear(27, 3)),
    )
    x = torch.randn(12, 1, 8, 8)
    x[:, :, :5] = 0
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(module, x).save("net.pt")
    np.savez("data.npz", x=x.numpy(), y=np.arange(12) % 3)
    options = ("--blocks", blocks, "--curvature", curvature, "--dtype", dtype)
    document = cli("compute", "net.pt", "data.npz", *options, "--json").document
    assert document["check"]["relative_error"] < document["check"]["tolerance"]
    assert {block["method"] for block in document["blocks"]} <= {
        *("gauss-newton", "preactivation", "hvp"),
    }


def test_the_hessian_is_no_gauss_newton_matrix():
    problem = pose(lambda z: torch.tanh(F.relu(z)), 24)
    weight = problem.parameters["a.weight"]
    alone = Problem(**{**vars(problem), "parameters": {"a.weight": weight}})
    block = Block("a.weight", ("a.weight",), (weight.numel(),))
    for curvature in ("hessian", "ggn"):
        matrix = CURVATURES[curvature].products(alone).matrix_rows(0, weight.numel())
        for claimed in ("hessian", "ggn"):
            checked = CURVATURES[claimed].certificate(problem, torch.float32, 0)
            assert checked.passed(checked.matrix(block, matrix)) == (claimed == curvature)


class Distances(nn.Module):
    """Distances, and ReLUs whose biases are zero, so that an image's empty border lies at every corner."""

    def __init__(self, written_out: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.head = nn.Linear(3, 2)
        self.centres = nn.Parameter(torch.tensor([[0.3, -0.2], [-1.0, 0.5]]))
        self.written_out = written_out

    def forward(self, x: Tensor) -> Tensor:
        z = self.head(F.relu(self.conv(x)).square().mean((2, 3)))
        if not self.written_out:
            return torch.cdist(z, self.centres)
        return (z.unsqueeze(1) - self.centres).square().sum(2).sqrt()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_second_derivatives(dtype: torch.dtype) -> None:
    x = torch.zeros(12, 1, 24, 24, dtype=torch.float64)
    x[:, :, 6:18, 6:18] = torch.randn(12, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    y = torch.rand(12, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def posed(written_out: bool, dtype: torch.dtype) -> Problem:
        torch.manual_seed(0)
        return problem_of(Distances(written_out), (x,), y, "mse", batch_size=5, dtype=dtype)

    written_out = posed(True, torch.float64).module
    truth = hessian(written_out, F.mse_loss, (x,), y)
    problem = posed(False, dtype)
    tolerance = 1e-7 if dtype == torch.float64 else 1e-2
    (block,) = blocks_of(problem, "full")
    found = compute_blocks(FiniteDifference(lambda: problem), [block])["hessian"]
    assert relative_error(found, truth) < tolerance
    products = Differences(problem)
    v = torch.linspace(-1, 1, products.size, dtype=torch.float64).flip(0).sin()
    assert relative_error(products(v), truth @ v) < tolerance


def test_kinks_are_held_where_float32_has_them():
    """A unit whose sum float32 rounds across its corner: the product in float32 is that of the piece it is on."""
    torch.manual_seed(0)
    module = Between(F.relu).float()
    x, y = torch.randn(12, 4), torch.randn(12, 2)
    # Until float32's rounding of unit 5 is to the other side of its corner.
    for sample in range(12):
        with torch.no_grad():
            z = x[sample].double() @ module.a.weight[5].double()
            module.a.bias[5] = -z.float()
            exact = float(z + module.a.bias[5].double())
            rounded = float(module.a(x)[sample, 5])
        if (exact > 0) != (rounded > 0):
            break
    else:
        pytest.fail("float32 rounds nothing here")
    narrow = problem_of(module, (x,), y, "mse", dtype=torch.float32)
    wide = narrow.double()
    assert wide is not None
    (block,) = blocks_of(narrow, "full")
    certificate = Certificate(wide, torch.float32, 0)
    v = certificate.direction(block)
    product = Products(narrow)(v.float()).double()
    along = certificate.along(block, v)
    quotients = [along.held_quotient(step, by_original=True) for step in (1e-5, 1e-4)]
    quotients += [along.held_quotient(step) for step in (1e-5, 1e-4)]
    assert all(q is not None for q in quotients)
    errors = [float((product - q).norm() / max(product.norm(), q.norm())) for q in quotients]
    assert max(errors[:2]) < 1e-6
    assert min(errors[2:]) > 1e-3


class QNetwork(nn.Module):
    """The squared error against a target of its own, which is a constant."""

    def __init__(self):
        super().__init__()
        self.q = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x, after):
        return (self.q(x).sum(1) - 0.9 * self.q(after).max(1).values.detach()) ** 2


class QNetworkWithoutGradients(QNetwork):
    def forward(self, x, after):
        with torch.no_grad():
            target = 0.9 * self.q(after).max(1).values
        return (self.q(x).sum(1) - target) ** 2


class StraightThrough(QNetwork):
    """Weights and activations of few bits, with the derivatives of those of all bits."""

    def forward(self, x, after):
        first, last = self.q[0], self.q[2]
        weight = first.weight + ((first.weight * 8).round() / 8 - first.weight).detach()
        h = torch.tanh(F.linear(x, weight, first.bias))
        h = h + self.constant(((h * 4).round() / 4).sub(h))
        return (F.linear(h, last.weight, last.bias) - after[:, :2]).square().sum(1)

    def constant(self, x):
        return x.detach()


class StraightThroughData(StraightThrough):
    def constant(self, x):
        return x.data


def as_module(model, inputs, path):
    return model


def as_script(model, inputs, path):
    torch.jit.script(model).save(path)
    return path


def as_program(model, inputs, path):
    torch.export.save(torch.export.export(model, inputs), path)
    return path


@pytest.mark.parametrize("method", ["auto", "finite-difference"])
@pytest.mark.parametrize("blocks", ["diag", "elements"])
@pytest.mark.parametrize(
    ("net", "saved"),
    [
        *product(
            [QNetwork, QNetworkWithoutGradients, StraightThrough],
            [as_module, as_script, as_program],
        ),
        (StraightThroughData, as_module),
        (StraightThroughData, as_script),
    ],
)
def test_what_a_model_detaches_is_a_constant(net, blocks, method, saved, tmp_path):
    torch.manual_seed(0)
    model = net().double()
    x, after = torch.randn(2, 9, 3, dtype=torch.float64)
    found = hesscli.compute(
        saved(model, (x, after), tmp_path / "model.pt2"),
        {"x": x, "after": after},
        inputs=("x", "after"),
        loss="output",
        blocks=blocks,
        method=method,
        framework="torch",
    )
    assert {b["method"] for b in found.metadata["blocks"]}.isdisjoint(
        {"finite-difference"} if method == "auto" else ()
    )
    names = [name for name, _ in model.named_parameters()]
    leaves = tuple(p.detach() for p in model.parameters())

    def loss(*values):
        output = torch.func.functional_call(
            model, dict(zip(names, values, strict=True)), (x, after)
        )
        return output.mean()

    truth = torch.autograd.functional.hessian(loss, leaves)
    for index, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        own = truth[index][index].reshape(leaf.numel(), -1)
        block = found.block(name)
        torch.testing.assert_close(
            block if blocks == "diag" else block.reshape(-1),
            own if blocks == "diag" else own.diagonal(),
            rtol=1e-8,
            atol=1e-9,
        )


def assigned(w: Tensor) -> Tensor:
    out = torch.zeros_like(w)
    out[:, :2] = w[:, 2:]
    return out


CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "corner": F.relu,
    "piece": F.elu,
    "bounds": lambda w: w.clamp(-0.5, 0.5),
    "picked": lambda w: w.max(1, keepdim=True).values,
    "sorted": lambda w: w.sort(1)[0],
    "joined": lambda w: torch.cat([w[:, 2:], w[:, :2]], 1),
    "copied": lambda w: torch.empty_like(w).copy_(w),
    "assigned": assigned,
    "summed-up": lambda w: torch.ones_like(w).add_(w).add_(w),
    "at-the-end": lambda w: torch.add(w, 1, out=torch.empty_like(w)),
    "viewed": lambda w: w.t().t(),
    "parts": lambda w: w.view(-1).unflatten(0, (3, 4)),
    "split": lambda w: w.unbind(0)[0],
}


class Scaling(nn.Module):
    """Scales that are made of the weights, and are constants."""

    def __init__(self, scales: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.scales = nn.Parameter(torch.randn(3, 4)), scales

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w.T) @ (self.w * self.scales(self.w))


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize(
    "scales",
    [
        *(torch.no_grad()(function) for function in CONSTANTS.values()),
        lambda w: w.mul(1).detach().mul_(0.5).add_(1),
    ],
    ids=[*CONSTANTS, "written-to"],
)
def test_what_is_made_of_weights_without_gradients_is_a_constant(
    scales: Callable[[Tensor], Tensor], curvature: str
) -> None:
    torch.manual_seed(0)
    model = Scaling(scales).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    options = {"curvature": curvature, "blocks": "full", "framework": "torch"}
    found = hesscli.compute(model, (x, y), **options).matrix()
    fixed = scales(model.w).detach()
    model.scales = lambda w: fixed
    assert relative_error(found, hesscli.compute(model, (x, y), **options).matrix()) < 1e-12
    if curvature == "hessian":
        assert relative_error(found, hessian(model, F.mse_loss, (x,), y)) < 1e-9


class RoundedToZero(nn.Module):
    """What straight-through rounding makes zero still moves, to autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = 0.1 * self.a(x)
        return self.b(z + (z.round() - z).detach())


@pytest.mark.parametrize("method", ["auto", "finite-difference"])
def test_what_is_rounded_to_zero(method: str) -> None:
    torch.manual_seed(0)
    model = RoundedToZero().double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    found = hesscli.compute(model, (x, y), blocks="full", method=method, framework="torch")
    assert relative_error(found.matrix(), hessian(model, F.mse_loss, (x,), y)) < 1e-6


class Truncated(nn.Module):
    """Truncated backpropagation, and a gate that is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r, self.b = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        h = torch.tanh(z)
        h.detach_()
        h.mul_(0.7)
        return self.b(torch.tanh(self.r(h) + z) * torch.sigmoid(torch.detach_(z.clone())))


@pytest.mark.parametrize("blocks", ["full", "elements"])
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("scripted", [True, False])
def test_what_is_detached_in_place_is_a_constant(tmp_path, scripted, check, blocks):
    torch.manual_seed(0)
    model = Truncated().double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    saved = tmp_path / "net.pt"
    torch.jit.script(model).save(saved)
    given = saved if scripted else model
    found = hesscli.compute(given, (x, y), blocks=blocks, check=check, framework="torch")
    truth = hessian(model, F.mse_loss, (x,), y)
    wanted = truth if blocks == "full" else truth.diagonal().diag()
    assert relative_error(found.matrix(), wanted) < 1e-9
    assert not [note for note in found.metadata["notes"] if "instead" in note]


class Tied(nn.Module):
    """Words that are scored by their own embeddings, padding among them."""

    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(6, 3, padding_idx=1)
        self.e.weight.data[1] = torch.tensor([0.3, -0.2, 0.5])

    def forward(self, x):
        return torch.tanh(self.e(x).mean(1)) @ self.e.weight.T


def test_padding_that_is_tied_to_the_output():
    torch.manual_seed(0)
    model = Tied().double()
    x, y = torch.randint(0, 6, (9, 4)), torch.randint(0, 6, (9,))
    assert (x == 1).any()
    found = hesscli.compute(model, (x, y), blocks="full", framework="torch")
    torch.testing.assert_close(found.matrix(), hessian(model, F.cross_entropy, (x,), y))
    assert not any("instead" in note for note in found.metadata["notes"])


@pytest.mark.parametrize("blocks", ["full", "diag", "elements"])
@pytest.mark.parametrize(
    "unit",
    [F.elu, F.selu, F.relu, lambda z: F.celu(z, 0.5), lambda z: F.elu_(z + 0, 2.0)],
    ids=["elu", "selu", "relu", "celu", "elu-in-place"],
)
def test_units_at_their_corner(unit, blocks):
    """No bias, and an input of zeros: there they are what autograd takes them for."""
    torch.manual_seed(0)
    model = Between(unit).double()
    nn.init.zeros_(model.a.bias)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    x[0] = 0
    found = hesscli.compute(model, (x, y), blocks=blocks, framework="torch")
    assert not [note for note in found.metadata["notes"] if "instead" in note]
    truth = hessian(model, F.mse_loss, (x,), y)
    assert relative_error(found.matrix().diagonal(), truth.diagonal()) < 1e-9


class Slopes(nn.Module):
    """PReLU as what its first derivative at zero takes it for; PyTorch's second there is that of the other side."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((24,), 0.25))

    def forward(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, z, self.weight * z)


@pytest.mark.parametrize("blocks", ["full", "diag", "elements"])
@pytest.mark.parametrize(
    ("unit", "same", "corner"),
    [
        (lambda: nn.PReLU(24), Slopes, 0.0),
        (lambda: F.hardsigmoid, lambda: lambda z: F.relu6(z + 3) / 6, 3.0),
        (lambda: F.hardsigmoid, lambda: lambda z: F.relu6(z + 3) / 6, -3.0),
        (lambda: F.hardswish, lambda: F.hardswish, 3.0),
        (lambda: nn.RReLU().eval(), lambda: lambda z: F.leaky_relu(z, 11 / 48), 0.0),
    ],
    ids=["prelu", "hardsigmoid-above", "hardsigmoid-below", "hardswish", "rrelu"],
)
def test_units_at_their_corner_whose_second_derivative_is_not_pytorchs(unit, same, corner, blocks):
    class Net(Between):
        def forward(self, x):
            return self.b(torch.tanh(self.function(self.a(x) + corner)))

    torch.manual_seed(0)
    model = Net(unit()).double().eval()
    nn.init.zeros_(model.a.bias)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    x[0] = 0
    found = hesscli.compute(model, (x, y), blocks=blocks, framework="torch")
    truth_of = Net(same()).double()
    truth_of.load_state_dict(model.state_dict())
    truth = hessian(truth_of, F.mse_loss, (x,), y)
    assert relative_error(found.matrix().diagonal(), truth.diagonal()) < 1e-9


def test_a_random_slope_is_one_number_in_eval_mode():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 5), nn.RReLU(0.1, 0.4), nn.Linear(5, 2)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    found = hesscli.compute(layers, (x, y), framework="torch")
    assert {facts["method"] for facts in found.blocks.values()} == {"gauss-newton"}
    truth = hessian(layers.eval(), F.mse_loss, (x,), y)
    assert relative_error(found.block("0.weight"), truth[:20, :20]) < 1e-9
    hesscli.compute(layers, (x, y), curvature="fisher")


@pytest.mark.parametrize(
    "pick",
    [
        lambda z: z.max(2)[0],
        lambda z: z.min(-1)[0],
        lambda z: z.median(2)[0],
        lambda z: z.kthvalue(2, 2)[0],
        lambda z: z.topk(1, 2)[0].squeeze(2),
        lambda z: z.sort(2)[0][..., 1],
        lambda z: z.cummax(2)[0][..., 1],
    ],
    ids=["max", "min", "median", "kthvalue", "topk", "sort", "cummax"],
)
def test_ties(pick):
    """No bias, and an input of zeros: autograd goes on with the one that was picked."""
    torch.manual_seed(0)
    model = Between(lambda z: torch.tanh(pick(z.view(-1, 8, 3))), 8).double()
    nn.init.zeros_(model.a.bias)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    x[0] = 0
    found = hesscli.compute(model, (x, y), blocks="full", framework="torch")
    assert not [note for note in found.metadata["notes"] if "instead" in note]
    assert relative_error(found.matrix(), hessian(model, F.mse_loss, (x,), y)) < 1e-9


def test_a_parameter_that_is_read_as_a_number():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.t = nn.Linear(4, 2), nn.Parameter(torch.tensor(0.7))

        def forward(self, x):
            return torch.tanh(self.a(x) / self.t.item()) * self.t

    torch.manual_seed(0)
    model = Net().double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    found = hesscli.compute(model, (x, y), blocks="full", framework="torch")
    assert not [note for note in found.metadata["notes"] if "instead" in note]
    t = float(model.t)
    model.forward = lambda x: torch.tanh(model.a(x) / t) * model.t
    assert relative_error(found.matrix(), hessian(model, F.mse_loss, (x,), y)) < 1e-9


class Rounded(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Binary(torch.autograd.Function):
    """Another, whose derivative is zero outside of -1 to 1."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() < 1)


class Shifted(torch.autograd.Function):
    """More than one input, and one that is no tensor."""

    @staticmethod
    def forward(ctx, x, shift, steps):
        return torch.round(steps * x) / steps + torch.round(shift)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient.sum().view(1), None


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is turned around."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Stepped(torch.autograd.Function):
    """Steps that are finer than those of any difference, whose derivative is zero."""

    @staticmethod
    def forward(ctx, x):
        return torch.floor(1e8 * x) / 1e8

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient)


class Constant(Stepped):
    """The same without a derivative: its result is detached."""

    backward = torch.autograd.Function.backward


class Forgetful(torch.autograd.Function):
    """Right once: what it saves for its derivative is a constant to the second one."""

    @staticmethod
    def forward(ctx, x):
        s = torch.sigmoid(x)
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx, gradient):
        x, s = ctx.saved_tensors
        return gradient * s * (1 + x * (1 - s))


class Quantized(nn.Module):
    def __init__(self, function, of_weights):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.shift = nn.Parameter(torch.tensor([0.3]))
        self.function, self.of_weights = function, of_weights

    def through(self, x):
        arguments = (self.shift, 4) if issubclass(self.function, Shifted) else ()
        made = self.function.apply(x, *arguments)
        return x + made.detach() if self.function is Constant else made

    def forward(self, x):
        if self.of_weights:
            return self.b(torch.tanh(F.linear(x, self.through(self.a.weight), self.a.bias)))
        return self.b(self.through(torch.tanh(self.a(x))))


def quantized(function, of_weights) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    return Quantized(function, of_weights).double(), x, y


@pytest.mark.parametrize("of_weights", [True, False])
@pytest.mark.parametrize(
    "function", [Rounded, Binary, Shifted, Reversed, SineByCosine, Stepped, Constant]
)
@pytest.mark.parametrize("method", ["auto", "finite-difference"])
def test_derivatives_that_a_model_defines_itself(function, of_weights, method):
    model, x, y = quantized(function, of_weights)
    found = hesscli.compute(model, (x, y), blocks="full", framework="torch", method=method)
    assert not [note for note in found.metadata["notes"] if "instead" in note]
    assert relative_error(found.matrix(), hessian(model, F.mse_loss, (x,), y)) < 1e-6


def test_a_second_derivative_that_a_model_gets_wrong():
    model, x, y = quantized(Forgetful, False)
    found = hesscli.compute(model, (x, y), blocks="full", framework="torch")
    assert [note for note in found.metadata["notes"] if "finite-difference instead" in note]
    model.through = F.silu
    assert relative_error(found.matrix(), hessian(model, F.mse_loss, (x,), y)) < 1e-6


def pulled(ctx, gradient):
    x, w, y = ctx.saved_tensors
    z = gradient * (1 - y * y)
    return z @ w, z.T @ x


class Once(torch.autograd.Function):
    """tanh(x w^T), with a derivative that is right, and not to be differentiated."""

    @staticmethod
    def forward(ctx, x, w):
        y = torch.tanh(x @ w.T)
        ctx.save_for_backward(x, w, y)
        return y

    backward = staticmethod(once_differentiable(pulled))


class WithoutGradients(Once):
    """The same, a constant to the second derivative."""

    backward = staticmethod(torch.no_grad()(pulled))


class InPlace(Once):
    """The same, with a second derivative that would need what is overwritten."""

    @staticmethod
    def backward(ctx, gradient):
        x, w, y = ctx.saved_tensors
        space = (gradient * (1 - y * y)).sinh()
        z = space.asinh()
        space.zero_()
        return z @ w, z.T @ x


class Fused(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2, 4))
        self.function = function

    def forward(self, x):
        return self.function(F.relu(self.function(x, self.w)), self.v)


class Asked(Once):
    """The same, and how often its derivative is asked for, by a count that is not put back from pass to pass."""

    times = count()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        next(Asked.times)
        return pulled(ctx, gradient)


class Smooth(Fused):
    def forward(self, x):
        return self.function(torch.sigmoid(self.function(x, self.w)), self.v)


def test_smooth_functions_need_not_be_held():
    """Four gradients a column, of two Functions each; to hold one asks for its derivative three times more."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    model = Smooth(Asked.apply).double()
    options = {"params": "w", "method": "finite-difference", "framework": "torch", "check": False}
    found = hesscli.compute(model, (x, y), **options).block("w")
    assert next(Asked.times) < 2 * 4 * len(found) + 100
    model.function = lambda x, w: torch.tanh(x @ w.T)
    assert relative_error(found, hessian(model, F.mse_loss, (x,), y)[:12, :12]) < 1e-6


class Assigned(torch.autograd.Function):
    """Writes into memory that others see."""

    @staticmethod
    def forward(ctx, scratch, value, place):
        ctx.place = place
        scratch.data[:, place] = value
        return scratch

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient[:, ctx.place], None


class InScratch(nn.Module):
    """Steps of a solver, each of which depends on the one before, in memory that held anything."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x):
        k = Assigned.apply(torch.empty(len(x), 3, 4, dtype=x.dtype), F.relu(self.a(x)), 0)
        for place in (1, 2):
            k = Assigned.apply(k, torch.tanh(self.b(k[:, place - 1])), place)
        return k.sum(1)


class InLists(InScratch):
    def forward(self, x):
        k = [F.relu(self.a(x))]
        for _ in range(2):
            k.append(torch.tanh(self.b(k[-1])))
        return sum(k)


class Normalized(InScratch):
    """The definition of a norm asks whether it is zero, which the norm itself does not."""

    def forward(self, x):
        return F.relu(self.b(F.normalize(F.relu(self.a(x) + 1))))


@pytest.mark.parametrize(("net", "plain"), [(InScratch, InLists), (Normalized, Normalized)])
def test_outputs_with_every_kink_held(net, plain, monkeypatch):
    monkeypatch.setattr("hesscli.hessian.differences.output_difference.nullcontext", None)
    torch.manual_seed(0)
    model = net().double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64)
    found = hesscli.compute(model, (x, y), curvature="ggn", blocks="full", framework="torch")
    same = plain().double()
    same.load_state_dict(model.state_dict())
    parameters = dict(same.named_parameters())
    J = torch.autograd.functional.jacobian(
        lambda *values: torch.func.functional_call(
            same, dict(zip(parameters, values, strict=True)), (x,)
        ),
        tuple(parameters.values()),
    )
    J = torch.cat([part.reshape(y.numel(), -1) for part in J], 1)
    assert relative_error(found.matrix(), 2 / y.numel() * J.T @ J) < 1e-10
    assert found.metadata["check"]["relative_error"] < 1e-8


class DoubledInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class InView(InScratch):
    def forward(self, x):
        z = F.relu(self.a(x)).clone()
        DoubledInPlace.apply(z[:, :2])
        return self.b(z)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_a_function_that_writes_into_a_view(curvature):
    torch.manual_seed(0)
    model, x = InView().double(), torch.randn(12, 3, dtype=torch.float64)
    y = torch.randn(12, 4, dtype=torch.float64)
    found = hesscli.compute(model, (x, y), curvature=curvature, framework="torch")
    z = torch.relu(model.a(x)).detach() * torch.tensor([2, 2, 1, 1])
    of_row = 2 / y.numel() * z.T @ z
    assert relative_error(found.block("b.weight"), torch.block_diag(*[of_row] * 4)) < 1e-10


class OfNoFunction(Once):
    """The same, with a gradient that no function has."""

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        of_x, of_w = pulled(ctx, gradient)
        return of_x, of_w * torch.arange(1, 1 + of_w.numel(), dtype=of_w.dtype).view_as(of_w)


@pytest.mark.parametrize("blocks", ["diag", "elements"])
def test_a_gradient_that_is_no_functions_is_refused(blocks):
    torch.manual_seed(0)
    model = Fused(OfNoFunction.apply).double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    with pytest.raises(hesscli.HesscliError, match="finite-difference differs from gradients"):
        hesscli.compute(model, (x, y), blocks=blocks)


class OfAFunctionNearly(Once):
    """As the adjoint of an equation that is solved in steps: off by as much as the steps are."""

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        of_x, of_w = pulled(ctx, gradient)
        factors = torch.arange(of_w.numel(), dtype=of_w.dtype).view_as(of_w)
        return of_x, of_w * (1 + 1e-4 * factors)


@pytest.mark.parametrize("blocks", ["diag", "elements"])
def test_gradients_that_contradict_each_other_do_for_fewer_digits(blocks):
    torch.manual_seed(0)
    model = Fused(OfAFunctionNearly.apply)
    x, y = torch.randn(12, 3), torch.randn(12, 2)
    with pytest.raises(hesscli.HesscliError, match="the gradients contradict each other") as caught:
        hesscli.compute(model, (x, y), blocks=blocks, dtype="float64")
    assert caught.value.hint == "--dtype float32"
    assert hesscli.compute(model, (x, y), blocks=blocks).metadata["check"]["relative_error"] < 1e-3


class ShiftedScores(nn.Module):
    """A parameter of which a softmax leaves no trace, before a Function."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)
        self.shift = nn.Parameter(torch.randn(12, 1))

    def forward(self, x):
        return Once.apply(torch.softmax(self.a(x) + self.shift, 1), self.b.weight) ** 2


@pytest.mark.parametrize("seed", range(3))
def test_a_block_of_differences_that_is_zero_but_for_rounding(seed):
    torch.manual_seed(0)
    model = ShiftedScores().double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    options = {"params": "shift", "method": "finite-difference", "seed": seed}
    found = hesscli.compute(model, (x, y), blocks="elements", batch_size=12, **options)
    assert abs(found.block("shift")).max() < 1e-8


class Target(nn.Module):
    """A target of its own, which a Function makes without gradients."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        z = F.relu(self.a(x))
        with torch.no_grad():
            target = Once.apply(z, self.b.weight)
        return z * (z - target)


def test_what_a_function_computes_without_gradients_is_a_constant():
    torch.manual_seed(0)
    model = Target().double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64)
    found = hesscli.compute(model, (x, y), blocks="full", framework="torch")
    assert relative_error(found.matrix(), hessian(model, F.mse_loss, (x,), y)) < 1e-10


def own_apply(function):
    return function.apply


def apply_of_c(function):
    """What `function.apply` is since PyTorch 2.14, where it was kept before: nothing stands in for it."""
    return vars(torch._C._FunctionBase)["apply"].__get__(None, function)


@pytest.mark.parametrize("apply", [own_apply, apply_of_c])
@pytest.mark.parametrize("blocks", ["full", "diag", "elements"])
@pytest.mark.parametrize("function", [Once, WithoutGradients, InPlace])
def test_derivatives_that_cannot_be_differentiated(function, blocks, apply):
    torch.manual_seed(0)
    model = Fused(apply(function)).double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    found = hesscli.compute(model, (x, y), blocks=blocks, framework="torch")
    assert {block["method"] for block in found.metadata["blocks"]} == {"finite-difference"}
    model.function = lambda x, w: torch.tanh(F.linear(x, w))
    truth = hessian(model, F.mse_loss, (x,), y)
    if blocks == "full":
        assert relative_error(found.matrix(), truth) < 1e-6
    for name, part in (("w", slice(0, 12)), ("v", slice(12, 20))) if blocks != "full" else ():
        wanted = truth[part, part]
        if blocks == "elements":
            wanted = wanted.diagonal().view(found.block(name).shape)
        assert relative_error(found.block(name), wanted) < 1e-6


class RoundedOnce(Rounded):
    backward = staticmethod(once_differentiable(Rounded.backward))


class BinaryOnce(Binary):
    backward = staticmethod(once_differentiable(Binary.backward))


class ShiftedOnce(Shifted):
    backward = staticmethod(once_differentiable(Shifted.backward))


@pytest.mark.parametrize("of_weights", [True, False])
@pytest.mark.parametrize(("function", "same"), [(RoundedOnce, Rounded), (BinaryOnce, Binary)])
def test_straight_through_that_cannot_be_differentiated(function, same, of_weights):
    model, x, y = quantized(function, of_weights)
    found = hesscli.compute(model, (x, y), blocks="full", framework="torch")
    truth = hessian(quantized(same, of_weights)[0], F.mse_loss, (x,), y)
    assert relative_error(found.matrix(), truth) < 1e-6


def test_straight_through_that_cannot_be_held():
    model, x, y = quantized(ShiftedOnce, False)
    with pytest.raises(hesscli.HesscliError, match="differs from gradients") as caught:
        hesscli.compute(model, (x, y), blocks="full")
    assert caught.value.exit_code == 5


class WrongInOne(torch.autograd.Function):
    """tanh, whose second derivative lacks a part for one of the units."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        slope = 1 - torch.tanh(x) ** 2
        wrong = torch.arange(x.shape[1]) == 5
        return gradient * torch.where(wrong, slope.detach(), slope)


def test_a_diagonal_that_is_wrong_in_one_place():
    torch.manual_seed(0)
    model = Between(WrongInOne.apply).double()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    found = hesscli.compute(model, (x, y), blocks="elements", framework="torch")
    methods = {block["name"]: block["method"] for block in found.metadata["blocks"]}
    assert methods["a.weight"] == methods["a.bias"] == "finite-difference"
    model.function = torch.tanh
    truth = hessian(model, F.mse_loss, (x,), y).diagonal()[:96]
    assert relative_error(found.block("a.weight").view(-1), truth) < 1e-6


class Averaged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.out = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 2)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.tanh(self.e(words)).mean(1))


@pytest.mark.parametrize("bands", [False, True])
@pytest.mark.parametrize("blocks", ["diag", "full"])
def test_padding_is_a_constant_where_kinks_are_not_held(
    monkeypatch: pytest.MonkeyPatch, blocks: str, bands: bool
) -> None:
    monkeypatch.setattr(quotients, "held_difference", lambda *_, **__: None)
    if bands:
        monkeypatch.setattr(planning, "LARGE", 8)
    torch.manual_seed(0)
    model = Averaged().double()
    nn.init.normal_(model.e.weight)  # of the padding too: it is what all samples have in common
    words, y = torch.randint(0, 5, (12, 3)), torch.randn(12, 2, dtype=torch.float64)
    words[:, 0] = 0
    options = {"method": "finite-difference", "blocks": blocks, "framework": "torch"}
    found = hesscli.compute(model, (words, y), loss="mse", **options)
    truth = hessian(model, F.mse_loss, (words,), y)
    if blocks == "diag":
        assert relative_error(found.block("e.weight"), truth[:20, :20]) < 1e-6
    else:
        assert relative_error(found.matrix(), truth) < 1e-6
