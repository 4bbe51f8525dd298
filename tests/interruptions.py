"""Commands whose computation is ended early: blocks in bands, small enough for a test, and products."""

from __future__ import annotations

import pytest

from hesscli.job.matrix import large

SLOW = """
import sys, time
from hesscli.job.matrix import large, memory, planning, unfinished
memory.BAND = memory.LONG_BAND = 900
planning.LARGE, unfinished.INTERVAL = 8, 0.0
whole = large.LargeBlock._band
def band(*arguments):
    print("band from", arguments[2], file=sys.stderr, flush=True)
    time.sleep(0.15)
    return whole(*arguments)
large.LargeBlock._band = band
from hesscli.cli import main
main()
"""
"""The command line with the bands of `small_bands`, each of which takes its time, and is said on stderr."""

MULTIPLYING = """
import sys
from hesscli.hessian.operator import Products
whole = Products.__call__
def telling(self, vectors):
    if self.count < 60 <= self.count + (1 if vectors.dim() == 1 else len(vectors)):
        print("multiplying", file=sys.stderr, flush=True)
    return whole(self, vectors)
Products.__call__ = telling
from hesscli.cli import main
main()
"""
"""The command line, which says on stderr when it makes its 60th product."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, calls: int, error: BaseException) -> None:
    """Makes the computation of bands and groups end after so many."""
    left = [calls]

    def counted(function):
        def run(*arguments, **options):
            if not left[0]:
                raise error
            left[0] -= 1
            return function(*arguments, **options)

        return run

    monkeypatch.setattr(large.LargeBlock, "_band", counted(large.LargeBlock._band))
