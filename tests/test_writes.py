"""Models that write into tensors: the fast routes see through it, unless samples meet."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import LOSSES, normal
from oracles import hessian, hessian_by_differences
from problems import FAST, STRUCTURES, Net, blocks_and_truth, compute_blocks, problem_of, routes_of
from torch import Tensor, nn

from hesscli.hessian.applicability import NotApplicable

SEEN, MIXING = [], []


def seen(function):
    SEEN.append(function)
    return function


def mixing(function):
    MIXING.append(function)
    return function


# Each makes five samples' features h [5, 6] of others, and may look at the inputs x [5, 4].


@seen
def halves(h, x):
    out = torch.zeros_like(h)
    out[:, :3] = h[:, 3:]
    out[:, 3:] = 2 * h[:, :3]
    return out


@seen
def step_by_step(h, x):
    out = torch.zeros(len(h), 6, dtype=h.dtype)
    for t in range(6):
        out[:, t] = h[:, t] * h[:, t - 1]
    return out


@seen
def kept_above_a_bound(h, x):
    return nn.functional.gaussian_nll_loss(h, x[:, :1].expand_as(h), h.exp(), reduction="none")


@seen
def shifted(h, x):
    out = torch.zeros_like(h)
    out[:, 1:] = h[:, :-1]
    return out


@seen
def where_gradients_are_off(h, x):
    out = h.clone()
    with torch.no_grad():
        out.clamp_(min=0.1)
        out.copy_(out + out.tanh())
    return out * out


@seen
def strided(h, x):
    out = h.clone()
    out[:, 1::2] = h[:, ::2] * h[:, 1::2]
    return out


@seen
def into_nothing(h, x):
    out = h * 1
    for start, stop in ((0, 2), (2, 6), (6, 6)):
        out[:, start:stop] = h[:, start:stop] * h[:, :1]
    return out


@seen
def two_views_at_once(h, x):
    out = h.clone()
    a, b = out[:, :3], out[:, 3:]
    a.copy_(h[:, 3:])
    b.mul_(2)
    a.add_(1)
    b.copy_(h[:, :3] + a)
    return out


@seen
def read_through_an_old_view(h, x):
    h = h * 1
    old = h[:, 0]
    h[:, :2] = h[:, 2:4].clone()
    return torch.cat([h[:, 1:], (old * old)[:, None]], 1)


@seen
def returned_as_an_old_view(h, x):
    h = h * 1
    old = h.view(-1, 2, 3)
    h[:, 0] = torch.tanh(h[:, 1])
    return old.reshape(-1, 6)


@seen
def operators_on_columns(h, x):
    h = h * 1
    h[:, 0] += h[:, 1]
    h[:, 2] *= 2
    h[:, 1].exp_()
    return h


@seen
def squares(h, x):
    h = h * 1
    h[:, 3].pow_(2)
    return h


@seen
def through_a_transpose(h, x):
    out = torch.zeros(6, len(h), dtype=h.dtype)
    out.T[:, :3] = h[:, :3]
    out.permute(1, 0)[:, 3:] = h[:, 3:]
    out.view(2, 3, -1)[1, 1] = h[:, 0] * h[:, 1]
    return out.T


@seen
def a_transposed_copy(h, x):
    out = h.new_empty(len(h), 2, 3)
    out.copy_(torch.tanh(h).view(-1, 3, 2).transpose(1, 2))
    return out.view(-1, 6)


@seen
def a_sum_through_a_transpose(h, x):
    h = h * 1
    h.view(-1, 3, 2).transpose(1, 2).cumsum_(1)
    return torch.tanh(h).view(-1, 6)


@seen
def through_another_axis(h, x):
    h = h * 1
    h.unsqueeze(1)[:, 0, 2] = torch.tanh(h[:, 3] + h[:, 4])
    return h


@seen
def broadcast(h, x):
    out = torch.zeros_like(h)
    out[:, :4] = h[:, :1]
    out[:, 4:] = torch.tensor([1.0, 2.0], dtype=h.dtype)
    return out + h


@seen
def another_dtype(h, x):
    out = torch.zeros_like(h)
    out[:, :4] = x > 0
    out[:, 4:] = torch.tensor([1, 2])
    return out * h


@seen
def numbers(h, x):
    h = h * 1
    h[:, 0] = 0
    h[:, 1].zero_()
    h[:, 2].fill_(3)
    return h


@seen
def columns_by_index(h, x):
    out = torch.zeros_like(h)
    out[:, [0, 2, 4]] = h[:, :3]
    out[:, [1, 3, 5]] = h[:, 3:] * h[:, :3]
    return out


@seen
def columns_by_mask(h, x):
    h = h * 1
    h[:, torch.tensor([True, False] * 3)] = 0.5
    return h


@seen
def some_samples_by_mask(h, x):
    out = h.clone()
    out[torch.tensor([True, False, True, False, True])] = 0.5
    return out


@seen
def samples_by_mask_of_their_inputs(h, x):
    out = h.view(5, 2, 3).clone()
    out[x[:, :2] > 0] = 0.5
    return out.view(5, 6)


@seen
def entries_by_mask(h, x):
    h = h * 1
    h[x[:, [0, 1, 2, 3, 0, 1]] > 0] = 0.0
    return h


@seen
def into_a_tensor_made_of_numbers(h, x):
    out = torch.tensor([[1.0] * 6] * 5, dtype=h.dtype)
    first = out[:, 0]
    out[:, 1:] = h[:, :-1]
    out.mul_(2)
    return out + first[:, None] * h


@seen
def index_operators(h, x):
    index = torch.tensor([1, 3])
    h = h.index_copy(1, index, h[:, :2] * h[:, 2:4]).index_fill(1, torch.tensor([0]), 2.0)
    return h.index_add(1, index, h[:, 4:])


@seen
def messages_between_nodes(h, x):
    """A graph network: five graphs of six nodes with the same edges."""
    start, end = torch.tensor([0, 1, 2, 3, 4, 5, 0, 2]), torch.tensor([1, 2, 3, 4, 5, 0, 3, 5])
    sent = torch.zeros_like(h).index_add(1, end, torch.tanh(h[:, start]))
    place = end.expand(len(h), -1)
    greatest = torch.zeros_like(h).scatter_reduce(1, place, h[:, start], "amax")
    return sent + greatest.scatter_reduce(1, place, h[:, start], "mean", include_self=False)


@seen
def diagonals(h, x):
    m = torch.diag_embed(h) + h[:, :, None] * h[:, None]
    m.diagonal(dim1=1, dim2=2)[:] = 2 * h
    return (m @ m).diagonal(dim1=1, dim2=2)


@seen
def a_copy_of_the_inputs(h, x):
    x = x.clone()
    x[:, 0] = 0
    return h * x[:, :1] + h * x[:, 1:2]


@mixing
def one_sample_from_another(h, x):
    h = h * 1
    h[0] = h[1]
    return h


@mixing
def moved_by_one_sample(h, x):
    out = torch.zeros_like(h)
    out[1:] = h[:-1]
    return out


@mixing
def samples_by_index(h, x):
    out = torch.zeros_like(h)
    out[[4, 3, 2, 1, 0]] = h
    return out


@mixing
def samples_by_index_add(h, x):
    return torch.zeros_like(h).index_add(0, torch.tensor([0, 0, 1, 2, 3]), h)


@mixing
def samples_reduced(h, x):
    place = torch.tensor([0, 0, 1, 2, 3])[:, None].expand(5, 6)
    return torch.zeros_like(h).scatter_reduce(0, place, h, "mean")


@mixing
def samples_of_a_list_by_mask(h, x):
    out, rows = h.clone(), torch.linspace(0, 1, 18, dtype=h.dtype).view(3, 6)
    out[torch.tensor([True, False, True, False, True])] = rows
    return out


@mixing
def entries_of_a_list_by_mask(h, x):
    out = h.clone()
    out[torch.arange(30).view(5, 6) % 2 == 0] = torch.linspace(0, 1, 15, dtype=h.dtype)
    return out


@mixing
def entries_added_to_by_mask(h, x):
    mask, more = torch.arange(30).view(5, 6) % 2 == 0, torch.tensor(0.5, dtype=h.dtype)
    return h.clone().index_put_((mask,), more, accumulate=True)


@mixing
def samples_by_indices_of_the_same_shape(h, x):
    out = h.clone()
    out[torch.ones(5, 6, dtype=torch.long)] = 0.5
    return out


@mixing
def diagonal_of_samples(h, x):
    m = h[:, :5] * 1
    m.diagonal()[:] = h[:, 0]
    return torch.cat([m, h[:, :1]], 1)


class Features(Net):
    def __init__(self, function):
        torch.manual_seed(1)
        super().__init__(function, a=nn.Linear(4, 6), b=nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(torch.tanh(self.a(x)), x))


def posed(function, traced):
    module, x, target = Features(function).double(), normal(5, 4, seed=2), normal(5, 3, seed=3)
    truth = hessian(module, LOSSES["mse"], (x,), target)
    if traced:
        with warnings.catch_warnings(action="ignore"):
            module = torch.jit.trace(module, x, check_trace=False)
    return problem_of(module, (x,), target), truth


either = pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])


@either
@pytest.mark.parametrize("function", SEEN, ids=lambda f: f.__name__)
def test_fast_routes_see_through_writes(function, traced):
    if traced and function is into_a_tensor_made_of_numbers:
        pytest.skip("a trace keeps the tensor, and what was written to it")
    if traced and function is where_gradients_are_off:
        pytest.skip("a trace does not know where")
    problem, truth = posed(function, traced)
    routes = routes_of(problem)
    for structure in STRUCTURES:
        for block, part in blocks_and_truth(problem, truth, structure):
            found = compute_blocks(routes["preactivation"], [block], structure == "elements")
            torch.testing.assert_close(found[block.name], part, rtol=1e-10, atol=1e-12)
    for block, part in blocks_and_truth(problem, truth, "block_diagonal"):
        if block.name == "b.weight":  # no tanh behind it
            found = compute_blocks(routes["gauss-newton"], [block])
            torch.testing.assert_close(found[block.name], part, rtol=1e-10, atol=1e-12)


@either
@pytest.mark.parametrize("function", MIXING, ids=lambda f: f.__name__)
def test_samples_that_meet_in_a_write_are_refused(function, traced):
    problem, truth = posed(function, traced)
    routes = routes_of(problem)
    for structure in STRUCTURES:
        for block, part in blocks_and_truth(problem, truth, structure):
            diagonal = structure == "elements"
            for name in FAST:
                with pytest.raises(NotApplicable, match="may mix samples"):
                    compute_blocks(routes[name], [block], diagonal)
            found = compute_blocks(routes["hvp"], [block], diagonal)
            torch.testing.assert_close(found[block.name], part, rtol=1e-10, atol=1e-12)


def test_a_view_that_is_turned_in_place():
    """Which leaves what it is a view of as it was."""

    def function(h, x):
        h = h * 1
        h.view(-1, 3, 2)[:].transpose_(1, 2)
        return torch.tanh(h)

    problem, truth = posed(function, False)
    routes = routes_of(problem)
    for block, part in blocks_and_truth(problem, truth, "block_diagonal"):
        with pytest.raises(NotApplicable, match="transpose_"):
            compute_blocks(routes["preactivation"], [block])
        found = compute_blocks(routes["hvp"], [block])[block.name]
        torch.testing.assert_close(found, part, rtol=1e-10, atol=1e-12)


def test_a_product_by_position_is_curved():
    """Of one sample too, which no rule of samples is asked about."""
    place = torch.tensor([[0, 0, 1, 2, 3, 3]])
    function = lambda h, x: torch.ones_like(h).scatter_reduce(1, place, h, "prod")  # noqa: E731
    module, x, target = Features(function).double(), normal(1, 4, seed=2), normal(1, 3, seed=3)
    truth = hessian(module, LOSSES["mse"], (x,), target)
    routes = routes_of(problem_of(module, (x,), target))
    for block, part in blocks_and_truth(routes["hvp"].problem, truth, "block_diagonal"):
        for name in FAST:
            try:
                found = compute_blocks(routes[name], [block])[block.name]
            except NotApplicable:
                continue
            torch.testing.assert_close(found, part, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_words(mode, padding, weighted):
    if weighted and mode != "sum":
        pytest.skip("PyTorch weighs sums alone")
    torch.manual_seed(0)
    words = torch.tensor([[0, 2, 1], [3, 3, 4], [2, 2, 2], [1, 0, 4], [4, 2, 3]])
    weights = normal(5, 3, seed=1) if weighted else None
    bag = nn.EmbeddingBag(5, 4, mode=mode, padding_idx=padding)
    module = Net(
        lambda s, words: s.b(torch.tanh(s.e(words, per_sample_weights=weights))),
        e=bag, b=nn.Linear(4, 3),
    ).double()  # fmt: skip
    target = normal(5, 3, seed=3)
    truth = hessian_by_differences(module, LOSSES["mse"], (words,), target)
    problem = problem_of(module, (words,), target)
    for name in ("preactivation", "hvp"):
        for block, part in blocks_and_truth(problem, truth, "full"):
            found = compute_blocks(routes_of(problem)[name], [block])[block.name]
            torch.testing.assert_close(found, part, rtol=1e-8, atol=1e-9)


def test_bags_of_different_lengths():
    torch.manual_seed(0)
    words = torch.tensor([0, 2, 1, 3, 3, 4])
    for starts, last in (([0, 2, 2, 3], False), ([0, 1, 3, 6], True), ([0, 1, 2, 3], False)):
        bag = nn.EmbeddingBag(5, 4, mode="mean", include_last_offset=last)
        module = Net(
            lambda s, x, starts=starts: s.b(torch.tanh(s.e(words, torch.tensor(starts)))),
            e=bag, b=nn.Linear(4, 3),
        ).double()  # fmt: skip
        count = len(starts) - last
        x, target = normal(count, 1), normal(count, 3, seed=3)
        truth = hessian_by_differences(module, LOSSES["mse"], (x,), target)
        problem = problem_of(module, (x,), target)
        for block, part in blocks_and_truth(problem, truth, "full"):
            found = compute_blocks(routes_of(problem)["hvp"], [block])[block.name]
            torch.testing.assert_close(found, part, rtol=1e-8, atol=1e-9)
