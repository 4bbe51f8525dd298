"""Independent pieces of work, each on one thread.

Many products of middling size gain more from running side by side than from sharing their own loops: no thread waits
for another at the end of each, and one that is held up, by the disk say, delays nothing but itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")


def workers(device: torch.device, pieces: int) -> int:
    """How many threads so many pieces are worth."""
    threads = torch.get_num_threads()
    return threads if device.type == "cpu" and pieces >= threads else 1


def side_by_side(
    items: Sequence[Item], count: int, work: Callable[[int, Iterator[Item]], None]
) -> None:
    """Calls `work(worker, items)` in `count` threads at once; each takes of the items what the others have left.

    What the items write must not overlap. No gradients are recorded.
    """
    left = iter(items)
    if count == 1:
        with torch.no_grad():
            work(0, left)
        return

    def run(worker: int) -> None:
        with torch.no_grad():  # known to each thread for itself
            work(worker, left)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        list(_pool(count).map(run, range(count)))
    finally:
        torch.set_num_threads(before)


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "hesscli-worker")
