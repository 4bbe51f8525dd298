"""The processes that share one job: those that `torchrun` started, or this one alone.

Each knows its rank and how many there are from the environment. They talk through torch.distributed: gloo for what is
on the CPU, NCCL for what is on a GPU, unless several share one. Blocks go through the file and the journals beside it,
with a word at the start and one at the end. Sums over data that lies on several processes are sent.
"""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hesscli.errors import HesscliError, ResourceError, UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from torch._C._distributed_c10d import Store

# A rank may wait long for a slower one; one that dies closes its connection.
_PATIENCE = timedelta(days=30)
_MEETING = timedelta(minutes=10)
"""How long one waits for the others to start: an environment may be left over, and nobody else come."""


def rank() -> int:
    """This process's number among those that `torchrun` started; 0 if it did not."""
    return _number("RANK", 0) if ranks() > 1 else 0


def ranks() -> int:
    return max(1, _number("WORLD_SIZE", 1)) if "MASTER_ADDR" in os.environ else 1


def rank_here() -> int:
    """This process's number among those on this machine."""
    return _number("LOCAL_RANK", rank()) if ranks() > 1 else 0


def ranks_here() -> int:
    """How many of them share this machine's memory."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1)) if ranks() > 1 else 1


def _number(name: str, usual: int) -> int:
    """A number in the environment; the usual one, where there is none."""
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return usual


class ProcessLost(ResourceError):  # noqa: N818 - reads as what happened
    """Another process has ended, and this one cannot go on."""


class Team:
    """All processes of a job, as seen from one of them; ProcessLost where another has ended."""

    def __init__(self, alone: bool = False) -> None:
        self.rank, self.size = (0, 1) if alone else (rank(), ranks())
        self.nccl = False

    def __enter__(self) -> Team:
        if self.size > 1:
            import torch
            import torch.distributed as dist

            _demand_whole_environment()
            try:
                with _ended_by_signals():
                    store = None if dist.is_initialized() else _met()
                    # NCCL wants a GPU for each.
                    gpus = torch.cuda.device_count()
                    self.nccl = dist.is_nccl_available() and ranks_here() <= gpus
                    if store is not None:
                        backend = "cpu:gloo,cuda:nccl" if self.nccl else "gloo"
                        dist.init_process_group(
                            backend,
                            store=store,
                            rank=self.rank,
                            world_size=self.size,
                            timeout=_PATIENCE,
                        )
            except RuntimeError as error:
                place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                raise ResourceError(
                    f"the {self.size} processes of WORLD_SIZE cannot meet at {place} ({_reason(error)})",
                    "unset WORLD_SIZE",
                ) from error
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        # Also when another is lost: gloo's threads may abort a process that ends with its group.
        if self.size > 1 and (error is None or isinstance(error, ProcessLost)):
            import torch.distributed as dist

            dist.destroy_process_group()

    def broadcast(self, value: Any) -> Any:
        """What the first process says, to all."""
        if self.size == 1:
            return value
        box = [value]
        with _together() as dist:
            dist.broadcast_object_list(box)
        return box[0]

    @contextmanager
    def first(self) -> Iterator[bool]:
        """Whether this is the first process, which does what is inside; what it refuses there, all refuse."""
        refused = None
        try:
            yield self.rank == 0
        except HesscliError as error:
            refused = error
        refused = self.broadcast(refused)
        if refused is not None:
            raise refused

    def all_gather(self, value: Any) -> list[Any]:
        """What each process says, to all."""
        if self.size == 1:
            return [value]
        said: list[Any] = [None] * self.size
        with _together() as dist:
            dist.all_gather_object(said, value)
        return said

    def broadcast_tensor(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, in place of that of all others."""
        sent = tensor if self.nccl else tensor.cpu()
        with _together() as dist:
            dist.broadcast(sent, 0)
        return sent.to(tensor.device)

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, added up in float64; on the first process alone."""
        import torch

        device = tensor.device if self.nccl else torch.device("cpu")
        # MPS has no float64 to send from.
        total = tensor.to(device).to(torch.float64, copy=True)
        with _together() as dist:
            dist.reduce(total, 0)
        return total.to(tensor.device, tensor.dtype)


def _met() -> Store:
    """What the processes tell each other by, when all are there; each knows then which of them are on its machine.

    Raises:
        RuntimeError: they are not after `_MEETING`.
    """
    import torch.distributed as dist

    meet: Any = dist.rendezvous  # type: ignore[attr-defined]
    store, mine, size = next(meet("env://", timeout=_MEETING))
    if "LOCAL_WORLD_SIZE" not in os.environ:  # a launcher of another kind
        store.set(f"hesscli/{mine}", socket.gethostname())
        here = [
            n for n in range(size) if store.get(f"hesscli/{n}").decode() == socket.gethostname()
        ]
        os.environ["LOCAL_WORLD_SIZE"] = str(len(here))
        os.environ.setdefault("LOCAL_RANK", str(here.index(mine)))
    store.set_timeout(_PATIENCE)
    return store


def _demand_whole_environment() -> None:
    """Refuses an environment that names several processes, but not where to meet, or which of them this one is."""
    for name, most in (("RANK", ranks() - 1), ("MASTER_PORT", 65535)):
        if not 0 <= _number(name, -1) <= most:
            said = repr(os.environ[name]) if name in os.environ else "not set"
            error = UsageError(
                f"WORLD_SIZE is {ranks()}, as where torchrun started as many processes, and {name} is {said}; "
                f"expected 0 to {most}",
                "unset WORLD_SIZE",
            )
            error.of_share = True  # the first process need not say it
            raise error


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM end the process: Python does not hear them while it waits for others."""
    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _together() -> Iterator[ModuleType]:
    """torch.distributed; inside, that it fails means that another process has ended."""
    import torch.distributed as dist

    try:
        yield dist
    except RuntimeError as error:
        raise ProcessLost(f"another process has ended early ({_reason(error)})") from error


def _reason(error: RuntimeError) -> str:
    """What torch.distributed says, without the source file that it begins with, and the advice that follows."""
    return re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).split(". ")[0]


def balanced(parts: Sequence[tuple[str, float]], count: int) -> list[set[str]]:
    """Parts of a job, (name, work), for so many processes: the largest first, always to the one with the least work."""
    found: list[set[str]] = [set() for _ in range(count)]
    work = [0.0] * count
    for name, amount in sorted(parts, key=lambda part: -part[1]):
        least = work.index(min(work))
        found[least].add(name)
        work[least] += amount
    return found
