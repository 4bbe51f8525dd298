"""Parameters that are one tensor under several names."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def tied_groups(parameters: Iterable[tuple[str, torch.Tensor]]) -> list[list[str]]:
    """Groups of names whose tensors are the same memory, read in the same way."""
    groups: dict[object, list[str]] = {}
    for name, p in parameters:
        if p.layout is not torch.strided or p.is_meta or p.numel() == 0:
            continue
        memory = p.untyped_storage().data_ptr()
        key = (memory, p.storage_offset(), p.shape, p.stride(), p.dtype, p.requires_grad)
        groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def tie(module: nn.Module, groups: Iterable[list[str]]) -> None:
    """Makes all names of a group the same parameter, as they were before the model was saved."""
    for first, *others in groups:
        parameter = module.get_parameter(first)
        for name in others:
            owner, _, attribute = name.rpartition(".")
            module.get_submodule(owner).register_parameter(attribute, parameter)
