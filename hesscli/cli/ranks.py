"""A command on the processes that `torchrun` started, each of which has a share of the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hesscli.job.setup.processes import Processes
from hesscli.job.setup.team import ranks


@contextmanager
def started_processes() -> Iterator[Processes]:
    """Those that `torchrun` started, or this one."""
    if ranks() == 1:
        yield Processes()
        return
    from hesscli.job.setup.many_processes import ManyProcesses

    with ManyProcesses() as processes:
        yield processes
