"""A command on the processes that `torchrun` started, each of which has a share of the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hesscli.job.setup.alone import Alone
from hesscli.job.setup.team import ranks


@contextmanager
def sharing() -> Iterator[Alone]:
    """This process's share of the data."""
    if ranks() == 1:
        yield Alone()
        return
    from hesscli.job.setup.share import Share

    with Share() as share:
        yield share
