"""Which parameters are differentiated by."""

from __future__ import annotations

import glob
import shlex
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from hesscli.errors import UsageError
from hesscli.files.models.ties import tied_groups
from hesscli.hessian.blocks import select
from hesscli.job.options import Note
from hesscli.texts import listed


def chosen_parameters(
    module: nn.Module, patterns: tuple[str, ...], note: Note
) -> tuple[dict[str, Tensor], dict[str, list[str]], list[str]]:
    """The parameters to differentiate by, the other names of tied ones, and the frozen; UsageError where none is left.

    Sets `requires_grad` of the module's parameters to match, and notes what is left out and the patterns that no name
    matches.
    """
    every = dict(module.named_parameters(remove_duplicate=False))
    floating = {name: p for name, p in every.items() if p.is_floating_point()}
    names = _names(floating)
    named = [p for p in patterns if not p.startswith("!")]
    excluded = [p.removeprefix("!") for p in patterns if p.startswith("!")]
    left = {n: its for n, its in names.items() if not select(its, excluded)}
    chosen = [name for name, its in left.items() if not named or select(its, named)]
    frozen = [name for name in chosen if not (named or floating[name].requires_grad)]
    parameters: dict[str, Tensor] = {n: floating[n] for n in chosen if n not in frozen}
    if not chosen:
        raise _no_match(patterns, names, left)
    if not parameters:
        raise UsageError(
            f"every parameter is frozen (requires_grad=False): {listed(frozen)}",
            "--params '*'",
        )
    for name in names:  # unwanted gradients are not paid for
        floating[name].requires_grad_(name in parameters)
    skipped = [name for name, p in module.named_parameters() if p.is_complex()]
    if skipped:
        note(f"skipped, complex: {listed(skipped)}")
    for pattern in patterns:
        if not select(every, (pattern.removeprefix("!"),)):
            note(f"no parameter matches {pattern}")
    if frozen:
        note(f"skipped, frozen: {listed(frozen)} (name them with --params to include them)")
    return parameters, {n: names[n][1:] for n in parameters if names[n][1:]}, frozen


def _no_match(
    patterns: tuple[str, ...],
    names: Mapping[str, Sequence[str]],
    left: Mapping[str, Sequence[str]],
) -> UsageError:
    """That no parameter is chosen; `left` are those that no pattern excludes.

    The hint is of the modules that are named, if any is, or of the first parameter.
    """
    known = [*names, *(other for _, *others in names.values() for other in others)]
    rest = [name for its in left.values() for name in its]
    of_modules = [f"{p}.*" for p in patterns if not p.startswith("!")]
    likely = [pattern for pattern in of_modules if select(rest, (pattern,))]
    if likely:
        likely += [p for p in patterns if p.startswith("!")]
    else:
        likely = [glob.escape(next(iter(left or names)))]
    return UsageError(
        f"no parameter matches {' '.join(patterns)}; the model has: {listed(known)}",
        " ".join(f"--params {shlex.quote(pattern)}" for pattern in likely),
    )


def _names(parameters: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The first name of each tensor -> all of its names, by any of which it is selected, and excluded."""
    groups = {group[0]: group for group in tied_groups(parameters.items())}
    others = {name for _, *rest in groups.values() for name in rest}
    return {name: groups.get(name, [name]) for name in parameters if name not in others}
