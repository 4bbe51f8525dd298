"""The certificate: routes broken on purpose are caught, right results pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import BY_NAME, CASES, expected, save
from conftest import read
from oracles import relative_error
from problems import blocks_and_truth, blocks_of, part_of, problem_of, problem_of_case
from torch import Tensor, nn

import hesscli
from hesscli.hessian.blocks import Block
from hesscli.hessian.curvatures import CURVATURES
from hesscli.hessian.differences.check import Certificate
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.routes.finite_difference import FiniteDifference
from hesscli.hessian.routes.gauss_newton import GaussNewton
from hesscli.hessian.routes.hvp import HessianVectorProducts
from hesscli.hessian.routes.preactivation import Preactivation

ROUTES = {
    "preactivation": Preactivation,
    "gauss-newton": GaussNewton,
    "hvp": HessianVectorProducts,
    "finite-difference": FiniteDifference,
}


def scaled(block: Block, values: Tensor) -> None:
    values *= 1.001


def halved(block: Block, values: Tensor) -> None:  # a wrong denominator
    values /= 2


def zeroed(block: Block, values: Tensor) -> None:
    values.zero_()


def negated(block: Block, values: Tensor) -> None:
    values.neg_()


def reversed_order(block: Block, values: Tensor) -> None:  # weights stored the other way
    values.copy_(values.flip(*range(values.dim())))


def perturbed(block: Block, values: Tensor) -> None:
    values.view(-1)[values.abs().argmax()] *= 1.1


def shifted(block: Block, values: Tensor) -> None:
    (values if values.dim() == 1 else values.diagonal()).add_(1e-2)


DAMAGES = [scaled, halved, zeroed, negated, reversed_order, perturbed, shifted]


def break_route(
    monkeypatch: pytest.MonkeyPatch, name: str, damage: Callable[[Block, Tensor], None]
) -> None:
    """A route that does its work and then damages it, once per batch."""
    right = ROUTES[name].add

    def wrong(self, batch, parts):
        right(self, batch, parts)
        if batch is self.problem.batches[-1]:
            for part in parts:
                damage(part.block, part.out)

    monkeypatch.setattr(ROUTES[name], "add", wrong)


def drop_a_batch(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = ROUTES[name].add

    def wrong(self, batch, parts):
        if batch is not self.problem.batches[-1]:
            right(self, batch, parts)

    monkeypatch.setattr(ROUTES[name], "add", wrong)


# A one-layer ReLU-free model, so that every route applies to every block.
MODEL = "softmax"


@pytest.fixture
def saved(tmp_path):
    model, data = save(BY_NAME[MODEL], "script", tmp_path)
    return model, data


@pytest.mark.parametrize("blocks", ["diag", "elements"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ROUTES)
def test_a_broken_route_is_caught(cli, saved, tmp_path, monkeypatch, name, damage, blocks):
    command = ("compute", *saved, "--loss", "cross-entropy", "--blocks", blocks, "--method", name)
    before = sorted(p.name for p in tmp_path.iterdir())
    break_route(monkeypatch, name, damage)
    ran = cli(*command, "-o", "wrong.safetensors")
    message = ran.fails(5)
    assert name in message
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    # Without the check it goes through: the check alone stood in the way.
    assert cli(*command, "--no-check", "-o", "wrong.safetensors").code == 0
    document, _ = read(tmp_path / "wrong.safetensors")
    assert document["check"] is None


@pytest.mark.parametrize("blocks", ["diag", "elements"])
@pytest.mark.parametrize("name", ROUTES)
def test_a_dropped_batch_is_caught(cli, saved, tmp_path, monkeypatch, name, blocks):
    drop_a_batch(monkeypatch, name)
    ran = cli("compute", *saved, "-l", "cross-entropy", "-b", blocks, "--method", name,
              "--batch-size", 3)  # fmt: skip
    ran.fails(5)
    assert not (tmp_path / "hessian.safetensors").exists()


@pytest.mark.parametrize("blocks", ["full", "module", "diag", "elements"])
@pytest.mark.parametrize("case", ["mlp-tanh", "mlp-relu", "conv2d", "softmax"])
def test_the_next_route_takes_over(cli, tmp_path, monkeypatch, case, blocks):
    model, data = save(BY_NAME[case], "script", tmp_path)
    command = ("compute", model, data, *BY_NAME[case].arguments(), "--blocks", blocks)
    assert cli(*command).code == 0
    first, right = read(tmp_path / "hessian.safetensors")
    chosen = {facts["method"] for facts in first["blocks"]}
    for name in chosen:
        break_route(monkeypatch, name, halved)
    ran = cli(*command)
    assert ran.code == 0, ran.stderr
    document, tensors = read(tmp_path / "hessian.safetensors")
    for facts in document["blocks"]:
        assert facts["method"] not in chosen
        assert any(facts["name"] in note and "instead" in note for note in ran.notes)
        assert any(facts["name"] in note and "instead" in note for note in document["notes"])
        assert facts["check_error"] <= document["check"]["tolerance"]
    assert set(tensors) == set(right)
    for key in right:
        assert relative_error(tensors[key], right[key]) < 1e-6


def test_when_nothing_agrees_nothing_is_written(cli, saved, tmp_path, monkeypatch):
    before = sorted(p.name for p in tmp_path.iterdir())
    for name in ROUTES:
        break_route(monkeypatch, name, halved)
    message = cli("compute", *saved, "-l", "cross-entropy").fails(5)
    assert "nothing was written" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_an_earlier_result_survives_a_failure(cli, saved, tmp_path, monkeypatch):
    assert cli("compute", *saved, "-l", "cross-entropy").code == 0
    before = (tmp_path / "hessian.safetensors").read_bytes()
    for name in ROUTES:
        break_route(monkeypatch, name, negated)
    cli("compute", *saved, "-l", "cross-entropy").fails(5)
    assert (tmp_path / "hessian.safetensors").read_bytes() == before


# --- the certificate alone --------------------------------------------------------------------


def judge(certificate: Certificate, block: Block, values: Tensor) -> bool:
    look = certificate.diagonal if values.dim() == 1 else certificate.matrix
    return certificate.passed(look(block, values))


@pytest.mark.parametrize("structure", ["full", "module", "block_diagonal", "elements"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_right_passes(case, structure):
    """Kinked, unused and padded models too."""
    problem = problem_of_case(case)
    certificate = Certificate(problem, torch.float64, 0)
    if case.name == "mlp-hardsigmoid":
        certificate.tolerance = 1e-5  # PyTorch's slope is a float32 sixth
    for block, truth in blocks_and_truth(problem, expected(case), structure):
        assert judge(certificate, block, truth.clone()), block.name


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("structure", ["full", "module", "block_diagonal", "elements"])
@pytest.mark.parametrize("name", ["embedding-padding", "mlp-relu", "mlp-hardtanh", "unused"])
def test_what_is_right_passes_with_any_seed(name, structure, seed):
    problem = problem_of_case(BY_NAME[name])
    certificate = Certificate(problem, torch.float64, seed)
    for block, truth in blocks_and_truth(problem, expected(BY_NAME[name]), structure):
        assert judge(certificate, block, truth.clone()), block.name


def curved_case(target_offset: float = 0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    y = torch.randn(6, 2, dtype=torch.float64) + target_offset
    return model, x, y


def test_no_curvature_claimed_where_the_gradient_vanishes():
    """A model that fits its data exactly has no gradient, and yet a Hessian."""
    model, x, _ = curved_case()
    problem = problem_of(model, (x,), model(x).detach())
    for structure in ("full", "block_diagonal", "elements"):
        for block in blocks_of(problem, structure):
            assert not problem.gradient(block.parameters)[block.parameters[0]].any()
            zero = torch.zeros(block.size, dtype=torch.float64)
            zero = zero if structure == "elements" else torch.diag(zero)
            assert not judge(Certificate(problem, torch.float64, 0), block, zero), block.name


def test_no_curvature_claimed_where_one_output_is_fitted():
    """Rows of zeros are excused for constants alone, not wherever the gradient happens to vanish."""
    model, x, y = curved_case()
    y[:, 0] = model(x)[:, 0].detach()
    problem = problem_of(model, (x,), y)
    (block,) = [b for b in blocks_of(problem, "block_diagonal") if b.name == "2.bias"]
    truth = torch.eye(2, dtype=torch.float64)
    assert judge(Certificate(problem, torch.float64, 0), block, truth)
    truth[0, 0] = 0
    assert not judge(Certificate(problem, torch.float64, 0), block, truth)


@pytest.mark.parametrize("switched", [-1e4, -1e6, -1e9])
@pytest.mark.parametrize("structure", ["diag", "full", "elements"])
def test_one_huge_parameter_is_no_measure(structure, switched):
    """A class that its bias switches off, and logits that a learned mask does."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.mask = (
                nn.Linear(3, 4),
                nn.Linear(4, 4),
                nn.Parameter(torch.zeros(4)),
            )
            with torch.no_grad():
                self.b.bias[2] = self.mask[1] = switched

        def forward(self, x):
            return self.b(torch.tanh(self.a(x))) + self.mask

    torch.manual_seed(0)
    x = torch.randn(7, 3, dtype=torch.float64)
    y = torch.tensor([0, 3, 3, 0, 0, 3, 0])
    found = hesscli.compute(Masked().double(), (x, y), blocks=structure)
    assert not [note for note in found.metadata["notes"] if "instead" in note]
    assert found.metadata["check"]["relative_error"] < 1e-6


@pytest.mark.parametrize("structure", ["diag", "elements"])
def test_blocks_in_float32_are_checked_in_float64(structure):
    """Differences of gradients in float32 are off by a thousandth."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    found = hesscli.compute(model, (torch.randn(20, 3), torch.randn(20, 2)), blocks=structure)
    assert found.metadata["check"]["relative_error"] < 3e-6


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_large_gradients_excuse_little(size):
    """Targets far away make the gradient large; a block that is wrong by half is still wrong."""
    model, x, y = curved_case(size)
    problem = problem_of(model, (x,), y)
    (block,) = [b for b in blocks_of(problem, "block_diagonal") if b.name == "2.bias"]
    truth = torch.eye(2, dtype=torch.float64)
    assert judge(Certificate(problem, torch.float64, 0), block, truth)
    assert not judge(Certificate(problem, torch.float64, 0), block, 1.5 * truth)
    assert not judge(Certificate(problem, torch.float64, 0), block, 0 * truth)
    assert not judge(Certificate(problem, torch.float64, 0), block, 1.5 * truth.diagonal())


@pytest.mark.parametrize("blocks", ["diag", "elements"])
def test_gradients_of_terms_that_nearly_cancel(blocks):
    """Small steps drown in their rounding, and larger ones leave out too much, unless two of them are combined."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.float64)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return 1e7 * (output.exp().log() - output) + output.cosh()

    net = nn.Linear(3, 1, dtype=torch.float64)
    found = hesscli.compute(net, (x, y), loss=loss, blocks=blocks, framework="torch")
    expected = x.T @ (net(x).detach().cosh() * x) / len(x)
    expected = expected if blocks == "diag" else expected.diagonal().view(1, 3)
    assert relative_error(found.block("weight"), expected) < 1e-7


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("structure", ["diag", "full", "elements"])
def test_a_loss_that_is_constant_but_for_rounding(structure, dtype):
    class Summed(nn.Sequential):
        def forward(self, x):
            return super().forward(x).softmax(-1).sum(-1, keepdim=True)

    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    found = hesscli.compute(Summed(nn.Linear(3, 4)), (x, y), blocks=structure, dtype=dtype)
    for name in found.blocks:
        assert np.abs(found.block(name)).max() < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_fails(value):
    problem = problem_of_case(BY_NAME["mlp-tanh"])
    (block,) = blocks_of(problem, "full")
    wrong = expected(BY_NAME["mlp-tanh"]).clone()
    wrong[0, 0] = value
    assert not judge(Certificate(problem, torch.float64, 0), block, wrong)


@pytest.mark.parametrize("factor", [0, 0.5, 1.5])
def test_what_is_wrong_fails_in_float32(factor):
    problem = problem_of_case(BY_NAME["mlp-tanh"], torch.float32)
    certificate = Certificate(problem, torch.float32, 0)
    whole = expected(BY_NAME["mlp-tanh"]).float()
    for block, truth in blocks_and_truth(problem, whole, "block_diagonal"):
        assert judge(certificate, block, truth.clone()), block.name
        assert not judge(certificate, block, factor * truth), block.name


@pytest.mark.parametrize("structure", ["block_diagonal", "elements"])
@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_a_direction_of_the_output_takes_one_pass_in_float32(curvature, structure, monkeypatch):
    """All directions share the output at theta; and what is wrong fails."""
    narrow = problem_of_case(BY_NAME["mlp-tanh"], torch.float32)
    problem, passes, output = narrow.double(), [], Problem.output
    monkeypatch.setattr(Problem, "output", lambda *x: passes.append(1) or output(*x))
    certificate = CURVATURES[curvature].certificate(problem, torch.float32, 0)
    products = CURVATURES[curvature].products(narrow)
    whole = products(torch.eye(products.size))
    for block, truth in blocks_and_truth(narrow, whole, structure):
        passes.clear()
        assert judge(certificate, block, truth.clone()), block.name
        assert 0 < len(passes) <= 3
        assert not judge(certificate, block, 1.01 * truth), block.name
        assert not judge(certificate, block, 0 * truth), block.name


def test_rows_of_constants_are_zero():
    problem = problem_of_case(BY_NAME["embedding-padding"])
    (block,) = blocks_of(problem, "full")
    wrong = expected(BY_NAME["embedding-padding"]).clone()
    constant = ~wrong.any(0)
    wrong[constant, constant] = wrong.abs().max()
    assert not judge(Certificate(problem, torch.float64, 0), block, wrong)


def test_half_a_diagonal_is_not_enough():
    """Seen with some seed at the latest: a diagonal whose second half is missing."""
    problem = problem_of_case(BY_NAME["mlp-tanh"])
    (block,) = [b for b in blocks_of(problem, "elements") if b.name == "0.weight"]
    wrong = part_of(expected(BY_NAME["mlp-tanh"]), problem, block, True).clone()
    wrong[len(wrong) // 2 :] = 0
    seeds = range(12)
    assert not all(judge(Certificate(problem, torch.float64, s), block, wrong) for s in seeds)


def diagonals(dtype: torch.dtype) -> list[tuple[Problem, Block, Tensor]]:
    """Of each tensor of a small model."""
    case = BY_NAME["mlp-tanh"]
    problem, whole = problem_of_case(case), expected(case)
    return [(problem, b, t.to(dtype)) for b, t in blocks_and_truth(problem, whole, "elements")]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_two_entries_of_a_diagonal_are_compared_as_if_each_were_alone(dtype, seed):
    """The largest, and another one: neither may be off by a little more than the tolerance."""
    for problem, block, truth in diagonals(dtype):
        certificate, caught = Certificate(problem, dtype, seed), set[int]()
        size = float(truth.abs().max())
        for place in range(block.size):
            wrong = truth.clone()
            wrong[place] -= 1.1 * certificate.tolerance * size * truth[place].sign()
            if not judge(certificate, block, wrong):
                caught.add(place)
        assert int(truth.abs().argmax()) in caught
        assert len(caught) == min(2, block.size)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_two_entries_of_a_diagonal_have_in_common_is_seen(dtype, seed):
    """A factor of both, and a number that both are off, make up for each other in no direction."""
    for problem, block, truth in diagonals(dtype):
        certificate = Certificate(problem, dtype, seed)
        off = 1.1 * certificate.tolerance
        for wrong in (truth * (1 + off), truth * (1 - off), truth + off * truth.abs().max(),
                      truth - off * truth.abs().max()):  # fmt: skip
            assert not judge(certificate, block, wrong), block.name


@pytest.mark.parametrize("ratio", [1, 2, 2.25, 3, 4])
def test_errors_of_two_entries_make_up_for_each_other_with_few_seeds(ratio):
    torch.manual_seed(0)
    x = torch.randn(5, 2, dtype=torch.float64)
    problem = problem_of(nn.Linear(2, 1, bias=False), [x], torch.zeros(5, 1))
    (block,) = blocks_of(problem, "elements")
    wrong = 2 * x.square().mean(0)
    assert judge(Certificate(problem, torch.float64, 0), block, wrong.clone())
    largest = int(wrong.argmax())
    wrong[largest] += 1e-3
    wrong[1 - largest] += ratio * 1e-3
    assert not any(judge(Certificate(problem, torch.float64, s), block, wrong) for s in range(8))


class Unsymmetric(nn.Module):
    """Its gradient, (2 w_0 + w_1, 2 w_1), is that of no function: a detached factor."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x):
        first, second = self.w
        return (first**2 + second**2 + first * second.detach()) * x


def test_a_diagonal_of_a_gradient_of_no_function_passes():
    """Both entries are compared by themselves, where together they have a part from off the diagonal."""
    problem = problem_of(Unsymmetric(), [torch.ones(1, 1)], None, "output")
    (block,) = blocks_of(problem, "elements")
    certificate = Certificate(problem, torch.float64, 0)
    assert judge(certificate, block, torch.tensor([2.0, 2.0], dtype=torch.float64))
    for wrong in ([2.0, 2.1], [2.1, 2.0]):
        assert not judge(certificate, block, torch.tensor(wrong, dtype=torch.float64))


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_asymmetry_is_found_whether_or_not_products_are_those_of_gradients(factor):
    problem = problem_of(Unsymmetric(), [torch.ones(1, 1)], None, "output")
    (block,) = blocks_of(problem, "elements")
    certificate = Certificate(problem, torch.float64, 0)
    products = factor * torch.tensor([[2.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    assert not certificate.passed(certificate.asymmetry(block, lambda v: products @ v))
    assert certificate.passed(certificate.asymmetry(block, lambda v: (products + products.T) @ v))


def test_the_parameters_are_left_as_they_were():
    problem = problem_of_case(BY_NAME["mlp-tanh"])
    before = {name: p.detach().clone() for name, p in problem.parameters.items()}
    (block,) = blocks_of(problem, "full")
    Certificate(problem, torch.float64, 0).matrix(block, expected(BY_NAME["mlp-tanh"]).clone())
    for name, p in problem.parameters.items():
        assert torch.equal(p, before[name])


class KeyBias(nn.Module):
    """Attention, whose softmax takes no notice of the keys' bias: its block is zero."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        weights = torch.softmax(self.q(x) @ self.k(x).mT / 2, -1)
        return (weights @ self.v(x)).mean(1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("blocks", ["diag", "elements"])
@pytest.mark.parametrize("method", ["auto", "hvp"])
def test_a_block_of_zero_passes_alone(cli, tmp_path, monkeypatch, dtype, blocks, method):
    torch.manual_seed(0)
    torch.jit.script(KeyBias()).save("net.pt")
    np.savez("data.npz", x=np.random.default_rng(0).normal(size=(6, 5, 4)), y=np.ones((6, 2)))
    command = ("compute", "net.pt", "data.npz", "-p", "k.bias", "--dtype", dtype, "-b", blocks)
    ran = cli(*command, "--method", method, "--json")
    assert ran.code == 0, ran.stderr
    assert abs(ran.document["blocks"][0]["trace"]) < 1e-6
    assert not any("instead" in note for note in ran.notes)
    for name in ("hvp", "preactivation"):
        break_route(monkeypatch, name, lambda block, values: values.add_(1e-3))
    cli(*command, "--method", "hvp").fails(5)
