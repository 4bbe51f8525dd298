"""How a module's forward takes its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import get_origin

import torch
from torch import Tensor, nn

BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class CallSignature:
    """What a model calls its inputs, and how it takes them."""

    most: int | None = None  # the most that it takes by position, if limited
    names: tuple[str, ...] = ()  # of all that have one
    keywords: tuple[str, ...] = ()  # of those that it takes by name only
    optional: tuple[str, ...] = ()  # of those that it can do without
    first: type | None = Tensor  # that, or a dict, tuple or list of them; None: it does not say
    any_name: bool = False  # whether it takes them by whatever names, and none by position

    @property
    def positional(self) -> list[str]:
        """The names of those that it takes by position."""
        return [name for name in self.names if name not in self.keywords]


def signature_of(module: nn.Module) -> CallSignature:
    """As forward declares it; without names if it declares none."""
    if isinstance(module, torch.jit.ScriptModule):
        arguments = module.forward.schema.arguments[1:]  # type: ignore[attr-defined]
        keywords = tuple(a.name for a in arguments if a.kwarg_only)
        return CallSignature(
            len(arguments) - len(keywords),
            tuple(a.name for a in arguments),
            keywords,
            tuple(a.name for a in arguments if a.has_default_value()),
            _kind(arguments[0].type.annotation_str) if arguments else Tensor,
        )
    try:
        parameters = list(signature(module.forward).parameters.values())
    except (TypeError, ValueError):  # not callable, or written in C
        return CallSignature()
    positional = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    unlimited = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    home = str(getattr(module.forward, "__module__", ""))
    of_pytorch = home.startswith("torch.nn.")  # where all take tensors
    return CallSignature(
        None if unlimited else positional,
        tuple(p.name for p in parameters if p.kind in BY_NAME),
        tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY),
        tuple(p.name for p in parameters if p.default is not Parameter.empty),
        Tensor if of_pytorch or not parameters else _kind(parameters[0].annotation),
        [p.kind for p in parameters] == [Parameter.VAR_KEYWORD],
    )


_KINDS = {"Dict": dict, "Mapping": dict, "Tuple": tuple, "List": list, "Sequence": list}
"""What an annotation is called, capitalised -> what is meant."""


def _kind(annotation: object) -> type | None:
    """What an annotation, or its text, stands for."""
    if annotation is Parameter.empty:
        return None
    kind = get_origin(annotation) or annotation
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return dict
    text = kind if isinstance(kind, str) else str(getattr(kind, "__name__", ""))
    return _KINDS.get(text.split("[")[0].rpartition(".")[2].capitalize(), Tensor)
