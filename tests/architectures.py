"""The factory that the tests name by `--arch architectures.py:build`.

`cases.py` would be imported anew for each command, all its models with it; its neighbours import it once.
"""

from cases import build

__all__ = ["build"]
