"""Finding the weights in what training scripts save, under the names that the architecture gives them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from hesscli.files.libraries import as_transformers_names

# Where training scripts and their libraries put the weights; the first of these that is there counts.
ENTRIES = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_LISTED = 5


def unwrap(content: object, notes: list[str]) -> object:
    """The state dict, or the module, in a checkpoint; the content itself if it is none."""
    if not isinstance(content, Mapping):
        return content
    found = [name for name in ENTRIES if _holds_weights(content.get(name))]
    if not found:
        found = [str(name) for name, value in content.items() if _holds_weights(value)]
        if len(found) != 1 or any(isinstance(value, torch.Tensor) for value in content.values()):
            return content
    others = [str(name) for name in content if name != found[0]]
    listed = ", ".join(others[:_LISTED]) + (", ..." if len(others) > _LISTED else "")
    notes.append(
        f"weights: the entry {found[0]} of the checkpoint" + (f" (not {listed})" if others else "")
    )
    return content[found[0]]


def _holds_weights(value: object) -> bool:
    if isinstance(value, nn.Module):
        return True
    return (
        isinstance(value, Mapping)
        and any(isinstance(t, torch.Tensor) for t in value.values())
        and all(isinstance(name, str) for name in value)
    )


def without_wrappers(
    weights: Mapping[str, torch.Tensor], notes: list[str]
) -> dict[str, torch.Tensor]:
    """The weights without what DistributedDataParallel, torch.compile and the like put before their names."""
    renamed = {_unwrapped(name): tensor for name, tensor in weights.items()}
    if len(renamed) < len(weights) or renamed.keys() == weights.keys():
        return dict(weights)
    notes.append(f"names: {_example(weights, renamed)}")
    return renamed


def fitted(
    module: nn.Module, weights: Mapping[str, torch.Tensor], notes: list[str]
) -> dict[str, torch.Tensor]:
    """The weights under the module's names: as they are, or without the prefix that keeps them from fitting.

    Says so where names were changed, and which weights belong to something else than the module.
    """
    expected = dict(module.state_dict(keep_vars=True))
    if _fits(expected, weights):
        return dict(weights)
    for candidate in _candidates(weights, len({id(tensor) for tensor in expected.values()})):
        if _fits(expected, candidate):
            notes.append(f"names: {_example(weights, candidate)}")
            kept = {id(tensor) for tensor in candidate.values()}
            left = [name for name, tensor in weights.items() if id(tensor) not in kept]
            if left:
                listed = ", ".join(left[:_LISTED]) + (", ..." if len(left) > _LISTED else "")
                notes.append(f"left out, without that prefix: {listed}")
            return candidate
    named = as_transformers_names(module, weights)
    if named is None:
        return dict(weights)
    notes.append("names: as transformers maps them to those of this version")
    return named


def _candidates(
    weights: Mapping[str, torch.Tensor], least: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The weights without wrappers, and without each prefix that at least so many names have."""
    plain = {_unwrapped(name): tensor for name, tensor in weights.items()}
    for named in (dict(weights), plain) if len(plain) == len(weights) else (dict(weights),):
        yield named
        ends = ((name, end + 1) for name in named for end, c in enumerate(name) if c == ".")
        for prefix, count in Counter(name[:end] for name, end in ends).items():
            if count >= least:
                yield {
                    name.removeprefix(prefix): tensor
                    for name, tensor in named.items()
                    if name.startswith(prefix)
                }


def _fits(expected: Mapping[str, object], weights: Mapping[str, object]) -> bool:
    """Whether no name is missing or too many; tied parameters need one of their names."""
    if not weights.keys() <= expected.keys():
        return False
    present = {id(expected[name]) for name in weights}
    return all(name in weights or id(t) in present for name, t in expected.items())


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _example(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> str:
    new, tensor = next((name, t) for name, t in after.items() if before.get(name) is not t)
    old = next(name for name, t in before.items() if t is tensor)
    return f"{old} is {new} in the architecture, and so on"
