"""Putting the weights of a state dict into a module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hesscli.errors import MismatchError
from hesscli.files.models.importing import kind_and_line
from hesscli.files.models.shards import index_beside
from hesscli.texts import dtype_name, listed

_EXTRA = "_extra_state"
_DENSE = {"quantised": "dequantize", "sparse": "to_dense"}


def load_weights(
    path: Path,
    module: nn.Module,
    weights: Mapping[str, torch.Tensor],
    others: Mapping[str, object],
    versions: Mapping[str, object],
) -> None:
    """Loads the weights of the file into the module, at their full precision, float32 at least.

    Args:
        weights: by their names in the module.
        others: what else the file holds; of that the module gets what it asks for by `get_extra_state`.
        versions: of the modules they were saved from, by which modules bring weights of older ones up to date.

    Raises:
        MismatchError: names or shapes differ; each is listed. Or weights are no dense floating point numbers.
    """
    content = dict(weights)
    expected = {
        name: t
        for name, t in module.state_dict(keep_vars=True).items()
        if isinstance(t, torch.Tensor)
    }
    _refuse_other_kinds(path, expected, content)
    _complete_ties(path, expected, content)
    for name, tensor in expected.items():
        stored = content.get(name)
        # load_state_dict would round the weights to what the module was built in
        if stored is not None and tensor.is_floating_point():
            wide = torch.float64 in (stored.dtype, tensor.dtype)
            tensor.data = tensor.data.to(torch.float64 if wide else torch.float32)
    asked = [name for name in module.state_dict() if name.rpartition(".")[2] == _EXTRA]
    extra = {name: others[name] for name in asked if name in others}
    state: Any = OrderedDict({**content, **extra})
    state._metadata = versions
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        differences = _differences(expected, content)
        raise MismatchError(
            f"{path}: the weights do not fit the architecture: "
            + (differences or str(error).splitlines()[-1].strip()),
            _way_out(path, expected, content),
        ) from error
    except Exception as error:  # what a module does with its weights is its own
        raise MismatchError(
            f"{path}: the architecture does not take the weights: {kind_and_line(error)}",
            None if versions else "torch.save(model.state_dict(), 'net.pt')",  # keeps them
        ) from error


def _way_out(path: Path, expected: Collection[str], names: Collection[str]) -> str:
    """What to do about weights that do not fit: those of one file of several lack the others'."""
    index = index_beside(path)
    if index is not None:
        return f"it is one of several files: give their index, {index}"
    masks = [name for name in names if name.endswith("_mask") and name not in expected]
    for pruned in (mask.removesuffix("_mask") for mask in masks):
        if f"{pruned}_orig" in names:
            module, _, own = pruned.rpartition(".")
            where = f"model.get_submodule({module!r})"
            return (
                f"in the factory: torch.nn.utils.prune.identity({where}, {own!r}); "
                "or prune.remove before the weights are saved"
            )
    return "name the architecture they were saved from, with its sizes: --arch-arg K=V"


def _refuse_other_kinds(
    path: Path,
    expected: Mapping[str, torch.Tensor],
    content: Mapping[str, torch.Tensor],
) -> None:
    """Refuses what load_state_dict would take as numbers, or not know how to copy."""
    for name, tensor in expected.items():
        stored = content.get(name)
        if stored is None:
            continue
        kind = _kind(stored)
        if kind != _kind(tensor):
            method = _DENSE.get(kind)
            raise MismatchError(
                f"{path}: {name} is a {kind} tensor; the architecture wants a {_kind(tensor)} one",
                f"weights[{name!r}] = weights[{name!r}].{method}()" if method else None,
            )
        if tensor.is_floating_point() and not stored.is_floating_point():
            dtype = dtype_name(stored.dtype)
            raise MismatchError(
                f"{path}: {name} is {dtype}; the architecture wants floating point numbers",
                "save the weights as they were before they were quantised or converted",
            )


def _kind(tensor: torch.Tensor) -> str:
    """`dense`, or what keeps the tensor's numbers from being read one by one."""
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_meta:
        return "meta"
    return "dense" if tensor.layout is torch.strided else "sparse"


def _complete_ties(
    path: Path,
    expected: Mapping[str, torch.Tensor],
    content: dict[str, torch.Tensor],
) -> None:
    """Gives tied parameters all their names; safetensors keeps one of them only."""
    groups: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        groups.setdefault(id(tensor), []).append(name)
    for names in groups.values():
        present = [name for name in names if name in content]
        if not present:
            continue
        first = present[0]
        for name in names:
            content.setdefault(name, content[first])
        for other in present[1:]:
            # The last one loaded would win, and nobody would know.
            if not torch.equal(content[first], content[other]):
                raise MismatchError(
                    f"{path}: {first} and {other} differ, but the architecture ties them",
                    "name the architecture they were saved from",
                )


def _differences(expected: Mapping[str, torch.Tensor], content: Mapping[str, torch.Tensor]) -> str:
    missing = [name for name in expected if name not in content]
    unexpected = [name for name in content if name not in expected]
    shapes = [
        f"{name} {list(content[name].shape)} (the architecture has {list(tensor.shape)})"
        for name, tensor in expected.items()
        if name in content and content[name].shape != tensor.shape
    ]
    parts = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return "; ".join(f"{what}: {listed(names)}" for what, names in parts if names)
