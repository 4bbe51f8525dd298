"""How a module's forward takes its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import get_origin

import torch
from torch import nn

BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class CallSignature:
    """What a model calls its inputs, and how it takes them."""

    most: int | None = None  # the most that it takes by position, if limited
    names: tuple[str, ...] = ()  # of all that have one
    keywords: tuple[str, ...] = ()  # of those that it takes by name only
    optional: tuple[str, ...] = ()  # of those that it can do without
    mapping: bool | None = False  # whether the first is a dict of tensors; None: it does not say
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
            arguments[0].type.annotation_str == "Dict[str, Tensor]" if arguments else False,
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
        bool(parameters) and not of_pytorch and _is_mapping(parameters[0].annotation),
        [p.kind for p in parameters] == [Parameter.VAR_KEYWORD],
    )


def _is_mapping(annotation: object) -> bool | None:
    """Whether an annotation, or its text, is of a dict; None where there is none."""
    if annotation is Parameter.empty:
        return None
    if isinstance(annotation, str):
        return annotation.split("[")[0].rpartition(".")[2] in ("dict", "Dict", "Mapping")
    kind = get_origin(annotation) or annotation
    return isinstance(kind, type) and issubclass(kind, Mapping)
