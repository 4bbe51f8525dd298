"""What makes a command of a function: decorators that add options, and make one of its parameters of them.

    @takes_problem  # MODEL, DATA and the options of both: `problem`
    @prints  # --json, --quiet, --debug: `out`
    @on_all_processes  # no options: `processes`
    def trace(out, processes, problem, rel_error): ...

On the command line there are MODEL and DATA, then the function's own parameters, then all other options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, get_type_hints

import typer

from hesscli.cli.failing import failing
from hesscli.cli.options import Debug, Json, Quiet, hessian_or_model, problem_of, problem_options
from hesscli.cli.output import Output
from hesscli.job.options import ProblemOptions
from hesscli.job.setup.processes import Processes
from hesscli.job.setup.team import rank, ranks

Command = Callable[..., None]


def prints(command: Command) -> Command:
    """Adds --json, --quiet and --debug. The parameter `out` is where the command prints; what goes wrong is said."""

    def run(json: Json = False, quiet: Quiet = False, debug: Debug = False, **others: Any) -> None:
        first = rank() == 0  # of the processes that torchrun started; the others are silent
        of_model = any(isinstance(value, ProblemOptions) for value in others.values())
        printing = Output(quiet=quiet or not first, json=json and first)
        with failing(debug, of_model), printing as out:
            command(out=out, **others)

    return _replaced(command, "out", run, after=_parameters(run))


def on_all_processes(command: Command) -> Command:
    """Runs a command on the first process; its parameter `processes` are those that torchrun started, or this one."""

    def run(**others: Any) -> None:
        if ranks() == 1:
            command(processes=Processes(), **others)
            return
        from hesscli.job.setup.many_processes import ManyProcesses

        with ManyProcesses() as processes:
            if not processes.serve():
                command(processes=processes, **others)

    return _replaced(command, "processes", run)


def takes_problem(command: Command) -> Command:
    """Adds MODEL, DATA and the options of both, which make the parameter `problem`."""
    return _takes(command, "problem", _FILES)


def takes_hessian_or_problem(*of_model: str) -> Callable[[Command], Command]:
    """The same, or a Hessian file alone: the parameter `hessian` is such a problem, or the file's path.

    Args:
        of_model: which of the command's own options mean nothing for a file.
    """
    files = _parameters(hessian_or_model)
    return lambda command: _takes(command, "hessian", files, of_model)


def _takes(
    command: Command, name: str, files: list[inspect.Parameter], of_model: Iterable[str] = ()
) -> Command:
    def run(**arguments: Any) -> None:
        shared = {option: arguments.pop(option) for option in _SHARED}
        value: str | ProblemOptions = shared["model"]
        if shared["data"] is not None:
            value = problem_of(shared)
        else:
            _refuse_given(problem_options, shared)
            _refuse_given(command, {option: arguments[option] for option in of_model})
        command(**{name: value}, **arguments)

    return _replaced(command, name, run, files, _OPTIONS)


def _refuse_given(command: Command, arguments: dict[str, Any]) -> None:
    """Refuses options of a command that only a model and data have, where a Hessian file is given."""
    for name, option in inspect.signature(command).parameters.items():
        optional = option.default is not option.empty
        if optional and name in arguments and arguments[name] != option.default:
            said = "--no-check" if name == "check" else f"--{name.replace('_', '-')}"
            raise typer.BadParameter("needs MODEL and DATA, not a Hessian file", param_hint=said)


def _parameters(function: Callable[..., None]) -> list[inspect.Parameter]:
    """A function's parameters by name, with their types."""
    hints = get_type_hints(function, include_extras=True)
    return [
        p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name])
        for p in inspect.signature(function).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    ]


_SHARED = {p.name: p for p in _parameters(problem_options)}
_FILES = [p for p in _SHARED.values() if p.default is p.empty]
_OPTIONS = [p for p in _SHARED.values() if p.default is not p.empty]


def _replaced(
    command: Command,
    name: str,
    run: Command,
    before: Iterable[inspect.Parameter] = (),
    after: Iterable[inspect.Parameter] = (),
) -> Command:
    """`run` as the command: other parameters stand for the one of this name, before and after the others."""
    own = [p for p in _parameters(command) if p.name != name]
    parameters = [*before, *own, *after]
    wraps(command)(run)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
