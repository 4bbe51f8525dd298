"""Diagonals along a chain of linear layers and elementwise functions, of samples or of their positions."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import labels, normal
from oracles import hessian
from problems import Net, blocks_and_truth, blocks_of, compute_blocks, problem_of, routes_of
from torch import Tensor, nn

from hesscli.hessian.objective.loss import Loss
from hesscli.hessian.objective.measure import measure
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.proofs.analysis import Analyses
from hesscli.hessian.routes.chain import find_chains


def by_class(f: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of scores with the classes along the last axis."""
    return F.cross_entropy(f.flatten(0, -2), y.flatten())


def focal(f: Tensor, y: Tensor) -> Tensor:
    """A function of log softmax that is not linear in it, with a term for each position."""
    log_p = F.log_softmax(f, -1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


WORDS, IMAGES = normal(5, 4, 3), normal(5, 2, 4, 3)
TAGS, MASKS = labels(6, 5, 4), labels(6, 5, 4, 3)


def of_words(**others: nn.Module) -> dict[str, nn.Module]:
    return {"a": nn.Linear(3, 7), "b": nn.Linear(7, 6), **others}


def plain(s: Any, x: Tensor) -> Tensor:
    return s.b(torch.tanh(s.a(x)))


def images(s: Any, x: Tensor) -> Tensor:
    return s.b(F.softplus(s.a(x)))


def of_images() -> dict[str, nn.Module]:
    return {"a": nn.Conv2d(2, 5, 3, padding=1), "b": nn.Conv2d(5, 6, 1)}


def channels_last(s: Any, x: Tensor) -> Tensor:
    z = torch.tanh(s.a(x)).permute(0, 2, 3, 1)
    return s.b(z * torch.linspace(0.5, 2, 3)[:, None]).movedim(-1, 1)


def normalised(s: Any, x: Tensor) -> Tensor:
    return s.b(s.norm(torch.tanh(s.a(x))))


def rows_in_another_order(s: Any, x: Tensor) -> Tensor:
    return s.b(torch.tanh(s.a(x)).transpose(0, 1)).transpose(0, 1)


def reversed_places(s: Any, x: Tensor) -> Tensor:
    z = torch.tanh(s.a(x)).reshape(len(x), 2, 2, 7)
    return s.b(z.transpose(1, 2)).reshape(len(x), 4, 6)


def to_samples(s: Any, x: Tensor) -> Tensor:
    return s.c(torch.tanh(plain(s, x)).flatten(1))


ALL = {"a.weight", "a.bias", "b.weight", "b.bias"}
BEHIND = {"b.weight", "b.bias"}
RANKS = {"tokens": 2, "classes-second": 2, "focal": 6, "squares": 0, "pixels": 2, "samples": 2}
# What is made of layers, these, the input, the target, the loss, and the parameters on a chain.
CHAINS: dict[str, tuple[Callable[..., Tensor], dict[str, nn.Module], Tensor, Tensor, Any, set]] = {
    "tokens": (plain, of_words(), WORDS, TAGS, by_class, ALL),
    "classes-second": (lambda s, x: plain(s, x).mT, of_words(), WORDS, TAGS, "cross-entropy", ALL),
    "focal": (plain, of_words(), WORDS, TAGS, focal, ALL),
    "squares": (plain, of_words(), WORDS, normal(5, 4, 6), "mse", ALL),
    "each-its-logit": (plain, of_words(), WORDS, labels(2, 5, 4, 6).double(), "bce-with-logits", ALL),
    "one-axis": (lambda s, x: plain(s, x).flatten(0, 1), of_words(), WORDS, TAGS, by_class, ALL),
    "time-first": (lambda s, x: plain(s, x.transpose(0, 1)), of_words(), WORDS, TAGS,
                   lambda f, y: by_class(f, y.T), set()),
    "pixels": (images, of_images(), IMAGES, MASKS, "cross-entropy", ALL),
    "pixel-squares": (images, of_images(), IMAGES, normal(5, 6, 4, 3), "mse", ALL),
    "channels-last": (channels_last, {"a": nn.Conv2d(2, 5, 3, padding=1), "b": nn.Linear(5, 6)},
                      IMAGES, MASKS, "cross-entropy", ALL),
    "normalised": (normalised, of_words(norm=nn.LayerNorm(7)), WORDS, TAGS, by_class,
                   BEHIND | {"norm.weight", "norm.bias"}),
    "another-order": (rows_in_another_order, of_words(), WORDS, TAGS, by_class, set()),
    "reversed-places": (reversed_places, of_words(), WORDS, TAGS, by_class, BEHIND),
    "strided": (images, {"a": nn.Conv2d(2, 5, 3, padding=1), "b": nn.Conv2d(5, 6, 1, stride=2)},
                IMAGES, MASKS[:, ::2, ::2], "cross-entropy", BEHIND),
    "padded": (images, {"a": nn.Conv2d(2, 5, 3), "b": nn.Conv2d(5, 6, 1, padding=1)},
               IMAGES, MASKS, "cross-entropy", BEHIND),
    "grouped": (images, {"a": nn.Conv2d(2, 4, 3, padding=1), "b": nn.Conv2d(4, 6, 1, groups=2)},
                IMAGES, MASKS, "cross-entropy", {"b.bias"}),
    "samples": (to_samples, of_words(c=nn.Linear(24, 6)), WORDS, labels(6, 5), "cross-entropy",
                {"c.weight", "c.bias"}),
    "coupled-places": (plain, of_words(), WORDS, TAGS,
                       lambda f, y: by_class(f, y) + (f.sum(1) ** 2).mean(), set()),
}  # fmt: skip


def posed(name: str) -> tuple[Problem, Tensor, set[str]]:
    function, layers, x, target, loss, on_chain = CHAINS[name]
    torch.manual_seed(0)
    module = Net(function, **layers).double()
    if isinstance(loss, str):
        named = {"cross-entropy": F.cross_entropy, "mse": F.mse_loss}
        oracle = named.get(loss, F.binary_cross_entropy_with_logits)
        return (
            problem_of(module, [x], target, loss),
            hessian(module, oracle, (x,), target),
            on_chain,
        )
    problem = problem_of(module, [x], None, "output")
    batch = replace(problem.batches[0], target=target)
    own = Loss("own", function=loss, reduced="of all")
    problem = measure(replace(problem, batches=[batch], loss=own, denominator=1.0))[0]
    return problem, hessian(module, loss, (x,), target), on_chain


@pytest.mark.parametrize("name", CHAINS)
def test_diagonals_along_a_chain_of_positions(name: str) -> None:
    problem, truth, on_chain = posed(name)
    chains = [*find_chains(Analyses(problem).of(problem.batches[0]), problem.parameters)]
    assert all(chain.rank == RANKS.get(name, chain.rank) for chain in chains)
    assert {parameter for chain in chains for parameter in chain.uses} == on_chain
    blocks = [b for b in blocks_of(problem, "elements") if b.name in on_chain]
    if blocks:
        found = compute_blocks(routes_of(problem)["preactivation"], blocks, diagonal=True)
        for block, wanted in blocks_and_truth(problem, truth, "elements"):
            if block.name in on_chain:
                torch.testing.assert_close(found[block.name], wanted, rtol=1e-10, atol=1e-13)
