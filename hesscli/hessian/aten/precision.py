"""Numbers with more or fewer digits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from hesscli.hessian.aten.definitions import CPU, gpus
from hesscli.hessian.aten.watcher import BLANK, Watcher

_NARROW = (torch.float32, torch.float16, torch.bfloat16, torch.complex64)
WIDE = (torch.float64, torch.complex128)
_CONVERSION = torch.ops.aten._to_copy.default
_REGISTERED = ("_parameters", "_buffers", "_modules")
_DEEPEST = 4  # of lists in lists that are looked into


def in_precision(tensor: Tensor, precision: torch.dtype) -> Tensor:
    """Real numbers in a floating dtype, complex ones in the complex dtype of as many digits; others as they are."""
    if tensor.is_complex():
        return tensor.to(precision.to_complex())
    return tensor.to(precision) if tensor.is_floating_point() else tensor


def in_precision_(module: nn.Module, precision: torch.dtype) -> nn.Module:
    """The module, its parameters, buffers and constants changed to that. `module.to` would drop imaginary parts."""
    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule):
            _constants_in_precision_(part, precision)
        else:
            for name, value in vars(part).items():
                if name not in _REGISTERED:
                    vars(part)[name] = _constants_in(value, precision)
    return module._apply(lambda tensor: in_precision(tensor, precision))


def _constants_in(value: Any, precision: torch.dtype, depth: int = 0) -> Any:
    """An attribute with all its constants in that: one, or a list, a dict or a distribution of them, and so on."""
    if isinstance(value, Tensor):
        # A parameter, frozen say, stays the one that it is.
        moves = value.requires_grad or isinstance(value, nn.Parameter)
        return value if moves else in_precision(value, precision)
    if depth == _DEEPEST:  # a list may hold itself
        return value
    if isinstance(value, Distribution):
        for name, held in vars(value).items():
            vars(value)[name] = _constants_in(held, precision, depth + 1)
    elif type(value) in (list, tuple):
        changed = [_constants_in(each, precision, depth + 1) for each in value]
        if any(a is not b for a, b in zip(changed, value, strict=True)):
            return type(value)(changed)
    elif type(value) is dict:
        entries = {key: _constants_in(each, precision, depth + 1) for key, each in value.items()}
        if any(entries[key] is not each for key, each in value.items()):
            return entries
    return value


def _constants_in_precision_(module: torch.jit.ScriptModule, precision: torch.dtype) -> None:
    """Of TorchScript: attributes, and what a trace keeps in its code, `torch.tensor([[0.5, 1.0]])`."""
    if not module._c._has_method("forward"):
        return
    graph = module._c._get_method("forward").graph
    for node in graph.findAllNodes("prim::Constant"):
        if node.hasAttribute("value") and node.kindOf("value") == "t":
            node.t_("value", in_precision(node.t("value"), precision))
    registered = {*module._parameters.keys(), *module._buffers.keys()}
    names = {node.s("name") for node in graph.findAllNodes("prim::GetAttr")} - registered
    for name in filter(module._c.hasattr, names):
        held = module._c.getattr(name)
        if isinstance(held, Tensor) and not held.requires_grad:  # a list may hold weights
            module._c.setattr(name, in_precision(held, precision))


def _fake_quantize_per_channel(x: Tensor, scale: Tensor, *places: Any) -> Tensor:
    """PyTorch's, which takes its scales in float32 alone."""
    narrow = torch.empty_like(scale, dtype=torch.float32).copy_(scale)
    return torch.ops.aten.fake_quantize_per_channel_affine_cachemask(x, narrow, *places)[0]


def _grouped_mm(
    x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None = None, *_: Any
) -> Tensor:
    """PyTorch's, which multiplies each expert's rows with its matrix, in float32 and less alone."""
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    groups = x.split([*sizes, len(x) - sum(sizes)])
    none = x.new_zeros(len(groups[-1]), weight.shape[2])  # rows of no expert
    y = torch.cat([*(rows @ m for rows, m in zip(groups, weight, strict=False)), none])
    return y if bias is None else y + bias


@contextmanager
def default_of(dtype: torch.dtype) -> Iterator[None]:
    """In this context, tensors that are made without a dtype have this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def staying_wide() -> Iterator[None]:
    """Forward passes in this context keep float64 where the model itself asks for less, as RMSNorms often do.

    They sum in it too, where they say `x.mean(1, dtype=torch.float32)`, and begin with it: with
    `torch.zeros(layers, samples, size)` for a hidden state, to which traces and exported graphs give the dtype that
    they were made in.
    """
    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        default_of(torch.float64),
        _Widening(),
    ):
        for key in (CPU, *gpus()):
            library.impl("fake_quantize_per_channel_affine", _fake_quantize_per_channel, key)
            library.impl("_grouped_mm", _grouped_mm, key)
        yield


def _asks_for_less(func: Any, kwargs: dict[str, Any]) -> bool:
    return kwargs.get("dtype") in _NARROW and func.overloadpacket.__name__ not in BLANK


class _Widening(Watcher):
    """Gives in float64 what a pass asks for in less; what has no more digits stays as it is."""

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _asks_for_less(func, kwargs) and not (func is _CONVERSION and _is_narrow(args[0])):
            dtype = torch.complex128 if kwargs["dtype"].is_complex else torch.float64
            if func is _CONVERSION and args[0].dtype is dtype:
                return args[0].clone()
            kwargs = {**kwargs, "dtype": dtype}
        return func(*args, **kwargs)


class Narrowings(Watcher):
    """Sees whether a pass in float64 goes through anything narrower."""

    found = False  # by a conversion, which `staying_wide` leaves out
    made = False  # whether it makes tensors, or sums, that it is told to make narrower
    stuck = ""  # the operator that meets a narrower constant of the model, and gives what that has

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if func is _CONVERSION:
            self.found |= args[0].dtype in WIDE and kwargs.get("dtype") in _NARROW
        elif _asks_for_less(func, kwargs):
            self.made = True
        elif _is_narrow(result) and any(map(_is_wide_variable, args)):
            self.stuck = func.overloadpacket.__name__
        return result


def _is_narrow(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in _NARROW


def _is_wide_variable(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in WIDE and x.requires_grad
