"""A GPU where there is none: its tensors say so, and lie on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hesscli.hessian import chunk_sizes
from hesscli.hessian.aten import definitions

MEMORY = 80 << 30

# What PyTorch's own code is told: its guards and its engine know no GPU, but this is another device than the CPU.
_INSIDE = torch.device("cpu:1")
_aten = torch.ops.aten
_TRANSFERS = {_aten.copy_.default, _aten._to_copy.default}
_INDEXING = {
    _aten.index.Tensor,
    _aten._unsafe_index.Tensor,
    _aten.index_put_.default,
    _aten.index_put.default,
    _aten._index_put_impl_.default,
}


class _OnGpu(Tensor):
    """Shares the memory of a tensor on the CPU."""

    kind = "cuda"

    @staticmethod
    def __new__(cls, x: Tensor) -> _OnGpu:
        return Tensor._make_subclass(cls, x, x.requires_grad, dispatch_device=True)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind, 0)

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    def __deepcopy__(self, memo: dict[int, Any]) -> _OnGpu:
        if id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            copy.__dict__.update(self.__dict__)
            memo[id(self)] = copy
        return memo[id(self)]


class _Refused(list[str]):
    """What no GPU would have done, also where the error that it raised was caught."""

    def error(self, kind: type[Exception], text: str) -> None:
        self.append(text)
        raise kind(text)


_refused = _Refused()


def _on_host(x: Any) -> Any:
    """The same numbers as PyTorch's kernels take them."""
    if not isinstance(x, _OnGpu):
        return x
    with torch._C._DisableTorchDispatch():
        storage = x.untyped_storage()
    plain = torch.empty(0, dtype=x.dtype).set_(storage, x.storage_offset(), x.size(), x.stride())
    plain = plain.conj() if x.is_conj() else plain
    return torch._neg_view(plain) if x.is_neg() else plain


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operator does, if it may, and on which device."""
    if func is torch.ops.prim.device.default:
        return _INSIDE
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_gpu = any(isinstance(x, _OnGpu) for x in given)
    if on_gpu and torch.Tag.inplace_view in func.tags:
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)
        return args[0]
    if on_gpu and func not in _TRANSFERS:
        _demand_one_device(func, args, given)
    if on_gpu and _OnGpu.kind == "mps" and func is _aten.linalg_qr.default:
        _refused.error(NotImplementedError, f"{func} is not implemented on all MPS devices")
    if func is _aten.copy_.default:
        on_gpu = isinstance(args[0], _OnGpu)
    if (device := kwargs.get("device")) is not None:
        on_gpu = device == _INSIDE
        kwargs = kwargs | {"device": torch.device("cpu")} if on_gpu else kwargs
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    plain = tree_map(_on_host, (args, kwargs))
    result = func(*plain[0], **plain[1])
    whose = dict(zip(map(id, tree_leaves(plain)), tree_leaves((args, kwargs)), strict=True))

    def back(x: Any) -> Any:
        if not isinstance(x, Tensor) or id(x) in whose:
            return whose.get(id(x), x)
        if _OnGpu.kind == "mps" and x.dtype in (torch.float64, torch.complex128) and on_mps:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")  # and more
        return _OnGpu(x) if on_gpu else x

    # MPS converts to float64 on the way to the host neither.
    on_mps = on_gpu or (func in _TRANSFERS and any(isinstance(x, _OnGpu) for x in given))
    return tree_map(back, result)


def _demand_one_device(func: Any, args: Any, given: list[Tensor]) -> None:
    """As PyTorch does: indices, and single numbers, may lie on the CPU."""
    indices = tree_leaves(args[1]) if func in _INDEXING and isinstance(args[0], _OnGpu) else []
    for x in given:
        elsewhere = not isinstance(x, _OnGpu) and x.device.type == "cpu"
        if elsewhere and x.dim() and not any(x is index for index in indices):
            of = f"{func} of {[tuple(x.shape) for x in given]}"
            _refused.error(RuntimeError, f"Expected all tensors to be on the same device: {of}")


class _Operators(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What asks for the device by its name, or takes a tensor's numbers without any operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {n: _inside(v) if n == "device" else v for n, v in (kwargs or {}).items()}
        first = args[0] if args else None
        if func is Tensor.to:
            args = tuple(map(_inside, args))
        elif func is Tensor.tolist:
            return func(_on_host(first))
        elif func is Tensor.numpy and isinstance(first, _OnGpu):
            _refused.error(TypeError, f"can't convert {first.device} device type tensor to numpy")
        elif func is Tensor.new_tensor and isinstance(first, _OnGpu):
            return torch.tensor(*args[1:], **{"dtype": first.dtype} | kwargs).to(_INSIDE)
        elif func in (torch.tensor, torch.as_tensor) and kwargs.pop("device", None) == _INSIDE:
            return func(*args, **kwargs).to(_INSIDE)
        return func(*args, **kwargs)


def _inside(value: Any) -> Any:
    named = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == _OnGpu.kind
    return _INSIDE if named else value


class _Stream:
    def __init__(self, device: object = None) -> None: ...

    def synchronize(self) -> None: ...


_CUDA: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "mem_get_info": lambda device=None: (MEMORY, MEMORY),
    "get_device_properties": lambda device: SimpleNamespace(total_memory=MEMORY),
    "synchronize": lambda device=None: None,
    "Stream": _Stream,
    "current_stream": _Stream,
    "stream": lambda stream: nullcontext(),
    "get_rng_state": lambda device=None: torch.zeros(1, dtype=torch.uint8),
    "set_rng_state": lambda state, device=None: None,
}


@contextmanager
def pretended_gpu(kind: str = "cuda", strict: bool = True) -> Iterator[None]:
    """Inside there is a device of a kind, cuda or mps, which refuses what such a device would.

    An operator that is given a tensor on the CPU beside one on the device is an error, if `strict` even if that was
    caught.
    """
    caches, parameters = (chunk_sizes._of_gpu, definitions.gpus), torch.__future__
    _refused.clear()
    for cache in caches:
        cache.cache_clear()
    with ExitStack() as stack:
        stack.callback(lambda: [cache.cache_clear() for cache in caches])
        stack.enter_context(mock.patch.object(_OnGpu, "kind", kind))
        if kind == "cuda":
            stack.enter_context(mock.patch.multiple(torch.cuda, **_CUDA))
        else:
            stack.enter_context(mock.patch("torch.backends.mps.is_available", return_value=True))
            rng = {name: _CUDA[name] for name in ("get_rng_state", "set_rng_state")}
            stack.enter_context(mock.patch.multiple(torch.mps, **rng))
        overwriting = parameters.get_overwrite_module_params_on_conversion()
        stack.callback(parameters.set_overwrite_module_params_on_conversion, overwriting)
        parameters.set_overwrite_module_params_on_conversion(True)
        # Else the engine looks for the device's own thread.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(_Operators())
        stack.enter_context(_Functions())
        yield
    assert not (strict and _refused), _refused
