"""What makes a command start, and end, sooner."""

from __future__ import annotations

import gc
import sys


def load_torch() -> None:
    """Imports torch as something that is there to stay.

    The garbage collector would look through all that it makes, again and again during the import and once more at
    exit: 0.4 s of 1.5 s. Nothing of it is garbage.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    import torch  # noqa: F401

    gc.freeze()
    gc.enable()
