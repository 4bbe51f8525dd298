"""Which parameters are differentiated by."""

from __future__ import annotations

import glob
import shlex
from typing import Any

from torch import Tensor, nn

from hesscli.errors import UsageError
from hesscli.hessian.blocks import select


def chosen_parameters(
    module: nn.Module, patterns: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, list[str]], list[str]]:
    """The parameters to differentiate by, the other names of tied ones, and the frozen ones left out."""
    first: dict[tuple[Any, ...], str] = {}
    unique: dict[str, Tensor] = {}
    tied: dict[str, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if not p.is_floating_point():
            continue
        key = (p.data_ptr(), p.shape, p.stride()) if p.numel() else (name,)
        if key in first:
            tied.setdefault(first[key], []).append(name)
        else:
            first[key] = name
            unique[name] = p
    known = [*unique, *(other for others in tied.values() for other in others)]
    # A tied parameter is selected by any of its names.
    canonical = {other: name for name, others in tied.items() for other in others}
    chosen = {canonical.get(name, name) for name in select(known, patterns)}
    named = [p for p in patterns if not p.startswith("!")]
    asked = {canonical.get(n, n) for n in select(known, named)} if named else set()
    frozen = [n for n in unique if n in chosen and not unique[n].requires_grad and n not in asked]
    parameters = {n: p for n, p in unique.items() if n in chosen and n not in frozen}
    if not parameters:
        if not chosen:
            excluded = tuple(p for p in patterns if p.startswith("!"))
            likely = (select(known, excluded) or known)[0]
            listed = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
            raise UsageError(
                f"no parameter matches {' '.join(patterns)}; the model has: {listed}",
                f"--params {shlex.quote(glob.escape(likely))}",
            )
        raise UsageError(
            f"every parameter is frozen (requires_grad=False): {', '.join(frozen[:10])}",
            "--params '*'",
        )
    for name, parameter in unique.items():
        parameter.requires_grad_(name in parameters)  # unwanted gradients are not paid for
    return parameters, {n: tied[n] for n in parameters if n in tied}, frozen


def unmatched(module: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """The patterns that no parameter's name matches."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    return [pattern for pattern in patterns if not select(names, (pattern.removeprefix("!"),))]
