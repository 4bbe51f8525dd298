"""One piece of work in the background: writing one block or band while the next one is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Background:
    """Runs calls one after the other, at most one at a time and one ahead.

    Two blocks are then held at once, the one that is written and the one that is computed. Where the memory has no room
    for both it is not `enabled`, and every call is made on the spot.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.pool = ThreadPoolExecutor(1) if enabled else None
        self.pending: Future[Any] | None = None

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            if error is None:
                self._wait()
        finally:
            if self.pool is not None:
                self.pool.shutdown(wait=True)

    def run(self, function: Callable[..., object], *arguments: object) -> None:
        """Starts a call when the one before has ended; what that one raised is raised here."""
        if self.pool is None:
            function(*arguments)
            return
        self._wait()
        self.pending = self.pool.submit(function, *arguments)

    def _wait(self) -> None:
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()
