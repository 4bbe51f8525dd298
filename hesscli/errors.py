"""Exit codes, and the errors that carry them from any room to the command line."""

from __future__ import annotations

import re
from enum import IntEnum

_OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator|out of memory|_ALLOC_FAILED")
"""What PyTorch says in a plain RuntimeError: of the CPU, MPS, and pinned memory, of what cuBLAS and cuDNN take for
themselves, and of any device inside TorchScript."""


class ExitCode(IntEnum):
    """What a finished process tells the shell, as `diff`, `grep` and `ruff` do up to 2."""

    OK = 0
    CHECK_FAILED = 1  # a check that was asked for failed (diff, a gate)
    USAGE = 2  # wrong options, a missing file, output refused
    FILE = 3  # a file is unreadable, unsupported or unsafe
    MISMATCH = 4  # model, data and loss do not fit together
    NUMERICAL = 5  # NaN or inf, not twice differentiable, check failed, not converged
    RESOURCES = 6  # device missing, not enough memory or disk
    BUG = 70  # a bug in hesscli
    INTERRUPTED = 130  # Ctrl-C


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch has an error of its own for most of a GPU's, and none for the CPU's."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and bool(said_of_memory(error)))


def said_of_memory(error: BaseException) -> str:
    """The line of an error that says that memory ran out."""
    return next(filter(_OUT_OF_MEMORY.search, str(error).splitlines()), "")


class Terminated(SystemExit):
    """Told to end (SIGTERM), by a batch system say; the code is what the shell expects."""


signalled: list[BaseException] = []
"""What signals have raised in this run: TorchScript makes a nameless error of that."""


class HesscliError(Exception):
    """An error for the user: what was found, what was wanted, and a hint that can be pasted.

    Args:
        message: what was found, and what was wanted.
        hint: a command; or an option, which goes to the command that failed.
        instead_of: options that are not in it, and that the command must do without then.
    """

    exit_code = ExitCode.BUG
    of_share = False  # met in the work that one process of several has for itself

    def __init__(
        self, message: str, hint: str | None = None, instead_of: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")  # below the traceback that Python shows
        self.instead_of = instead_of


class CheckError(HesscliError):
    exit_code = ExitCode.CHECK_FAILED


class UsageError(HesscliError):
    exit_code = ExitCode.USAGE


class FileError(HesscliError):
    exit_code = ExitCode.FILE


class MismatchError(HesscliError):
    exit_code = ExitCode.MISMATCH


class DeviceMismatchError(MismatchError):
    """The model, or the loss, makes tensors on another device than the one that all else was brought to."""


class NumericalError(HesscliError):
    exit_code = ExitCode.NUMERICAL


class ResourceError(HesscliError):
    exit_code = ExitCode.RESOURCES


class InterruptedRun(HesscliError):  # noqa: N818 - nothing went wrong
    exit_code = ExitCode.INTERRUPTED
