"""Every route against the references, and its refusals: what a route does not refuse is right."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, GOLDEN, LOSSES, TARGETS, VARYING, Case, expected, labels, normal
from oracles import hessian
from problems import (
    FAST,
    STRUCTURES,
    Net,
    blocks_and_truth,
    blocks_of,
    compute_blocks,
    part_of,
    problem_of,
    problem_of_case,
    routes_of,
)
from torch import Tensor, nn

import hesscli
from hesscli.errors import NumericalError
from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.chunk_sizes import ChunkSizes
from hesscli.hessian.objective.loss import Loss
from hesscli.hessian.objective.measure import measure
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.proofs import operands
from hesscli.hessian.proofs.analysis import Analyses
from hesscli.hessian.proofs.uses import Use
from hesscli.hessian.routes import sample_gradients
from hesscli.hessian.routes.base import Route, Rows
from hesscli.hessian.routes.output_hessian import OutputHessian
from hesscli.hessian.routes.probes import Probed

Counts = dict[str, dict[str, list[int]]]  # by route and structure

# How far the reference itself can be trusted: differences of gradients, and a float32 sixth.
DIFFERENCES = 1e-8
TOLERANCES = {"mlp-hardsigmoid": 2e-7}

# No second derivative in PyTorch: hvp must say so where it needs one.
NOT_TWICE = {"segments"}


def tolerance(case: Case) -> float:
    usual = DIFFERENCES if case.oracle == "differences" else 1e-10
    return TOLERANCES.get(case.name, usual)


@functools.cache
def posed(name: str) -> tuple[Problem, dict[str, Route]]:
    problem = problem_of_case(BY_NAME[name])
    return problem, routes_of(problem)


def compare(found: Tensor, truth: Tensor, whole: Tensor) -> float:
    """The error relative to a block; where it is next to nothing, relative to the whole."""
    assert found.shape == truth.shape
    size = max(float(truth.norm()), 1e-3 * float(whole.norm()))
    error = float((found.double() - truth).norm())
    return error / size if size else error


def applies(
    route: Route, whole: Tensor, structure: str, limit: float, label: str = ""
) -> tuple[int, list[str]]:
    """How many blocks the route gave, all of them right, and its reasons for the others."""
    right, reasons = 0, []
    diagonal = structure == "elements"
    for block, truth in blocks_and_truth(route.problem, whole, structure):
        try:
            found = compute_blocks(route, [block], diagonal)[block.name]
        except NotApplicable as reason:
            reasons.append(str(reason))
            continue
        error = compare(found, truth, whole)
        assert error <= limit, f"{label} {route.name}, {structure}, {block.name}: {error:.1e}"
        right += 1
    assert all(reasons)  # a refusal says why
    return right, reasons


# --- the zoo ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hvp(case):
    _, routes = posed(case.name)
    for structure in STRUCTURES:
        right, reasons = applies(routes["hvp"], expected(case), structure, tolerance(case))
        if case.name in NOT_TWICE:  # the layers behind it can be differentiated
            assert right + len(reasons) == len(blocks_of(routes["hvp"].problem, structure))
            assert all("no second derivative" in reason for reason in reasons)
        else:
            assert reasons == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fast_routes(case):
    _, routes = posed(case.name)
    found: Counts = {name: {} for name in FAST}
    for name, counts in found.items():
        for structure in STRUCTURES:
            right, reasons = applies(routes[name], expected(case), structure, tolerance(case))
            counts[structure] = [right, len(reasons)]
    if os.environ.get("UPDATE_GOLDEN"):
        pin(case.name, found)
    assert case.name in VARYING or found == json.loads(GOLDEN.read_text())[case.name]


def pin(name: str, found: Counts) -> None:
    """Takes a case's counts into the golden file, which other processes may be updating too."""
    with GOLDEN.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        golden = json.load(file) | {name: found}
        lines = [f'"{case}": {json.dumps(golden[case])}' for case in sorted(golden)]
        file.seek(0)
        file.truncate()
        file.write("{\n" + ",\n".join(lines) + "\n}\n")


@pytest.mark.parametrize(
    "name",
    "mlp-gelu conv2d conv-conv embedding gru twice multihead-attention "
    "transformer-gelu residual-norm batch-norm2d scale two-inputs".split(),
)
def test_directions_on_two_threads(name, two_threads):
    _, routes = posed(name)
    for structure in STRUCTURES:
        right, _ = applies(routes["preactivation"], expected(BY_NAME[name]), structure, 1e-10)
        assert right


@pytest.mark.parametrize("case", CASES, ids=str)
def test_finite_difference(case):
    """Of each model's smallest tensor: several gradients for each of its entries."""
    problem, routes = posed(case.name)
    block = min(blocks_of(problem, "block_diagonal"), key=lambda block: block.size)
    found = compute_blocks(routes["finite-difference"], [block])[block.name]
    truth = part_of(expected(case), problem, block)
    assert compare(found, truth, expected(case)) <= max(1e-8, 10 * tolerance(case))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["segments", "mlp-hardsigmoid", "mlp-relu", "embedding-bag"])
def test_finite_difference_of_parts(name, structure):
    problem, routes = posed(name)
    limit = max(1e-7, tolerance(BY_NAME[name]))
    right, reasons = applies(routes["finite-difference"], expected(BY_NAME[name]), structure, limit)
    assert (right, reasons) == (len(blocks_of(problem, structure)), [])


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in NOT_TWICE], ids=str)
def test_float32(case):
    problem = problem_of_case(case, torch.float32)
    routes = routes_of(problem)
    for structure in ("full", "block_diagonal"):
        right, _ = applies(routes["hvp"], expected(case), structure, 1e-3)
        assert right == len(blocks_of(problem, structure))
        for name in FAST:
            applies(routes[name], expected(case), structure, 1e-3)


MUST_REFUSE = [  # (case, block of `block_diagonal`, route)
    *((c, b, r) for r in FAST for c, b in (
        ("tied-names", "embed.weight"), ("tied-transpose", "encode.weight"),
        ("twice", "layer.bias"), ("twice-conv", "layer.weight"),
        ("gru-cell", "cell.weight_ih"),
        ("weight-norm", "2.parametrizations.weight.original1"), ("unused", "spare.weight"),
    )),
    ("twice", "layer.weight", "gauss-newton"),
    ("mlp-deep", "0.0.weight", "gauss-newton"), ("mlp-softmax", "0.weight", "gauss-newton"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "name", "route"), MUST_REFUSE)
def test_a_fast_route_refuses(case, name, route):
    problem, routes = posed(case)
    (block,) = [b for b in blocks_of(problem, "block_diagonal") if b.name == name]
    with pytest.raises(NotApplicable, match=r"\w"):
        compute_blocks(routes[route], [block])
    with pytest.raises(NotApplicable):
        compute_blocks(routes[route], [block], diagonal=True)


def test_hvp_refuses_what_has_no_second_derivative():
    problem, routes = posed("segments")
    with pytest.raises(NotApplicable, match="no second derivative"):
        compute_blocks(routes["hvp"], blocks_of(problem, "full"))


def test_gauss_newton_never_spans_layers():
    problem, routes = posed("mlp-relu")
    with pytest.raises(NotApplicable):
        compute_blocks(routes["gauss-newton"], blocks_of(problem, "full"))


# --- strange models ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Odd:
    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    loss: str = "mse"

    def __str__(self) -> str:
        return self.name


def odd(name: str, function: Callable, *inputs: Tensor, loss: str = "mse", **parts) -> Odd:
    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(3)
            built = {key: part() if callable(part) else part.clone() for key, part in parts.items()}
            return Net(function, **built).double()

    return Odd(name, make, inputs, loss)


def layer(*sizes: int, kind: type[nn.Module] = nn.Linear, **options) -> Callable[[], nn.Module]:
    return lambda: kind(*sizes, **options)


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return normal(*shape, seed=seed)


def hidden(s: Net, x: Tensor) -> Tensor:
    return torch.tanh(s.a(x))


def shifted_by_one(s: Net, x: Tensor) -> Tensor:
    h, out = hidden(s, x), torch.zeros(len(x), 3, dtype=x.dtype)
    out[1:] += h[:-1]
    return s.b(out)


def heads(s: Net, x: Tensor) -> Tensor:
    h = torch.tanh(torch.einsum("nti,hij->nthj", x, s.w) + s.b)
    return torch.einsum("nthj,hjo->nto", h, s.v)


def experts(s: Net, x: Tensor, activation: Callable[[Tensor], Tensor] = torch.tanh) -> Tensor:
    h = activation(torch.baddbmm(s.b, x.expand(len(s.w), -1, -1), s.w))
    return torch.bmm(h, s.v).mean(0)


def attended(s: Net, x: Tensor) -> Tensor:
    return s.a(x, x, x, need_weights=False)[0]


ROWS, SQUARE, CUBE = numbers(5, 3, seed=5), numbers(4, 4, seed=5), numbers(4, 4, 4, seed=5)
LOWER = torch.eye(5, dtype=torch.float64) + numbers(5, 5, seed=8).tril() / 4
MASK = torch.tensor([[1, 0, 1], [0, 2, 1], [1, 1, 0], [0, 0, 3]], dtype=torch.float64)
TWO = {"a": layer(3, 3), "b": layer(3, 2)}
SQ = {"a": layer(4, 4), "b": layer(4, 4)}

# Samples see each other: no fast route may answer.
MIXING = [
    odd("uneven-mask", lambda s, x: s.b(hidden(s, x)[x[:, :, 0] > 0][:4]), CUBE, **SQ),
    odd("softmax-over-batch", lambda s, x: s.b(s.a(x).softmax(0)), ROWS, **TWO),
    odd("log-softmax-over-batch", lambda s, x: s.a(x).log_softmax(0), ROWS, **TWO),
    odd("centred", lambda s, x: (lambda h: h - h.mean(0))(hidden(s, x)), ROWS, **TWO),
    odd("weight-times-data", lambda s, x: F.linear(hidden(s, x), s.w * x.mean()), ROWS, w=numbers(4, 3), a=layer(3, 3)),
    odd("solved-for-rows",
        lambda s, x: torch.linalg.solve_triangular(LOWER.T[:4, :4], hidden(s, x).T, upper=True, left=False).T,
        SQUARE, **SQ),
    odd("solved-with-rows",
        lambda s, x: torch.linalg.solve(hidden(s, x) + LOWER[:4, :4], x.T).T, SQUARE, **SQ),
    odd("centred-by-all", lambda s, x: (lambda h: h - h.mean())(hidden(s, x)), ROWS, **TWO),
    odd("batch-norm-train", lambda s, x: s.b(s.n(hidden(s, x))), ROWS,
        n=layer(3, kind=nn.BatchNorm1d), **TWO),
    odd("standardised", lambda s, x: s.b((lambda h: h / h.std(0))(hidden(s, x))), ROWS, **TWO),
    odd("normalised-over-batch", lambda s, x: s.b(F.normalize(hidden(s, x), dim=0)), ROWS, **TWO),
    odd("variance-of-all", lambda s, x: s.b((lambda h: h / h.var())(hidden(s, x))), ROWS, **TWO),
    odd("greatest-of-all", lambda s, x: s.b((lambda h: h / h.abs().max())(hidden(s, x))), ROWS,
        **TWO),
    odd("logsumexp-over-batch", lambda s, x: (lambda h: h - h.logsumexp(0))(hidden(s, x)), ROWS,
        **TWO),
    odd("clamped-at-mean", lambda s, x: (lambda h: h.clamp(min=h.mean(0)))(s.a(x)), ROWS, **TWO),
    odd("gram", lambda s, x: (lambda h: h @ h.T)(hidden(s, x)), ROWS, **TWO),
    odd("gram-square", lambda s, x: (lambda h: h @ h.T)(hidden(s, x)), SQUARE, **SQ),
    odd("gram-of-two", lambda s, x, y: hidden(s, x) @ torch.tanh(s.b(y)).T, SQUARE,
        numbers(4, 4, seed=6), **SQ),
    odd("einsum-over-batch", lambda s, x: torch.einsum("ni,mi->nm", hidden(s, x), x), SQUARE, **SQ),
    odd("parameter-over-batch", lambda s, x: s.m @ hidden(s, x), SQUARE, m=numbers(4, 4), **SQ),
    odd("parameter-over-rows", lambda s, x: torch.tanh(s.m @ x.T) @ s.v, SQUARE,
        m=numbers(4, 4), v=numbers(4, 4, seed=2)),
    odd("first-added", lambda s, x: (lambda h: h + h[0])(hidden(s, x)), ROWS, **TWO),
    odd("transpose-added", lambda s, x: (lambda h: torch.tanh(h + h.T))(s.a(x)), SQUARE, **SQ),
    odd("transposed-output", lambda s, x: s.a(x).tanh().T, SQUARE, **SQ),
    odd("transposed-between", lambda s, x: s.b(hidden(s, x).T), SQUARE, **SQ),
    odd("transposed-copy", lambda s, x: s.b(hidden(s, x).T.contiguous().view(4, 4)), SQUARE, **SQ),
    odd("row-sums-on-columns", lambda s, x: (lambda h: torch.tanh(h * h.sum(1)))(s.a(x)), SQUARE,
        **SQ),
    odd("reshaped-across", lambda s, x: s.b(hidden(s, x).T.reshape(5, 3)), ROWS, **TWO),
    odd("flip-over-batch", lambda s, x: s.b(hidden(s, x).flip(0)), ROWS, **TWO),
    odd("roll-over-batch", lambda s, x: s.b(hidden(s, x).roll(1, 0)), ROWS, **TWO),
    odd("cumsum-over-batch", lambda s, x: s.b(hidden(s, x).cumsum(0)), ROWS, **TWO),
    odd("sort-over-batch", lambda s, x: s.b(hidden(s, x).sort(0)[0]), ROWS, **TWO),
    odd("sort-stable-over-batch",
        lambda s, x: s.b(torch.sort(hidden(s, x), dim=0, stable=True)[0]), ROWS, **TWO),
    odd("sort-stable-over-middle-batch",
        lambda s, x: s.b(torch.sort(hidden(s, x).unsqueeze(0), stable=True, dim=1)[0][0]), ROWS,
        **TWO),
    odd("topk-over-batch", lambda s, x: s.b(hidden(s, x).topk(4, 0)[0]), SQUARE, **SQ),
    odd("index-by-data", lambda s, x: s.b(hidden(s, x)[x[:, 0].argsort()]), ROWS, **TWO),
    odd("index", lambda s, x: s.b(hidden(s, x)[torch.tensor([1, 0, 3, 2, 4])]), ROWS, **TWO),
    odd("index-backwards", lambda s, x: s.b(hidden(s, x)[torch.arange(4, -1, -1)]), ROWS, **TWO),
    odd("index-of-others", lambda s, x: s.b(hidden(s, x)[torch.arange(4)[:, None], torch.arange(4)]
        [torch.arange(4).roll(1)[:, None], torch.arange(4)]), SQUARE, **SQ),
    odd("index-of-all", lambda s, x: s.b(hidden(s, x)[torch.arange(4)[None], torch.arange(4)[:, None]]),
        SQUARE, **SQ),
    odd("index-select", lambda s, x: s.b(hidden(s, x).index_select(0, torch.tensor([1, 0, 3, 2, 4]))),
        ROWS, **TWO),
    odd("gather-over-batch",
        lambda s, x: s.b(hidden(s, x).gather(0, torch.tensor([[1, 0, 2]]).expand(5, 3))), ROWS,
        **TWO),
    odd("chunks-swapped", lambda s, x: s.b(torch.cat(hidden(s, x).chunk(2)[::-1])), SQUARE, **SQ),
    odd("slices-swapped", lambda s, x: (lambda h: s.b(torch.cat([h[1:], h[:1]])))(hidden(s, x)),
        ROWS, **TWO),
    odd("stacked-otherwise",
        lambda s, x: (lambda h: s.b(torch.stack([h[i] for i in (1, 0, 2, 4, 3)])))(hidden(s, x)),
        ROWS, **TWO),
    odd("padded-over-batch", lambda s, x: s.b(F.pad(hidden(s, x), (0, 0, 1, 0))[:-1]), ROWS, **TWO),
    odd("written-one-later", shifted_by_one, ROWS, **TWO),
    odd("convolved-over-batch", lambda s, x: torch.tanh(s.c(x.T.unsqueeze(0)))[0].T, ROWS,
        c=layer(3, 3, 3, kind=nn.Conv1d, padding=1)),
    odd("pooled-over-batch",
        lambda s, x: s.b(F.avg_pool1d(hidden(s, x).T.unsqueeze(0), 3, 1, 1)[0].T), ROWS, **TWO),
    odd("convolved-as-channels", lambda s, x: torch.tanh(s.c(x)).sum((1, 2)), numbers(3, 4, 4),
        c=layer(3, 3, 2, kind=nn.Conv2d)),
    odd("weights-from-data",
        lambda s, x: F.conv1d(s.a(x).unsqueeze(0), hidden(s, x).unsqueeze(2))[0], SQUARE, **SQ),
    odd("attention-over-batch", attended, CUBE, a=layer(4, 2, kind=nn.MultiheadAttention)),
    odd("bmm-over-batch",
        lambda s, x: s.a(x).transpose(0, 1) @ s.b(x).transpose(0, 1).transpose(1, 2), CUBE, **SQ),
    odd("rnn-over-batch", lambda s, x: s.b(s.r(x)[0][:, -1]), CUBE,
        r=layer(4, 4, kind=nn.RNN), b=layer(4, 4)),
    odd("lstm-over-batch", lambda s, x: s.b(s.r(x)[0][:, -1]), CUBE,
        r=layer(4, 4, kind=nn.LSTM), b=layer(4, 4)),
    odd("time-major-unfolded-otherwise",
        lambda s, x: s.b(hidden(s, x.transpose(0, 1).reshape(16, 4))).reshape(4, 4, 4), CUBE, **SQ),
    odd("rolled-flat", lambda s, x: s.b(hidden(s, x).roll(1)), ROWS, **TWO),
    odd("index-of-rows-and-columns",
        lambda s, x: s.b(hidden(s, x)[torch.tensor([[1], [0], [3], [2]]), torch.arange(4)]), SQUARE,
        **SQ),
    odd("index-of-many-rows",
        lambda s, x: hidden(s, x)[torch.tensor([[1, 0, 2, 3]] * 4)][:, 0], CUBE, **SQ),
    odd("mask-over-batch",
        lambda s, x: s.b(hidden(s, x)[torch.eye(4, dtype=torch.bool)].unsqueeze(1).expand(4, 4)),
        SQUARE, **SQ),
    odd("table-of-samples", lambda s, x: s.b(hidden(s, x)[x.argsort(1)[:, 0]]), SQUARE, **SQ),
    odd("scatter-over-batch",
        lambda s, x: s.b(torch.zeros_like(x).scatter_add(0, x.argsort(0), hidden(s, x))), SQUARE, **SQ),
    odd("embedding-of-samples", lambda s, x: s.b(F.embedding(torch.tensor([1, 0, 3, 2, 4]), hidden(s, x))), ROWS,
        **TWO),
    odd("features-by-samples", lambda s, x: s.b(hidden(s, x).index_select(1, x.argsort(1)[:, 0])), SQUARE, **SQ),
    odd("row-of-samples-replaced", lambda s, x: s.b(torch.select_scatter(hidden(s, x), s.v, 0, 2)), ROWS,
        v=numbers(3), **TWO),
    odd("scattered-into-more-rows",
        lambda s, x: s.b(x.new_zeros(6, 3).scatter_add(1, torch.tensor([[1, 0, 2]] * 5), hidden(s, x))), ROWS, **TWO),
    odd("repeated-over-batch", lambda s, x: s.b(hidden(s, x).repeat(2, 1)[1::2]), SQUARE, **SQ),
    odd("repeated-in-front", lambda s, x: s.b(hidden(s, x).repeat(4, 1, 1)), SQUARE, **SQ),
    odd("windows-over-batch", lambda s, x: s.b(hidden(s, x).unfold(0, 4, 1)[0]), SQUARE, **SQ),
    odd("row-in-front",
        lambda s, x: s.b(torch.cat([s.c, hidden(s, x)])[:5]), ROWS, c=numbers(1, 3), **TWO),
    odd("variance-over-batch",
        lambda s, x: (lambda h: s.b(h / torch.var_mean(h, 0)[0]))(hidden(s, x)), ROWS, **TWO),
    odd("highest-over-batch", lambda s, x: s.b(hidden(s, x).median(0)[0] * x), ROWS, **TWO),
    odd("product-over-batch", lambda s, x: s.b(hidden(s, x).cumprod(0)), ROWS, **TWO),
]  # fmt: skip


def in_place_buffer(s: Net, x: Tensor) -> Tensor:
    h, out = s.a(x), torch.zeros(len(x), 3, dtype=x.dtype)
    out[:, 0] = torch.tanh(h[:, 1])
    out[:, 1] = h[:, 0]
    return s.b(out)


def in_place_copy(s: Net, x: Tensor) -> Tensor:
    h, out = s.a(x), torch.zeros(len(x), 3, dtype=x.dtype)
    out.copy_(torch.tanh(h))
    out.add_(1)
    return s.b(out)


def in_place_base(s: Net, x: Tensor) -> Tensor:
    h = s.a(x)
    h.view(-1).tanh_()
    return s.b(h)


def in_place_column(s: Net, x: Tensor) -> Tensor:
    h = s.a(x)
    h[:, 0].mul_(2.0)
    return s.b(torch.tanh(h))


def in_place_part(s: Net, x: Tensor) -> Tensor:
    first, second = torch.unsafe_split(s.a(x), 2, 1)
    turned = first.t()
    first.mul_(2.0)
    return s.b(torch.tanh(torch.cat([turned.t(), second.add_(1.0)], 1)))


def attended_to(tokens: Tensor) -> Tensor:
    """The first of them, when all have looked at all."""
    return ((tokens @ tokens.mT).softmax(-1) @ tokens)[:, 0]


def class_token(s: Net, x: Tensor) -> Tensor:
    tokens = torch.cat([s.token.expand(len(x), -1, -1), s.a(x)], 1) + s.place
    return s.b(attended_to(tokens))


def prompted(s: Net, x: Tensor) -> Tensor:
    """Trained tokens that each sample gets, through a layer of their own, in the middle of time-major ones."""
    prompts = s.p(s.token[:, None].repeat(1, len(x), 1))
    tokens = torch.cat([prompts, s.a(x).transpose(0, 1)]).transpose(0, 1)
    return s.b(attended_to(tokens))


def trained_state(s: Net, x: Tensor) -> Tensor:
    state = s.state.expand(len(x), -1)
    for t in range(x.shape[1]):
        state = s.r(x[:, t], state)
    return s.b(state)


def own_copies(s: Net, x: Tensor) -> Tensor:
    return s.b(torch.tanh(torch.bmm(x, s.w.expand(len(x), -1, -1))).mean(1))


def heads_by_matmul(s: Net, x: Tensor) -> Tensor:
    return s.b(torch.tanh(x[:, None] @ s.w).mean(1))


def with_state(s: Net, x: Tensor) -> Tensor:
    state = x.new_zeros(len(x), 4)
    for t in range(x.shape[1]):
        state = s.r(x[:, t], state)
    return s.b(state)


def dense(s: Net, x: Tensor) -> Tensor:
    h = hidden(s, x)
    return s.c(torch.cat([x, h, torch.tanh(s.b(torch.cat([x, h], 1)))], 1))


def branched(s: Net, x: Tensor) -> Tensor:
    z = s.a(x)
    return s.b(z.relu()) + s.c(z.tanh()) * s.d(z)


def attention(s: Net, x: Tensor) -> Tensor:
    return torch.bmm(s.q(x), s.k(x).transpose(1, 2)).softmax(-1) @ s.v(x)


def last_step(s: Net, x: Tensor) -> Tensor:
    return s.h(s.r(x.transpose(0, 1))[0][-1])


def time_major(s: Net, x: Tensor) -> Tensor:
    return s.b(hidden(s, x.transpose(0, 1))).transpose(0, 1)


def time_major_flat(s: Net, x: Tensor) -> Tensor:
    flat = x.transpose(0, 1).reshape(-1, x.shape[2])
    return s.b(hidden(s, flat)).reshape(x.shape[1], len(x), -1).transpose(0, 1)


# Samples are independent. Whichever route answers must be right.
INDEPENDENT = [
    odd("square", lambda s, x: s.b(hidden(s, x)), SQUARE, **SQ),
    odd("square-over-time", lambda s, x: s.b(hidden(s, x)), CUBE, **SQ),
    odd("one-sample", lambda s, x: s.b(hidden(s, x)), ROWS[:1], **TWO),
    odd("one-sample-relu", lambda s, x: s.b(s.a(x).relu()), ROWS[:1], loss="cross-entropy", **TWO),
    odd("one-step", lambda s, x: s.b(hidden(s, x)).squeeze(1), ROWS.unsqueeze(1), **TWO),
    odd("one-sample-over-time", lambda s, x: s.b(hidden(s, x)).mean(1), numbers(1, 3, 3), **TWO),
    odd("one-output", lambda s, x: s.b(hidden(s, x)).squeeze(1), ROWS[:1], a=layer(3, 4),
        b=layer(4, 1)),
    odd("output-repeated", lambda s, x: s.b(hidden(s, x)).unsqueeze(1).expand(5, 3, 2), ROWS, **TWO),
    odd("shared-wide", lambda s, x: s.b(hidden(s, x)), numbers(3, 2, 6), a=layer(6, 5),
        b=layer(5, 4)),
    odd("shared-wide-relu", lambda s, x: s.b(s.a(x).relu()).mean(1), numbers(3, 2, 6),
        a=layer(6, 5), b=layer(5, 4), loss="cross-entropy"),
    # Weights by other ways than nn.Linear
    odd("weight-as-stored", lambda s, x: torch.tanh(x @ s.w) @ s.v, SQUARE, w=numbers(4, 4),
        v=numbers(4, 4, seed=2)),
    odd("weight-on-the-left", lambda s, x: torch.tanh(s.w @ x.T).T @ s.v, SQUARE, w=numbers(4, 4),
        v=numbers(4, 4, seed=2)),
    odd("weight-on-the-left-over-time", lambda s, x: torch.tanh(s.w @ x), CUBE, w=numbers(4, 4)),
    odd("weight-batched-on-the-left", lambda s, x: torch.tanh(s.w @ x), numbers(3, 2, 3, 3),
        w=numbers(2, 3, 3)),
    odd("weight-transposed", lambda s, x: torch.tanh(x @ s.w.T) @ s.v.t() + s.b, SQUARE,
        w=numbers(4, 4), v=numbers(4, 4, seed=2), b=numbers(4)),
    odd("weight-permuted", lambda s, x: torch.tanh(F.linear(x, s.w.permute(1, 0))), ROWS,
        w=numbers(3, 4)),
    odd("weight-viewed", lambda s, x: torch.tanh(F.linear(x, s.w.view(4, 3))), ROWS, w=numbers(12)),
    odd("weight-viewed-otherwise", lambda s, x: torch.tanh(F.linear(x, s.w.view(4, 3))), ROWS,
        w=numbers(3, 4)),
    odd("weight-viewed-column", lambda s, x: torch.tanh(x @ s.w.view(3, 1)), ROWS,
        w=numbers(1, 3)),
    odd("weight-viewed-row", lambda s, x: torch.tanh(x[:, :1] @ s.w.view(1, 3)), ROWS,
        w=numbers(3, 1)),
    odd("weight-unsqueezed", lambda s, x: torch.tanh(x @ s.w.unsqueeze(1)), ROWS, w=numbers(3)),
    odd("weight-vector", lambda s, x: torch.tanh(x @ s.w), ROWS, w=numbers(3)),
    odd("weight-vector-over-time", lambda s, x: torch.tanh(x @ s.w), CUBE, w=numbers(4)),
    odd("weight-twice-by-slices", lambda s, x: torch.tanh(F.linear(x, s.w[:3])) + F.linear(x, s.w[1:]),
        ROWS, w=numbers(4, 3)),
    odd("weight-viewed-early-used-late",
        lambda s, x: (lambda w: torch.tanh(torch.tanh(F.linear(x, s.w)) @ w.clone()))(s.w.t()), ROWS, w=numbers(3, 3)),
    odd("weight-and-bias-in-one", lambda s, x: torch.tanh(torch.addmm(s.p, x[:, :1], s.p.view(1, 3))), ROWS,
        p=numbers(3)),
    odd("weight-detached-too", lambda s, x: torch.tanh(F.linear(x, s.w) + F.linear(x, s.w.detach())), ROWS,
        w=numbers(4, 3)),
    odd("weight-detached-alone", lambda s, x: torch.tanh(F.linear(hidden(s, x), s.w.detach())), ROWS, a=layer(3, 3),
        w=numbers(4, 3)),
    odd("weight-product", lambda s, x: torch.tanh(x @ (s.w @ s.v)), ROWS, w=numbers(3, 2),
        v=numbers(2, 3)),
    odd("weight-as-kernel", lambda s, x: torch.tanh(F.conv1d(x, s.w.unsqueeze(-1))),
        numbers(5, 3, 4), w=numbers(2, 3)),
    odd("weight-as-kernel-transposed", lambda s, x: torch.tanh(F.conv1d(x, s.w.t().unsqueeze(-1))),
        numbers(5, 3, 4), w=numbers(3, 2)),
    odd("weight-as-kernel-transposed-square",
        lambda s, x: torch.tanh(F.conv1d(x, s.w.t().unsqueeze(-1))), numbers(5, 3, 4),
        w=numbers(3, 3)),
    odd("weight-as-kernel-transposed-relu",
        lambda s, x: F.conv1d(x, s.w.t().unsqueeze(-1)).relu().flatten(1), numbers(5, 3, 4),
        w=numbers(3, 3)),
    odd("weight-tensordot", lambda s, x: torch.tanh(torch.tensordot(x, s.w, [[1, 2], [0, 1]])),
        numbers(5, 2, 3), w=numbers(2, 3, 4)),
    odd("weight-einsum", lambda s, x: torch.einsum("ni,ij,nj->n", hidden(s, x), s.w, x), ROWS,
        w=numbers(3, 3), **TWO),
    odd("weight-by-einsum", lambda s, x: torch.einsum("nk,kj->nj", torch.einsum("ni,ji->nj", x, s.w).tanh(), s.v),
        ROWS, w=numbers(4, 3), v=numbers(4, 2)),
    odd("weight-by-einsum-over-time",
        lambda s, x: torch.einsum("nti,ij->ntj", torch.einsum("nti,ji->ntj", x, s.w).relu(), s.v),
        CUBE, w=numbers(3, 4), v=numbers(3, 2)),
    odd("weight-by-einsum-of-heads",
        lambda s, x: torch.einsum("nthk,hkj->ntj", torch.einsum("nti,ihk->nthk", x, s.w).tanh(), s.v),
        numbers(3, 2, 5), w=numbers(5, 2, 3), v=numbers(2, 3, 4)),
    odd("weight-by-einsum-in-other-order",
        lambda s, x: torch.einsum("ni,hik->nhk", x, s.w).tanh().flatten(1), ROWS, w=numbers(2, 3, 3)),
    odd("weight-of-heads", lambda s, x: heads(s, x[:, None])[:, 0], ROWS, w=numbers(2, 3, 4),
        b=numbers(2, 4), v=numbers(2, 4, 2)),
    odd("weight-of-heads-over-time", heads, numbers(2, 3, 5), w=numbers(2, 5, 2), b=numbers(2, 2),
        v=numbers(2, 2, 6)),
    odd("weight-of-heads-rearranged",
        lambda s, x: F.linear(torch.tanh(F.linear(x, s.w.transpose(1, 2).reshape(8, 3), s.b.view(8))),
            s.v.permute(2, 0, 1).reshape(2, 8)),
        ROWS, w=numbers(2, 3, 4), b=numbers(2, 4), v=numbers(2, 4, 2)),
    odd("weight-of-two-inputs", lambda s, x: torch.tanh(torch.einsum("nij,ikjl->nkl", x, s.w)),
        numbers(3, 2, 3), w=numbers(2, 2, 3, 2)),
    odd("weight-of-experts", experts, ROWS, w=numbers(2, 3, 4), b=numbers(2, 1, 4), v=numbers(2, 4, 2)),
    odd("weight-of-experts-relu", lambda s, x: experts(s, x, F.relu).log_softmax(1), ROWS,
        w=numbers(2, 3, 4), b=numbers(2, 1, 4), v=numbers(2, 4, 2)),
    odd("weight-of-experts-square", experts, numbers(3, 3), w=numbers(3, 3, 3), b=numbers(3, 1, 3),
        v=numbers(3, 3, 3)),
    odd("weight-of-experts-one-bias", experts, ROWS, w=numbers(2, 3, 4), b=numbers(1, 1, 4),
        v=numbers(2, 4, 2)),
    odd("weight-of-experts-transposed",
        lambda s, x: torch.tanh(x.expand(2, -1, -1) @ s.w.mT).mean(0), ROWS, w=numbers(2, 4, 3)),
    odd("weight-of-experts-of-heads",
        lambda s, x: torch.einsum("nhi,ihk->nhk", hidden(s, x).view(-1, 2, 3), s.w).tanh().flatten(1),
        ROWS, a=layer(3, 6), w=numbers(3, 2, 2)),
    odd("weight-of-an-expert-for-each-sample",
        lambda s, x: torch.tanh(torch.bmm(x[:, None], s.w)[:, 0]), ROWS, w=numbers(5, 3, 2)),
    odd("weight-copied", lambda s, x: torch.tanh(x @ s.w.clone() + s.b.clone()), ROWS,
        w=numbers(3, 2), b=numbers(2)),
    odd("solved-for-columns",
        lambda s, x: torch.linalg.solve_triangular(LOWER[:3, :3], hidden(s, x).T, upper=False).T, ROWS,
        a=layer(3, 3)),
    odd("solved-for-columns-over-time",
        lambda s, x: torch.linalg.solve(LOWER[:3, :3].expand(3, 3, 3), hidden(s, x).permute(1, 2, 0)).sum(0).T,
        numbers(5, 3, 3), a=layer(3, 3)),
    odd("cholesky-solved",
        lambda s, x: torch.cholesky_solve(hidden(s, x).T, LOWER[:3, :3]).T, ROWS, a=layer(3, 3)),
    odd("weight-masked", lambda s, x: F.linear(torch.tanh(F.linear(x, s.w * MASK, s.b)), s.v * 0.5), ROWS,
        w=numbers(4, 3), b=numbers(4), v=numbers(2, 4)),
    odd("weight-masked-relu", lambda s, x: s.b(F.linear(x, MASK * s.w).relu()), ROWS, w=numbers(4, 3),
        b=layer(4, 2), loss="cross-entropy"),
    odd("weight-masked-deep", lambda s, x: torch.tanh(s.g * F.linear(hidden(s, x), s.w * MASK)), ROWS,
        a=layer(3, 3), w=numbers(4, 3), g=numbers(4)),
    odd("weight-masked-over-time", lambda s, x: torch.tanh(F.linear(hidden(s, x), s.w * MASK)), CUBE,
        a=layer(4, 3), w=numbers(4, 3)),
    odd("weight-divided", lambda s, x: torch.tanh(-x @ (s.w / torch.tensor([[2.0], [3], [4]]))), ROWS,
        w=numbers(3, 2)),
    odd("weight-below-a-mask", lambda s, x: torch.tanh(F.linear(x, (1 + MASK) / s.w)), ROWS, w=numbers(4, 3)),
    odd("weight-divided-to-whole-numbers",
        lambda s, x: s.b(torch.tanh(F.linear(x, torch.div(s.w, 0.5, rounding_mode="floor")))), ROWS, w=numbers(4, 3),
        b=layer(4, 2)),
    odd("weight-below", lambda s, x: torch.tanh(x @ (2 / s.w)), ROWS, w=numbers(3, 2)),
    odd("weight-masked-heads",
        lambda s, x: torch.tanh(x @ (s.w * MASK[:, None]).transpose(0, 1).reshape(2, 12)), ROWS[:, :2],
        w=numbers(4, 2, 3)),
    odd("weight-transposed-and-masked", lambda s, x: torch.tanh(F.linear(x, s.w.t() * MASK)), ROWS,
        w=numbers(3, 4)),
    odd("weight-times-another", lambda s, x: torch.tanh(F.linear(x, s.w * s.g)), ROWS,
        w=numbers(4, 3), g=numbers(4, 1)),
    odd("weight-times-one-like-it", lambda s, x: torch.tanh(F.linear(x, s.w * s.g)), ROWS,
        w=numbers(4, 3), g=numbers(4, 3, seed=2)),
    odd("weight-times-itself", lambda s, x: torch.tanh(F.linear(x, s.w * s.w)), ROWS, w=numbers(4, 3)),
    odd("weight-repeated-by-a-product", lambda s, x: torch.tanh(F.linear(x, s.w * MASK)), ROWS,
        w=numbers(1, 3)),
    odd("kernel-masked", lambda s, x: torch.tanh(F.conv1d(x, s.w * MASK[:2, :, None], s.b * 3)), numbers(5, 3, 4),
        w=numbers(2, 3, 2), b=numbers(2)),
    odd("kernel-masked-depthwise",
        lambda s, x: torch.tanh(F.conv1d(x, s.w * MASK.t()[:, None], groups=3)), numbers(5, 3, 6),
        w=numbers(3, 1, 4)),
    odd("bias-and-scale-masked", lambda s, x: torch.tanh(x * (s.g * MASK[0]) + s.c * MASK[1]), ROWS,
        g=numbers(3), c=numbers(3)),
    odd("table-masked", lambda s, x: s.b(torch.tanh(F.embedding(x.argsort(1)[:, 0], s.t * MASK))), SQUARE,
        t=numbers(4, 3), b=layer(3, 2)),
    odd("weight-shuffled", lambda s, x: torch.tanh(x @ s.w.permute(2, 1, 0).reshape(3, 4)), ROWS,
        w=numbers(2, 2, 3)),
    odd("weight-copied-across", lambda s, x: torch.tanh(x @ s.w.t().reshape(3, 4)), ROWS,
        w=numbers(3, 4)),
    odd("bias-copied-across", lambda s, x: torch.tanh(s.a(x) + s.p.t().reshape(6)), ROWS,
        a=layer(3, 6), p=numbers(2, 3)),
    odd("scale-copied-across", lambda s, x: torch.tanh(s.a(x) * s.p.t().reshape(6)), ROWS,
        a=layer(3, 6), p=numbers(2, 3)),
    odd("kernel-copied-across",
        lambda s, x: torch.tanh(F.conv1d(x, s.w.permute(1, 0, 2).contiguous())), numbers(5, 2, 4),
        w=numbers(2, 2, 2)),
    odd("table-copied-across", lambda s, x: s.b(torch.tanh(s.t.t().contiguous()[x.argsort(1)[:, 0]])), SQUARE,
        t=numbers(4, 4), **SQ),
    odd("addmm-scaled", lambda s, x: torch.tanh(torch.addmm(s.b, x, s.w, beta=0.5, alpha=2.0)), ROWS,
        b=numbers(2), w=numbers(3, 2)),
    odd("addmm-bias-row", lambda s, x: torch.tanh(torch.addmm(s.b, x, s.w)), ROWS, b=numbers(1, 2),
        w=numbers(3, 2)),
    odd("addmm-bias-copied-across", lambda s, x: torch.tanh(torch.addmm(s.p.t().reshape(6), x, s.w)), ROWS,
        p=numbers(2, 3), w=numbers(3, 6)),
    odd("one-sample-behind-weight", lambda s, x: torch.tanh(torch.addmm(s.b, s.w, x.T)).T, ROWS[:1], b=numbers(1),
        w=numbers(2, 3)),
    odd("addmm-bias-one", lambda s, x: torch.tanh(torch.addmm(s.b, x, s.w)), ROWS, b=numbers(1),
        w=numbers(3, 2)),
    odd("addmm-bias-per-sample", lambda s, x: torch.tanh(torch.addmm(s.b, x, s.w)), ROWS,
        b=numbers(5, 2), w=numbers(3, 2)),
    # Bare parameters
    odd("bias-later", lambda s, x: torch.tanh(x @ s.w + s.b), ROWS, w=numbers(3, 2), b=numbers(2)),
    odd("bias-much-later", lambda s, x: torch.tanh(s.a(x)) + s.c, ROWS, c=numbers(3), **TWO),
    odd("bias-transposed", lambda s, x: torch.tanh(x + s.p.t()), numbers(5, 3, 2), p=numbers(2, 3)),
    odd("bias-transposed-square", lambda s, x: torch.tanh(x + s.p.t()), numbers(5, 3, 3),
        p=numbers(3, 3)),
    odd("scale-transposed", lambda s, x: torch.tanh(x * s.p.t()), numbers(5, 3, 2),
        p=numbers(2, 3)),
    odd("scale-transposed-linear", lambda s, x: x * s.p.t(), numbers(5, 3, 3), p=numbers(3, 3)),
    odd("bias-sliced", lambda s, x: torch.tanh(s.a(x) + s.c[:3]), ROWS, c=numbers(4), **TWO),
    odd("bias-split-off", lambda s, x: torch.tanh(s.a(x) + s.c.split(3)[1]), ROWS, c=numbers(6), **TWO),
    odd("bias-per-sample", lambda s, x: torch.tanh(s.a(x) + s.c), ROWS, c=numbers(5, 1), **TWO),
    odd("bias-times-three", lambda s, x: torch.tanh(torch.add(x, s.p, alpha=3)), ROWS,
        p=numbers(3)),
    odd("bias-subtracted", lambda s, x: torch.tanh(x - s.p), ROWS, p=numbers(3)),
    odd("bias-twice", lambda s, x: torch.tanh(x + s.p + s.p), ROWS, p=numbers(3)),
    odd("scale-and-bias-in-one", lambda s, x: torch.tanh(x * s.p + s.p), ROWS, p=numbers(3)),
    odd("scale-per-sample", lambda s, x: torch.tanh(x * s.p), ROWS, p=numbers(5, 3)),
    odd("scale-of-one-sample", lambda s, x: torch.tanh(x * s.p), ROWS[:1], p=numbers(1, 3)),
    odd("scale-over-axes", lambda s, x: torch.tanh(x * s.g + s.b), numbers(5, 2, 4, 3),
        g=numbers(2, 1, 3), b=numbers(4, 1)),
    odd("scale-over-equal-axes", lambda s, x: torch.tanh(x * s.g + s.b), numbers(3, 3, 3, 3),
        g=numbers(3, 1, 3), b=numbers(3, 1)),
    odd("scale-spreads-out", lambda s, x: torch.tanh(x[:, :, None] * s.p), ROWS, p=numbers(3, 4)),
    odd("bias-spreads-out", lambda s, x: torch.tanh(s.p + x[:, :1, None]), ROWS, p=numbers(3, 4)),
    odd("numbers-alone", lambda s, x: torch.tanh(s.g * s.a(x)) + s.c, ROWS,
        g=torch.tensor(1.3), c=torch.tensor(0.3), **TWO),
    odd("number-twice", lambda s, x: torch.tanh(x * s.g.exp() + s.g), ROWS, g=torch.tensor(0.3)),
    # Parameters without elements
    odd("no-outputs", lambda s, x: s.o(torch.cat([hidden(s, x), s.z(x)], 1)), ROWS, a=layer(3, 3),
        z=layer(3, 0), o=layer(3, 2)),
    odd("no-inputs", lambda s, x: s.b(hidden(s, x)) + s.z(x[:, :0]), ROWS, z=layer(0, 2), **TWO),
    odd("copied-without-outputs", lambda s, x: s.o(torch.cat([hidden(s, x), x @ s.w.clone()], 1)), ROWS,
        a=layer(3, 3), w=torch.zeros(3, 0), o=layer(3, 2)),
    odd("copied-without-inputs", lambda s, x: s.b(hidden(s, x)) + x[:, :0] @ s.w.clone(), ROWS,
        w=torch.zeros(0, 2), **TWO),
    odd("nothing-unused", lambda s, x: s.b(hidden(s, x)), ROWS, z=torch.zeros(0), **TWO),
    odd("nothing-rearranged", lambda s, x: s.b(hidden(s, x)) + hidden(s, x)[:, :0].T.reshape(5, 0).sum(1)[:, None],
        ROWS, **TWO),
    # Branches
    odd("product-of-branches", lambda s, x: s.a(x) * s.c(x), ROWS, a=layer(3, 2), c=layer(3, 2)),
    odd("product-with-itself", lambda s, x: (lambda z: z * z.relu())(s.a(x)), ROWS, **TWO),
    odd("quotient", lambda s, x: s.b(x / (3 + s.a(x).abs())), ROWS, **TWO),
    odd("one-value-three-ways", branched, ROWS, a=layer(3, 4), b=layer(4, 2), c=layer(4, 2),
        d=layer(4, 2)),
    odd("residual", lambda s, x: x + s.b(hidden(s, x)) + s.c(x), ROWS, a=layer(3, 4),
        b=layer(4, 3), c=layer(3, 3)),
    odd("negated-between", lambda s, x: s.b(-hidden(s, x)), ROWS, **TWO),
    odd("marked-between", lambda s, x: torch.tanh(s.b(s.a(x).signbit().to(x.dtype))), ROWS, **TWO),
    odd("whole-between", lambda s, x: torch.tanh(s.b((2 * s.a(x)).long().to(x.dtype))), ROWS, **TWO),
    odd("nothing-between", lambda s, x: torch.tanh(s.b(torch.zeros_like(s.a(x)))), ROWS, **TWO),
    odd("dense", dense, ROWS, a=layer(3, 4), b=layer(7, 2), c=layer(9, 2)),
    odd("tanh-behind", lambda s, x: torch.tanh(s.b(s.a(x).relu())), ROWS, **TWO),
    odd("curved-on-one-side", lambda s, x: (lambda z: s.b(torch.where(z > 0, z, 0.1 * z**2)))(s.a(x)),
        ROWS, **TWO),
    odd("mask-times-value", lambda s, x: (lambda z: s.b(z * (z > 0)))(s.a(x)), ROWS, **TWO),
    odd("bounds-by-parameter", lambda s, x: s.b(torch.clamp(s.a(x), min=s.l, max=s.l.abs() + 0.5)),
        ROWS, l=0.1 * numbers(3), **TWO),
    odd("weights-by-a-network",
        lambda s, x: torch.bmm(hidden(s, x).view(4, 2, 4), x.unsqueeze(2)).squeeze(2), SQUARE,
        a=layer(4, 8)),
    odd("two-networks-multiplied",
        lambda s, x: torch.bmm(s.a(x).view(5, 2, 2), s.b(x).view(5, 2, 1)).squeeze(2), ROWS,
        a=layer(3, 4), b=layer(3, 2)),
    odd("one-input-twice", lambda s, x, y: hidden(s, x) * torch.tanh(s.b(y)), SQUARE, SQUARE, **SQ),
    odd("added-three-times", lambda s, x: s.b(torch.tanh(torch.add(x, s.a(x), alpha=3))), ROWS,
        a=layer(3, 3), b=layer(3, 2)),
    odd("spread-and-shifted",
        lambda s, x: s.b(torch.tanh(s.a(x).view(5, 1, -1) + MASK[:2, :1]).sum(1)), ROWS, **TWO),
    odd("by-way-of-complex-numbers", lambda s, x: s.b((s.a(x) + 1j).abs()), ROWS, **TWO),
    odd("branch-on-data", lambda s, x: hidden(s, x) if x.sum() > 100 else s.a(x).relu(), ROWS,
        **TWO),
    # Layouts
    odd("rnn-time-major", last_step, numbers(4, 3, 3), r=layer(3, 2, kind=nn.RNN), h=layer(2, 2)),
    odd("rnn-time-major-square", last_step, CUBE, r=layer(4, 4, kind=nn.RNN), h=layer(4, 4)),
    odd("time-major", time_major, CUBE, **SQ),
    odd("time-major-flat", time_major_flat, CUBE, **SQ),
    odd("time-major-flat-wide", time_major_flat, numbers(2, 3, 6), a=layer(6, 5), b=layer(5, 4)),
    odd("transposed-twice", lambda s, x: s.b(hidden(s, x).T.T), SQUARE, **SQ),
    odd("flip-of-features", lambda s, x: s.b(hidden(s, x).flip(1)), ROWS, **TWO),
    odd("cumsum-of-features", lambda s, x: s.b(hidden(s, x).cumsum(1)), ROWS, **TWO),
    odd("sort-of-features", lambda s, x: s.b(hidden(s, x).sort(1)[0]), ROWS, **TWO),
    odd("sort-stable-of-features",
        lambda s, x: s.b(torch.sort(hidden(s, x), stable=True, dim=1)[0]), ROWS, **TWO),
    odd("gather-of-features",
        lambda s, x: s.b(hidden(s, x).gather(1, torch.tensor([[1, 0, 2]]).expand(5, 3))), ROWS,
        **TWO),
    odd("product-of-features", lambda s, x: s.b(hidden(s, x).view(5, 2, 2).prod(2)), ROWS,
        a=layer(3, 4), b=layer(2, 2)),
    odd("greatest-of-features", lambda s, x: s.b(s.a(x).view(5, 2, 2).max(2)[0]), ROWS,
        a=layer(3, 4), b=layer(2, 2)),
    odd("spread-of-features", lambda s, x: s.b((lambda h: h / h.std(1, keepdim=True))(hidden(s, x))),
        ROWS, **TWO),
    odd("glu-transposed", lambda s, x: F.glu(s.a(x).t(), dim=0).t(), ROWS, a=layer(3, 4)),
    odd("repeated", lambda s, x: s.b(hidden(s, x).repeat_interleave(2, 1)), ROWS, a=layer(3, 4),
        b=layer(8, 2)),
    odd("attention-square", attention, numbers(3, 3, 3), q=layer(3, 3), k=layer(3, 3),
        v=layer(3, 3)),
    odd("attention-heads-square", attended, CUBE,
        a=layer(4, 2, kind=nn.MultiheadAttention, batch_first=True)),
    odd("first-of-features", lambda s, x: s.b(hidden(s, x)[:, 0]), CUBE, **SQ),
    odd("class-token", class_token, CUBE, token=numbers(1, 1, 4), place=numbers(1, 5, 4), **SQ),
    odd("weight-in-front", lambda s, x: s.b(torch.tanh((s.w @ x.T).T)), ROWS, w=numbers(4, 3), b=layer(4, 2)),
    odd("weight-in-front-relu", lambda s, x: s.b((s.w @ x.T).relu().T), ROWS, w=numbers(4, 3), b=layer(4, 2),
        loss="cross-entropy"),
    odd("weight-in-front-with-a-bias", lambda s, x: s.b(torch.tanh(torch.addmm(s.c, s.w, x.T).T)), SQUARE,
        w=numbers(4, 4), c=numbers(4, 1), b=layer(4, 2)),
    odd("weight-in-front-over-time",
        lambda s, x: s.b(torch.tanh(torch.einsum("oi,nti->nto", s.w, x)).mean(1)), CUBE, w=numbers(4, 4),
        b=layer(4, 2)),
    odd("weight-in-front-of-heads",
        lambda s, x: s.b(torch.tanh(torch.einsum("hoi,ni->nho", s.w, x)).mean(1)), SQUARE, w=numbers(2, 4, 4),
        b=layer(4, 2)),
    odd("query", lambda s, x: s.b(((hidden(s, x) @ s.q).softmax(1)[..., None] * x).sum(1)), CUBE, q=numbers(4), **SQ),
    odd("query-by-einsum",
        lambda s, x: s.b((torch.einsum("i,nti->nt", s.q, hidden(s, x)).softmax(1)[..., None] * x).sum(1)), CUBE,
        q=numbers(4), **SQ),
    odd("centres", lambda s, x: s.b(torch.exp(-(hidden(s, x)[:, None] - s.c).square().sum(-1))), SQUARE,
        c=numbers(3, 4), a=layer(4, 4), b=layer(3, 2)),
    odd("centres-first", lambda s, x: s.b(torch.tanh(s.c - x)), SQUARE, c=numbers(4), b=layer(4, 2)),
    odd("centres-twice", lambda s, x: s.b(torch.tanh(s.a(x) - s.c) + (x - s.c)), SQUARE, c=numbers(4), **SQ),
    odd("centres-of-half", lambda s, x: s.b(torch.tanh(torch.sub(s.a(x), s.c, alpha=2))), SQUARE, c=numbers(4), **SQ),
    odd("token-by-adding", lambda s, x: s.b(attended_to(torch.cat([x.new_zeros(len(x), 1, 4) + s.token, s.a(x)], 1))),
        CUBE, token=numbers(4), **SQ),
    odd("prompts", prompted, CUBE, token=numbers(3, 4), p=layer(4, 4), **SQ),
    odd("copied-over-time", lambda s, x: s.b(torch.tanh(s.a(x) + s.c.expand(4, 4))), CUBE, c=numbers(1, 4), **SQ),
    odd("copied-over-time-and-mixed", lambda s, x: s.b(torch.tanh(s.a(x) + s.c.expand(4, 4).softmax(0))), CUBE,
        c=numbers(1, 4), **SQ),
    odd("trained-state", trained_state, numbers(5, 3, 3), state=numbers(1, 4), r=layer(3, 4, kind=nn.GRUCell),
        b=layer(4, 2)),
    odd("own-copies", own_copies, CUBE, w=numbers(4, 4), b=layer(4, 2)),
    odd("heads-by-matmul", heads_by_matmul, CUBE, w=numbers(3, 4, 4), b=layer(4, 2)),
    odd("index-of-features", lambda s, x: s.b(hidden(s, x)[:, [2, 0, 1]]), ROWS, **TWO),
    odd("index-of-pairs",
        lambda s, x: s.b((lambda h: h @ h.mT)(hidden(s, x))[:, [0, 0, 1, 2], [1, 2, 2, 3]]), CUBE,
        **SQ),
    odd("index-apart",
        lambda s, x: s.b(hidden(s, x)[:, [0, 1], :, [1, 0]].transpose(0, 1)), numbers(3, 2, 4, 4),
        **SQ),
    odd("mask-of-features",
        lambda s, x: s.b(hidden(s, x)[:, torch.tensor([True, False, True, True])]), SQUARE,
        a=layer(4, 4), b=layer(3, 2)),
    odd("own-step-by-mask", lambda s, x: s.b(hidden(s, x)[F.one_hot(x[:, :, 0].argmax(1), 4).bool()]), CUBE, **SQ),
    odd("own-steps-by-mask",
        lambda s, x: s.b(hidden(s, x)[F.one_hot(x[:, :, 0].argmax(1), 4) == 0].view(4, 3, 4).mean(1)), CUBE, **SQ),
    odd("own-step", lambda s, x: s.b(hidden(s, x)[torch.arange(4), x[:, :, 0].argmax(1)]), CUBE,
        **SQ),
    odd("own-rows",
        lambda s, x: s.b(hidden(s, x)[torch.arange(len(x))[:, None], torch.tensor([[2, 0, 1]])]),
        CUBE, **SQ),
    odd("own-rows-of-a-mask",
        lambda s, x: s.b(hidden(s, x) * (x[..., 0] > 0)[torch.arange(4)[:, None, None], torch.arange(4)]),
        CUBE, **SQ),
    odd("pooled-of-channels-last",
        lambda s, x: s.b(F.adaptive_avg_pool2d(
            torch.tanh(s.c(x.contiguous(memory_format=torch.channels_last))), 1).flatten(1)),
        numbers(4, 2, 4, 4), c=layer(2, 3, 2, kind=nn.Conv2d), b=layer(3, 2)),
    odd("pooled-of-channels-last-3d",
        lambda s, x: s.b(F.adaptive_avg_pool3d(
            torch.tanh(s.c(x.contiguous(memory_format=torch.channels_last_3d))), 1).flatten(1)),
        numbers(4, 2, 3, 3, 3), c=layer(2, 3, 2, kind=nn.Conv3d), b=layer(3, 2)),
    odd("with-nothing-before", lambda s, x: s.b(torch.cat([x.new_zeros(0), hidden(s, x)], 1)), ROWS,
        **TWO),
    odd("positions", lambda s, x: s.b(torch.tanh(s.a(x) + s.p(torch.arange(4)))), CUBE,
        p=layer(6, 4, kind=nn.Embedding), **SQ),
    odd("positions-of-each-sample",
        lambda s, x: s.b(torch.tanh(s.p(torch.arange(4).expand(4, 4)) + s.a(x))), CUBE,
        p=layer(4, 4, kind=nn.Embedding), **SQ),
    odd("positions-and-types",
        lambda s, x: s.b(torch.tanh(s.a(x) + s.t(torch.tensor([[0, 0, 1, 1]])) + s.p[:4])), CUBE,
        t=layer(3, 4, 0, kind=nn.Embedding), p=numbers(4, 4), **SQ),
    odd("positions-multiplied", lambda s, x: s.b(torch.tanh(s.a(x) * s.p(torch.arange(4)))), CUBE,
        p=layer(6, 4, kind=nn.Embedding), **SQ),
    odd("positions-twice-as-large", lambda s, x: s.b(torch.tanh(torch.add(s.a(x), s.p(torch.arange(4)), alpha=2))),
        CUBE, p=layer(6, 4, kind=nn.Embedding), **SQ),
    odd("positions-of-one-number", lambda s, x: s.b(torch.tanh(s.a(x) + s.p(torch.arange(4)))), CUBE,
        p=layer(6, 1, kind=nn.Embedding), **SQ),
    odd("table", lambda s, x: s.b(torch.tanh(s.t[x.argsort(1)[:, 0]])), SQUARE, t=numbers(4, 4), **SQ),
    odd("select-replaced",
        lambda s, x: s.b(torch.select_scatter(x.transpose(0, 1) * 1, hidden(s, x[:, 0]), 0, 2)).transpose(0, 1),
        CUBE, **SQ),
    odd("picture-of-one-sample", lambda s, x: torch.tanh(F.conv1d(s.p, s.a(x).view(2, 2, 3))), ROWS[:1],
        a=layer(3, 12), p=numbers(1, 2, 5)),
    odd("gather-by-data", lambda s, x: s.b(hidden(s, x).gather(1, x.argsort(1))), SQUARE, **SQ),
    odd("one-hot",
        lambda s, x: hidden(s, F.one_hot(x.argsort(1), 4).to(x.dtype)).mean(1), SQUARE, **SQ),
    odd("scatter-of-features",
        lambda s, x: s.b(torch.zeros_like(x).scatter_add(1, x.argsort(1), hidden(s, x))), SQUARE, **SQ),
    odd("roll-of-features", lambda s, x: s.b(hidden(s, x).roll(1, 1)), ROWS, **TWO),
    odd("highest-features", lambda s, x: s.b(hidden(s, x).topk(3, 1)[0]), SQUARE, a=layer(4, 4),
        b=layer(3, 2)),
    odd("highest-features-relu", lambda s, x: s.b(s.a(x).relu().topk(3, 1)[0]), SQUARE,
        a=layer(4, 4), b=layer(3, 2), loss="cross-entropy"),
    odd("repeat-of-features", lambda s, x: s.b(hidden(s, x).repeat(1, 2)), ROWS, a=layer(3, 3),
        b=layer(6, 2)),
    odd("variance-of-features",
        lambda s, x: s.b((lambda h, v: h / v[0])(h := hidden(s, x), torch.var_mean(h, 1, keepdim=True))),
        ROWS, **TWO),
    odd("product-along-features",
        lambda s, x: s.b(hidden(s, x).cumprod(1) + s.a(x).logcumsumexp(1)), ROWS, **TWO),
    odd("lower-triangle", lambda s, x: s.b((hidden(s, x).tril() @ x).relu()), CUBE, **SQ),
    odd("windows-of-features", lambda s, x: s.b(hidden(s, x).unfold(1, 3, 1)).mean(1), SQUARE,
        a=layer(4, 4), b=layer(3, 2)),
    odd("patches", lambda s, x: s.b(hidden(s, F.unfold(x, 2).mT)).mean(1), numbers(3, 1, 3, 4),
        **SQ),
    odd("bilinear", lambda s, x: s.b(torch.tanh(s.a(x, x.flip(1)))), ROWS,
        a=layer(3, 3, 4, kind=nn.Bilinear), b=layer(4, 2)),
    odd("gru", last_step, numbers(4, 3, 3), r=layer(3, 2, kind=nn.GRU), h=layer(2, 2)),
    odd("gru-cell", with_state, numbers(5, 3, 3), r=layer(3, 4, kind=nn.GRUCell), b=layer(4, 2)),
    odd("lstm-both-ways", lambda s, x: s.b(s.r(x)[0][:, -1]), numbers(4, 3, 3),
        r=layer(3, 2, kind=nn.LSTM, batch_first=True, bidirectional=True), b=layer(4, 2)),
    # Convolutions
    odd("conv-uneven", lambda s, x: s.b(s.a(x).relu()).flatten(1), numbers(3, 2, 5, 6),
        a=layer(2, 3, (2, 3), kind=nn.Conv2d, padding=(1, 0), stride=(1, 2), dilation=(2, 1)),
        b=layer(3, 2, 1, kind=nn.Conv2d)),
    odd("conv-same-even", lambda s, x: s.b(s.a(x).relu()).mean((2, 3)), numbers(3, 2, 4, 4),
        a=layer(2, 3, 2, kind=nn.Conv2d, padding="same"), b=layer(3, 2, 1, kind=nn.Conv2d),
        loss="cross-entropy"),
    odd("conv1d-few-places", lambda s, x: s.b(torch.tanh(s.a(x))).mean(2), numbers(3, 4, 5),
        a=layer(4, 3, 3, kind=nn.Conv1d), b=layer(3, 2, 1, kind=nn.Conv1d), loss="cross-entropy"),
    odd("conv2d-few-places", lambda s, x: s.b(torch.tanh(s.a(x))).flatten(1), numbers(3, 4, 4, 5),
        a=layer(4, 3, 3, kind=nn.Conv2d), b=layer(3, 2, (1, 2), kind=nn.Conv2d)),
    odd("conv-groups", lambda s, x: s.b(s.a(x).relu()).flatten(1), numbers(3, 2, 4, 4),
        a=layer(2, 4, 2, kind=nn.Conv2d, groups=2), b=layer(4, 2, 2, kind=nn.Conv2d, groups=2)),
    odd("conv-groups-curved", lambda s, x: s.b(torch.tanh(s.a(x)).flatten(1)), numbers(3, 4, 4, 5),
        a=layer(4, 6, (2, 3), kind=nn.Conv2d, groups=2, stride=(1, 2), padding=1), b=layer(90, 2)),
    odd("conv-depthwise", lambda s, x: s.b(s.a(x).relu()).mean((2, 3)), numbers(3, 3, 5, 4),
        a=layer(3, 3, 3, kind=nn.Conv2d, groups=3, padding=1), b=layer(3, 2, 1, kind=nn.Conv2d),
        loss="cross-entropy"),
    odd("conv1d-depthwise", lambda s, x: s.b(s.a(x).relu()).mean(2), numbers(3, 2, 6),
        a=layer(2, 4, 3, kind=nn.Conv1d, groups=2, dilation=2), b=layer(4, 2, 1, kind=nn.Conv1d)),
    odd("conv3d-groups", lambda s, x: s.b(torch.tanh(s.a(x)).flatten(1)), numbers(2, 4, 3, 2, 3),
        a=layer(4, 2, 2, kind=nn.Conv3d, groups=2), b=layer(8, 2)),
    odd("conv-groups-of-frames",
        lambda s, x: s.b(s.a(x.flatten(0, 1)).relu().flatten(1)).unflatten(0, (3, 2)).mean(1),
        numbers(3, 2, 2, 3, 3), a=layer(2, 2, 2, kind=nn.Conv2d, groups=2), b=layer(8, 2)),
    odd("conv-transposed", lambda s, x: s.b(torch.tanh(s.a(x))).flatten(1), numbers(3, 2, 3, 3),
        a=layer(2, 3, 2, kind=nn.ConvTranspose2d, stride=2),
        b=layer(3, 1, 2, kind=nn.ConvTranspose2d)),
    odd("conv-transposed-outwards", lambda s, x: s.b(s.a(x).relu().flatten(1)), numbers(3, 3, 2, 2),
        a=layer(3, 2, (3, 2), kind=nn.ConvTranspose2d, stride=(3, 2), padding=(1, 0), output_padding=(2, 1)),
        b=layer(60, 2)),
    odd("conv1d-transposed", lambda s, x: s.b(torch.tanh(s.a(x)).flatten(1)), numbers(3, 2, 4),
        a=layer(2, 3, 2, kind=nn.ConvTranspose1d, padding=2, dilation=3), b=layer(9, 2)),
    odd("conv3d-transposed", lambda s, x: s.b(torch.tanh(s.a(x))).flatten(1), numbers(2, 2, 1, 2, 1),
        a=layer(2, 3, (1, 2, 2), kind=nn.ConvTranspose3d), b=layer(3, 1, 2, kind=nn.ConvTranspose3d)),
    odd("conv-transposed-depthwise", lambda s, x: s.b(s.a(x).relu()).mean((2, 3)), numbers(3, 4, 2, 2),
        a=layer(4, 2, 3, kind=nn.ConvTranspose2d, groups=2, stride=2), b=layer(2, 2, 1, kind=nn.Conv2d)),
    odd("conv-transposed-groups", lambda s, x: s.b(s.a(x).relu()).mean((2, 3)), numbers(3, 4, 2, 2),
        a=layer(4, 4, 2, kind=nn.ConvTranspose2d, groups=2), b=layer(4, 2, 1, kind=nn.Conv2d)),
    odd("conv-transposed-of-frames",
        lambda s, x: s.b(torch.tanh(s.a(x.flatten(0, 1))).flatten(1)).unflatten(0, (3, 2)).mean(1),
        numbers(3, 2, 2, 2, 1), a=layer(2, 3, 2, kind=nn.ConvTranspose2d), b=layer(18, 2)),
    odd("conv-of-frames",
        lambda s, x: s.b(torch.tanh(s.a(x.flatten(0, 1))).flatten(1)).unflatten(0, (3, 2)).mean(1),
        numbers(3, 2, 1, 4, 3), a=layer(1, 3, 2, kind=nn.Conv2d), b=layer(18, 2)),
    odd("conv-of-frames-in-front",
        lambda s, x: s.b(s.a(x.transpose(0, 1).flatten(0, 1)).relu().flatten(1)).unflatten(0, (2, 3)).sum(0),
        numbers(3, 2, 1, 4, 3), a=layer(1, 3, 2, kind=nn.Conv2d), b=layer(18, 2),
        loss="cross-entropy"),
    odd("conv-of-frames-few-places",
        lambda s, x: s.b(torch.tanh(s.a(x.flatten(0, 1))).flatten(1)).unflatten(0, (3, 2)).mean(1),
        numbers(3, 2, 1, 4, 3), a=layer(1, 3, 3, kind=nn.Conv2d), b=layer(6, 2)),
    odd("conv-of-frames-in-front-few-places",
        lambda s, x: s.b(torch.tanh(s.a(x.transpose(0, 1).flatten(0, 1))).flatten(1)).unflatten(0, (2, 3))[0],
        numbers(3, 2, 1, 4, 3), a=layer(1, 3, 3, kind=nn.Conv2d), b=layer(6, 2)),
    odd("attention-of-one-sample", lambda s, x: s.b(attended(s, x)), CUBE[:1],
        a=layer(4, 2, kind=nn.MultiheadAttention, batch_first=True), b=layer(4, 3)),
    odd("conv-of-one-sample", lambda s, x: s.b(torch.tanh(s.a(x)).flatten(1)).mean(0, keepdim=True),
        numbers(1, 2, 4, 4)[0].unsqueeze(0), a=layer(2, 3, 2, kind=nn.Conv2d), b=layer(27, 2)),
    odd("conv-square", lambda s, x: s.b(torch.tanh(s.a(x))).flatten(1), numbers(3, 3, 3, 3),
        a=layer(3, 3, 2, kind=nn.Conv2d), b=layer(3, 3, 2, kind=nn.Conv2d)),
    odd("pool-of-one-channel", lambda s, x: F.max_pool2d(s.a(x), 2).flatten(1), CUBE, **SQ),
    odd("cosine", lambda s, x: F.cosine_similarity(torch.tanh(s.a(x)), s.b(torch.tanh(s.a(x)))), ROWS,
        a=layer(3, 4), b=layer(4, 4)),
    odd("cosine-of-pairs", lambda s, x: F.cosine_similarity(s.a(x)[:, None], s.b.weight, dim=-1), ROWS,
        a=layer(3, 4), b=layer(4, 5)),
    odd("own-likelihood", lambda s, x: F.cross_entropy(s.b(torch.tanh(s.a(x))), (x[:, 0] > 0).long(), reduction="none"),
        ROWS, a=layer(3, 4), b=layer(4, 2)),
    # Written in place
    odd("in-place-buffer", in_place_buffer, ROWS, **TWO),
    odd("in-place-copy", in_place_copy, ROWS, **TWO),
    odd("in-place-base", in_place_base, ROWS, **TWO),
    odd("in-place-column", in_place_column, ROWS, **TWO),
    odd("in-place-part", in_place_part, SQUARE, **SQ),
    odd("in-place-relu", lambda s, x: s.b(s.a(x).relu_()), ROWS, **TWO),
]  # fmt: skip


@functools.cache
def reference(model: Odd) -> tuple[Tensor, Tensor]:
    """Targets that fit the model's output, and the Hessian."""
    module = model.make()
    with torch.no_grad():
        shape = module(*model.inputs).shape
    if model.loss == "cross-entropy":
        generator = torch.Generator().manual_seed(0)
        target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    else:
        target = normal(*shape, seed=9)
    truth = hessian(module, LOSSES[model.loss], model.inputs, target)
    assert truth.norm() > 1e-3
    return target, truth


def pose(model: Odd, traced: bool = False) -> tuple[Problem, Tensor]:
    target, truth = reference(model)
    module = model.make()
    if traced:  # `x[:, 0]` takes all samples first, and `len(x)` is a number
        with warnings.catch_warnings(action="ignore"):
            module = torch.jit.trace(module, model.inputs, check_trace=False)
    return problem_of(module, model.inputs, target, model.loss), truth


either = pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])


@either
@pytest.mark.parametrize("model", MIXING, ids=str)
def test_samples_that_mix_are_refused(model, traced):
    problem, truth = pose(model, traced)
    routes = routes_of(problem)
    for name in FAST:
        for structure in STRUCTURES:
            diagonal = structure == "elements"
            for block in blocks_of(problem, structure):
                with pytest.raises(NotApplicable, match=r"\w"):
                    compute_blocks(routes[name], [block], diagonal)
    right, reasons = applies(routes["hvp"], truth, "full", 1e-10)
    assert (right, reasons) == (1, [])


# Of those, these are affine in the plain sense, and preactivation must see it.
SEEN = {
    "square", "square-over-time", "one-sample", "one-step", "shared-wide", "weight-as-stored",
    "weight-transposed", "bias-later", "scale-over-axes", "numbers-alone", "residual", "dense",
    "product-of-branches", "time-major-flat", "conv-uneven", "attention-square", "first-of-features",
    "class-token", "index-of-features", "index-of-pairs", "index-apart", "mask-of-features", "table",
    "weight-in-front-over-time", "query", "query-by-einsum", "centres-first",
    "own-step-by-mask", "own-steps-by-mask",
    "pooled-of-channels-last", "pooled-of-channels-last-3d", "own-step", "own-rows",
    "own-rows-of-a-mask", "with-nothing-before", "gather-by-data", "one-hot",
    "scatter-of-features", "roll-of-features", "highest-features", "repeat-of-features",
    "variance-of-features", "lower-triangle", "windows-of-features", "patches",
    "bilinear", "gru", "lstm-both-ways", "conv-of-frames", "conv-of-frames-in-front",
    "conv-of-frames-few-places", "conv-of-frames-in-front-few-places",
    "attention-of-one-sample", "conv-of-one-sample", "weight-by-einsum", "weight-by-einsum-over-time",
    "weight-by-einsum-of-heads", "weight-permuted", "weight-viewed", "weight-viewed-otherwise",
    "weight-by-einsum-in-other-order", "weight-of-heads", "weight-of-heads-over-time",
    "weight-of-heads-rearranged", "weight-of-experts", "weight-of-experts-square",
    "weight-of-experts-transposed", "weight-of-experts-of-heads", "weight-copied", "conv-transposed-groups",
    "weight-masked", "weight-masked-relu", "weight-masked-deep", "weight-masked-over-time", "weight-divided",
    "weight-masked-heads", "weight-transposed-and-masked", "kernel-masked", "kernel-masked-depthwise",
    "bias-and-scale-masked", "table-masked", "solved-for-columns", "solved-for-columns-over-time",
    "cholesky-solved", "weight-detached-too", "select-replaced",
}  # fmt: skip


@either
@pytest.mark.parametrize("model", INDEPENDENT, ids=str)
def test_what_is_not_refused_is_right(model, traced):
    problem, truth = pose(model, traced)
    routes = routes_of(problem)
    right, reasons = applies(routes["hvp"], truth, "full", 1e-10, model.name)
    assert (right, reasons) == (1, [])
    for structure, name in product(STRUCTURES, FAST):
        right, _ = applies(routes[name], truth, structure, 1e-10, model.name)
        if (structure, name) == ("block_diagonal", "preactivation"):
            assert right or model.name not in SEEN


def test_what_preactivation_must_see_is_tried():
    assert len({model.name for model in INDEPENDENT} & SEEN) == len(SEEN)


@either
@pytest.mark.parametrize("name", ["positions", "positions-of-each-sample", "positions-and-types"])
def test_preactivation_sees_the_rows_of_positions(name, traced):
    (model,) = [m for m in INDEPENDENT if m.name == name]
    problem, truth = pose(model, traced)
    for structure in ("block_diagonal", "elements"):
        right, reasons = applies(routes_of(problem)["preactivation"], truth, structure, 1e-10)
        assert (right, reasons) == (len(blocks_of(problem, structure)), [])


@either
@pytest.mark.parametrize(
    "name",
    [
        "class-token",
        "prompts",
        "trained-state",
        "own-copies",
        "heads-by-matmul",
        "token-by-adding",
        "weight-in-front",
        "weight-in-front-over-time",
        "weight-in-front-of-heads",
        "query",
        "query-by-einsum",
        "centres",
        "centres-first",
    ],
)
def test_uses_of_other_kinds_are_seen(name, traced):
    (model,) = [m for m in INDEPENDENT if m.name == name]
    problem, _ = pose(model, traced)
    uses = Analyses(problem).of(problem.batches[0]).uses
    assert not {"token", "state", "w", "q", "c"}.isdisjoint(uses)


@pytest.mark.parametrize(
    "name",
    ["positions", "own-rows", "prompts", "trained-state", "weight-in-front-over-time", "query-by-einsum",
     "square-over-time", "attention-heads-square", "class-token", "time-major-flat", "gru", "conv-uneven",
     "weight-by-einsum-over-time", "scale-over-equal-axes"],
)  # fmt: skip
def test_a_last_batch_of_one_sample(name):
    (model,) = [m for m in INDEPENDENT if m.name == name]
    problem, truth = pose(model)
    (batch,) = problem.batches
    most = len(batch.inputs[0]) - 1
    problem = problem_of(model.make(), model.inputs, batch.target, model.loss, batch_size=most)
    assert [len(batch.inputs[0]) for batch in problem.batches] == [most, 1]
    route = routes_of(problem)["preactivation"]
    right, _ = applies(route, truth, "block_diagonal", 1e-10)
    assert right >= 1


# --- constants --------------------------------------------------------------------------------


def with_constants(s: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        size, state = s.a.weight.norm(), hidden(s, x)
        column, rows = state[:, :1], x.new_zeros(len(x), 3)
    h = torch.tanh(s.a(x) / size) * column
    rows[:, 1:] = h[:, :2] + s.a.bias.detach().mean()
    return s.b(rows) - s.b.bias.data * state[:, :2]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_is_made_with_gradients_off_is_a_constant(structure):
    problem, truth = pose(odd("with-constants", with_constants, ROWS, **TWO))
    routes = routes_of(problem)
    assert applies(routes["preactivation"], truth, structure, 1e-10)[1] == []
    applies(routes["gauss-newton"], truth, structure, 1e-10)


@pytest.mark.parametrize(
    "doubled",
    [lambda x: 2 * x, lambda x: 2 * x.detach(), lambda x: torch.from_numpy(2 * x.detach().numpy()),
     lambda x: x, lambda x: x.mT, lambda x: torch.empty(5, 3, dtype=x.dtype).copy_(x.detach()),
     lambda x: x.mul_(2), lambda x: x.data.mul_(2)],
)  # fmt: skip
def test_nothing_is_proven_of_a_function_of_the_models_own(doubled):
    """Gradients are off inside, and it has one all the same."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            result = doubled(x)
            if result is x and x._version:
                ctx.mark_dirty(x)
            return result

        @staticmethod
        def backward(ctx, gradient):
            return 2 * (gradient if gradient.shape == (5, 3) else gradient.mT)

    def forward(s: Net, x: Tensor) -> Tensor:
        z = s.a(x).clone()
        return s.b(torch.tanh(Doubled.apply(z).reshape(5, 3)) + z)

    model = odd("function", forward, ROWS, **TWO).make()
    problem = problem_of(model, (ROWS,), numbers(5, 2))
    with pytest.raises(NotApplicable, match=r"Function of its own|gradients off|wrote in place"):
        Analyses(problem).of(problem.batches[0])


# --- parameters that enter several times ------------------------------------------------------


def recurrent(s: Net, x: Tensor) -> Tensor:
    h = torch.tanh(s.i(x))
    for _ in range(3):
        h = h + torch.tanh(s.a(h))
    return s.b(h)


def by_tokens(s: Net, x: Tensor) -> Tensor:
    for _ in range(2):
        x = s.n(x + F.gelu(s.a(x)))
    return s.b(x.mean(1))


def encoders(s: Net, x: Tensor, y: Tensor) -> Tensor:
    return s.b(hidden(s, x)) - s.b(hidden(s, y)) ** 2


def from_zeros(s: Net, x: Tensor) -> Tensor:
    h = x.new_zeros(len(x), 5)
    for step in x.unbind(1):
        h = torch.tanh(s.i(step) + s.a(h))
    return s.b(h)


def mixed_zeros(s: Net, x: Tensor) -> Tensor:
    """The rows of the constant change places, which the samples do not."""
    return torch.tanh(s.a(hidden(s, x)) + s.a(torch.eye(5, 6, dtype=x.dtype)).flip(0))


def between(s: Net, x: Tensor) -> Tensor:
    """A layer of its own between the two."""
    return s.a(torch.tanh(s.i(torch.tanh(s.a(x)))))


WIDE = numbers(5, 6, seed=5)
SHARED = [  # the model, and its weights that enter as they are at several values
    (odd("recurrent", recurrent, ROWS, i=layer(3, 5), a=layer(5, 5), b=layer(5, 2)), {"a.weight"}),
    (odd("between", between, WIDE, a=layer(6, 6), i=layer(6, 6)), {"a.weight"}),
    (odd("encoders", encoders, WIDE, numbers(5, 6, seed=7), a=layer(6, 4), b=layer(4, 3)),
        {"a.weight", "b.weight"}),
    (odd("encoders-relu", lambda s, x, y: s.b(s.a(x).relu()) * s.b(s.a(y).relu()), WIDE,
        numbers(5, 6, seed=7), a=layer(6, 4), b=layer(4, 3)), {"a.weight", "b.weight"}),
    (odd("once-with-a-bias", lambda s, x: s.b(F.linear(torch.tanh(F.linear(x, s.w, s.c)), s.w).tanh()),
        WIDE, w=numbers(6, 6), c=numbers(6), b=layer(6, 2)), {"w"}),
    (odd("one-bias-of-two", lambda s, x: F.linear(torch.tanh(F.linear(x, s.w, s.c)), s.v, s.c), WIDE,
        w=numbers(4, 6), v=numbers(4, 4), c=numbers(4)), {"w", "v"}),
    (odd("stored-inputs-first", lambda s, x: torch.tanh(torch.tanh(x @ s.w) @ s.w) @ s.v, WIDE,
        w=numbers(6, 6), v=numbers(6, 2)), {"w"}),
    (odd("both-ways-up", lambda s, x: torch.tanh(x @ s.w) @ s.w.T, WIDE, w=numbers(6, 4)), set()),
    (odd("masked-once", lambda s, x: torch.tanh(x @ s.w) @ (s.w * 2), WIDE, w=numbers(6, 6)), set()),
    (odd("by-tokens", by_tokens, numbers(5, 3, 8), a=layer(8, 8), n=layer(8, kind=nn.LayerNorm),
        b=layer(8, 2)), {"a.weight"}),
    (odd("convolutions", lambda s, x: s.b(torch.tanh(s.a(torch.tanh(s.a(x)))).flatten(1)),
        numbers(5, 3, 2, 2), a=layer(3, 3, 3, kind=nn.Conv2d, padding=1), b=layer(12, 2)), {"a.weight"}),
    (odd("tokens-and-types", lambda s, x: s.b(s.a(x.argsort(1)[:, 0]) * s.a(x.argsort(1)[:, 1]).sin()),
        WIDE, a=layer(6, 3, kind=nn.Embedding), b=layer(3, 2)), {"a.weight"}),
    (odd("from-zeros", from_zeros, numbers(5, 3, 4), i=layer(4, 5), a=layer(5, 5), b=layer(5, 2)),
        {"a.weight"}),
    (odd("mixed-zeros", mixed_zeros, WIDE, a=layer(6, 6)), set()),
    (odd("once-detached", lambda s, x: s.b(torch.tanh(s.a(x)) * s.a(x.sin()).detach()), WIDE, a=layer(6, 4),
        b=layer(4, 3)), {"a.weight", "b.weight"}),
    (odd("gru-of-two", lambda s, x: s.b(s.r(x)[0][:, -1]), numbers(5, 3, 4),
        r=layer(4, 5, 2, kind=nn.GRU, batch_first=True), b=layer(5, 2)),
        {"r.weight_hh_l0", "r.weight_hh_l1"}),
    (odd("lstm-of-two-ways", lambda s, x: s.b(s.r(x)[0].sum(1)), numbers(5, 3, 4),
        r=layer(4, 5, kind=nn.LSTM, batch_first=True, bidirectional=True), b=layer(10, 2)),
        {"r.weight_hh_l0", "r.weight_hh_l0_reverse"}),
]  # fmt: skip


@either
@pytest.mark.parametrize(("model", "weights"), SHARED, ids=[str(model) for model, _ in SHARED])
def test_a_weight_that_enters_several_times(model, weights, traced):
    problem, truth = pose(model, traced)
    route = routes_of(problem)["preactivation"]
    for structure in STRUCTURES:
        applies(route, truth, structure, 1e-10, model.name)
    blocks = [b for b in blocks_of(problem, "block_diagonal") if b.name in weights]
    assert {block.name for block in blocks} == weights
    for block, diagonal in product(blocks, (False, True)):
        assert compute_blocks(route, [block], diagonal)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("recurrent", [4, 1]),
        ("from-zeros", [4, 1]),
        ("convolutions", [4, 1]),
        ("gru-of-two", [3, 2]),
    ],
)
def test_a_shared_weight_in_bands_and_batches(name, sizes):
    """Rows of some neurons alone, few directions at a time, and a last batch of one sample."""
    (model,) = [m for m, _ in SHARED if m.name == name]
    problem, truth = pose(model)
    (batch,) = problem.batches
    problem = problem_of(model.make(), model.inputs, batch.target, model.loss, batch_size=sizes[0])
    assert [len(batch.inputs[0]) for batch in problem.batches] == sizes
    route = routes_of(problem)["preactivation"]
    route.workspace = 1
    (block,) = blocks_of(problem, "full")
    layout, found = route.layout(block), torch.zeros_like(truth)
    for start, stop in layout.bands(1):
        out = truth.new_zeros(stop - start, block.size - start)
        route.sum([Rows(block, start, stop, out)])
        found[start:stop, start:] = out
    found = layout.ordered(found.triu() + found.triu(1).T)
    assert compare(found, truth, truth) <= 1e-10


@pytest.mark.parametrize("columns", [1, 7])
@pytest.mark.parametrize(
    "name", ["recurrent", "between", "by-tokens", "convolutions", "gru-of-two"]
)
def test_gradients_of_later_layers_in_tiles(monkeypatch, name, columns):
    """Two samples at a time, by few columns: one neuron, or the last ones of a layer with the first of the next."""
    monkeypatch.setattr(sample_gradients, "FEWEST", 2)
    sizes = ChunkSizes(gradients=2 * columns)
    monkeypatch.setattr(sample_gradients, "chunk_sizes", lambda device: sizes)
    tiles: list[list[tuple[int, range]]] = []
    real = sample_gradients.SampleGradients._make

    def watched(self, out, tile, part, motion, row):
        tiles.append(tile)
        real(self, out, tile, part, motion, row)

    monkeypatch.setattr(sample_gradients.SampleGradients, "_make", watched)
    (model,) = [m for m, _ in SHARED if m.name == name]
    problem, truth = pose(model)
    applies(routes_of(problem)["preactivation"], truth, "full", 1e-10, model.name)
    assert len({tuple(tile) for tile in tiles}) > 2


VIEWS = WIDE, numbers(5, 6, seed=7)
STRAIGHT = [  # the model, and a structure whose blocks are all their Gauss-Newton blocks
    (odd("two-views", lambda s, x, y: s.b((s.a(x).relu() - s.a(y).relu()).abs()), *VIEWS, a=layer(6, 4),
        b=layer(4, 3)), "module"),
    (odd("one-of-two-views", lambda s, x, y: s.b((s.a(x) - s.a(y).detach()).abs()), *VIEWS, a=layer(6, 4),
        b=layer(4, 3)), "module"),
    (odd("two-images", lambda s, x, y: s.b((s.a(x).relu() + 2 * s.a(y).relu()).flatten(1)), numbers(5, 2, 3, 3),
        numbers(5, 2, 3, 3, seed=7), a=layer(2, 3, 2, kind=nn.Conv2d), b=layer(12, 2)), "module"),
    (odd("two-tokens", lambda s, x: s.b((s.a(x.argsort(1)[:, 0]) - s.a(x.argsort(1)[:, 1])).relu()), WIDE,
        a=layer(6, 3, kind=nn.Embedding), b=layer(3, 2)), "block_diagonal"),
    (odd("two-towers", lambda s, x, y: torch.maximum(s.a(x), s.b(y)), *VIEWS, a=layer(6, 3), b=layer(6, 3)), "full"),
    (odd("bias-behind", lambda s, x: ((x @ s.w).relu() + s.c).abs(), WIDE, w=numbers(6, 3), c=numbers(3)), "full"),
    (odd("bias-subtracted-beside", lambda s, x: torch.cat([x * s.g, x - s.c], 1).abs().sum(1), WIDE, g=numbers(6),
        c=numbers(6, seed=2)), "full"),
    (odd("bias-in-front-beside", lambda s, x: torch.cat([x * s.g, s.c - x], 1).abs().sum(1), WIDE, g=numbers(6),
        c=numbers(6, seed=2)), "full"),
]  # fmt: skip
BEHIND = [  # and why one is not
    (odd("twice-in-a-row", lambda s, x: s.a(s.a(x).relu()), WIDE, a=layer(6, 6)), "one behind another"),
    (odd("views-multiplied", lambda s, x, y: s.a(x).relu() * s.a(y).relu(), *VIEWS, a=layer(6, 3)), "mul is not"),
    (odd("scaled-behind", lambda s, x: F.linear(x, s.w).relu() * s.g, WIDE, w=numbers(3, 6), g=numbers(3)),
        "one behind another"),
]  # fmt: skip


@either
@pytest.mark.parametrize(
    ("model", "structure"), STRAIGHT, ids=[str(model) for model, _ in STRAIGHT]
)
def test_gauss_newton_of_what_enters_side_by_side(model, structure, traced):
    problem, truth = pose(model, traced)
    route = routes_of(problem)["gauss-newton"]
    right, reasons = applies(route, truth, structure, 1e-10)
    assert (right, reasons) == (len(blocks_of(problem, structure)), [])
    applies(route, truth, "elements", 1e-10)


@pytest.mark.parametrize(("model", "reason"), BEHIND, ids=[str(model) for model, _ in BEHIND])
def test_gauss_newton_refuses_what_enters_one_behind_another(model, reason):
    problem, _ = pose(model)
    with pytest.raises(NotApplicable, match=reason):
        compute_blocks(routes_of(problem)["gauss-newton"], blocks_of(problem, "full"))


# --- positions --------------------------------------------------------------------------------

FRAMES = numbers(4, 2, 2, 4)

# No position sees another behind its layer: (model, the layer, whether all layers are so).
APART = [
    (odd("tokens", lambda s, x: s.b(hidden(s, x)), CUBE, **SQ), "a", True),
    (odd("tokens-of-two-axes", lambda s, x: s.b(hidden(s, x)), FRAMES, **SQ), "a", True),
    (odd("tokens-moved", lambda s, x: s.b(hidden(s, x).transpose(1, 2)), FRAMES, **SQ), "a", False),
    (odd("tokens-apart-and-together",
        lambda s, x: s.b(hidden(s, x).transpose(1, 2)).transpose(1, 2) + s.a(x), FRAMES, **SQ),
        "b", False),
    (odd("tokens-in-front", lambda s, x: s.b(hidden(s, x.transpose(0, 1))).transpose(0, 1), CUBE,
        **SQ), "a", True),
    (odd("tokens-in-a-row", lambda s, x: s.b(hidden(s, x)).flatten(1), CUBE, **SQ), "a", True),
    (odd("tokens-by-their-sum",
        lambda s, x: s.b(torch.tanh(s.a(x) + x.cumsum(1))), CUBE, **SQ), "a", True),
    (odd("token-classes", lambda s, x: s.b(hidden(s, x)).mT, CUBE, loss="cross-entropy", **SQ),
        "a", True),
    (odd("queries", lambda s, x: s.o(torch.tanh(s.q(x) @ x.mT).softmax(2) @ s.v(x)), CUBE,
        q=layer(4, 4), v=layer(4, 4), o=layer(4, 4)), "q", False),
    (odd("pixels", lambda s, x: torch.tanh(s.c(x)), numbers(4, 2, 3, 3),
        c=layer(2, 3, 2, kind=nn.Conv2d, padding=1)), "c", True),
    (odd("pixel-classes", lambda s, x: s.d(torch.tanh(s.c(x))), numbers(4, 2, 3, 3),
        c=layer(2, 3, 2, kind=nn.Conv2d), d=layer(3, 4, 1, kind=nn.Conv2d), loss="cross-entropy"),
        "d", False),
    (odd("points", lambda s, x: s.d(torch.tanh(s.c(x))), numbers(4, 2, 4),
        c=layer(2, 3, 1, kind=nn.Conv1d), d=layer(3, 4, 1, kind=nn.Conv1d)), "c", True),
    (odd("points-of-groups", lambda s, x: s.d(torch.tanh(s.c(x))), numbers(4, 2, 2, 2),
        c=layer(2, 4, 2, kind=nn.Conv2d, padding=1), d=layer(4, 2, 1, kind=nn.Conv2d, groups=2)),
        "c", False),
    (odd("first-token", lambda s, x: s.b(torch.tanh(s.c(hidden(s, x)[:, 0]))), CUBE,
        c=layer(4, 4), **SQ), "a", False),
    (odd("last-token", lambda s, x: s.b(hidden(s, x)[:, -1:].exp()).sum(1).softmax(1), CUBE, **SQ),
        "a", False),
    (odd("first-token-twice", lambda s, x: (lambda h: s.b(h[:, 0] * h[:, 0].exp()))(hidden(s, x)),
        CUBE, **SQ), "a", False),
    (odd("one-sample-of-tokens", lambda s, x: s.b(hidden(s, x)), CUBE[:1], **SQ), "a", True),
]  # fmt: skip

# They do, on the way or in the loss.
TOGETHER = [
    (odd("points-padded", lambda s, x: s.d(torch.tanh(s.c(x))), numbers(4, 2, 4),
        c=layer(2, 3, 1, kind=nn.Conv1d), d=layer(3, 4, 1, kind=nn.Conv1d, padding=1)), "c"),
    (odd("points-skipped", lambda s, x: s.d(torch.tanh(s.c(x))), numbers(4, 2, 4),
        c=layer(2, 3, 1, kind=nn.Conv1d), d=layer(3, 4, 1, kind=nn.Conv1d, stride=2)), "c"),
    (odd("first-and-last", lambda s, x: (lambda h: s.b(h[:, 0] * h[:, -1]))(hidden(s, x)), CUBE,
        **SQ), "a"),
    (odd("first-from-before-it-and-last", lambda s, x: (lambda h: s.b(h[:, -9:1] * h[:, 3:]))(hidden(s, x)), CUBE,
        **SQ), "a"),
    (odd("first-and-all", lambda s, x: (lambda h: s.b(h * h[:, :1]))(hidden(s, x)), CUBE, **SQ), "a"),
    (odd("first-two", lambda s, x: s.b(hidden(s, x)[:, :2].sum(1).exp()), CUBE, **SQ), "a"),
    (odd("tokens-averaged", lambda s, x: s.b(hidden(s, x).mean(1).tanh()), CUBE, **SQ), "a"),
    (odd("tokens-transposed", lambda s, x: s.b(hidden(s, x).mT), CUBE, **SQ), "a"),
    (odd("tokens-rolled", lambda s, x: (lambda h: s.b(h * h.roll(1, 1)))(hidden(s, x)), CUBE, **SQ),
        "a"),
    (odd("tokens-weighed", lambda s, x: s.b(s.a(x).softmax(1)), CUBE, **SQ), "a"),
    (odd("tokens-as-classes", lambda s, x: s.b(hidden(s, x)), CUBE, loss="cross-entropy", **SQ),
        "a"),
    (odd("tokens-in-a-row-of-classes", lambda s, x: s.b(hidden(s, x)).flatten(1), CUBE,
        loss="cross-entropy", **SQ), "a"),
    (odd("tokens-by-the-last", lambda s, x: (lambda h: s.b(h * h[:, -1:]))(hidden(s, x)), CUBE,
        **SQ), "a"),
    (odd("keys", lambda s, x: torch.tanh(x @ s.k(x).mT).softmax(2) @ x, CUBE, k=layer(4, 4)), "k"),
]  # fmt: skip


def own_use(model: Odd, part: str) -> tuple[Problem, Tensor, Use]:
    problem, truth = pose(model)
    analysis = Analyses(problem).of(problem.batches[0])
    name = f"{part}.weight"
    return problem, truth, analysis.uses_apart([name])[name]


def all_right(problem: Problem, truth: Tensor, label: str) -> None:
    for structure in STRUCTURES:
        for name in FAST:
            applies(routes_of(problem)[name], truth, structure, 1e-10, label)


@pytest.mark.parametrize(("model", "part", "everywhere"), APART, ids=str)
def test_positions_that_count_as_samples(model, part, everywhere):
    problem, truth, use = own_use(model, part)
    assert use.positions == 1
    assert use.apart > 1
    all_right(problem, truth, model.name)
    right, _ = applies(routes_of(problem)["preactivation"], truth, "block_diagonal", 1e-10)
    assert right >= 2
    if everywhere:
        right, _ = applies(routes_of(problem)["preactivation"], truth, "full", 1e-10)
        assert right == 1


@pytest.mark.parametrize(("model", "part"), TOGETHER, ids=str)
def test_positions_that_see_each_other(model, part):
    problem, truth, use = own_use(model, part)
    assert use.positions > 1
    assert use.apart == 1
    all_right(problem, truth, model.name)


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: torch.tanh(s.a(x).sum(2)[:, :, None] + s.b(x).sum(2)[:, None, :]),
        lambda s, x: torch.tanh(s.a(x)) * torch.tanh(s.b(x)).mT,
        lambda s, x: torch.tanh(s.a(x)) @ torch.tanh(s.b(x)).mT,
        lambda s, x: torch.tanh(s.a(x)) + torch.tanh(s.b(x.roll(1, 1)) * s.a.weight[0]),
    ],
)
def test_layers_whose_positions_do_not_correspond(function):
    """The positions of each are apart, but those of one meet others of the other."""
    problem, truth = pose(odd("branches", function, CUBE, **SQ))
    all_right(problem, truth, "branches")


# --- losses of the user's own -----------------------------------------------------------------


def focal(z: Tensor, y: Tensor) -> Tensor:
    terms = F.cross_entropy(z, y, reduction="none")
    return (1 - torch.exp(-terms)) ** 2 * terms


def by_words(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none")


OWN = {
    "focal": (focal, (5, 2), torch.tensor([0, 1, 1, 0, 1])),
    "picked": (lambda z, y: -z.log_softmax(1)[torch.arange(len(y)), y].exp(), (5, 2),
        torch.tensor([0, 1, 1, 0, 1])),
    "gathered": (lambda z, y: z.log_softmax(1).gather(1, y[:, None]).square(), (5, 2),
        torch.tensor([0, 1, 1, 0, 1])),
    "probabilities": (lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="none"), (5, 2),
        numbers(5, 2).sigmoid()),
    "smooth": (lambda z, y: F.smooth_l1_loss(z, y, reduction="none").sum(1), (5, 2), numbers(5, 2)),
    "cosh": (lambda z, y: torch.log(torch.cosh(z - y)).mean(1), (5, 2), numbers(5, 2)),
    "words": (by_words, (4, 4, 4), torch.arange(16).reshape(4, 4) % 4),
    "words-behind": (lambda z, y: F.cross_entropy(z.mT, y, reduction="none"), (4, 4, 4),
        torch.arange(16).reshape(4, 4) % 4),
    "norm": (lambda z, y: (z - y).square().mean(1).sqrt(), (5, 2), numbers(5, 2)),
    "neighbours": (lambda z, y: ((z - y) * (z - y).flip(1)).mean(1), (5, 2), numbers(5, 2)),
    "output-itself": (lambda z, y: z, (5, 2), numbers(5, 2)),
}  # fmt: skip
OWN_ELEMENTWISE = {"probabilities", "smooth", "cosh", "output-itself"}

NINE, CLASSES = (5, 9), torch.tensor([0, 8, 1, 0, 3])
RISING = torch.arange(1, 10, dtype=torch.float64)
SHARES = numbers(5, 9, seed=3).double().softmax(1)
OF_LOG_SOFTMAXES = {  # and how many
    "cross-entropy": (F.cross_entropy, 1),
    "smoothed": (lambda z, y: F.cross_entropy(z, y, RISING, label_smoothing=0.1), 1),
    "by-probabilities": (lambda z, y: F.cross_entropy(z, SHARES), 1),
    "shifted": (lambda z, y: F.nll_loss((z - z.amax(1, keepdim=True)).log_softmax(1), y), 1),
    "at-temperatures": (lambda z, y: F.cross_entropy(-z / 2 + 1, y) + F.kl_div(
        (z * RISING).log_softmax(-1), SHARES, reduction="batchmean"), 2),
    "centred": (lambda z, y: F.cross_entropy((z * RISING - z.mean(1, keepdim=True)) / 2, y), 1),
    "and-linear": (lambda z, y: z.log_softmax(1)[:, 2] - z[:, 1], 1),
    "linear": (lambda z, y: z[:, 2] - z.log_softmax(1).detach()[:, 1], 1),
}  # fmt: skip
OF_OTHERS = {
    "to-another-power": lambda z, y: z.log_softmax(1).exp().square().sum(1),
    "mixed-before": lambda z, y: F.cross_entropy(z.cumsum(1), y),
    "products-before": lambda z, y: F.cross_entropy(z * z.detach(), y),
    "over-sums": lambda z, y: F.cross_entropy(z + z.sum(1, keepdim=True) ** 2 * RISING, y),
    "centred-before": lambda z, y: F.cross_entropy((z - z.mean(1, keepdim=True)) * RISING, y),
    "as-divisor": lambda z, y: F.cross_entropy(1 / z, y),
    "of-some": lambda z, y: F.cross_entropy(z[:, :8], y.clamp(max=7)),
    "of-halves": lambda z, y: z.reshape(5, 3, 3).log_softmax(1).sum((1, 2)),
    "and-squares": lambda z, y: F.cross_entropy(z, y) + z.square().sum(1).mean(),
    "weighed-by-itself": lambda z, y: (z.softmax(1) * z.log_softmax(1)).sum(1),
    "chosen-by-itself": lambda z, y: torch.where(z > 0, z.log_softmax(1), z).sum(1),
}

OF_ALL = {
    "contrastive": lambda z, y: -torch.log_softmax(z @ z.T, 1).diagonal(),
    "centred": lambda z, y: ((z - z.mean(0)) - y).square(),
    "weighed": lambda z, y: z.softmax(0) * y,
    "reduced": lambda z, y: F.mse_loss(z, y) * z,
    "in-order": lambda z, y: (z.cumsum(0) - y).square(),
}


def posed_with(
    function: Callable, shape: tuple[int, ...], target: Tensor
) -> tuple[Problem, Tensor]:
    model = odd("own", lambda s, x: s.b(hidden(s, x)), numbers(*shape[:-1], 3), a=layer(3, 4),
                b=layer(4, shape[-1]))  # fmt: skip
    module = model.make()
    truth = hessian(module, lambda z, y: function(z, y).mean(), model.inputs, target)
    problem = problem_of(module, model.inputs, numbers(*shape))
    loss = Loss("own", function=function)
    batch = replace(problem.batches[0], target=target)
    return measure(replace(problem, batches=[batch], loss=loss, denominator=1.0))[0], truth


@pytest.mark.parametrize("name", OWN)
def test_a_loss_with_terms_of_single_samples(name):
    problem, truth = posed_with(*OWN[name])
    all_right(problem, truth, name)
    for structure in ("full", "block_diagonal"):
        right, reasons = applies(routes_of(problem)["preactivation"], truth, structure, 1e-10)
        assert (right, reasons) == (len(blocks_of(problem, structure)), [])
    analysis = Analyses(problem).of(problem.batches[0])
    assert (analysis.loss_rank(analysis.of_sample) == 0) == (name in OWN_ELEMENTWISE)
    if "words" in name:
        use = analysis.uses_apart(["b.weight"])["b.weight"]
        assert use.apart == 4


ELSEWHERE = {  # and the way back
    "with-words": (lambda z: z.flatten(0, 1), lambda z: z.unflatten(0, (5, -1))),
    "second": (lambda z: z.transpose(0, 1), lambda z: z.transpose(0, 1)),
    "behind-words": (lambda z: z.transpose(0, 1).flatten(0, 1),
                     lambda z: z.unflatten(0, (-1, 5)).transpose(0, 1)),
    "last": (lambda z: z.mT.transpose(0, 2), lambda z: z.transpose(0, 2).mT),
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_output_with_its_samples_elsewhere(name):
    """As the scores of all words along one axis, which the loss is of."""
    turned, back = ELSEWHERE[name]
    model = odd("own", lambda s, x: turned(s.b(hidden(s, x))), numbers(5, 4, 3), a=layer(3, 4),
                b=layer(4, 6))  # fmt: skip
    module, target = model.make(), labels(6, 5, 4)

    def loss(z, y):
        return F.cross_entropy(back(z).flatten(0, 1), y.flatten())

    truth = hessian(module, loss, model.inputs, target)
    problem = problem_of(module, model.inputs, turned(numbers(5, 4, 6)))
    batch = replace(problem.batches[0], target=target)
    own = Loss("own", function=loss, reduced="of all")
    problem = measure(replace(problem, batches=[batch], loss=own, denominator=1.0))[0]
    all_right(problem, truth, name)
    for structure in STRUCTURES:
        right, reasons = applies(routes_of(problem)["preactivation"], truth, structure, 1e-10)
        assert (right, reasons) == (len(blocks_of(problem, structure)), [])
    use = Analyses(problem).of(problem.batches[0]).uses_apart(["b.weight"])["b.weight"]
    assert use.apart == 4


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "shape", [torch.Size((5, 3)), torch.Size((5, 3, 2))], ids=["vectors", "positions"]
)
def test_the_hessian_of_a_loss_at_the_output(name, shape):
    """Of an elementwise one, a diagonal; behind a softmax, one of rank two more."""
    target = TARGETS.get(name, lambda s: normal(*s, seed=9))(shape)
    squeezed = {"bce": nn.Sigmoid(), "nll": nn.LogSoftmax(1), "kl-div": nn.LogSoftmax(1)}
    end = squeezed.get(name, nn.Identity())
    module = nn.Sequential(nn.Linear(shape[-1], shape[-1]), end)
    problem = problem_of(module, [normal(*shape)], target, name)
    analysis = Analyses(problem).of(problem.batches[0])
    found, own = at_output(problem)
    rank = {"cross-entropy": 2 if len(shape) == 2 else 6}.get(name, 0)
    assert found.right.shape[1] == analysis.loss_rank(analysis.of_sample) == rank
    mine = found @ torch.eye(shape[1:].numel(), dtype=own.dtype).expand(5, -1, -1)
    torch.testing.assert_close(mine, own, rtol=1e-10, atol=1e-14)


def at_output(problem: Problem) -> tuple[OutputHessian, Tensor]:
    """The loss's Hessian at the output as the routes have it, [B, C, C] by its factors, and by `torch.autograd`."""
    batch = problem.batches[0]
    probed = Probed(Analyses(problem), batch, [])
    found = probed.output_hessian(probed.analysis.of_sample)
    with torch.no_grad():
        f = problem.output(batch)
    whole = torch.autograd.functional.hessian(
        lambda f: problem.loss.total(f, batch)[0] / problem.denominator, f
    )
    own = torch.einsum("bibj->bij", whole.reshape(len(f), -1, len(f), f[0].numel()))
    return found, own


@pytest.mark.parametrize("name", [*OF_LOG_SOFTMAXES, *OF_OTHERS])
def test_a_loss_that_is_linear_in_log_softmaxes(name):
    """Two rows for each, and a diagonal; any other has as many rows as the output."""
    function, count = OF_LOG_SOFTMAXES.get(name) or (OF_OTHERS[name], None)
    problem, truth = posed_with(function, NINE, CLASSES)
    found, own = at_output(problem)
    assert found.right.shape[1] == (9 if count is None else 2 * count)
    mine = found @ torch.eye(9, dtype=own.dtype).expand(5, -1, -1)
    torch.testing.assert_close(mine, own, rtol=1e-10, atol=1e-14)
    all_right(problem, truth, name)


def test_the_hessian_of_a_cross_entropy_of_predictions_that_are_almost_sure():
    """p_m is one in float32; p_m (1 - p_m) is not nothing."""
    z = torch.tensor([[40.0, 1, 0, 2], [0, 18, -1, 2], [3, 1, 0, 2]])
    layer = nn.Linear(4, 4)
    nn.init.eye_(layer.weight), nn.init.zeros_(layer.bias)
    labels = torch.tensor([0, 1, 1])
    found, _ = at_output(problem_of(layer, [z], labels, "cross-entropy", dtype=torch.float32))
    mine = found @ torch.eye(4).expand(3, -1, -1)
    p = z.double().softmax(1)
    q = torch.stack([p.roll(shift, 1) for shift in (1, 2, 3)]).sum(0)  # 1 - p
    exact = -p[:, :, None] * p[:, None]
    exact.diagonal(dim1=1, dim2=2).copy_(p * q)
    torch.testing.assert_close(mine.double(), exact / 3, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", OF_ALL)
def test_a_loss_with_terms_of_several_samples(name):
    problem, truth = posed_with(OF_ALL[name], (5, 2), numbers(5, 2, seed=4))
    routes = routes_of(problem)
    for block in blocks_of(problem, "block_diagonal"):
        with pytest.raises(NotApplicable, match="the loss own may mix samples"):
            compute_blocks(routes["preactivation"], [block])
    right, _ = applies(routes["hvp"], truth, "full", 1e-10)
    assert right == 1


NO_SUMS = {
    "root": lambda z, y: F.mse_loss(z, y).sqrt(),
    "ratio": lambda z, y: (z * y).sum() / z.square().sum(),
    "product": lambda z, y: z.mean() * (z - y).square().mean(),
    "contrasts": lambda z, y: F.cross_entropy(z @ z.T, torch.arange(len(z))),
    "centred": lambda z, y: (z - z.mean(0) - y).square().sum(),
    "in-order": lambda z, y: (z.cumsum(0) - y).square().mean(),
    "largest": lambda z, y: z.square().sum(1).amax(),
    "each-with-each": lambda z, y: F.mse_loss(z[:, :1].expand(5, 5), z[:, 1].expand(5, 5)),
}


@pytest.mark.parametrize("name", NO_SUMS)
def test_one_number_that_is_no_sum_over_samples(name):
    problem, _ = posed_with(NO_SUMS[name], (5, 2), numbers(5, 2, seed=4))
    problem = replace(problem, loss=replace(problem.loss, reduced="mean"))
    with pytest.raises(NotApplicable, match="the loss own may mix samples"):
        Analyses(problem).of(problem.batches[0])


def test_a_loss_of_an_output_and_its_transpose():
    problem, truth = posed_with(lambda z, y: F.mse_loss(z, z.mT), (4, 4, 4), numbers(4, 4, 4))
    all_right(problem, truth, "transposed")
    analysis = Analyses(problem).of(problem.batches[0])
    assert analysis.loss_rank(analysis.of_sample) == 16


def test_an_axis_of_classes_is_no_axis_of_samples():
    """Without a sample axis the loss couples what lies along the first."""
    model = Net(lambda s, x: x * s.g, g=torch.tensor(1.3)).double()
    x, target = numbers(4), torch.tensor(2)
    truth = hessian(model, F.cross_entropy, (x,), target)
    assert truth.norm() > 1e-2
    problem = problem_of(model, (x,), target, "cross-entropy")
    for route in routes_of(problem).values():
        limit = 1e-6 if route.name == "finite-difference" else 1e-10
        for structure in ("full", "elements"):
            applies(route, truth, structure, limit)
    assert applies(routes_of(problem)["hvp"], truth, "full", 1e-10) == (1, [])


@pytest.mark.parametrize("name", FAST)
def test_a_multiplier_that_differs_between_batches_is_refused(name):
    """What multiplies a parameter is multiplied in when all batches are summed up."""
    model = Net(lambda s, x: torch.tanh(F.linear(x, s.w * (len(x) * MASK))), w=numbers(4, 3))
    for batch_size in (None, 3):
        problem = problem_of(model, (ROWS,), numbers(5, 4), batch_size=batch_size)
        route, blocks = routes_of(problem)[name], blocks_of(problem, "full")
        with pytest.raises(NotApplicable, match="different paths") if batch_size else nullcontext():
            compute_blocks(route, blocks)


def test_layers_in_another_order_in_another_batch_are_refused():
    """The rows of a block are those of its layers, in the order of execution."""
    model = Net(
        lambda s, x: s.b(torch.tanh(s.a(x))) if len(x) == 3 else s.a(torch.tanh(s.b(x))),
        a=layer(6, 6)(), b=layer(6, 6)(),
    )  # fmt: skip
    for batch_size in (None, 3):
        problem = problem_of(model, (WIDE,), numbers(5, 6), batch_size=batch_size)
        route, blocks = routes_of(problem)["preactivation"], blocks_of(problem, "full")
        with pytest.raises(NotApplicable, match="different paths") if batch_size else nullcontext():
            compute_blocks(route, blocks)


@pytest.mark.parametrize(
    "function", [lambda z: torch.tanh(z) > 0, lambda z: z.pow(0)], ids=["compared", "straight"]
)
def test_a_bend_that_the_loss_does_not_feel(function):
    """Beside layers that it does."""
    model = odd("bend", lambda s, x: s.b(x) + function(s.a(x)), ROWS, a=layer(3, 2), b=layer(3, 2))
    problem, whole = pose(model)
    route = routes_of(problem)["gauss-newton"]
    for structure in ("block_diagonal", "elements"):
        found = compute_blocks(route, blocks_of(problem, structure), structure == "elements")
        for block, truth in blocks_and_truth(problem, whole, structure):
            assert compare(found[block.name], truth, whole) <= 1e-10


def test_gauss_newton_refuses_an_output_of_complex_numbers():
    model = Net(lambda s, x: torch.complex(s.a(x), s.b(x)), a=layer(3, 2)(), b=layer(3, 2)())
    options = {"loss": lambda z, y: (z.abs() - y).square().mean(1), "dtype": "float64"}
    with pytest.raises(NumericalError, match="the output is complex"):
        hesscli.compute(model, (ROWS, numbers(5, 2)), method="gauss-newton", **options)


@pytest.mark.parametrize("name", ["loss.py:mine", "output"])
def test_a_loss_that_may_mix_samples_is_refused(name):
    """Be it the user's own, or what the model returns."""
    model = Net(
        lambda s, x: s.b(hidden(s, x)).mean(0).square().sum(), **{k: v() for k, v in TWO.items()}
    )
    if name == "output":
        problem = problem_of(model, (ROWS,), None, name)
    else:
        from dataclasses import replace

        from hesscli.hessian.objective.loss import Loss

        plain = Net(lambda s, x: s.b(hidden(s, x)), **{k: v() for k, v in TWO.items()})
        problem = problem_of(plain, (ROWS,), numbers(5, 2), "mse")
        loss = Loss(name, function=lambda z, y: (z - y).square().mean(0).pow(2))
        problem = replace(problem, loss=loss)
    for route in FAST:
        with pytest.raises(NotApplicable):
            compute_blocks(routes_of(problem)[route], blocks_of(problem, "block_diagonal"))


@pytest.mark.parametrize(
    ("name", "route"),
    [
        *product(
            ["mlp-relu", "softmax", "conv-conv", "twice"], ["preactivation", "gauss-newton", "hvp"]
        ),
        ("twice", "finite-difference"),
    ],
)
def test_blocks_together_are_the_blocks_alone(name, route):
    problem, routes = posed(name)
    for structure in ("block_diagonal", "elements"):
        diagonal = structure == "elements"
        blocks = blocks_of(problem, structure)
        try:
            alone = {b.name: compute_blocks(routes[route], [b], diagonal)[b.name] for b in blocks}
        except NotApplicable:
            with pytest.raises(NotApplicable):
                compute_blocks(routes[route], blocks, diagonal)
            continue
        together = compute_blocks(routes[route], blocks, diagonal)
        for block in blocks:
            assert torch.allclose(together[block.name], alone[block.name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("route", ["preactivation", "gauss-newton", "hvp"])
def test_a_parameter_that_is_not_contiguous(route):
    weight = numbers(3, 4).T
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    model[0].weight = nn.Parameter(weight)
    assert not model[0].weight.is_contiguous()
    target = numbers(5, 2)
    truth = hessian(model, F.mse_loss, (ROWS,), target)
    routes = routes_of(problem_of(model, (ROWS,), target))
    right, _ = applies(routes[route], truth, "block_diagonal", 1e-10)
    assert right == 4


def test_a_view_that_a_contiguous_parameter_would_not_have():
    model = Net(
        lambda s, x: torch.tanh(s.a(x) + s.t.t().view(12)), a=nn.Linear(3, 12), t=numbers(4, 3).T
    ).double()
    target = numbers(5, 12)
    problem = problem_of(model, (ROWS,), target)
    copied = Net(
        lambda s, x: torch.tanh(s.a(x) + s.t.t().reshape(12)), a=model.a, t=model.t.detach()
    )
    truth = hessian(copied, F.mse_loss, (ROWS,), target)
    right, reasons = applies(routes_of(problem)["preactivation"], truth, "block_diagonal", 1e-10)
    assert (right, reasons) == (2, ["not an affine use (view)"])


@pytest.mark.parametrize("most", [operands._MOST_UNITS, 1])
def test_what_table_is_a_layer_of_unit_vectors(monkeypatch, most):
    """One that is not too large."""
    monkeypatch.setattr(operands, "_MOST_UNITS", most)
    model = nn.Sequential(nn.Embedding(4, 3), nn.Tanh(), nn.Linear(3, 2))
    problem = problem_of(model, (ROWS.argsort(1)[:, 0],), numbers(5, 2))
    uses = Analyses(problem).of(problem.batches[0]).uses
    assert ("0.weight" in uses) is (most > 1)


def test_nothing_is_proven_of_an_output_that_is_not_computed():
    problem = problem_of(Net(lambda s, x: x, w=torch.ones(3)).double(), (ROWS,), numbers(5, 3))
    with pytest.raises(NotApplicable, match="does not depend on the data"):
        Analyses(problem).of(problem.batches[0])


def test_finite_difference_of_a_parameter_that_is_not_contiguous():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].weight = nn.Parameter(numbers(3, 4).T)
    target = numbers(5, 2)
    truth = hessian(model, F.mse_loss, (ROWS,), target)
    route = routes_of(problem_of(model, (ROWS,), target))["finite-difference"]
    assert applies(route, truth, "full", 1e-7) == (1, [])
