"""Embeddings whose gradients are to be sparse have dense ones: these hold the same numbers, and can be differentiated.

Nor are rows divided by how often they occur (`scale_grad_by_freq`): what would be left is no derivative of the loss.

The operator is replaced: traces, exported programs and `F.embedding(..., sparse=True)` have no module to be told.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


class _Replaced:
    library: torch.library.Library | None = None


def are_dense() -> bool:
    """Whether they are dense now."""
    return _Replaced.library is not None


def make_dense(dense: bool = True) -> None:
    """Makes them dense, in all of the process; or what they are in PyTorch."""
    if dense == are_dense():
        return
    if _Replaced.library is not None:
        _Replaced.library._destroy()
        _Replaced.library = None
        return
    _Replaced.library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # it had another
        _Replaced.library.impl("embedding_backward", _dense, "CompositeImplicitAutograd")
        for device in ("CPU", "CUDA"):
            _Replaced.library.impl("_embedding_bag_backward", _dense_of_bags, device)


def _dense(
    gradient: Tensor,
    indices: Tensor,
    rows: int,
    padding: int,
    by_frequency: bool,
    sparse: bool,
) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(gradient, indices, rows, padding, False)


def _dense_of_bags(
    gradient: Tensor,
    indices: Tensor,
    offsets: Tensor,
    bags: Tensor,
    sizes: Tensor,
    largest: Tensor,
    rows: int,
    by_frequency: bool,
    mode: int,
    sparse: bool,
    weights: Tensor | None,
    padding: int = -1,
) -> Tensor:
    if not bags.numel():  # the bag of each index, which some forward passes leave out
        places = torch.arange(len(indices), device=indices.device)
        bags = (torch.bucketize(places, offsets, right=True) - 1).to(indices.dtype)
    return torch.ops.aten._embedding_bag_dense_backward(
        gradient.contiguous(), indices, bags, sizes, largest, rows, False, mode, weights, padding
    )
