"""Checkpoints: what a model does not keep but computes again in a backward pass, wherever that is made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch.utils import checkpoint

_MADE = "_checkpoint_without_reentrant_generator"
if hasattr(checkpoint, f"{_MADE}_impl"):  # since PyTorch 2.14
    _MADE += "_impl"
_one_at_a_time = threading.RLock()  # several threads may be at backward passes
_inside = 0


@contextmanager
def also_recomputed(within: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Inside, checkpoints are made that compute again `within` such a context, which this is part of."""
    global _inside
    own: Any = getattr(checkpoint, _MADE, None)
    if own is None:  # where PyTorch has moved it
        yield
        return

    def made(function: Callable[..., object], *options: Any, **keywords: Any) -> object:
        def again(*arguments: Any, **named: Any) -> object:
            with _one_at_a_time, nullcontext() if _inside else within():
                return function(*arguments, **named)

        return own(again, *options, **keywords)

    setattr(checkpoint, _MADE, made)
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1
        setattr(checkpoint, _MADE, own)
