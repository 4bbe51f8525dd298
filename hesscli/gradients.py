"""Gradients on and autocast off, whatever the caller has; afterwards both are as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def gradients_on() -> Iterator[None]:
    """Inside, gradients are recorded, of all digits, also in `no_grad`, `inference_mode` or `autocast`.

    Whatever code inside leaves on, or off, ends with it.
    """
    with torch.inference_mode(False), torch.enable_grad(), _autocast_put_aside():
        yield


@contextmanager
def _autocast_put_aside() -> Iterator[None]:
    """Inside, none of the caller's autocasts is on, and one that is entered there is the outermost.

    What that has cast of the weights it keeps until the outermost ends: within another, the second pass would go on
    with a result of the first, and within one that is never left, the next model's.
    """
    with ExitStack() as off:
        for device in ("cpu", "cuda", "mps"):
            off.enter_context(torch.autocast(device, enabled=False))
        depth = _leave_all()
        try:
            yield
        finally:
            _leave_all()
            for _ in range(depth):
                torch.autocast_increment_nesting()


def _leave_all() -> int:
    """Forgets what autocasts have cast, and in how many this is, which is what it returns."""
    depth = torch.autocast_increment_nesting() - 1
    while torch.autocast_decrement_nesting():
        pass
    torch.clear_autocast_cache()
    return depth
