"""Modules in memory, in the form of those from a file."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hesscli.errors import MismatchError
from hesscli.files.digest import sha256_of
from hesscli.files.models.call_signature import signature_of
from hesscli.files.models.model_file import SavedModel, prepare, without_parameters


def live_model(module: nn.Module, *, train_mode: bool, device: torch.device | None) -> SavedModel:
    """A module in memory in the form of a loaded one. It is changed as one from a file is: pass a copy.

    Raises:
        FileError: it has no parameters.
        MismatchError: they have no values yet.
    """
    name = type(module).__name__
    if next(module.parameters(), None) is None:
        raise without_parameters(name, "module")
    _demand_values(name, module)
    notes: list[str] = []
    digest = sha256_of(module.state_dict())
    prepare(module, notes)
    if device is not None:
        module.to(device)
    module.train(train_mode)
    return SavedModel(module, "module", digest, tuple(notes), signature_of(module))


def _demand_values(name: str, module: nn.Module) -> None:
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise MismatchError(
                f"{name}: {key} has no shape before the module was called", "model(x)"
            )
        if tensor.is_meta:
            raise MismatchError(
                f"{name}: {key} is on the meta device, where tensors have no values",
                "model.to_empty(device='cpu').load_state_dict(weights)",
            )
