"""Building the module that a file of weights belongs to."""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable, Collection, Mapping
from inspect import Parameter
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from hesscli.errors import UsageError
from hesscli.files.models.call_signature import BY_NAME
from hesscli.files.models.compiled import uncompiled
from hesscli.files.models.importing import attribute_of, importable, kind_and_line, module_of
from hesscli.files.models.libraries import timm_factory, transformers_factory
from hesscli.files.models.mlp import build_mlp
from hesscli.texts import listed

_FORMS = "PKG.MOD:FACTORY, FILE.py:FACTORY, transformers:CLASS, timm:NAME or mlp"


def build(
    arch: str,
    arch_arguments: Mapping[str, object],
    state_dict: Mapping[str, torch.Tensor],
    model: Path | str = "",
    saved_arguments: Mapping[str, object] = MappingProxyType({}),
    saved_as: str = "",
    note: Callable[[str], None] = lambda text: None,
) -> nn.Module:
    """The module that `arch` names, its weights not yet loaded.

    Args:
        arch: `PKG.MOD:FACTORY`, `FILE.py:FACTORY` (the current folder is importable), `transformers:CLASS`,
            `timm:NAME` or `mlp`. The factory is a class, a function or a ready module.
        state_dict: the weights; only `mlp` looks at them.
        model: where they come from; `transformers` finds its configuration there.
        saved_arguments: keyword arguments for a factory of the user's own that were saved with the weights: those that
            it takes, and that are not given.
        saved_as: a factory that has a parameter of this name takes them as one mapping, there.
        note: hears which of these it was given.

    Raises:
        UsageError: the factory is not there, fails, or makes something else.
        MismatchError: the weights are not those of an MLP.
    """
    if arch == "mlp":
        return build_mlp(state_dict, arch_arguments)
    source, _, attribute = arch.rpartition(":")
    if not source or not attribute:
        raise UsageError(f"--arch {arch}: expected {_FORMS}", f"--arch {shlex.quote(_guess(arch))}")
    with importable():
        if source in ("transformers", "timm"):
            os.environ["HF_HUB_OFFLINE"] = "1"  # read when they are imported
        module = module_of("--arch", arch)
        factory: object
        if source == "transformers":
            factory = transformers_factory(attribute, model)
        elif source == "timm":
            factory = timm_factory(attribute)
        else:
            factory = attribute_of("--arch", arch, module)
            saved = _saved(factory, saved_arguments, saved_as)
            saved = {name: value for name, value in saved.items() if name not in arch_arguments}
            if saved:
                pairs = listed(_pair(name, value) for name, value in saved.items())
                note(f"arguments of {attribute}: {pairs}, as saved with the weights")
            arch_arguments = {**saved, **arch_arguments}
        return uncompiled(_call(arch, factory, attribute, arch_arguments))


def _call(arch: str, factory: object, name: str, arguments: Mapping[str, object]) -> nn.Module:
    if isinstance(factory, nn.Module):
        if arguments:
            raise UsageError(
                f"--arch {arch}: {name} is a ready module and takes no --arch-arg "
                f"({', '.join(arguments)})",
                f"--arch {shlex.quote(arch)}",
                instead_of=("--arch-arg",),
            )
        return factory
    if not callable(factory):
        raise UsageError(
            f"--arch {arch}: {name} is a {type(factory).__name__}; "
            "expected a class, a function or an nn.Module",
            f"--arch {shlex.quote(arch.rpartition(':')[0])}:FACTORY",
        )
    try:
        module = factory(**arguments)
    except (Exception, SystemExit) as error:
        message = f"--arch {arch}: {name} raised {kind_and_line(error)}"
        wanted = _wanted(factory, arguments)
        if wanted.keys() == arguments.keys():
            raise UsageError(message, "--debug") from error
        pairs = (shlex.quote(f"{key}={value}") for key, value in wanted.items())
        hint = " ".join([f"--arch {shlex.quote(arch)}", *(f"--arch-arg {p}" for p in pairs)])
        raise UsageError(message, hint, instead_of=("--arch-arg",)) from error
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"--arch {arch}: {name} returned a {type(module).__name__}; expected an nn.Module",
            f"return the model alone from {name}",
        )
    return module


def _wanted(factory: Callable[..., object], given: Mapping[str, object]) -> dict[str, object]:
    """The arguments that the factory knows and needs: the given ones, VALUE for the others."""
    parameters = _parameters(factory)
    needed = {p.name: "VALUE" for p in parameters if p.default is p.empty and p.kind in BY_NAME}
    return needed | _taken(parameters, given)


def _saved(factory: object, arguments: Mapping[str, object], whole: str) -> dict[str, object]:
    """Those of the saved arguments that the factory knows; all, where it takes them whole."""
    saved = bool(arguments or whole)
    if not saved or not callable(factory) or isinstance(factory, nn.Module):
        return {}
    parameters = _parameters(factory)
    if any(p.name == whole and p.kind in BY_NAME for p in parameters):
        return {whole: dict(arguments)}
    return _taken(parameters, arguments)


def _taken(parameters: Collection[Parameter], given: Mapping[str, object]) -> dict[str, object]:
    """Those of the arguments that a factory of these parameters knows."""
    known = {p.name for p in parameters if p.kind in BY_NAME}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {name: value for name, value in given.items() if takes_all or name in known}


def _pair(name: str, value: object) -> str:
    """An argument for a note, which says the same in every run: objects tell their addresses."""
    plain = isinstance(value, (bool, int, float, str, list, tuple, dict))
    return f"{name}={value!r}" if plain and " at 0x" not in repr(value) else name


def _parameters(factory: Callable[..., object]) -> list[Parameter]:
    """Its parameters; where it was written in C, and does not tell them, any are taken."""
    try:
        return list(inspect.signature(factory).parameters.values())
    except ValueError:
        return [Parameter("arguments", Parameter.VAR_KEYWORD)]


def _guess(arch: str) -> str:
    if arch.lower() == "mlp":
        return "mlp"
    name = arch.strip(":") or "mypkg.nets"
    source, _, attribute = name.rpartition(".")
    dotted = source and attribute.isidentifier() and attribute != "py"
    return f"{source}:{attribute}" if dotted else f"{name}:FACTORY"
