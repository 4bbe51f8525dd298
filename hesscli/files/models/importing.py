"""Code that the command line names: `PKG.MOD:NAME` or `FILE.py:NAME`, from the current folder or installed."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Iterator
from types import ModuleType

from torch import nn

from hesscli.errors import UsageError
from hesscli.gradients import gradients_on
from hesscli.texts import listed

# Where architectures come from; each is installed under its own name.
_LIBRARIES = ("timm", "torchaudio", "torchvision", "transformers")
_WANTED = {"--arch": "FACTORY", "--loss": "FN"}  # what an option names


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Makes the current folder importable, and keeps what imported code prints out of stdout.

    A console script's path starts with its own folder, not the user's; and stdout is for data. Afterwards the folders
    come last, where they hide nothing, for what the code imports when it runs.

    A script may leave another folder as the current one, or gradients off, or autocast on: that ends here.
    """
    before, folder = list(sys.path), os.getcwd()
    sys.path.insert(0, folder)
    try:
        with contextlib.redirect_stdout(sys.stderr), gradients_on():
            yield
    finally:
        os.chdir(folder)
        sys.path[:] = [*before, *(folder for folder in sys.path if folder not in before)]


@contextlib.contextmanager
def as_main(module: ModuleType) -> Iterator[None]:
    """Inside, `__main__` is this module: the script that a file was saved by, which was that one then."""
    before = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        yield
    finally:
        sys.modules["__main__"] = before


def imported(option: str, spec: str) -> object:
    """What `PKG.MOD:NAME` or `FILE.py:NAME` names."""
    return attribute_of(option, spec, module_of(option, spec))


def module_of(option: str, spec: str) -> ModuleType:
    """The module or file in which `spec` names something; the same arguments, the same errors."""
    source = spec.rpartition(":")[0]
    is_file = source.endswith(".py")
    if is_file and not os.path.isfile(source):
        raise UsageError(
            f"{option} {spec}: no such file: {source}",
            f"the path is relative to the current folder: {option} path/to/net.py:{_WANTED[option]}",
        )
    try:
        return _import_file(source) if is_file else importlib.import_module(source)
    except ModuleNotFoundError as error:
        missing = error.name or source
        if not is_file and (source == missing or source.startswith(missing + ".")):
            named = shlex.quote(f"path/to/{source.split('.')[-1]}.py:{_WANTED[option]}")
            raise UsageError(
                f"{option} {spec}: no module named {missing} here or among the installed packages",
                f"pip install {missing}"
                if missing in _LIBRARIES
                else f"name the file instead: {option} {named}",
            ) from error
        raise UsageError(
            f"{option} {spec}: {source} imports {missing}, which is not installed",
            f"pip install {missing.split('.')[0]}",
        ) from error
    except (Exception, SystemExit) as error:  # a script without a main guard may exit
        raise UsageError(
            f"{option} {spec}: importing {source} raised {kind_and_line(error)}",
            f"python {shlex.quote(source)}" if is_file else f"python -c 'import {source}'",
        ) from error


def _import_file(path: str) -> ModuleType:
    folder = os.path.dirname(os.path.abspath(path))
    sys.path.insert(0, folder)  # as for a script: its neighbours are importable
    # A name of its own, so that a file called random.py hides nothing.
    name = "hesscli_named_" + os.path.basename(path).removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # by the name's end
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and TorchScript look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def attribute_of(option: str, spec: str, module: ModuleType) -> object:
    """What `spec` names in its module; the same arguments, the same errors."""
    source, _, dotted = spec.rpartition(":")
    value: object = module
    for name in dotted.split("."):
        if not hasattr(value, name):
            choices = _named(module)
            near = difflib.get_close_matches(name, choices, 1, 0.5) or choices[:1]
            raise UsageError(
                f"{option} {spec}: {source} has no {name}"
                + (f"; it has: {listed(choices)}" if choices else ""),
                f"{option} {shlex.quote(f'{source}:{near[0] if near else _WANTED[option]}')}",
            )
        value = getattr(value, name)
    return value


def _named(module: ModuleType) -> list[str]:
    """What the module itself defines that can be called."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (
            isinstance(value, nn.Module)
            or (callable(value) and getattr(value, "__module__", None) == module.__name__)
        )
    ]


def kind_and_line(error: BaseException) -> str:
    """The kind of an error, and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
