"""hesscli: the exact Hessian of a saved PyTorch model, from the command line.

In Python: `load` opens a file that the command wrote, `compute` takes a model in memory, `operator`
multiplies vectors with its Hessian. Importing this loads neither numpy nor torch; what is used is
loaded then.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hesscli.errors import HesscliError
    from hesscli.job.linear_operator import operator
    from hesscli.job.live import compute
    from hesscli.job.loaded import Hessian, load

__version__ = "0.1.0"
__all__ = ["HesscliError", "Hessian", "__version__", "compute", "load", "operator"]

_HOMES = {
    "Hessian": "hesscli.job.loaded",
    "HesscliError": "hesscli.errors",
    "compute": "hesscli.job.live",
    "load": "hesscli.job.loaded",
    "operator": "hesscli.job.linear_operator",
}
"""Where each name is defined."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hesscli' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
