"""Finding the weights in what training scripts save, under the names that the architecture gives them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from hesscli.errors import MismatchError
from hesscli.files.models.libraries import as_transformers_names
from hesscli.files.models.ties import tied_groups
from hesscli.texts import listed

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
    notes.append(
        f"weights: the entry {found[0]} of the checkpoint"
        + (f" (not {listed(others, _LISTED)})" if others else "")
    )
    return content[found[0]]


def saved_arguments(content: object) -> tuple[Mapping[str, object], str]:
    """What a module was made with, where a checkpoint keeps it as Lightning's `save_hyperparameters()` does.

    Returns:
        the arguments; the name of the one argument that had all of them as a mapping, where there was one.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("hyper_parameters"), Mapping):
        return {}, ""
    found, whole = content["hyper_parameters"], content.get("hparams_name")
    named = {name: value for name, value in found.items() if isinstance(name, str)}
    return named, whole if isinstance(whole, str) else ""


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
    names = {_unwrapped(name): name for name in weights}
    if len(names) < len(weights) or names.keys() == weights.keys():
        return dict(weights)
    notes.append(_example(names))
    return {new: weights[old] for new, old in names.items()}


def fitted(
    path: Path,
    module: nn.Module,
    weights: Mapping[str, torch.Tensor],
    notes: list[str],
) -> dict[str, torch.Tensor]:
    """The weights under the module's names: as they are, or without the prefix that keeps them from fitting.

    Says so where names were changed, and which weights belong to something else than the module.

    Raises:
        MismatchError: they fit under several prefixes.
    """
    expected = dict(module.state_dict(keep_vars=True))
    if _fits(expected, weights):
        return dict(weights)
    names = _names_that_fit(path, expected, weights)
    if names is not None:
        if any(new != old for new, old in names.items()):
            notes.append(_example(names))
        kept = set(names.values())
        left = [name for name in weights if name not in kept]
        if left:
            notes.append(f"left out, not the architecture's: {listed(left, _LISTED)}")
        return {new: weights[old] for new, old in names.items()}
    named = as_transformers_names(module, weights)
    if named is None:
        return dict(weights)
    notes.append("names: as transformers maps them to those of this version")
    return named


def versions(content: object, weights: Mapping[str, torch.Tensor]) -> dict[str, object]:
    """The versions of its modules that a state dict keeps, under the names that its weights were given."""
    kept = getattr(content, "_metadata", None)
    if not isinstance(content, Mapping) or not isinstance(kept, Mapping):
        return {}
    new_names = {id(tensor): name for name, tensor in weights.items()}
    found: dict[str, object] = {}
    for old, tensor in content.items():
        new = new_names.get(id(tensor), "")
        parts = str(old).split(".")
        for end in range(len(parts)):  # what is wrapped comes after its wrapper
            module, inner = ".".join(parts[:end]), _unwrapped(".".join(parts[end:]))
            if module in kept and f".{new}".endswith(f".{inner}"):
                found[new.removesuffix(inner).removesuffix(".")] = kept[module]
    return found


def _names_that_fit(
    path: Path,
    expected: Mapping[str, object],
    weights: Mapping[str, torch.Tensor],
) -> dict[str, str] | None:
    """The file's name for each of the module's; None if more than a prefix keeps the weights from fitting.

    A copy under a prefix (`ema.`) gives way to the weights under the module's own names.
    """
    whole = {name: name for name in weights}
    plain = {_unwrapped(name): name for name in weights}
    views = [whole, plain] if len(plain) == len(weights) else [whole]
    least = len({id(tensor) for tensor in expected.values()})
    same = {name: names[0] for names in tied_groups(weights.items()) for name in names}
    found: dict[frozenset[str], tuple[str, dict[str, str]]] = {}
    for prefix, names in (pair for view in views for pair in _without_prefixes(view, least)):
        if _fits(expected, names):
            memory = frozenset(same.get(old, old) for old in names.values())
            found.setdefault(memory, (prefix, names))
    for view in views:
        own = {new: old for new, old in view.items() if new in expected}
        if (found or len(own) == len(view)) and _fits(expected, own):
            return own
    if not found:
        return None
    (first, names), *others = found.values()
    if others:
        raise MismatchError(
            f"{path}: the weights fit the architecture under several prefixes: "
            + ", ".join([first, *(prefix for prefix, _ in others)])
            + "; expected one",
            f"keep one of them: torch.save({{k.removeprefix({first!r}): t for k, t in "
            f"weights.items() if k.startswith({first!r})}}, 'net.pt')",
        )
    return names


def _without_prefixes(view: Mapping[str, str], least: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Each prefix that at least so many names have, and these names without it."""
    ends = ((name, end + 1) for name in view for end, c in enumerate(name) if c == ".")
    for prefix, count in Counter(name[:end] for name, end in ends).items():
        if count >= least:
            mine = {name: old for name, old in view.items() if name.startswith(prefix)}
            yield prefix, {name.removeprefix(prefix): old for name, old in mine.items()}


def _fits(expected: Mapping[str, object], names: Iterable[str]) -> bool:
    """Whether no name is missing or too many; tied parameters need one of their names."""
    given = set(names)
    if not given <= expected.keys():
        return False
    present = {id(expected[name]) for name in given}
    return all(name in given or id(t) in present for name, t in expected.items())


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _example(names: Mapping[str, str]) -> str:
    new, old = next((new, old) for new, old in names.items() if new != old)
    return f"names: {old} is {new} in the architecture, and so on"
