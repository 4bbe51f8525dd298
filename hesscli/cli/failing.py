"""From an exception to a line on stderr and an exit code."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from hesscli.errors import ExitCode, HesscliError


@contextmanager
def failing(debug: bool = False) -> Iterator[None]:
    """Runs a command's body: every way in which it can end badly has its message and its exit code.

    Raises:
        typer.Exit: with the exit code.
    """
    try:
        yield
    except (typer.Exit, typer.BadParameter):
        raise
    except BaseException as error:
        raise typer.Exit(_report(error, debug)) from None


def _report(error: BaseException, debug: bool) -> int:
    from hesscli.cli.output import say

    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, HesscliError):
        say("error", error.message)
        if error.hint:
            say("hint", _pasteable(error.hint))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        say("error", "interrupted")
        return ExitCode.INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # The reader has gone, which is its right; without this Python complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        say("error", f"out of memory: {str(error).splitlines()[0] if str(error) else ''}")
        say("hint", _pasteable("--batch-size 1"))
        return ExitCode.RESOURCES
    if not debug:
        import traceback

        traceback.print_exception(error)
    say("error", f"this is a bug in hesscli: {type(error).__name__}: {error}")
    return ExitCode.BUG


def _pasteable(hint: str) -> str:
    """A hint that is only an option becomes this very command with that option."""
    if hint.startswith("-"):
        return f"{shlex.join(['hesscli', *sys.argv[1:]])} {hint}"
    return hint
