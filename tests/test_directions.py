"""Derivatives along pre-activations, of which two threads make a share each: the same each time, and the Hessian's."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from cases import normal
from oracles import hessian
from problems import blocks_and_truth, blocks_of, finished, planner_of, problem_of, routes_of
from torch import Tensor, nn
from torch.nn import functional as F

from hesscli.hessian.routes.base import Diagonal, Rows
from hesscli.hessian.routes.probes import Probed
from hesscli.hessian.routes.rates import usual_rates


class Recurrent(nn.Module):
    """A layer of several values, one of one value, and parameters of none."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.norm, self.head = (
            nn.GRU(3, 8, batch_first=True),
            nn.LayerNorm(8),
            nn.Linear(8, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.cell(x)[0][:, -1]))


def convolution() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 2))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Probed, int]]:
    """Each pass that directions went through, and the thread; of two passes, each waits for the other to begin."""
    passes, met, real = list[tuple[Probed, int]](), threading.Barrier(2), Probed.along

    def watched(
        self: Probed, delta: Tensor, inputs: Sequence[Tensor], seeds: Tensor
    ) -> tuple[Tensor | None, ...]:
        begins = all(self is not other for other, _ in passes)
        passes.append((self, threading.get_ident()))
        if begins and threading.current_thread() is not threading.main_thread():
            met.wait(timeout=30)
        return real(self, delta, inputs, seeds)

    monkeypatch.setattr(Probed, "along", watched)
    return passes


@pytest.mark.parametrize("structure", ["full", "block_diagonal", "elements"])
@pytest.mark.parametrize("make", [Recurrent, convolution])
def test_shares_of_two_threads(two_threads, seen, make, structure):
    torch.manual_seed(0)
    shape = (3, 5) if make is convolution else (4, 3)
    problem = problem_of(make(), [normal(6, *shape)], normal(6, 2))
    (batch,) = problem.batches
    whole = hessian(problem.module, F.mse_loss, batch.inputs, batch.target)
    kind, found = Diagonal if structure == "elements" else Rows, []
    names = {"cell.weight_hh_l0", "0.weight", "hessian"}
    for _ in range(2):
        seen.clear()
        route = routes_of(problem)["preactivation"]
        parts = [kind.of(b, whole) for b in blocks_of(problem, structure) if b.name in names]
        route.sum(parts)
        found.append([p.out if kind is Diagonal else finished(route, p) for p in parts])
        threads: dict[int, set[int]] = {}
        for probed, thread in seen:
            threads.setdefault(id(probed), set()).add(thread)
        assert all(len(each) == 1 for each in threads.values())
        assert len({thread for each in threads.values() for thread in each}) == 2
    truths = {block.name: truth for block, truth in blocks_and_truth(problem, whole, structure)}
    for part, once, again in zip(parts, *found, strict=True):
        assert torch.equal(once, again)
        torch.testing.assert_close(once, truths[part.block.name], rtol=1e-10, atol=1e-13)


def test_directions_on_two_threads_are_reckoned_less(two_threads):
    problem = problem_of(Recurrent(), [normal(6, 4, 3)], normal(6, 2))
    (block,) = blocks_of(problem, "full")
    seconds = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        choice = planner_of(problem).choices(block, False, "preactivation")[0]
        seconds.append(choice.work.seconds(usual_rates(problem.device)))
    assert seconds[0] < seconds[1]
