"""Products with the Hessian, the Gauss-Newton and the empirical Fisher matrix, against matrices formed explicitly."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, Case, expected
from oracles import _twice_differentiable_attention, hessian, relative_error
from problems import (
    STRUCTURES,
    Net,
    compute_blocks,
    part_of,
    problem_of,
    problem_of_case,
    routes_of,
    shapes_of,
)
from torch import Tensor, nn

import hesscli
from hesscli.errors import MismatchError
from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import partition
from hesscli.hessian.curvatures import CURVATURES, FISHER, GGN
from hesscli.hessian.differences.products import Differences
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.operator import Products

GAUSS_NEWTON = [
    "linear", "softmax", "mlp-over-time", "conv2d", "max-pool2d", "batch-norm2d", "layer-norm", "weight-norm",
    "gru", "lstm", "transformer-gelu", "multihead-attention", "tied-transpose", "twice", "embedding-padding",
    "two-inputs", "unused", "dict-output", "ce-weight", "ce-weight-ignore-smoothing", "one-output",
]  # fmt: skip


def matrix(products: Products | Differences) -> Tensor:
    return products.matrix_rows(0, products.size)


def jacobian(case: Case) -> tuple[Tensor, Tensor]:
    """The output [..., C] and its derivative by the parameters [numel, P], row by row."""
    module = case.make()
    output = module(*case.inputs)
    output = output if case.output_key is None else output[case.output_key]
    leaves = [p for p in module.parameters() if p.requires_grad]
    rows = []
    for entry in output.reshape(-1):
        grads = torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True)
        parts = zip(grads, leaves, strict=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in parts])
        )
    return output.detach(), torch.stack(rows)


def gauss_newton(case: Case) -> Tensor:
    """J^T H J, formed."""
    with _twice_differentiable_attention():
        output, J = jacobian(case)

    def loss(z: Tensor) -> Tensor:
        z = z.view_as(output)
        return case.reference(z if case.output_key is None else {case.output_key: z}, case.target)

    H = torch.autograd.functional.hessian(loss, output.reshape(-1))
    return J.T @ H @ J


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hessian(case):
    whole = case.fixed_batch or case.loss == "output"
    problem = problem_of_case(case, batch_size=None if whole else 4)
    try:
        found = matrix(Products(problem, memory=1 << 30))
    except NotApplicable:
        assert case.oracle == "differences"
        return
    limit = 1e-9 if case.oracle == "autograd" else 1e-6
    assert relative_error(found, expected(case)) < limit or float(expected(case).norm()) < 1e-9


@pytest.mark.parametrize(
    "name", ["mlp-tanh", "gru", "layer-norm", "weight-norm", "mlp-relu", "unused"]
)
def test_float32_and_single_products(name):
    case = BY_NAME[name]
    problem = problem_of_case(case, torch.float32, batch_size=4)
    products = Products(problem)
    v = torch.randn(products.size, generator=torch.Generator().manual_seed(0))
    assert relative_error(products(v), expected(case).float() @ v) < 1e-4
    assert products.count == 1
    assert relative_error(products(torch.stack([v, 2 * v]))[1], 2 * products(v)) < 1e-5
    assert products.count == 4


@pytest.mark.parametrize("name", ["mlp-tanh", "conv2d", "gru", "layer-norm", "embedding"])
def test_batches_side_by_side_add_up_in_their_order(name, two_threads):
    problem = problem_of_case(BY_NAME[name], batch_size=1)
    found = [matrix(Products(problem, memory=1 << 30)) for _ in range(3)]
    torch.set_num_threads(1)
    alone = matrix(Products(problem, memory=1 << 30))
    assert all(torch.equal(each, alone) for each in found)


def test_graphs_that_do_not_fit_are_made_again():
    problem = problem_of_case(BY_NAME["mlp-tanh"], batch_size=2)
    few, many = Products(problem, memory=0), Products(problem, memory=1 << 30)
    assert torch.equal(matrix(few), matrix(many))
    assert len(few.kept) == 0
    assert len(many.kept) == len(problem.batches) > 1


@pytest.mark.parametrize("name", ["mlp-tanh", "segments", "layer-norm", "unused"])
def test_differences(name):
    problem = problem_of_case(BY_NAME[name], batch_size=3)
    assert relative_error(matrix(Differences(problem)), expected(BY_NAME[name])) < 1e-5


@pytest.mark.parametrize("name", GAUSS_NEWTON)
def test_gauss_newton(name):
    case = BY_NAME[name]
    truth = gauss_newton(case)
    found = matrix(GGN.products(problem_of_case(case, batch_size=3)))
    assert relative_error(found, truth) < 1e-10
    assert relative_error(found, found.T) < 1e-12
    assert torch.linalg.eigvalsh((found + found.T) / 2).min() > -1e-10 * truth.norm()


@pytest.mark.parametrize("name", ["linear", "linear-no-bias", "softmax", "logistic"])
def test_gauss_newton_of_a_linear_model_is_the_hessian(name):
    problem = problem_of_case(BY_NAME[name], batch_size=5)
    assert relative_error(matrix(GGN.products(problem)), expected(BY_NAME[name])) < 1e-12


def fisher(module: nn.Module, x: Tensor, y: Tensor, own_loss, denominator: float) -> Tensor:
    """1 / D sum of g g^T, sample by sample."""
    total = torch.zeros(())
    for i in range(len(x)):
        value = own_loss(module(x[i : i + 1]), y[i : i + 1])
        leaves = list(module.parameters())
        g = torch.cat([p.flatten() for p in torch.autograd.grad(value, leaves)])
        total = total + torch.outer(g, g)
    return total / denominator


def seeded(*modules: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    module = nn.Sequential(*modules).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.7)
    return module.eval()


X, Y = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)).double(), torch.arange(7) % 3
MLP = lambda: seeded(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))  # noqa: E731
WEIGHT = torch.tensor([0.5, 2.0, 1.0]).double()


@pytest.mark.parametrize("batch_size", [None, 3])
def test_fisher(batch_size):
    module = MLP()
    problem = problem_of(module, [X], Y, "cross-entropy", batch_size=batch_size)
    truth = fisher(module, X, Y, F.cross_entropy, 7)
    found = matrix(FISHER.products(problem))
    assert relative_error(found, truth) < 1e-12
    assert torch.linalg.eigvalsh(found).min() > -1e-12


def test_fisher_with_class_weights_and_ignored_targets():
    module = MLP()
    y = Y.clone()
    y[2] = 1
    problem = problem_of(
        module, [X], y, "cross-entropy", weight=WEIGHT, ignore_index=1, batch_size=2
    )
    kept = y != 1

    def own(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t, weight=WEIGHT, reduction="sum")

    truth = fisher(module, X[kept], y[kept], own, float(WEIGHT[y[kept]].sum()))
    assert relative_error(matrix(FISHER.products(problem)), truth) < 1e-12


def test_fisher_of_the_squared_error_sums_a_samples_terms():
    module = MLP()
    target = torch.randn(7, 3, generator=torch.Generator().manual_seed(2)).double()
    problem = problem_of(module, [X], target, "mse", batch_size=4)
    truth = fisher(module, X, target, lambda z, t: ((z - t) ** 2).sum(), 21)
    assert relative_error(matrix(FISHER.products(problem)), truth) < 1e-12
    summed = problem_of(module, [X], target, "mse", reduction="sum")
    assert relative_error(matrix(FISHER.products(summed)), 21 * truth) < 1e-12


@pytest.mark.parametrize("blocks", ["full", "diag", "elements"])
@pytest.mark.parametrize("shape", ["tokens", "mixing", "vector", "number"])
def test_fisher_of_one_sample_without_an_axis_of_samples(shape, blocks):
    """g g^T / D, of rank one: its tokens are no samples, whether they mix or not."""
    torch.manual_seed(0)
    x, y = X[:5], X[:5, :3].sin()
    module = seeded(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    if shape == "mixing":
        module.register_forward_hook(lambda module, inputs, output: output - output.mean(0))
    elif shape != "tokens":
        x, y = x[0], y[0]
    if shape == "number":
        module.register_forward_hook(lambda module, inputs, output: output.sum())
        y = y.sum()
    options = {"loss": "mse", "curvature": "fisher", "unbatched": True, "framework": "torch"}
    found = hesscli.compute(module, (x, y), blocks=blocks, **options)
    total = F.mse_loss(module(x), y, reduction="sum")
    g = torch.cat([p.flatten() for p in torch.autograd.grad(total, list(module.parameters()))])
    truth = torch.outer(g, g) / y.numel()
    if blocks == "full":
        assert relative_error(found.matrix(), truth) < 1e-10
        v = torch.randn(len(g), dtype=g.dtype)
        product = hesscli.operator(
            module, (x, y), loss="mse", curvature="fisher", unbatched=True
        ) @ v.numpy()  # fmt: skip
        assert relative_error(torch.from_numpy(product), truth @ v) < 1e-10
    assert relative_error(found.matrix().diagonal(), truth.diagonal()) < 1e-10


def test_fisher_needs_samples_that_do_not_mix():
    mixing = seeded(nn.Linear(4, 3))
    mixing.register_forward_hook(lambda module, inputs, output: output - output.mean(0))
    problem = problem_of(mixing, [X], Y, "cross-entropy")
    with pytest.raises(MismatchError, match="mean may mix samples"):
        FISHER.products(problem)
    GGN.products(problem)  # needs no such thing


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_a_model_that_returns_its_loss_has_no_output(curvature):
    problem = problem_of_case(BY_NAME["output-mean"])
    problem = replace(problem, loss=replace(problem.loss, reduced="mean"))
    with pytest.raises(MismatchError, match="returns its own loss"):
        CURVATURES[curvature].products(problem)


# --- blocks ---------------------------------------------------------------------------------------


BLOCKS = [
    "mlp-tanh",
    "conv2d",
    "layer-norm",
    "embedding",
    "transformer-gelu",
    "ce-weight",
    "gru",
    "mlp-over-time",
    "twice",
    "twice-conv",
    "tied-transpose",
]


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
@pytest.mark.parametrize("method", ["gauss-newton", "hvp"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, method, curvature):
    """What enters once or several times, in one way or in several, has Jacobians all the same."""
    problem = problem_of_case(BY_NAME[name], batch_size=3)
    whole = matrix(CURVATURES[curvature].products(problem))
    if curvature == "ggn":
        assert relative_error(whole, gauss_newton(BY_NAME[name])) < 1e-10
    made = routes_of(problem, curvature=curvature)
    for structure in STRUCTURES:
        for block in partition(shapes_of(problem), structure):
            diagonal = structure == "elements"
            found = compute_blocks(made[method], [block], diagonal)[block.name]
            assert relative_error(found, part_of(whole, problem, block, diagonal)) < 1e-9


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "twice-conv"])
def test_gauss_newton_blocks_along_preactivations(name):
    """Of all layers, also shared ones with fewer directions than entries, and of whatever else a block has."""
    problem, whole = problem_of_case(BY_NAME[name], batch_size=3), gauss_newton(BY_NAME[name])
    route, right = routes_of(problem, curvature="ggn")["preactivation"], 0
    for structure in STRUCTURES:
        for block in partition(shapes_of(problem), structure):
            diagonal = structure == "elements"
            with suppress(NotApplicable):
                found = compute_blocks(route, [block], diagonal)[block.name]
                assert relative_error(found, part_of(whole, problem, block, diagonal)) < 1e-9
                right += 1
    assert right


# --- the certificate ------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize(
    "name", ["mlp-tanh", "layer-norm", "conv2d", "attention-by-hand", "ce-weight"]
)
def test_the_certificate_knows_right_from_wrong(name, curvature):
    problem = problem_of_case(BY_NAME[name], batch_size=3)
    products = CURVATURES[curvature].products(problem)
    whole = matrix(products)
    (block,) = partition(shapes_of(problem), "full")
    certificate = CURVATURES[curvature].certificate(problem, torch.float64, 0)
    assert certificate.passed(max(certificate.product(block, products)))
    assert certificate.passed(certificate.matrix(block, whole))
    assert not certificate.passed(
        certificate.product(block, lambda v: 1.001 * products(v)).difference
    )
    broken = whole.clone()
    broken[3, 5] += 1e-3 * whole.norm()
    assert not certificate.passed(certificate.matrix(block, broken))


def test_the_curvatures_differ():
    problem: Problem = problem_of_case(BY_NAME["mlp-tanh"])
    found = [matrix(curvature.products(problem)) for curvature in CURVATURES.values()]
    (block,) = partition(shapes_of(problem), "full")
    for i, curvature in enumerate(CURVATURES.values()):
        certificate = curvature.certificate(problem, torch.float64, 0)
        passed = [certificate.passed(certificate.matrix(block, each)) for each in found]
        assert passed == [j == i for j in range(3)]


def test_differences_along_nothing():
    """As of a gradient that is zero: there is no direction to take a step in."""
    products = Differences(problem_of_case(BY_NAME["mlp-tanh"]))
    assert not products(torch.zeros(products.size, dtype=torch.float64)).any()


def test_an_unused_parameter_and_a_zero_hessian():
    problem = problem_of_case(BY_NAME["l1-of-linear"])
    assert not matrix(Products(problem)).any()
    truth = hessian(
        BY_NAME["unused"].make(), F.mse_loss, BY_NAME["unused"].inputs, BY_NAME["unused"].target
    )
    assert relative_error(matrix(Products(problem_of_case(BY_NAME["unused"]))), truth) < 1e-12


class Square(torch.autograd.Function):
    """About which nothing can be proven."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(Square.apply(self.a(x)))


class Centred(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z - z.mean(0)


@pytest.mark.parametrize("blocks", ["diag", "full", "elements"])
def test_fisher_of_one_sample_at_a_time(blocks: str) -> None:
    """Where it cannot be proven that samples do not mix, one that is alone has a gradient of its own."""
    torch.manual_seed(0)
    model = Squared().double()
    options = {"blocks": blocks, "curvature": "fisher", "framework": "torch"}
    with pytest.raises(MismatchError) as raised:
        hesscli.compute(model, (X, Y), **options)
    assert raised.value.hint == "--batch-size 1"
    found = hesscli.compute(model, (X, Y), batch_size=1, **options)
    truth = fisher(model, X, Y, F.cross_entropy, 7)
    if blocks == "full":
        assert relative_error(found.matrix(), truth) < 1e-9
    else:
        mine = found.block("a.weight").reshape(truth[:16, :16].shape if blocks == "diag" else -1)
        wanted = truth[:16, :16] if blocks == "diag" else truth.diagonal()[:16]
        assert relative_error(mine, wanted) < 1e-9


def test_no_fisher_of_samples_that_mix() -> None:
    for options in ({}, {"batch_size": 1}):
        with pytest.raises(MismatchError) as raised:
            hesscli.compute(Centred(4, 3).double(), (X, Y), curvature="fisher", **options)
    assert raised.value.hint == "--curvature ggn"


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("other", ["nothing", "others"])
def test_batches_that_depend_on_none_of_the_parameters(curvature, other):
    def forward(s: Net, x: Tensor) -> Tensor:
        if x[0, 0] < 9:
            return torch.tanh(s.a(x))
        return x[:, :2] * 1.0 if other == "nothing" else s.b(x)

    torch.manual_seed(0)
    model = Net(forward, a=nn.Linear(3, 2), b=nn.Linear(3, 2)).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    x[4:, 0] = 10
    names = ["a.weight", "a.bias"]
    both, first = problem_of(model, [x], y, batch_size=4), problem_of(model, [x[:4]], y[:4])
    found, alone = (
        matrix(CURVATURES[curvature].products(problem.restricted(names)))
        for problem in (both, first)
    )
    torch.testing.assert_close(found, alone / 2)
