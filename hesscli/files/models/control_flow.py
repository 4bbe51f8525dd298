"""The control flow of exported programs, in Python.

PyTorch's own operators for it trace their branches anew, and have no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Body = Callable[..., Sequence[Tensor]]


def _cond(predicate: Any, true: Body, false: Body, operands: Sequence[Tensor]) -> Sequence[Tensor]:
    return (true if predicate else false)(*operands)


def _while_loop(
    goes_on: Callable[..., Any], body: Body, carried: Sequence[Tensor], others: Sequence[Tensor]
) -> Sequence[Tensor]:
    while goes_on(*carried, *others):
        carried = body(*carried, *others)
    return carried


def _map(body: Body, rows: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    return _stacked(body(*row, *others) for row in zip(*rows, strict=True))


def _scan(
    combine: Body, carried: Sequence[Tensor], rows: Sequence[Tensor], others: Sequence[Tensor]
) -> list[Tensor]:
    count, made = len(carried), []
    for row in zip(*rows, strict=True):
        result = combine(*carried, *row, *others)
        carried = result[:count]
        made.append(result[count:])
    return [*carried, *_stacked(made)]


def _stacked(results: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


IN_PYTHON = {"cond": _cond, "while_loop": _while_loop, "map_impl": _map, "scan": _scan}
"""The operators of `torch.ops.higher_order`, by their names."""
