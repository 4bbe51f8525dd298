"""Rows by products, of which two threads make half each: the same as one after the other."""

from __future__ import annotations

import threading

import pytest
import torch
from cases import normal
from oracles import hessian
from problems import blocks_of, part_of, problem_of
from torch import Tensor, nn
from torch.nn import functional as F

from hesscli.hessian.autodiff import batched_rows
from hesscli.hessian.batch_size import Passes, choose_passes
from hesscli.hessian.chunk_sizes import ChunkSizes
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.proofs.analysis import Analyses
from hesscli.hessian.routes import hvp
from hesscli.hessian.routes.base import Diagonal, Rows
from hesscli.hessian.routes.cuts import Cuts
from hesscli.hessian.routes.first_batch import FirstBatch
from hesscli.hessian.routes.hvp import HessianVectorProducts
from hesscli.hessian.routes.rates import usual_rates


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


def posed(net: nn.Module, batch_size: int | None = None) -> Problem:
    torch.manual_seed(0)
    return problem_of(net, [normal(6, 5, 3)], normal(6, 2), batch_size=batch_size)


@pytest.mark.parametrize("structure", ["full", "block_diagonal", "elements"])
@pytest.mark.parametrize(("batch_size", "chunk"), [(None, 16), (2, 40), (6, 1000)])
def test_rows_are_those_of_the_hessian_and_the_same_each_time(
    two_threads, batch_size, chunk, structure
):
    problem = posed(Recurrent(), batch_size)
    whole = hessian(
        problem.module, F.mse_loss, (torch.cat([b.inputs[0] for b in problem.batches]),),
        torch.cat([b.target for b in problem.batches]),
    )  # fmt: skip
    kind, found = Diagonal if structure == "elements" else Rows, []
    for _ in range(2):
        blocks = blocks_of(problem, structure)
        parts = [kind.of(block, whole) for block in blocks]
        HessianVectorProducts(problem, chunk).sum(parts)
        found.append([part.out for part in parts])
    for block, once, again in zip(blocks, *found, strict=True):
        expected = part_of(whole, problem, block, structure == "elements")
        assert torch.equal(once, again)
        torch.testing.assert_close(once, expected, rtol=1e-10, atol=1e-13)


def watched(monkeypatch: pytest.MonkeyPatch, threads: int) -> list[tuple[int, int]]:
    """The gradient and the number of rows of each chunk; threads wait for each other before their first."""
    seen, met, mine = list[tuple[int, int]](), threading.Barrier(threads), threading.local()

    def counted(g: Tensor, leaves: list[Tensor], seeds: Tensor) -> Tensor:
        if not hasattr(mine, "began"):
            mine.began = True
            met.wait(timeout=30)
        seen.append((id(g), len(seeds)))
        return batched_rows(g, leaves, seeds)

    monkeypatch.setattr(hvp, "batched_rows", counted)
    return seen


def rows_of(problem: Problem, chunk: int, name: str) -> Rows:
    (block,) = [b for b in blocks_of(problem, "block_diagonal") if b.name == name]
    rows = Rows.of(block, torch.zeros((), dtype=torch.float64))
    HessianVectorProducts(problem, chunk).sum([rows])
    return rows


@pytest.mark.parametrize(("chunk", "threads", "most"), [(40, 2, 20), (16, 2, 8), (15, 1, 15)])
def test_all_threads_together_take_as_many_rows_as_one_did(
    two_threads, monkeypatch, chunk, threads, most
):
    seen = watched(monkeypatch, threads)
    rows = rows_of(posed(Recurrent()), chunk, "gru.weight_hh_l0")
    assert max(count for _, count in seen) == most
    assert sum(count for _, count in seen) == rows.block.size
    assert len({gradient for gradient, _ in seen}) == threads


def test_few_rows_are_shared_too(two_threads, monkeypatch):
    seen = watched(monkeypatch, 2)
    rows_of(posed(Recurrent()), 128, "head.bias")
    assert [count for _, count in seen] == [1, 1]


class Scratch(torch.autograd.Function):
    """x^2, whose backward pass keeps a number in between."""

    seen: set[tuple[int, int]]

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        Scratch.seen.add((id(ctx), threading.get_ident()))
        (x,) = ctx.saved_tensors
        ctx.kept = 2 * x
        return g * ctx.kept


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(15, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(Scratch.apply(self.a(x.flatten(1))))


def test_what_a_function_keeps_is_seen_by_one_thread(two_threads, monkeypatch):
    watched(monkeypatch, 2)
    problem = posed(Squared())
    Scratch.seen = set()
    rows = rows_of(problem, 16, "a.weight")
    main = threading.get_ident()
    workers = [(ctx, thread) for ctx, thread in Scratch.seen if thread != main]
    assert len({thread for _, thread in workers}) == 2
    assert len({ctx for ctx, _ in workers}) == len(workers)
    (batch,) = problem.batches
    whole = hessian(problem.module, F.mse_loss, batch.inputs, batch.target, ["a.weight"])
    torch.testing.assert_close(rows.out, whole, rtol=1e-10, atol=1e-13)


def test_rows_on_two_threads_are_reckoned_less(two_threads):
    """But for chunks that are not worth two."""
    problem = posed(Recurrent())
    block, first = blocks_of(problem, "full")[0], FirstBatch(Cuts(Analyses(problem), Passes(64)))
    rates, seconds = usual_rates(problem.device), {}
    for chunk in (8, 16, 64):
        choice = HessianVectorProducts(problem, chunk).choice(first, block, diagonal=False)
        seconds[chunk] = choice.work.seconds(rates)
    assert seconds[64] == seconds[16] < seconds[8]


@pytest.mark.parametrize(("largest", "rows"), [(1000, 128), (8 << 10, 64), (1 << 20, 16)])
def test_rows_share_a_pass_as_long_as_its_values_stay_small(largest, rows):
    """Of 8 samples, in 4 MiB; but never fewer than are worth a pass."""
    assert passes_of(8 * largest, memory=1 << 34).rows == rows


def passes_of(saved: int, memory: int) -> Passes:
    """Those of a batch of which so much is kept, in one tensor, where two graphs are worth it."""
    return choose_passes(
        saved, largest_saved=saved, largest_block=100, itemsize=4, memory=memory,
        usual=ChunkSizes(), graphs=2,
    )  # fmt: skip


@pytest.mark.parametrize(("memory", "graphs"), [(1 << 30, 2), (32 << 20, 2), (31 << 20, 1), (0, 1)])
def test_there_are_as_many_graphs_as_a_quarter_of_the_memory_holds(memory, graphs):
    """Of which each takes 4 MiB."""
    passes = passes_of(1 << 20, memory)
    assert passes.graphs == graphs
    assert passes.bytes == (graphs + passes.rows) * (4 << 20)


@pytest.mark.parametrize("graphs", [1, 2])
def test_rows_are_made_by_as_many_graphs_as_there_is_room_for(two_threads, monkeypatch, graphs):
    problem, taken = posed(Recurrent()), list[int]()
    once = hvp.gradient_graph

    def counted(*given):
        taken.append(1)
        return once(*given)

    monkeypatch.setattr(hvp, "gradient_graph", counted)
    block = blocks_of(problem, "full")[0]
    route = HessianVectorProducts(problem, 16, graphs)
    route.sum([Rows.of(block, route.like)])
    assert len(taken) == graphs


def test_directions_have_as_many_graphs_as_there_is_room_for(two_threads):
    cuts = [Cuts(Analyses(posed(Recurrent())), Passes(64, graphs)) for graphs in (1, 2)]
    assert [each.graphs_for(64) for each in cuts] == [1, 2]
    assert [each.graphs_for(8) for each in cuts] == [1, 1]
