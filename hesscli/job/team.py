"""The processes that share one job: those that `torchrun` started, or this one alone.

Each knows its rank and how many there are from the environment. They talk through torch.distributed (gloo): a word at
the start, and at the end that all are done. Results go through the file and the journals beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

from hesscli.errors import ResourceError

_PATIENCE = timedelta(
    days=30
)  # a rank may wait long for a slower one; one that dies closes its connection


def rank() -> int:
    """This process's number among those that `torchrun` started; 0 if it did not."""
    return int(os.environ.get("RANK", "0")) if ranks() > 1 else 0


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


class Team:
    """All processes of a job, as seen from one of them."""

    def __init__(self) -> None:
        self.rank, self.size = rank(), ranks()

    def __enter__(self) -> Team:
        if self.size > 1:
            import torch.distributed as dist

            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=_PATIENCE)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.size > 1 and error is None:
            import torch.distributed as dist

            dist.destroy_process_group()

    def tell(self, value: Any) -> Any:
        """What the first process says, to all.

        Raises:
            ResourceError: a process has ended.
        """
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        try:
            dist.broadcast_object_list(box)
        except RuntimeError as error:
            raise _ended(error) from error
        return box[0]

    def wait(self) -> None:
        """Until all processes are here.

        Raises:
            ResourceError: a process has ended.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        try:
            dist.barrier()
        except RuntimeError as error:
            raise _ended(error) from error


def _ended(error: RuntimeError) -> ResourceError:
    return ResourceError(f"another process has ended early ({str(error).splitlines()[0]})")


def shares(parts: Sequence[tuple[str, float]], count: int) -> list[set[str]]:
    """Parts of a job for each of `count` processes: the largest first, always to the one with the least work.

    Args:
        parts: (name, work) of each.
        count: how many processes there are.
    """
    found: list[set[str]] = [set() for _ in range(count)]
    work = [0.0] * count
    for name, amount in sorted(parts, key=lambda part: -part[1]):
        least = work.index(min(work))
        found[least].add(name)
        work[least] += amount
    return found


def missing(parts: Iterable[str], finished: Iterable[str]) -> list[str]:
    """The parts that nobody has finished."""
    known = set(finished)
    return [part for part in parts if part not in known]
