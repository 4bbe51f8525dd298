"""From an exception to a line on stderr and an exit code."""

from __future__ import annotations

import errno
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import typer

from hesscli.cli.output import say
from hesscli.cli.terminal import silence
from hesscli.errors import (
    ExitCode,
    HesscliError,
    Terminated,
    is_out_of_memory,
    said_of_memory,
    signalled,
)
from hesscli.job.setup.team import rank

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# As Python says; modules ask when they are imported.
_NO_FOLDER = "No usable temporary directory"


@contextmanager
def failing(debug: bool, of_model: bool) -> Iterator[None]:
    """Runs a command's body: every way in which it can end badly has its message and its exit code.

    Args:
        of_model: the command has a model and data, which may be split into smaller batches.
    """
    terminating = signal.signal(signal.SIGTERM, _terminated)
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not if it is ignored, in the background say
        signal.signal(signal.SIGINT, _interrupted)
    try:
        try:
            yield
        except BaseException as error:
            if _comes_of_a_signal(error):
                raise signalled[-1] from None
            raise
        if signalled:  # where Python drops exceptions, in a finalizer
            raise signalled[-1]
    except (typer.Exit, typer.BadParameter, SystemExit):
        raise
    except BaseException as error:
        raise typer.Exit(report(error, debug, of_model)) from None
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, terminating)
        signalled.clear()


def _comes_of_a_signal(error: BaseException) -> bool:
    """Whether it is only what a signal led to: an import that was cut off, say."""
    knows = isinstance(error, (KeyboardInterrupt, SystemExit))
    knows |= isinstance(error, HesscliError) and error.exit_code == ExitCode.INTERRUPTED
    return bool(signalled) and not knows


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """Being told to end, by a batch system say, leaves as little behind as Ctrl-C does."""
    signalled.append(Terminated(128 + number))
    raise signalled[-1]


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    signalled.append(KeyboardInterrupt())
    raise signalled[-1]


def report_usage(error: Any) -> int:
    """What is wrong with the command line itself, in the style of every other error."""
    if rank() == 0:
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        say("error", message[:1].lower() + message[1:])
        say("hint", f"{error.ctx.command_path if error.ctx else 'hesscli'} --help")
    return ExitCode.USAGE


def report(error: BaseException, debug: bool = False, of_model: bool = False) -> int:
    """Says what went wrong; returns the exit code."""
    if debug:
        traceback.print_exception(error)
    whose = f"rank {rank()}: " if rank() else ""
    if isinstance(error, HesscliError):
        everywhere = (ExitCode.USAGE, ExitCode.FILE, ExitCode.MISMATCH, ExitCode.INTERRUPTED)
        if rank() and error.exit_code in everywhere and not error.of_share:
            return error.exit_code  # the first process says the same
        say("error", f"{whose}{error.message}")
        if error.hint:
            say("hint", _pasteable(error.hint, error.instead_of))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        if rank() == 0:
            say("error", "interrupted")
        return ExitCode.INTERRUPTED
    if isinstance(error, BrokenPipeError):  # the reader has gone, which is its right
        silence(sys.stdout)
        return ExitCode.OK
    if isinstance(error, FileNotFoundError) and _NO_FOLDER in str(error):
        say("error", f"{whose}no folder for temporary files can be written to")
        say("hint", f"TMPDIR=FOLDER {shlex.join(['hesscli', *sys.argv[1:]])}")
        return ExitCode.RESOURCES
    if isinstance(error, OSError) and error.errno in _FULL:
        say("error", f"{error.filename or 'standard output'}: {error.strerror}")
        silence(sys.stdout)
        return ExitCode.RESOURCES
    if isinstance(error, OSError) and error.filename and error.strerror:
        say("error", f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}")
        return ExitCode.FILE
    if is_out_of_memory(error):
        said = said_of_memory(error) or str(error).partition("\n")[0]
        said = said.rpartition("DefaultCPUAllocator: ")[2].removeprefix("RuntimeError: ")
        say("error", f"{whose}out of memory: {said}" if said else f"{whose}out of memory")
        if of_model:
            say("hint", _pasteable("--batch-size 1"))
        return ExitCode.RESOURCES
    if not debug:
        traceback.print_exception(error)
    say("error", f"this is a bug in hesscli: {type(error).__name__}: {error}")
    return ExitCode.BUG


def _pasteable(hint: str, instead_of: tuple[str, ...] = ()) -> str:
    """A hint that is an option, or the rest of a pipe, is appended to this very command.

    Options that the command has already give way to those in it, and so do those that it stands `instead_of`.
    """
    if not hint.startswith(("-", "| ")):
        # The rooms behind know no other command.
        return hint.replace("hesscli compute MODEL", f"hesscli {sys.argv[1]} MODEL")
    options = _options()
    given = (word for word in (*instead_of, *hint.split()) if word in options)
    replaced = {name for word in given for name in options[word].opts}
    kept: list[str] = []
    words = iter(sys.argv[1:])
    for word in words:
        if word == "--":
            break
        name = word.partition("=")[0] if word.startswith("--") else word[:2]
        if name not in replaced:
            kept.append(word)
        elif word == name and not options[name].is_flag:
            next(words, None)  # its value
    command, files = shlex.join(["hesscli", *kept]), list(words)
    if not files:
        return f"{command} {hint}"
    last = shlex.join(["--", *files])
    return f"{command} {last} {hint}" if hint.startswith("|") else f"{command} {hint} {last}"


def _options() -> dict[str, Any]:
    """The options of this very command, and its arguments, each by all of its names."""
    from hesscli.cli import app

    group: Any = typer.main.get_command(app)
    parameters = group.commands[sys.argv[1]].params
    return {name: each for each in parameters for name in each.opts}
