"""Which parameters are differentiated by."""

from __future__ import annotations

import glob
import shlex
from collections.abc import Callable

from torch import Tensor, nn

from hesscli.errors import UsageError
from hesscli.files.models.ties import tied_groups
from hesscli.hessian.blocks import select
from hesscli.texts import listed


def chosen_parameters(
    module: nn.Module, patterns: tuple[str, ...], note: Callable[[str], None]
) -> tuple[dict[str, Tensor], dict[str, list[str]], list[str]]:
    """The parameters to differentiate by, the other names of tied ones, and the frozen ones left out.

    Sets `requires_grad` of the module's parameters to match, and notes what is left out and the patterns that no name
    matches.

    Raises:
        UsageError: nothing is left.
    """
    every = module.named_parameters(remove_duplicate=False)
    floating: dict[str, Tensor] = {name: p for name, p in every if p.is_floating_point()}
    tied = {first: others for first, *others in tied_groups(floating.items())}
    # A tied parameter is selected, and excluded, by any of its names.
    canonical = {other: name for name, others in tied.items() for other in others}
    unique = {name: p for name, p in floating.items() if name not in canonical}
    known = [*unique, *canonical]
    named = tuple(p for p in patterns if not p.startswith("!"))
    excluded = tuple(p.removeprefix("!") for p in patterns if p.startswith("!"))
    left_out = {canonical.get(n, n) for n in select(known, excluded)} if excluded else set()
    chosen = {canonical.get(name, name) for name in select(known, named)} - left_out
    asked = chosen if named else set()
    frozen = [n for n in unique if n in chosen and not unique[n].requires_grad and n not in asked]
    parameters = {n: p for n, p in unique.items() if n in chosen and n not in frozen}
    if not parameters:
        if not chosen:
            likely = next((n for n in known if canonical.get(n, n) not in left_out), known[0])
            raise UsageError(
                f"no parameter matches {' '.join(patterns)}; the model has: {listed(known)}",
                f"--params {shlex.quote(glob.escape(likely))}",
            )
        raise UsageError(
            f"every parameter is frozen (requires_grad=False): {listed(frozen)}",
            "--params '*'",
        )
    for name, parameter in unique.items():
        parameter.requires_grad_(name in parameters)  # unwanted gradients are not paid for
    skipped = [name for name, p in module.named_parameters() if p.is_complex()]
    if skipped:
        note(f"skipped, complex: {', '.join(skipped)}")
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    for pattern in patterns:
        if not select(names, (pattern.removeprefix("!"),)):
            note(f"no parameter matches {pattern}")
    if frozen:
        note(f"skipped, frozen: {', '.join(frozen)} (name them with --params to include them)")
    return parameters, {n: tied[n] for n in parameters if n in tied}, frozen
