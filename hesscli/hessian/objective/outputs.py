"""Which tensor of what a model returns is its output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from torch import Tensor

from hesscli.errors import MismatchError


def pick_output(
    result: object,
    key: str | None,
    preferred: str = "logits",
    note: Callable[[str], None] | None = None,
) -> Tensor:
    """The output tensor in what a module returned: the tensor itself, or the entry that `key` names.

    Without a key, a lone tensor in a tuple or dict is taken, or the `preferred` entry of a dict or object, of which
    `note` hears.

    Raises:
        MismatchError: nothing or too much to choose from.
    """
    if isinstance(result, Tensor) and key is None:
        return result
    entries, found = entries_of(result), described(result)
    if key is not None:
        entry = entries.get(key)
        if isinstance(result, (tuple, list)) and key.removeprefix("-").isdigit():
            place = int(key)
            entry = result[place] if -len(result) <= place < len(result) else None
        if isinstance(entry, Tensor):
            return entry
        if isinstance(result, Tensor):
            raise MismatchError(f"the model's output is one tensor, without a part {key!r}")
        raise MismatchError(f"the model's output has no tensor {key!r}; it holds: {found}")
    tensors = tensors_of(result)
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    if preferred in tensors:
        if note:
            note(f"output: {preferred}, inferred from its name")
        return tensors[preferred]
    numbers = [name for name, value in tensors.items() if preferred == "loss" and not value.dim()]
    first = next(iter(numbers or tensors), None)
    raise MismatchError(
        f"the model returns more than one tensor or none: {found}",
        first and f"--output-key {first}",
    )


def entries_of(result: object) -> dict[str, object]:
    """What a module returned besides one tensor, by name or place."""
    if isinstance(result, Mapping):
        return {str(name): value for name, value in result.items()}
    if isinstance(result, (tuple, list)):
        fields = getattr(result, "_fields", None) or range(len(result))
        return {str(name): value for name, value in zip(fields, result, strict=True)}
    if dataclasses.is_dataclass(result):
        return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return {}


def tensors_of(result: object) -> dict[str, Tensor]:
    """The tensors among these."""
    entries = entries_of(result).items()
    return {name: value for name, value in entries if isinstance(value, Tensor)}


def described(result: object) -> str:
    """The names of these, and the types of what is no tensor."""
    entries = entries_of(result)
    return ", ".join(map(_described, entries, entries.values())) or type(result).__name__


def _described(name: str, value: object) -> str:
    return name if isinstance(value, Tensor) else f"{name} ({type(value).__name__})"
