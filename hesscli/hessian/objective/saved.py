"""How much memory a pass keeps for its derivatives."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from hesscli.errors import MismatchError
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.problem import Problem

_UNSEEN = 256  # times the inputs: what a pass is taken to keep that cannot be looked into


def saved_sizes(
    problem: Problem, batch: Batch, forward: Callable[[Batch], Tensor]
) -> Collection[int]:
    """How many bytes autograd keeps between a forward pass of a batch and its backward pass, of each tensor."""
    own = {p.untyped_storage().data_ptr() for p in problem.module.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Any:
        if tensor.layout is not torch.strided:
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # Not the storage's: a batch is a view of all data.
            size = tensor.numel() * tensor.itemsize
            seen[storage.data_ptr()] = max(size, seen.get(storage.data_ptr(), 0))
        # Not itself: an operator's own output would keep the operator, and that the output, for ever.
        return tensor.detach()

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
            forward(batch)
    except MismatchError as error:
        if not re.search("saved tensor hooks|invalid python storage", error.message):
            raise
        return [_UNSEEN * sum(x.numel() * x.itemsize for x in batch.inputs)]  # of `torch.func`
    return seen.values()
