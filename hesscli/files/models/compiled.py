"""What `torch.compile` wraps."""

from __future__ import annotations

from torch import nn

_COMPILED = "torch._dynamo.eval_frame", "OptimizedModule"  # importing it takes three seconds


def uncompiled(module: nn.Module) -> nn.Module:
    """The module without what `torch.compile` put around it and around its parts, which are replaced in place.

    It computes the same, and its parameters have the names that they had before.
    """
    for part in module.modules():
        for name, child in part._modules.items():
            if child is not None:
                part._modules[name] = _inner(child)
    return _inner(module)


def _inner(module: nn.Module) -> nn.Module:
    kind = type(module)
    compiled = (kind.__module__, kind.__qualname__) == _COMPILED
    return module.get_submodule("_orig_mod") if compiled else module
