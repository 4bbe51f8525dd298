"""What makes a process start, work, and end sooner."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress

from hesscli.files.malloc import keep_freed_memory


def start() -> None:
    """Imports torch as something that is there to stay, and keeps the memory that is freed.

    NumPy first: where torch imports it, in C++, Ctrl-C is lost, and NumPy with it.

    The garbage collector would look through all that it makes, again and again during the import and once more at
    exit: 0.3 s of 1.3 s. Nothing of it is garbage.
    """
    keep_freed_memory()
    if "torch" in sys.modules:
        return
    gc.disable()
    import numpy  # noqa: F401
    import torch  # noqa: F401

    gc.freeze()
    gc.enable()


def leave(code: object) -> None:
    """Ends the process without taking torch apart, which takes 0.1 s; all files must be closed.

    Returns where the usual end is needed: without torch, with matplotlib, which may have a folder to clear, for a
    code that is no number, or when there is something that cannot be flushed.
    """
    if "torch" in sys.modules and "matplotlib" not in sys.modules and isinstance(code, int):
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
