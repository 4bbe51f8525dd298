"""hesscli: the exact Hessian of a saved PyTorch model, from the command line."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`hesscli.operator`, which needs torch, is imported when it is asked for."""
    if name == "operator":
        from hesscli.job.operator import operator

        return operator
    raise AttributeError(f"module 'hesscli' has no attribute {name!r}")
