"""The function that is differentiated: batches, chunks, structures and losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, expected, labels, normal, positive, probabilities
from oracles import relative_error
from problems import (
    FAST,
    Net,
    blocks_of,
    compute_blocks,
    part_of,
    problem_of,
    problem_of_case,
    routes_of,
)
from torch import Tensor

from hesscli.errors import MismatchError, UsageError
from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.blocks import partition, select
from hesscli.hessian.objective.losses import LOSSES, check_arguments
from hesscli.hessian.objective.measure import measure
from hesscli.hessian.objective.outputs import pick_output

# --- batches ----------------------------------------------------------------------------------

SPLIT = [c for c in CASES if "loss" in c.tags and c.name != "output-mean"] + [
    BY_NAME[name]
    for name in ("conv2d", "embedding", "lstm", "two-inputs", "layer-norm", "segments")
]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_any_batch_size_gives_the_same(case, batch_size):
    problem = problem_of_case(case, batch_size=batch_size)
    sizes = [len(batch.inputs[0]) for batch in problem.batches]
    assert len(sizes) > 1
    assert sum(sizes) == len(case.inputs[0])
    routes = routes_of(problem)
    name = "finite-difference" if case.name == "segments" else "hvp"
    blocks = blocks_of(problem, "full")
    found = compute_blocks(routes[name], blocks)["hessian"]
    assert relative_error(found, expected(case)) < (1e-7 if name == "finite-difference" else 1e-8)
    for name in FAST:
        try:
            for block in blocks_of(problem, "block_diagonal"):
                mine = compute_blocks(routes[name], [block])[block.name]
                truth = part_of(expected(case), problem, block)
                error = float((mine - truth).norm())
                assert error < 1e-10 * max(float(expected(case).norm()), 1), name
        except NotApplicable:
            assert name == "gauss-newton" or case.name in {"segments", "embedding", "lstm"}


@pytest.mark.parametrize("batch_size", [2, 3])
def test_uneven_weights_per_element_follow_their_samples(batch_size):
    """A weight as long as the data is cut with it; one per class is not."""
    x, y, w = normal(5, 3), normal(5, 2, seed=1), positive(5, 2, seed=2)
    model = Net(lambda s, x: torch.tanh(x @ s.w), w=normal(3, 2, seed=3))
    whole = problem_of(model, (x,), y, "mse", weight=w)
    parts = problem_of(model, (x,), y, "mse", batch_size=batch_size, weight=w)
    assert whole.denominator == parts.denominator == pytest.approx(float(w.sum()))
    one, other = (
        compute_blocks(routes_of(p)["hvp"], blocks_of(p, "full"))["hessian"] for p in (whole, parts)
    )
    assert relative_error(other, one) < 1e-12
    truth = torch.autograd.functional.hessian(
        lambda t: (w * (torch.tanh(x @ t) - y) ** 2).sum() / w.sum(), model.w.detach()
    )
    assert relative_error(one, truth.reshape(6, 6)) < 1e-12


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("name", ["mlp-tanh", "group-norm", "gru", "conv2d", "einsum"])
def test_any_chunk_gives_the_same(name, chunk):
    problem = problem_of_case(BY_NAME[name])
    route = routes_of(problem, chunk)["hvp"]
    found = compute_blocks(route, blocks_of(problem, "full"))["hessian"]
    assert relative_error(found, expected(BY_NAME[name])) < 1e-10
    for structure in ("block_diagonal", "elements"):
        blocks = blocks_of(problem, structure)
        parts = compute_blocks(route, blocks, structure == "elements")
        for block in blocks:
            truth = part_of(found, problem, block, structure == "elements")
            assert relative_error(parts[block.name], truth) < 1e-10


@pytest.mark.parametrize("route", ["preactivation", "hvp"])
@pytest.mark.parametrize("name", ["mlp-tanh", "conv2d", "softmax", "residual"])
def test_structures_agree(name, route):
    problem = problem_of_case(BY_NAME[name])
    routes = routes_of(problem)
    whole = compute_blocks(routes[route], blocks_of(problem, "full"))["hessian"]
    assert whole.norm() > 0.01
    for structure in ("module", "block_diagonal", "elements"):
        diagonal = structure == "elements"
        blocks = blocks_of(problem, structure)
        try:
            parts = compute_blocks(routes[route], blocks, diagonal)
        except NotApplicable:
            assert (route, structure) == ("preactivation", "module")
            continue
        for block in blocks:
            truth = part_of(whole, problem, block, diagonal)
            assert float((parts[block.name] - truth).norm()) < 1e-11 * float(whole.norm())


def test_sum_is_mean_times_the_denominator():
    case = BY_NAME["ce-weight-ignore-smoothing"]
    mean = problem_of_case(case)
    total, value = measure(replace(mean, loss=replace(mean.loss, reduction="sum")))
    assert total.denominator == 1
    assert mean.denominator > 1
    assert value == pytest.approx(measure(mean)[1] * mean.denominator)


def test_the_denominator_of_nothing():
    case = BY_NAME["ce-ignore"]
    with pytest.raises(MismatchError, match="ignored"):
        problem_of(case.make(), case.inputs, torch.full((6,), 2), "cross-entropy", ignore_index=2)


def test_random_numbers_are_noticed():
    model = Net(lambda s, x: F.dropout(x @ s.w, 0.5), w=normal(3, 2))
    with pytest.raises(MismatchError, match="random"):
        problem_of(model, (normal(5, 3),), normal(5, 2), "mse")


# --- losses -----------------------------------------------------------------------------------

Z, T = normal(7, 3), normal(7, 3, seed=1)
C = labels(3, 7)
IGNORING = torch.tensor([0, 2, -100, 1, 2, -100, 0])
FUNCTIONS = {
    "mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss, "smooth-l1": F.smooth_l1_loss,
    "bce": F.binary_cross_entropy, "bce-with-logits": F.binary_cross_entropy_with_logits,
    "kl-div": F.kl_div, "poisson-nll": F.poisson_nll_loss, "nll": F.nll_loss,
    "cross-entropy": F.cross_entropy,
}  # fmt: skip
WEIGHT = positive(3)
EXAMPLES = [
    ("mse", Z, T, {}), ("mse", Z, T, {"weight": positive(7, 3)}),
    ("mse", Z[:, 0], T[:, 0], {}), ("l1", Z, T, {}), ("l1", Z, T, {"weight": positive(7, 3)}),
    ("huber", Z, T, {}), ("huber", Z, T, {"delta": 0.3}), ("huber", Z, T, {"delta": 2.0}),
    ("smooth-l1", Z, T, {}), ("smooth-l1", Z, T, {"beta": 0.4}), ("smooth-l1", Z, T, {"beta": 0.0}),
    ("bce", Z.sigmoid(), T.sigmoid(), {}), ("bce", Z.sigmoid(), (T > 0).double(), {"weight": WEIGHT}),
    ("bce-with-logits", Z, T.sigmoid(), {}),
    ("bce-with-logits", Z, (T > 0).double(), {"weight": positive(7, 3), "pos_weight": WEIGHT}),
    ("bce-with-logits", 300 * Z, (T > 0).double(), {}),
    ("kl-div", Z.log_softmax(1), probabilities(7, 3), {}),
    ("kl-div", Z.log_softmax(1), T.log_softmax(1), {"log_target": True}),
    ("kl-div", Z.log_softmax(1), F.one_hot(C, 3).double(), {}),
    ("poisson-nll", Z, labels(4, 7, 3).double(), {}),
    ("poisson-nll", Z, labels(4, 7, 3).double(), {"full": True}),
    ("poisson-nll", Z.exp(), labels(4, 7, 3).double(), {"log_input": False, "eps": 1e-3}),
    ("nll", Z.log_softmax(1), C, {}), ("nll", Z.log_softmax(1), C, {"weight": WEIGHT}),
    ("nll", Z.log_softmax(1), C, {"ignore_index": 1}), ("nll", Z.log_softmax(1), IGNORING, {}),
    ("cross-entropy", Z, C, {}), ("cross-entropy", Z, IGNORING, {"weight": WEIGHT}),
    ("cross-entropy", Z, C, {"ignore_index": 0, "label_smoothing": 0.3}),
    ("cross-entropy", Z, IGNORING, {"weight": WEIGHT, "label_smoothing": 0.3}),
    ("cross-entropy", Z, C, {"label_smoothing": 1.0}),
    ("cross-entropy", Z, probabilities(7, 3), {}),
    ("cross-entropy", Z, probabilities(7, 3), {"weight": WEIGHT, "label_smoothing": 0.2}),
    ("cross-entropy", normal(4, 3, 2), labels(3, 4, 2), {"weight": WEIGHT}),
    ("cross-entropy", normal(4, 3, 2, 2), labels(3, 4, 2, 2), {"ignore_index": 1}),
    ("cross-entropy", normal(4, 3, 2), normal(4, 3, 2, seed=4).softmax(1), {"weight": WEIGHT}),
    ("cross-entropy", Z[0], torch.tensor(1), {}),
    ("cross-entropy", 300 * Z, C, {}),
]  # fmt: skip
IDS = [f"{name}-{i}" for i, (name, *_) in enumerate(EXAMPLES)]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("name", "output", "target", "arguments"), EXAMPLES, ids=IDS)
def test_losses(name, output, target, arguments, reduction):
    def ours(z: Tensor) -> Tensor:
        total, denominator = LOSSES[name](z, target, **arguments)
        return total / (denominator if reduction == "mean" else 1)

    def theirs(z: Tensor) -> Tensor:
        if name == "kl-div" and reduction == "mean":  # over all elements, as PyTorch has it today
            return F.kl_div(z, target, reduction="none", **arguments).mean()
        return FUNCTIONS[name](z, target, reduction=reduction, **arguments)

    torch.testing.assert_close(ours(output), theirs(output), rtol=1e-12, atol=1e-13)
    slopes = [torch.autograd.functional.jacobian(f, output) for f in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-11, atol=1e-13)
    curvatures = [torch.autograd.functional.hessian(f, output) for f in (ours, theirs)]
    torch.testing.assert_close(*curvatures, rtol=1e-10, atol=1e-12)


def test_every_loss_has_an_example():
    assert {name for name, *_ in EXAMPLES} == set(LOSSES) == set(FUNCTIONS)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_bce_of_a_certain_output(target):
    """Where a sigmoid has rounded to 1, PyTorch's gradient is finite; so is ours, and its slope."""
    z = torch.tensor([40.0, -800.0, 0.3], dtype=torch.float64)
    y = torch.full((3,), target, dtype=torch.float64)
    assert z.sigmoid()[0] == 1

    def loss(z: Tensor) -> Tensor:
        return LOSSES["bce"](z.sigmoid(), y)[0]

    assert torch.isfinite(torch.autograd.functional.jacobian(loss, z)).all()
    assert torch.isfinite(torch.autograd.functional.hessian(loss, z)).all()
    least = torch.tensor([0, 1e-60, 1e-30, 1], dtype=torch.float64)
    y = torch.full((4,), target, dtype=torch.float64)
    theirs = F.binary_cross_entropy(least, y, reduction="sum")
    torch.testing.assert_close(LOSSES["bce"](least, y)[0], theirs)


MISFITS = [
    ("mse", Z, T[:, :1], {}), ("mse", Z[:, :1], T[:, 0], {}), ("l1", Z[:, 0], T[:, :1], {}),
    ("huber", Z, T[:1], {}), ("kl-div", Z, T[0], {}), ("bce", Z, T.sigmoid(), {}),
    ("bce-with-logits", Z[:, :1], T[:, 0].sigmoid(), {}), ("poisson-nll", Z, T[:, 0], {}),
    ("cross-entropy", Z, labels(3, 7, 1), {}), ("cross-entropy", Z, C + 1, {}),
    ("cross-entropy", Z, C.double(), {}), ("cross-entropy", Z[:, :1], C, {}),
    ("cross-entropy", Z, C, {"weight": positive(4)}), ("nll", Z, C - 1, {}),
    ("mse", Z, T, {"weight": positive(7)}), ("nll", Z.log_softmax(1), C, {"weight": positive(4)}),
    ("cross-entropy", Z, probabilities(7, 3), {"weight": positive(4)}),
    ("bce", Z[:, :1].sigmoid(), T[:, 0].sigmoid(), {}), ("smooth-l1", Z, T[:, 0], {}),
    ("bce-with-logits", Z, T.sigmoid(), {"pos_weight": positive(4)}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "output", "target", "arguments"), MISFITS,
    ids=[f"{n}-{i}" for i, (n, *_) in enumerate(MISFITS)],
)  # fmt: skip
def test_what_only_broadcasting_would_fit(name, output, target, arguments):
    with pytest.raises(MismatchError):
        LOSSES[name](output, target, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("huber", {"delta": 0.0}), ("smooth-l1", {"beta": -1.0}),
     ("cross-entropy", {"label_smoothing": 2.0})],
)  # fmt: skip
def test_arguments_out_of_range(name, arguments):
    target = C if name == "cross-entropy" else T
    with pytest.raises(UsageError):
        LOSSES[name](Z, target, **arguments)


def test_arguments_that_there_are_not():
    with pytest.raises(UsageError, match="label_smoothing"):
        check_arguments("cross-entropy", {"smoothing": 0.1})
    check_arguments("cross-entropy", {"label_smoothing": 0.1})


# --- names ------------------------------------------------------------------------------------


def test_select():
    names = ["0.weight", "0.bias", "2.weight"]
    assert select(names, []) == []
    assert select(names, ["*.weight"]) == ["0.weight", "2.weight"]
    assert select(names, ["x", "0.b*", "2.*"]) == ["0.bias", "2.weight"]
    assert select(names, ["x"]) == []


def test_partition():
    shapes = {"w": (2,), "a.weight": (2, 3), "a.bias": (2,), "b.c.weight": (), "b.weight": (0, 2)}
    assert [(b.name, b.size) for b in partition(shapes, "full")] == [("hessian", 11)]
    assert [(b.name, b.size) for b in partition(shapes, "module")] == [
        ("(root)", 2), ("a", 8), ("b.c", 1), ("b", 0),
    ]  # fmt: skip
    for structure in ("block_diagonal", "elements"):
        assert [b.name for b in partition(shapes, structure)] == list(shapes)


def test_pick_output():
    one, two = torch.ones(1), torch.zeros(2)
    assert pick_output({"x": one}, None) is one
    assert pick_output({"x": one, "logits": two}, None) is two
    assert pick_output((one, two), "1") is two
    assert pick_output((one, two), "-1") is two
    for result, key in (((one, two), None), ({"x": one}, "y"), ((one,), "3"), (3, None)):
        with pytest.raises(MismatchError):
            pick_output(result, key)
