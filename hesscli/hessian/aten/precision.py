"""Numbers with more or fewer digits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from hesscli.hessian.aten.definitions import CPU, gpus
from hesscli.hessian.aten.watcher import Watcher

_NARROW = (torch.float32, torch.float16, torch.bfloat16, torch.complex64)
WIDE = (torch.float64, torch.complex128)
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
    """Of a trace, which keeps in its code what it was made with: `torch.tensor([[0.5, 1.0]])`."""
    if not module._c._has_method("forward"):
        return
    for node in module._c._get_method("forward").graph.findAllNodes("prim::Constant"):
        if node.hasAttribute("value") and node.kindOf("value") == "t":
            node.t_("value", in_precision(node.t("value"), precision))


def _widened(dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype not in _NARROW:
        return dtype
    return torch.complex128 if dtype.is_complex else torch.float64


def _to_copy_that_stays_wide(
    keys: torch._C.DispatchKeySet, x: Tensor, *, dtype: torch.dtype | None = None, **options: Any
) -> Tensor:
    if dtype in _NARROW and (x.dtype in WIDE or not (x.is_floating_point() or x.is_complex())):
        # Integers too: positions, say, that meet what stays wide.
        dtype = _widened(dtype)
        if x.dtype is dtype:
            return x.clone()
    if x.requires_grad:  # to another device, say
        like = {name: options[name] for name in ("device", "layout") if options.get(name)}
        return torch.empty_like(x, dtype=dtype, **like).copy_(x)
    below = keys & torch._C._after_autograd_keyset
    return torch.ops.aten._to_copy.default.redispatch(below, x, dtype=dtype, **options)


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


def _filled_like(
    x: Tensor, value: Any, *, dtype: torch.dtype | None = None, **options: Any
) -> Tensor:
    return torch.empty_like(x, dtype=_widened(dtype), **options).fill_(value)


def _made_by(
    out: Callable[..., Tensor], inferred: Callable[..., torch.dtype | None] = lambda *_: None
) -> Callable[..., Tensor]:
    """What makes a tensor of the dtype that it is told, or that is inferred from its arguments: of a wider one."""

    def make(*arguments: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        blank = torch.empty(0, dtype=_widened(dtype or inferred(*arguments)), **options)
        return out(*arguments, out=blank)

    return make


def _dtype_of(*numbers: Any) -> torch.dtype:
    return torch.tensor(numbers).dtype


def _summed_by(
    out: Callable[..., Tensor], result: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype
) -> Callable[..., Tensor]:
    """What sums or multiplies in the dtype that it is told, or in that of x, integers in theirs: in a wider one."""

    def reduce(
        x: Tensor, *arguments: Any, dtype: torch.dtype | None = None, **options: Any
    ) -> Tensor:
        is_whole = not (x.is_floating_point() or x.is_complex())
        x = x.to(_widened(dtype or (torch.int64 if is_whole else x.dtype)))
        blank = torch.empty(0, dtype=result(x.dtype), device=x.device)
        return out(x, *arguments, **options, out=blank)

    return reduce


_aten = torch.ops.aten
_MADE: dict[str, Callable[..., Tensor]] = {
    "zeros": _made_by(_aten.zeros.out),
    "ones": _made_by(_aten.ones.out),
    "full": _made_by(_aten.full.out, lambda _, value: _dtype_of(value)),
    "zeros_like": lambda x, **options: _filled_like(x, 0, **options),
    "ones_like": lambda x, **options: _filled_like(x, 1, **options),
    "full_like": _filled_like,
    "eye": _made_by(_aten.eye.out),
    "eye.m": _made_by(_aten.eye.m_out),
    "arange": _made_by(_aten.arange.out, _dtype_of),
    "arange.start": _made_by(_aten.arange.start_out, _dtype_of),
    "arange.start_step": _made_by(_aten.arange.start_out, _dtype_of),
    "linspace": _made_by(_aten.linspace.out),
}

_SUMS: dict[str, Callable[..., Tensor]] = {
    "sum.dim_IntList": _summed_by(_aten.sum.IntList_out),
    "nansum": _summed_by(_aten.nansum.out),
    "mean.dim": _summed_by(_aten.mean.out),
    "prod": lambda x, **options: _summed_by(_aten.prod.int_out)(x.flatten(), 0, **options),
    "prod.dim_int": _summed_by(_aten.prod.int_out),
    "cumsum": _summed_by(_aten.cumsum.out),
    "cumprod": _summed_by(_aten.cumprod.out),
    "linalg_vector_norm": _summed_by(_aten.linalg_vector_norm.out, torch.dtype.to_real),
}

_TOLD = frozenset(name.partition(".")[0] for name in _MADE | _SUMS)


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
    ):
        _replace(library)
        yield


def _replace(library: torch.library.Library) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # they have others
        for key in (CPU, *gpus()):
            library.impl("_to_copy", _to_copy_that_stays_wide, key, with_keyset=True)
            library.impl("fake_quantize_per_channel_affine", _fake_quantize_per_channel, key)
            library.impl("_grouped_mm", _grouped_mm, key)
            below = key.removeprefix("Autograd")
            for name, kernel in (_MADE | _SUMS).items():
                library.impl(name, kernel, below)


class Narrowings(Watcher):
    """Sees whether a pass in float64 goes through anything narrower."""

    found = False  # by a conversion, which `staying_wide` leaves out
    made = False  # whether it makes tensors, or sums, that it is told to make narrower
    stuck = ""  # the operator that meets a narrower constant of the model, and gives what that has

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            self.found |= args[0].dtype in WIDE and kwargs.get("dtype") in _NARROW
        elif func.overloadpacket.__name__ in _TOLD:
            self.made |= kwargs.get("dtype") in _NARROW
        elif _is_narrow(result) and any(map(_is_wide_variable, args)):
            self.stuck = func.overloadpacket.__name__
        return result


def _is_narrow(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in _NARROW


def _is_wide_variable(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in WIDE and x.requires_grad
