"""What a model detaches, which is a constant to autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hesscli.hessian.aten.watcher import FunctionWatcher

_DETACHED = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
_IN_PLACE = (Tensor.detach_, torch.detach_)


class Detaching(FunctionWatcher):
    """While it is on, `handler(result, in_place)` returns what stands for each tensor that is detached.

    Below autograd, `detach_` does not show at all, and `detach` looks like autograd's own copies of what it saves.
    """

    def __init__(self, handler: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.handler = handler

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        in_place = func in _IN_PLACE
        return self.handler(result, in_place) if in_place or func in _DETACHED else result
