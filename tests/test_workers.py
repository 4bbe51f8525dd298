"""Pieces of work side by side: every piece once, and the same numbers as one after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from hesscli.hessian.chunk_sizes import ChunkSizes
from hesscli.hessian.routes import kronecker
from hesscli.hessian.routes.kronecker import add_kronecker_rows
from hesscli.hessian.routes.sums import add_products
from hesscli.hessian.workers import in_order, side_by_side, workers


def test_every_piece_is_done_once_by_threads_that_take_turns(two_threads):
    done: list[int] = []
    met = threading.Barrier(2, timeout=30)  # both are at work at once
    seen: list[tuple[int, bool]] = []

    def work(worker: int, items: Iterator[int]) -> None:
        met.wait()
        seen.append((torch.get_num_threads(), torch.is_grad_enabled()))
        done.extend(items)

    side_by_side(range(100), 2, work)
    assert sorted(done) == list(range(100))
    assert seen == [(1, False)] * 2
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("count", [1, 2])
def test_results_are_taken_in_order_and_none_is_left(two_threads, count):
    taken: list[int] = []

    def slowest_first(item: int) -> int:
        time.sleep(0.002 * (item % 2 == 0))
        return item

    in_order(range(7), count, slowest_first, taken.append)
    assert taken == list(range(7))


def test_an_error_in_a_piece_is_raised_and_the_threads_are_given_back(two_threads):
    def work(worker: int, items: Iterator[int]) -> None:
        for item in items:
            if item == 3:
                raise ValueError("three")

    with pytest.raises(ValueError, match="three"):
        side_by_side(range(5), 2, work)
    assert torch.get_num_threads() == 2


def test_after_an_error_no_thread_takes_another_piece(two_threads):
    met = threading.Barrier(2, timeout=30)
    emptied, ended = threading.Event(), threading.Event()
    done: list[int] = []

    class Pieces(list[int]):
        def __iter__(self) -> Iterator[int]:
            yield from range(100)
            emptied.set()

    def work(worker: int, items: Iterator[int]) -> None:
        if worker == 0:
            met.wait()
            raise ValueError("the first")
        done.append(next(items))
        met.wait()
        emptied.wait(5)
        done.extend(items)
        ended.set()

    with pytest.raises(ValueError, match="the first"):
        side_by_side(Pieces(), 2, work)
    assert ended.wait(30)
    assert done == [0]


def test_a_device_and_few_pieces_take_one_thread(two_threads):
    assert workers(torch.device("cpu"), 2) == 2
    assert workers(torch.device("cpu"), 1) == 1
    assert workers(torch.device("cuda"), 100) == 1


def test_rows_of_a_kronecker_sum_do_not_depend_on_the_threads(two_threads):
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(40, 9, 40, generator=generator, dtype=torch.float64)
    s = s + s.permute(2, 1, 0)
    a = torch.randn(9, 70, generator=generator, dtype=torch.float64)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = torch.zeros(40 * 70, 40 * 70, dtype=torch.float64)
        add_kronecker_rows(out, s, a)
        found.append(out)
    assert torch.equal(*found)
    expected = torch.einsum("pbi,bq,bj->pqij", s, a, a).reshape(2800, 2800)
    upper = torch.ones(40, 40).triu().repeat_interleave(70, 0).repeat_interleave(70, 1)
    assert float(((found[0] - expected) * upper).abs().max()) < 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("pairs", [1, 128 * 70 * 40, 300 * 70 * 40])
def test_many_samples_of_a_kronecker_sum_take_no_more_memory(monkeypatch, pairs):
    """Some samples and some columns at a time: no more products of two inputs are held than may be."""
    monkeypatch.setattr(kronecker, "chunk_sizes", lambda device: ChunkSizes(pairs=pairs))
    held: list[int] = []
    real = kronecker._add_products

    def watched(target, s, a, edges, most):
        q, width = edges[0][0], a.shape[1]
        held.append(len(a) * (edges[-1][1] - q) * (width - q))
        real(target, s, a, edges, most)

    monkeypatch.setattr(kronecker, "_add_products", watched)
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(6, 500, 6, generator=generator, dtype=torch.float64)
    s = s + s.permute(2, 1, 0)
    a = torch.randn(500, 70, generator=generator, dtype=torch.float64)
    out = torch.zeros(420, 420, dtype=torch.float64)
    add_kronecker_rows(out, s, a)
    least = 128 * 24 * 70  # a group of columns of the fewest samples
    assert max(held) <= max(pairs, least)
    expected = torch.einsum("pbi,bq,bj->pqij", s, a, a).reshape(420, 420)
    upper = torch.ones(6, 6).triu().repeat_interleave(70, 0).repeat_interleave(70, 1)
    assert float(((out - expected) * upper).abs().max()) < 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("p", "q", "samples"), [(5, 6, 7), (300, 300, 7), (3, 4, 3000)], ids=["small", "large", "tiny"]
)
def test_products_are_added_to_what_is_there(p, q, samples):
    """By themselves, in place, or in parts."""
    torch.manual_seed(0)
    left, right = torch.randn(p, samples).double(), torch.randn(2, samples, q).double()
    out = torch.ones(2, p, q, dtype=torch.float64)
    add_products(out, left, right)
    torch.testing.assert_close(out, 1 + torch.einsum("pb,kbq->kpq", left, right))
