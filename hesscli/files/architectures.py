"""Building the module that a file of weights belongs to."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType

import torch
from torch import nn

from hesscli.errors import UsageError
from hesscli.files.libraries import timm_factory, transformers_factory
from hesscli.files.mlp import build_mlp

_FORMS = "PKG.MOD:FACTORY, FILE.py:FACTORY, transformers:CLASS, timm:NAME or mlp"


def build(
    arch: str,
    arch_args: Mapping[str, object],
    state_dict: Mapping[str, torch.Tensor],
    model: str | os.PathLike[str] = "",
) -> nn.Module:
    """The module that `arch` names, its weights not yet loaded.

    Args:
        arch: `PKG.MOD:FACTORY`, `FILE.py:FACTORY` (the current folder is importable), `transformers:CLASS`,
            `timm:NAME` or `mlp`. The factory is a class, a function or a ready module.
        arch_args: keyword arguments for the factory.
        state_dict: the weights; only `mlp` looks at them.
        model: where they come from; `transformers` finds its configuration there.

    Raises:
        UsageError: the factory is not there, fails, or makes something else.
        MismatchError: the weights are not those of an MLP.
    """
    if arch == "mlp":
        return build_mlp(state_dict, arch_args)
    source, colon, attribute = arch.rpartition(":")
    if not colon or not source or not attribute:
        raise UsageError(f"--arch {arch}: expected {_FORMS}", f"--arch {_guess(arch)}")
    with importable():
        module = _import(arch, source)
        factory: object
        if source == "transformers":
            factory = transformers_factory(attribute, model)
        elif source == "timm":
            factory = timm_factory(attribute)
        else:
            factory = _attribute(arch, module, attribute)
        return _call(arch, factory, attribute, arch_args)


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Makes the current folder importable, and keeps what imported code prints out of stdout.

    A console script's path starts with its own folder, not the user's; and stdout is for data.
    """
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.path[:] = before


def _import(arch: str, source: str) -> ModuleType:
    is_file = source.endswith(".py")
    if is_file and not os.path.isfile(source):
        raise UsageError(
            f"--arch {arch}: no such file: {source}",
            "the path is relative to the current folder: --arch path/to/net.py:FACTORY",
        )
    try:
        return _import_file(source) if is_file else importlib.import_module(source)
    except ModuleNotFoundError as error:
        missing = error.name or source
        if not is_file and (source == missing or source.startswith(missing + ".")):
            raise UsageError(
                f"--arch {arch}: no module named {missing} here or among the installed packages",
                f"name the file instead: --arch path/to/{source.split('.')[-1]}.py:FACTORY",
            ) from error
        raise UsageError(
            f"--arch {arch}: {source} imports {missing}, which is not installed",
            f"pip install {missing.split('.')[0]}",
        ) from error
    except (Exception, SystemExit) as error:  # a script without a main guard may exit
        raise UsageError(
            f"--arch {arch}: importing {source} raised {_told(error)}",
            f"python {source}" if is_file else f"python -c 'import {source}'",
        ) from error


def _import_file(path: str) -> ModuleType:
    folder = os.path.dirname(os.path.abspath(path))
    sys.path.insert(0, folder)  # as for a script: its neighbours are importable
    # A name of its own, so that a file called random.py hides nothing.
    name = "hesscli_arch_" + os.path.basename(path).removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and TorchScript look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(arch: str, module: ModuleType, dotted: str) -> object:
    value: object = module
    for name in dotted.split("."):
        if not hasattr(value, name):
            choices = _factories(module)
            near = difflib.get_close_matches(name, choices, 1, 0.5) or choices[:1]
            source = arch.rpartition(":")[0]
            raise UsageError(
                f"--arch {arch}: {source} has no {name}"
                + (f"; it has: {', '.join(choices[:10])}" if choices else ""),
                f"--arch {source}:{near[0] if near else 'FACTORY'}",
            )
        value = getattr(value, name)
    return value


def _factories(module: ModuleType) -> list[str]:
    """What the module itself defines that could make a model."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (
            isinstance(value, nn.Module)
            or (callable(value) and getattr(value, "__module__", None) == module.__name__)
        )
    ]


def _call(arch: str, factory: object, name: str, arguments: Mapping[str, object]) -> nn.Module:
    if isinstance(factory, nn.Module):
        if arguments:
            raise UsageError(
                f"--arch {arch}: {name} is a ready module and takes no --arch-arg "
                f"({', '.join(arguments)})",
                f"--arch {arch}",
            )
        return factory
    if not callable(factory):
        raise UsageError(
            f"--arch {arch}: {name} is a {type(factory).__name__}; "
            "expected a class, a function or an nn.Module",
            f"--arch {arch.rpartition(':')[0]}:FACTORY",
        )
    hint = " ".join([f"--arch {arch}", *(f"--arch-arg {a}" for a in _required(factory, arguments))])
    try:
        module = factory(**arguments)
    except (Exception, SystemExit) as error:
        raise UsageError(f"--arch {arch}: {name} raised {_told(error)}", hint) from error
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"--arch {arch}: {name} returned a {type(module).__name__}; expected an nn.Module",
            f"return the model alone from {name}",
        )
    return module


def _required(factory: object, given: Mapping[str, object]) -> list[str]:
    """`K=V` for each argument the factory needs, the given ones with their values."""
    parts = {name: f"{name}={value}" for name, value in given.items()}
    try:
        parameters = inspect.signature(factory).parameters.values()  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return list(parts.values())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {p.name for p in parameters if p.kind in named}
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        parts = {name: text for name, text in parts.items() if name in known}
    for p in parameters:
        if p.kind in named and p.default is p.empty:
            parts.setdefault(p.name, f"{p.name}=VALUE")
    return list(parts.values())


def _told(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _guess(arch: str) -> str:
    if arch.lower() == "mlp":
        return "mlp"
    name = arch.strip(":") or "mypkg.nets"
    return name + ":FACTORY"
