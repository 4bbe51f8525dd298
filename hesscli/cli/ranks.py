"""A command on the processes that `torchrun` started, each of which has a share of the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hesscli.job.team import ranks

if TYPE_CHECKING:
    from hesscli.job.share import Share


@contextmanager
def sharing() -> Iterator[Share | None]:
    """This process's share; None where it is alone."""
    if ranks() == 1:
        yield None
        return
    from hesscli.job.share import Share

    with Share() as share:
        yield share
