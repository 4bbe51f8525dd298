"""Records a forward pass of a model, or the terms of a loss, on a tape."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.aten.definitions import exact_derivatives
from hesscli.hessian.aten.detaching import Detaching
from hesscli.hessian.aten.precision import WIDE
from hesscli.hessian.aten.watcher import BLANK, Watcher
from hesscli.hessian.guests import is_missing_derivative
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.recording.aliases import Aliases
from hesscli.hessian.recording.tape import Call, Ref, Tape, each
from hesscli.hessian.recording.writes import fills_a_mask, functional, put_back

_TELLING = frozenset(
    "_local_scalar_dense equal allclose is_nonzero nonzero masked_select "
    "_unique2 unique_dim unique_consecutive".split()
)
_CONVOLUTION_OF_TRACES = torch.ops.aten._convolution.default


def record(problem: Problem, batch: Batch) -> Tape:
    """The tape of one forward pass.

    Raises:
        NotApplicable: the output is made of nothing that the pass computes.
    """
    return _recorded(lambda: problem.output(batch), batch.inputs, problem.parameters)


def record_terms(problem: Problem, batch: Batch) -> Tape:
    """The tape of the terms that a loss of the user's own makes of the model's output, its only input.

    Raises:
        NotApplicable: they are made of nothing that the loss computes.
    """
    with torch.no_grad():
        output = problem.output(batch)
    return _recorded(lambda: problem.loss.terms(output, batch), (output,))


def _recorded(
    function: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    parameters: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tape:
    recorder = _Recorder()
    try:
        with exact_derivatives(), _unfused(), Detaching(recorder.detached), recorder:
            output = function()
    except RuntimeError as error:
        if not is_missing_derivative(error):
            raise
        raise NotApplicable(str(error).splitlines()[0]) from error
    if id(output) not in recorder.numbers:
        raise NotApplicable("the output does not depend on the data")
    number = recorder._referenced(output).value
    needed = {number}
    if recorder.refusal:  # what writes into another's memory is not seen to be needed
        needed.update(range(len(recorder.shapes)))
    calls = []
    for call in reversed(recorder.calls):
        outputs = tuple(n if n in needed else None for n in call.outputs)
        if any(n is not None for n in outputs):
            calls.append(Call(call.operator, call.arguments, call.keywords, outputs))
            needed.update(call.reads)
    given = {n: tensor for n, tensor in recorder.given.items() if n in needed}
    numbers = {id(tensor): n for n, tensor in given.items()}
    seen = [recorder.first[id(x)] for x in inputs if id(x) in recorder.first]
    return Tape(
        calls=tuple(reversed(calls)),
        given={n: tensor.detach() for n, tensor in given.items()},
        shapes={n: recorder.shapes[n] for n in needed},
        parameters={name: numbers[id(p)] for name, p in parameters.items() if id(p) in numbers},
        inputs=tuple(n for n in seen if n in needed),
        output=number,
        complex=frozenset(recorder.complex & needed),
        default=recorder.default,
        decided=_decided(recorder.calls, seen),
        refusal=recorder.refusal,
    )


def _decided(calls: Sequence[Call], inputs: Sequence[int]) -> bool:
    """Whether Python, or TorchScript, was told a number that depends on the inputs."""
    reached = set(inputs)
    for call in calls:
        if not reached.isdisjoint(call.reads):
            if call.name in _TELLING:
                return True
            reached.update(n for n in call.outputs if n is not None)
    return False


@contextmanager
def _unfused() -> Iterator[None]:
    """Recurrent layers as their steps, not as one kernel. What is replayed takes the fast kernels again."""
    flags = torch.backends.mkldnn.set_flags
    enabled, *_ = flags(_enabled=False, _fp32_precision=None)
    try:
        yield
    finally:
        flags(_enabled=enabled, _fp32_precision=None)


class _Recorder(Watcher):
    """Numbers every tensor that passes by.

    An operator that writes in place is recorded as its functional twin, and what it wrote to through a view is put
    together anew. Other tensors that share the memory are then stale: views are taken again when they are read, and
    anything else would show a change that the twin does not make.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.given: dict[int, Tensor] = {}
        self.shapes: list[torch.Size] = []
        self.complex: set[int] = set()
        self.numbers: dict[int, int] = {}  # of what a tensor, by identity, is now
        self.first: dict[int, int] = {}  # and of what it was at first
        self.aliases = Aliases()
        self.refusal = ""
        self.default = torch.get_default_dtype()

    def detached(self, result: Tensor, in_place: bool) -> Tensor:
        if in_place:
            self._refuse("the model detaches in place")
        return result

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled() and any(x.requires_grad for x in each(args, Tensor)):
            self._refuse("the model turns gradients off, or applies a Function of its own")
        if torch._C._current_graph_task_id() != -1:
            # What autograd saved of the pass looks like what the model detaches.
            self._refuse("the model differentiates itself")
        self.default = torch.get_default_dtype()
        arguments = self._referenced(args)
        keywords = {name: self._referenced(value) for name, value in kwargs.items()}
        writes = [
            a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments
        ]
        written = list(itertools.compress(args, writes))
        for target in each(written, Tensor):
            self._keep_given(target)
        result = func(*args, **kwargs)
        if func.overloadpacket.__name__ in BLANK:  # TorchScript fills these where nothing sees it
            self.given[self._number(result)] = result
            return result
        recorded = func
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._refuse(f"{func._schema.name.removeprefix('aten::')} draws random numbers")
        if any(writes):
            recorded, arguments = self._without_writing(func, args, arguments, written)
        if recorded is _CONVOLUTION_OF_TRACES:  # its further arguments are cuDNN's business
            recorded, arguments = torch.ops.aten.convolution.default, arguments[:9]
        if keywords.get("dtype") and isinstance(result, Tensor):
            keywords["dtype"] = result.dtype  # which may stay wider than the model says
        parts = result if isinstance(result, (tuple, list)) else (result,)
        if any(
            _converted(part, x) for part in parts for x in each(args, Tensor) if x.requires_grad
        ):
            self._refuse(f"{func.overloadpacket.__name__} goes on in another dtype than float32")
        if _widened(result, args, keywords):  # by memory that it made: a replay would not
            made = self._made(result, recorded, arguments, result.shape, keywords)
            recorded, arguments = torch.ops.aten._to_copy.default, (made,)
            keywords = {"dtype": result.dtype}
        outputs = tuple(
            self._number(part, func, args) if isinstance(part, Tensor) else None for part in parts
        )
        self.calls.append(Call(recorded, arguments, keywords, outputs))
        if any(writes):
            self._put_back(result)
        elif _is_view(func, args, result):
            self.aliases.keep_view(result, args[0], self.calls[-1])
        return result

    def _keep_given(self, target: Tensor) -> None:
        """Copies what no call makes before it is written to: a replay begins with what was there."""
        for tensor in self.aliases.sharing(target):
            number = self.first[id(tensor)]
            if self.given.get(number) is tensor:
                self.given[number] = tensor.detach().clone()

    def _refuse(self, reason: str) -> None:
        """Keeps the first reason. What is recorded still tells how much work a pass is."""
        self.refusal = self.refusal or reason

    def _without_writing(
        self, func: Any, args: tuple[Any, ...], arguments: tuple[Any, ...], written: list[Any]
    ) -> tuple[Any, tuple[Any, ...]]:
        """The operator that gives what this one writes in place, and its arguments."""
        twin = functional(func)
        if len(written) != 1 or not isinstance(written[0], Tensor):
            self._refuse(f"{func._schema.name} writes into its arguments")
            return func, arguments
        if self.aliases.write(written[0]) and torch.Tag.inplace_view in func.tags:
            self._refuse(f"{func._schema.name.removeprefix('aten::')} changes what a view is of")
        if func is torch.ops.aten.copy_.default:
            return self._copied(written[0], args[1], arguments[1])
        if fills_a_mask(func, args):
            return torch.ops.aten.masked_fill.Tensor, (arguments[0], *arguments[1], arguments[2])
        if twin is None:
            self._refuse(f"{func._schema.name.removeprefix('aten::')} writes in place")
        return twin or func, arguments

    def _copied(self, target: Tensor, source: Tensor, ref: Ref) -> tuple[Any, tuple[Any, ...]]:
        """A copy in another's shape, and of its dtype."""
        if source.dtype is not target.dtype:
            convert, dtype = torch.ops.aten._to_copy.default, {"dtype": target.dtype}
            ref = self._made(target, convert, (ref,), source.shape, dtype)
        return torch.ops.aten.expand.default, (ref, tuple(target.shape))

    def _put_back(self, part: Any) -> None:
        """What was written to through a view, as far as it is known what the view is of."""
        while viewed := self.aliases.view(part):
            whole, view = viewed
            was, now, shape = self._ref(whole), self._ref(part), whole.shape
            made = put_back(
                view, was, now, shape, partial(self._made, whole), partial(self._constant, whole)
            )
            if made is None:
                return
            self.calls.append(Call(*made, {}, (self._number(whole),)))
            part = whole

    def _made(
        self,
        like: Tensor,
        operator: Any,
        arguments: tuple[Any, ...],
        shape: Sequence[int],
        keywords: Mapping[str, Any] = MappingProxyType({}),
    ) -> Ref:
        """The result of an operator that the pass itself does not call; of another tensor's kind of numbers."""
        number = len(self.shapes)
        self.shapes.append(torch.Size(shape))
        if like.is_complex():
            self.complex.add(number)
        self.calls.append(Call(operator, arguments, keywords, (number,)))
        return Ref(number)

    def _constant(self, like: Tensor, numbers: list[int]) -> Ref:
        """A vector of numbers, on another tensor's device."""
        vector = torch.tensor(numbers, device=like.device)
        self.given[self._number(vector)] = vector
        return self._ref(vector)

    def _taken_again(self, view: Tensor) -> None:
        """A view of what has been written to since it was taken."""
        viewed = self.aliases.view(view)
        if viewed is None:
            self._refuse("the model reads through a view what it wrote in place")
            return
        whole, call = viewed
        arguments = (self._referenced(whole), *call.arguments[1:])
        self.calls.append(Call(call.operator, arguments, call.keywords, (self._number(view),)))

    def _number(self, tensor: Tensor, func: Any = None, args: tuple[Any, ...] = ()) -> int:
        """A new number, for what a tensor is from here on: given, or made by `func(*args)`."""
        if tensor.layout is not torch.strided:
            self._refuse("sparse tensors may mix samples")
        number = len(self.shapes)
        self.shapes.append(tensor.values().shape if tensor.layout is torch.jagged else tensor.shape)
        if tensor.is_complex():
            self.complex.add(number)
        self.numbers[id(tensor)] = number
        self.first.setdefault(id(tensor), number)
        self.aliases.keep(tensor, func, args)
        return number

    def _ref(self, tensor: Tensor) -> Ref:
        return Ref(self.numbers[id(tensor)])

    def _referenced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if self.aliases.is_stale(value):
                self._taken_again(value)
            if id(value) not in self.numbers:
                self.given[self._number(value)] = value
            return self._ref(value)
        if isinstance(value, (tuple, list)):
            return tuple(self._referenced(item) for item in value)
        return value


def _is_view(func: Any, args: tuple[Any, ...], result: Any) -> bool:
    alone = isinstance(result, Tensor) and result is not args[0]
    return alone and func._schema.returns[0].alias_info is not None


def _widened(made: Any, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> bool:
    """Whether what is made of narrower numbers alone is in float64, without being told to."""
    given = [x.dtype for x in each(args, Tensor) if x.is_floating_point() or x.is_complex()]
    wide = isinstance(made, Tensor) and made.dtype in WIDE
    return wide and bool(given) and set(WIDE).isdisjoint(given) and not keywords.get("dtype")


def _converted(made: Any, x: Tensor) -> bool:
    """Whether what is made of float32 is in float64, or in half precision."""
    real = isinstance(made, Tensor) and made.is_floating_point()
    return real and x.dtype is torch.float32 is not made.dtype
