"""The copy of a module of the caller's, which is differentiated in its place."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hesscli.errors import MismatchError
from hesscli.files.models.compiled import uncompiled
from hesscli.files.models.ties import tie, tied_groups
from hesscli.hessian.objective.copies import copied
from hesscli.texts import first_line

# By which `torch.compile` knows its own, and whether an exported module looks at its inputs, which a copy does not.
_OF_A_WRAPPER = ("_torchdynamo_wrapper_id", "validate_inputs")


def own_copy(module: nn.Module) -> nn.Module:
    """A copy that shares nothing with the module and has the same numbers; MismatchError where there is none."""
    every = dict(module.named_parameters(remove_duplicate=False))
    groups = tied_groups((name, p) for name, p in every.items() if not is_lazy(p))
    try:
        with torch.no_grad():  # TorchScript would record it
            copy = copied(module)
        _demand_own(copy, module)
        _demand_equal(copy, module)
        for name, p in copy.named_parameters(remove_duplicate=False):
            p.requires_grad = every[name].requires_grad
        tie(copy, groups)  # which share memory and are no one object
        return uncompiled(copy)
    except Exception as error:  # a module may hold anything
        raise MismatchError(
            f"{type(module).__name__}: cannot be copied: {first_line(error)}",
            "save it, torch.save(model.state_dict(), 'net.pt'), and name its class with arch=",
        ) from error


def _demand_own(copy: nn.Module, module: nn.Module) -> None:
    """Refuses a copy that is the module itself in parts, whose `__deepcopy__` returns them: those would change."""
    known = {id(x) for x in (*module.modules(), *module.parameters(), *module.buffers())}
    for name, part in (*copy.named_modules(), *copy.named_parameters(), *copy.named_buffers()):
        if id(part) in known:
            raise ValueError(f"the copy of {name or 'it'} is {name or 'it'} itself")


def _demand_equal(copy: nn.Module, module: nn.Module) -> None:
    """Refuses a copy with other numbers, whose `__deepcopy__` or `__getstate__` loses them: it is another model."""
    found = _numbers(copy)
    for name, value in _numbers(module).items():
        if name not in found or not _equal(found[name], value):
            raise ValueError(f"the copy has another {name}")


def _numbers(module: nn.Module) -> dict[str, Tensor | complex]:
    """The parameters, the buffers, and the attributes that are tensors or numbers, by their names."""
    attributes = (
        (f"{path}.{name}" if path else name, value)
        for path, part in module.named_modules(remove_duplicate=False)
        for name, value in vars(part).items()
        if isinstance(value, (Tensor, int, float, complex)) and name not in _OF_A_WRAPPER
    )
    parameters = module.named_parameters(remove_duplicate=False)
    return dict(chain(attributes, parameters, module.named_buffers(remove_duplicate=False)))


def _equal(a: Tensor | complex, b: Tensor | complex) -> bool:
    """What is not a number is equal to itself here; tensors without numbers to read are equal."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b or a != a)
    if is_lazy(a) or a.is_meta or a.is_quantized or a.layout is not torch.strided:
        return True
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and bool(((a == b) | (a != a) & (b != b)).all())
