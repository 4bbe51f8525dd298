"""How a module's forward takes its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import Parameter, signature

import torch
from torch import nn


@dataclass(frozen=True)
class CallSignature:
    """What a model calls its inputs, and how it takes them."""

    most: int | None = None  # the most that it takes by position, if limited
    names: tuple[str, ...] = ()  # of all that have one
    keywords: tuple[str, ...] = ()  # of those that it takes by name only
    optional: tuple[str, ...] = ()  # of those that it can do without

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
        )
    try:
        parameters = signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # not callable, or written in C
        return CallSignature()
    by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    positional = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    unlimited = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return CallSignature(
        None if unlimited else positional,
        tuple(p.name for p in parameters if p.kind in by_name),
        tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY),
        tuple(p.name for p in parameters if p.default is not Parameter.empty),
    )
