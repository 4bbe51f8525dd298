"""How a module's forward takes its inputs."""

from __future__ import annotations

from inspect import Parameter, signature

import torch
from torch import nn


def arguments_of(
    module: nn.Module,
) -> tuple[int | None, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The most inputs that forward takes by position, if limited; what it calls all; those by name only; and those
    that have a default."""
    if isinstance(module, torch.jit.ScriptModule):
        arguments = module.forward.schema.arguments[1:]  # type: ignore[attr-defined]
        keywords = tuple(a.name for a in arguments if a.kwarg_only)
        optional = tuple(a.name for a in arguments if a.has_default_value())
        return len(arguments) - len(keywords), tuple(a.name for a in arguments), keywords, optional
    try:
        parameters = signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return None, (), (), ()
    by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    positional = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    unlimited = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return (
        None if unlimited else positional,
        tuple(p.name for p in parameters if p.kind in by_name),
        tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY),
        tuple(p.name for p in parameters if p.default is not Parameter.empty),
    )
