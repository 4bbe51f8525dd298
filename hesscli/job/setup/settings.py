"""What the job sets for the whole process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from threading import RLock
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch.autograd import Function
from torch.nn.utils import parametrize

from hesscli.hessian.aten.custom_functions import apply_in_python, set_apply
from hesscli.hessian.aten.dense_gradients import are_dense, make_dense
from hesscli.hessian.guests import may_compile
from hesscli.job.options import ProblemOptions
from hesscli.job.setup.devices import cuda_devices

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")

_BACKENDS: Any = torch.backends  # parts of which have no types
_CPU = [getattr(_BACKENDS.mkldnn, name) for name in ("matmul", "conv", "rnn")]
_PRECISIONS = [
    _BACKENDS,
    _BACKENDS.cuda.matmul,
    _BACKENDS.cudnn.conv,
    _BACKENDS.cudnn.rnn,
    *_CPU,
]
_ONE_AT_A_TIME = RLock()


def settle(options: ProblemOptions) -> None:
    """Sets the number of threads, the precision, how Functions are applied, and that all gradients are dense."""
    apply_in_python()
    make_dense()
    if options.threads:
        torch.set_num_threads(options.threads)
    _BACKENDS.fp32_precision = "none"
    # cuDNN's convolutions would use it by default, at three digits.
    _BACKENDS.cuda.matmul.allow_tf32 = options.tf32
    _BACKENDS.cudnn.allow_tf32 = options.tf32
    for each in _CPU:
        each.fp32_precision = "ieee"


def as_written(function: Callable[Arguments, Value]) -> Callable[Arguments, Value]:
    """The function, which `torch.compile` leaves as it is where it is called by one that is compiled.

    Its passes make the weights of parametrizations, of which `parametrize.cached` would give those of an earlier one.
    """

    @wraps(function)
    def alone(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Value:
        kept = parametrize._cache_enabled, parametrize._cache
        parametrize._cache_enabled, parametrize._cache = 0, {}
        try:
            return function(*args, **kwargs)
        finally:
            parametrize._cache_enabled, parametrize._cache = kept

    @wraps(function)
    def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Value:
        made = torch.compiler.disable(alone) if may_compile() else alone
        return made(*args, **kwargs)

    return called


@contextmanager
def settings_kept() -> Iterator[None]:
    """Puts back what `settle` sets, and lets one thread at a time do so.

    PyTorch has two ways to set the precision, and refuses to read by the old one what was set by the new one. It lets
    no flag be set after `torch.backends.disable_global_flags()`, which its own tests call, but in such a context.
    """
    with _ONE_AT_A_TIME, getattr(_BACKENDS, "__allow_nonbracketed_mutation", nullcontext)():
        threads = torch.get_num_threads()
        precisions = [each.fp32_precision for each in _PRECISIONS]
        matmul = _readable(torch.get_float32_matmul_precision)
        if matmul is None:  # as where a GPU's was set by itself afterwards
            matmul = "high" if _readable(lambda: _BACKENDS.cuda.matmul.allow_tf32) else "highest"
        cudnn = _readable(lambda: _BACKENDS.cudnn.allow_tf32)
        apply, dense = vars(Function)["apply"], are_dense()
        try:
            yield
        finally:
            set_apply(apply)
            make_dense(dense)
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(matmul)
            if cudnn is not None:
                _BACKENDS.cudnn.allow_tf32 = cudnn
            for each, precision in zip(_PRECISIONS, precisions, strict=True):
                each.fp32_precision = precision


def _readable(setting: Callable[[], Value]) -> Value | None:
    try:
        return setting()
    except RuntimeError:
        return None


@contextmanager
def random_kept() -> Iterator[None]:
    """Puts back the state of the random numbers: torch's, and those of Python and NumPy, which models may draw too."""
    pythons, numpys = random.getstate(), np.random.get_state()
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with torch.random.fork_rng(range(cuda_devices())):
            yield
    finally:
        if mps is not None:
            torch.mps.set_rng_state(mps)
        random.setstate(pythons)
        np.random.set_state(numpys)
