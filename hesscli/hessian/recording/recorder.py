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
from hesscli.hessian.aten.watcher import BLANK, Watcher, detaching, each
from hesscli.hessian.guests import is_missing_derivative
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.loss import Loss
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.recording.draft import Draft
from hesscli.hessian.recording.tape import Call, Ref, Tape
from hesscli.hessian.recording.tensors import Known, Tensors
from hesscli.hessian.recording.writes import put_back, without_writing

_RANDOM_SLOPE = torch.ops.aten.rrelu_with_noise.default
_DETACH = torch.ops.aten.detach.default
_CONVOLUTION_OF_TRACES = torch.ops.aten._convolution.default


def record(problem: Problem, batch: Batch) -> Tape:
    """The tape of one forward pass.

    Raises:
        NotApplicable: the output is made of nothing that the pass computes.
    """
    return _recorded(lambda: problem.output(batch), batch.inputs, problem.parameters)


def record_terms(loss: Loss, output: Tensor, batch: Batch) -> Tape:
    """The tape of the terms that a loss makes of the model's output, its only input, or of their sum.

    Raises:
        NotApplicable: they are made of nothing that the loss computes.
    """
    output = output.detach()

    def terms() -> Tensor:
        own = loss.function is not None
        found = loss.terms(output, batch) if own else loss.total(output, batch)[0]
        return found.view_as(found)  # recorded, also where it is the output itself

    return _recorded(terms, (output,))


def _recorded(
    function: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    parameters: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tape:
    recorder = _Recorder()
    try:
        with exact_derivatives(on_tape=True), _unfused(), detaching(recorder.detached), recorder:
            output = function()
    except RuntimeError as error:
        if not is_missing_derivative(error):
            raise
        raise NotApplicable(str(error).splitlines()[0]) from error
    tensors = recorder.tensors
    if output not in tensors:
        raise NotApplicable("the output does not depend on the data")
    met = [tensors[x].first for x in inputs if x in tensors]
    return recorder.draft.tape(recorder.ref(output).value, met, parameters)


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
    """Puts every operator that is called on a draft, by what it reads and makes.

    An operator that writes in place is recorded as its functional twin, and what it wrote to through a view is put
    together anew. Other tensors that share the memory are then stale: views are taken again when they are read, and
    anything else would show a change that the twin does not make.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draft = Draft()
        self.tensors = Tensors()

    def detached(self, result: Tensor, in_place: bool) -> Tensor:
        if in_place:
            self.draft.refuse("the model detaches in place")
        return result

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is _RANDOM_SLOPE and not (asked := Call(func, args, kwargs)).named("training"):
            slope = (asked.named("lower") + asked.named("upper")) / 2
            func, args, kwargs = torch.ops.aten.leaky_relu.default, (args[0], slope), {}
        self._look_around()
        off = not torch.is_grad_enabled()
        constant = off and any(x.requires_grad for x in each(args, Tensor))
        call = Call(func, self._read(args), {n: self._read(value) for n, value in kwargs.items()})
        written = _written(func, args)
        for target in each(written, Tensor):
            self._keep_given(target)
        before = None
        if constant and written and all(_has_history(x) for x in written):
            before = self.ref(written[0])
        result = func(*args, **kwargs)
        if func.overloadpacket.__name__ in BLANK:  # TorchScript fills these where nothing sees it
            self._give(result)
            return result
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.draft.refuse(f"{call.name} draws random numbers")
        if written is not None:
            call = self._without_writing(call, args, written)
            if constant:
                call = self._keep_derivative(call, before, result)
        if call.operator is _CONVOLUTION_OF_TRACES:  # its further arguments are cuDNN's business
            call = Call(torch.ops.aten.convolution.default, call.arguments[:9], call.keywords)
        if _is_converted(result, args):
            self.draft.refuse(
                f"{func.overloadpacket.__name__} goes on in another dtype than float32"
            )
        parts = result if isinstance(result, (tuple, list)) else (result,)
        outputs = [
            self._make(part, func, args) if isinstance(part, Tensor) else None for part in parts
        ]
        call = Call(call.operator, call.arguments, call.keywords, tuple(outputs))
        self.draft.calls.append(call)
        if written is not None:
            self._put_back(result)
        elif _is_view(func, args, result) and not constant:
            self.tensors[result].taken = args[0], call
        for part in each(result, Tensor):
            known = self.tensors[part]
            known.off = off and before is None
            known.history = None if before is None else part.grad_fn
        return result

    def _look_around(self) -> None:
        """Whether the model is doing what a replay would not."""
        if torch._C._current_graph_task_id() != -1:
            # What autograd saved of the pass looks like what the model detaches.
            self.draft.refuse("the model differentiates itself")
        self.draft.default = torch.get_default_dtype()

    def _keep_given(self, target: Tensor) -> None:
        """Copies what no call makes before it is written to: a replay begins with what was there."""
        for tensor in self.tensors[target].memory.tensors:
            number = self.tensors[tensor].first
            if self.draft.given.get(number) is tensor:
                self.draft.given[number] = tensor.detach().clone()

    def _without_writing(self, call: Call, args: tuple[Any, ...], written: Sequence[Any]) -> Call:
        """The call that gives what this one writes in place."""
        if len(written) != 1 or not isinstance(written[0], Tensor):
            self.draft.refuse(f"{call.operator._schema.name} writes into its arguments")
            return call
        if self.tensors.write(written[0]) and torch.Tag.inplace_view in call.operator.tags:
            self.draft.refuse(f"{call.name} changes what a view is of")
        return without_writing(self.draft, call, args)

    def _keep_derivative(self, call: Call, before: Ref | None, result: Any) -> Call:
        """The call that gives y, written over x where gradients are off: its derivative stays that of x.

        That is x + (y - x), the difference being a constant.
        """
        if before is None:
            self.draft.refuse("the model writes where it turns gradients off")
            return call
        made = partial(self.draft.made, result, shape=result.shape)
        written = made(call.operator, call.arguments, keywords=call.keywords)
        detached = made(_DETACH, (before,))
        change = made(torch.ops.aten.sub.Tensor, (written, detached))
        return Call(torch.ops.aten.add.Tensor, (before, change), {})

    def _put_back(self, part: Any) -> None:
        """What was written to through a view, as far as it is known what the view is of."""
        while isinstance(part, Tensor) and (taken := self.tensors[part].taken):
            whole, view = taken
            was, now = Ref(self.tensors[whole].now), Ref(self.tensors[part].now)
            made = put_back(self.draft, view, whole, was, now)
            if made is None:
                return
            self.tensors.set(whole, made.value)
            part = whole

    def _read(self, value: Any) -> Any:
        """An argument of a call, with a `Ref` for each tensor.

        Where gradients are off, it is a detached one: in a replay they are on.
        """
        if isinstance(value, Tensor):
            ref, off = self.ref(value), value.requires_grad and not torch.is_grad_enabled()
            return self.draft.made(value, _DETACH, (ref,), value.shape) if off else ref
        return tuple(map(self._read, value)) if isinstance(value, (tuple, list)) else value

    def ref(self, tensor: Tensor) -> Ref:
        """What a tensor is now."""
        if tensor not in self.tensors:
            self._give(tensor)
        known = self.tensors[tensor]
        # A Function computes where gradients are off, and gives its result one after that.
        given = known.now in self.draft.given or known.history not in (None, tensor.grad_fn)
        if tensor.grad_fn is not None and (known.off or given):
            self.draft.refuse("the model applies a Function of its own")
        if known.is_stale:
            self._take_again(known)
        return Ref(known.now)

    def _take_again(self, view: Known) -> None:
        """A view of what has been written to since it was taken."""
        if view.taken is None:
            self.draft.refuse("the model reads through a view what it wrote in place")
            return
        whole, call = view.taken
        arguments, outputs = (self.ref(whole), *call.arguments[1:]), (self._make(view.tensor),)
        self.draft.calls.append(Call(call.operator, arguments, call.keywords, outputs))

    def _give(self, tensor: Tensor) -> None:
        """A tensor that no call makes."""
        self.draft.given[self._make(tensor)] = tensor

    def _make(self, tensor: Tensor, func: Any = None, args: tuple[Any, ...] = ()) -> int:
        """The number of what a tensor is from here on: given, or made by `func(*args)`."""
        number = self.draft.value(tensor)
        self.tensors.set(tensor, number, func, args)
        return number


def _written(func: Any, args: tuple[Any, ...]) -> list[Any] | None:
    """The arguments that an operator writes to, as far as they are given by their place; None if it writes to none."""
    writes = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
    return list(itertools.compress(args, writes)) if any(writes) else None


def _has_history(written: object) -> bool:
    """Whether what is written to is a tensor that is computed with a gradient, no weight."""
    return isinstance(written, Tensor) and written.grad_fn is not None


def _is_view(func: Any, args: tuple[Any, ...], result: Any) -> bool:
    alone = isinstance(result, Tensor) and result is not args[0]
    return alone and func._schema.returns[0].alias_info is not None


def _is_converted(result: Any, args: tuple[Any, ...]) -> bool:
    """Whether what is made of float32 with a gradient is in float64, or in half precision."""
    real = (part for part in each(result, Tensor) if part.is_floating_point())
    converted = any(part.dtype is not torch.float32 for part in real)
    return converted and any(
        x.requires_grad and x.dtype is torch.float32 for x in each(args, Tensor)
    )
