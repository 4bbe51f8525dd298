"""Independent pieces of work, each on one thread.

Many products of middling size gain more from running side by side than from sharing their own loops: no thread waits
for another at the end of each, and one that is held up, by the disk say, delays nothing but itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
Graph = TypeVar("Graph")

ABREAST = 2
_FEWEST = 8  # rows at a time that a thread is worth
_SHARE = 0.7  # of the time that one graph takes; measured: 0.36 to 0.75


def workers(device: torch.device, pieces: int) -> int:
    """How many threads so many pieces are worth: all, or as many as there are pieces, if that is more than half."""
    threads = torch.get_num_threads()
    return min(threads, pieces) if device.type == "cpu" and 2 * pieces > threads else 1


def graphs_for(device: torch.device, rows: int, most: int = ABREAST) -> int:
    """How many threads so many rows of a matrix are worth, each through a graph of its own: two, where there are two.

    There is room for `most`.

    An operator of a small model is too little to be shared: with both threads in each of them, rows of a recurrent
    layer and of attention took 1.5 times as long. Nor are two threads much sooner through one graph: each of its nodes
    serves one at a time.
    """
    two = torch.get_num_threads() == ABREAST <= most
    return workers(device, rows // _FEWEST) if two else 1


def share_of_time(graphs: int) -> float:
    """What rows take through so many graphs, as a share of what they would through one."""
    return _SHARE if graphs > 1 else 1.0


def each_with(
    graphs: Sequence[Graph], items: Sequence[Item], work: Callable[[Graph, Item], None]
) -> None:
    """Calls `work(graph, item)` for each item, as many at once as there are graphs; see `side_by_side`."""

    def run(worker: int, mine: Iterator[Item]) -> None:
        for item in mine:
            work(graphs[worker], item)

    side_by_side(items, len(graphs), run)


def side_by_side(
    items: Sequence[Item], count: int, work: Callable[[int, Iterator[Item]], None]
) -> None:
    """Calls `work(worker, items)` in `count` threads at once; each takes of the items what the others have left.

    What the items write must not overlap. No gradients are recorded. Where one fails, or the caller is interrupted, the
    threads end with the items that they have.
    """
    left = iter(items)

    def run(worker: int) -> None:
        with torch.no_grad():  # known to each thread for itself
            work(worker, left)

    if count == 1:
        run(0)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        list(_pool(count).map(run, range(count)))
    finally:
        for _ in left:
            pass
        torch.set_num_threads(before)


def in_order(
    items: Sequence[Item],
    count: int,
    work: Callable[[Item], Result],
    take: Callable[[Result], None],
) -> None:
    """Calls `work(item)` in `count` threads at once; `take` gets the results one at a time, in the items' order.

    So a sum of floating-point numbers has the same bits, however many threads there are.
    """
    lock, ready, taken = Lock(), dict[int, Result](), 0

    def run(worker: int, places: Iterator[int]) -> None:
        nonlocal taken
        for place in places:
            result = work(items[place])
            with lock:
                ready[place] = result
                while taken in ready:
                    take(ready.pop(taken))
                    taken += 1

    side_by_side(range(len(items)), count, run)


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "hesscli-worker")
