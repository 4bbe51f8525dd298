"""The function that is differentiated: parameters -> loss of a model over all batches of the data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from hesscli.errors import MismatchError, is_out_of_memory
from hesscli.hessian.aten.definitions import right_gradients
from hesscli.hessian.aten.precision import Narrowings, in_precision_, staying_wide
from hesscli.hessian.autodiff import graph_of
from hesscli.hessian.guests import explaining, guest
from hesscli.hessian.objective.batch import Batch, doubled
from hesscli.hessian.objective.copies import copied
from hesscli.hessian.objective.loss import Loss
from hesscli.hessian.objective.outputs import pick_output
from hesscli.hessian.objective.refusals import no_gradient, not_accepted
from hesscli.hessian.objective.state import state_kept
from hesscli.hessian.objective.weight_writes import weight_writes


@dataclass(frozen=True)
class Problem:
    """The loss L(theta) = sum over batches of loss(module(inputs), target) / denominator.

    The denominator is the number by which the mean over *all* data divides (1 for `reduction="sum"`), so values,
    gradients and Hessians of the batches simply add up.
    """

    # Called with a batch's inputs, the last ones by name where it names them; every floating tensor in it has the same
    # dtype as the data.
    module: nn.Module
    # The tensors to differentiate by, under their names, in `named_parameters` order.
    parameters: Mapping[str, Tensor]
    batches: Sequence[Batch]  # the data, on the module's device
    loss: Loss  # what is differentiated
    denominator: float = 1.0  # see above; `measure` finds it
    output_key: str | None = None  # which entry of a dict or tuple that is returned is the output
    # Dict, tuple or list, if the module takes all of its inputs, which are named, in one.
    container: type | None = None
    # The module writes into its inputs, so every pass has copies of them.
    writes_inputs: bool = False
    written: tuple[str, ...] = ()  # those of the parameters that it writes to
    protected: bool = False  # it cannot write to them: see `weight_writes.py`
    separable: bool = True  # each sample could go through on its own
    one_sample: bool = False  # the data is one sample, without a sample axis
    # Module or loss apply `torch.autograd.Function`s; `measure` finds it.
    functions: bool = False
    original: Problem | None = None  # the problem that this is a copy of, in float64

    runs_here: ClassVar[bool] = True  # whether this process makes all passes

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.parameters.values())).dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def output(self, batch: Batch, note: Callable[[str], None] | None = None) -> Tensor:
        """The module's output for a batch; `note` hears if it is one of several by its name alone.

        Raises:
            MismatchError: the model does not accept the data, or returns no tensor.
        """
        try:
            output = self._output(batch, note)
        except MismatchError as error:
            if torch.is_grad_enabled() or "does not require grad" not in error.message:
                raise
            with torch.enable_grad():  # for a model that differentiates by itself
                output = self._output(batch, note)
        return output if torch.is_grad_enabled() else output.detach()

    def _output(self, batch: Batch, note: Callable[[str], None] | None) -> Tensor:
        result = self.returned(batch)
        if self.loss.whole:
            return self.loss.called(result, batch)
        preferred = "logits" if self.loss.needs_target else "loss"
        return pick_output(result, self.output_key, preferred, note)

    def returned(self, batch: Batch) -> object:
        """All that the module returns for a batch.

        Raises:
            MismatchError: it does not accept the data.
        """
        # TorchScript's optimiser would put derivatives of its own into the graph that it caches.
        with (
            # The state is compared within it: a recording keeps the default dtype of the last operator that it sees.
            staying_wide() if self.loss.wide else nullcontext(),
            state_kept(self.module),
            torch.jit.optimized_execution(False),  # type: ignore[attr-defined]
            self._protecting() if self.protected else nullcontext(),
            guest(partial(not_accepted, batch)),
        ):
            inputs = [x.clone() for x in batch.inputs] if self.writes_inputs else batch.inputs
            place = len(inputs) - len(batch.keywords)
            named = dict(zip(batch.keywords, inputs[place:], strict=True))
            if self.container is not None:
                return self.module(self.container(named if self.container is dict else inputs))
            return self.module(*inputs[:place], **named)

    def _protecting(self) -> AbstractContextManager[object]:
        every = self.module.named_parameters(remove_duplicate=False)
        return weight_writes({n: p for n, p in every if n in self.written}, prevented=True)

    def value(self, batch: Batch) -> Tensor:
        """The batch's share of L(theta)."""
        total, _ = self.loss.total(self.output(batch), batch)
        return total / self.denominator

    def gradient(self, names: Sequence[str]) -> dict[str, Tensor]:
        """dL/dtheta of the named parameters, summed over batches; zero where L does not depend on one."""
        leaves = [self.parameters[name] for name in names]
        sums = [torch.zeros_like(leaf) for leaf in leaves]
        for batch in self.batches:
            with right_gradients():
                value = self.value(batch)
            if not value.requires_grad:
                continue
            with explaining(no_gradient, needed=True):
                grads = torch.autograd.grad(value, leaves, materialize_grads=True)
            for total, grad in zip(sums, grads, strict=True):
                total += grad
        return dict(zip(names, sums, strict=True))

    def flat_gradient(self, names: Sequence[str]) -> Tensor:
        """The same as one vector [n], parameter after parameter."""
        return torch.cat([grad.reshape(-1) for grad in self.gradient(names).values()])

    def moved_gradient(self, names: Sequence[str], direction: Tensor, step: float) -> Tensor:
        """The same at theta + step v; v [n] has the parameters' entries one after the other."""
        with parameters_moved([self.parameters[name] for name in names], direction, step):
            return self.flat_gradient(names)

    def gradient_norm(self) -> float:
        """|dL/dtheta| over all parameters of the module, also those that were not chosen."""
        with all_differentiated(self.module) as every:
            gradient = replace(self, parameters=every).gradient(list(every))
        return math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))

    def restricted(self, names: Iterable[str]) -> Problem:
        """The problem as a function of these parameters alone."""
        return replace(self, parameters={name: self.parameters[name] for name in names})

    def by_batch(self) -> Iterator[Problem]:
        """The problem in parts that add up to it."""
        for index, batch in enumerate(self.batches):
            original = self.original
            if original is not None:
                original = replace(original, batches=[original.batches[index]])
            yield replace(self, batches=[batch], original=original)

    def widened(self) -> tuple[Problem, Tensor]:
        """The problem in float64 throughout, where the module computes parts of it in float32, or cannot without.

        The least number of float64, which masks scores, is infinite in float32, and nothing times that is not a number.

        Returns:
            it, and its output for the first batch.

        Raises:
            MismatchError: it has constants in float32, which the parameters meet.
        """
        plain = None
        with suppress(MismatchError):  # float64 meets float32
            problem, output, narrowings = self._seen_narrowing(wide=False)
            if not (narrowings.found or narrowings.stuck or bool(output.isnan().any())):
                plain = problem, output
                if not narrowings.made:
                    return plain
        try:
            problem, output, narrowings = self._seen_narrowing(wide=True)
        except MismatchError:
            if plain is None:
                raise
            return plain
        if plain is not None and (narrowings.stuck or torch.equal(plain[1], output)):
            return plain  # zeros, masks: nothing was rounded
        if narrowings.stuck:
            raise MismatchError(
                f"the model computes in float32 ({narrowings.stuck}), whatever the dtype of its weights",
                "--dtype float32",
            )
        return problem, output

    def _seen_narrowing(self, wide: bool) -> tuple[Problem, Tensor, Narrowings]:
        """The problem computed so, its output for the first batch, and what that goes through in float32."""
        problem = replace(self, loss=replace(self.loss, wide=wide))
        batch = problem.batches[0]
        with torch.enable_grad(), Narrowings() as narrowings:
            output = problem.output(batch)
            if problem.loss.function is not None:
                problem.loss.terms(output, batch)
        return problem, output.detach(), narrowings

    def depends_on(self, parameters: Iterable[Tensor]) -> bool:
        """Whether the output, or a loss of the user's own, is computed with any of these, be they the module's or found
        by a global name.

        It is, where its graph begins at one of them.
        """
        wanted, batch = {id(parameter) for parameter in parameters}, self.batches[0]
        with torch.enable_grad():
            output = self.output(batch)
            if self.loss.function is not None:
                output = self.loss.terms(output, batch)
        return any(id(getattr(node, "variable", None)) in wanted for node in graph_of(output))

    def double(self) -> Problem | None:
        """A copy in float64, or None where module or loss cannot run in it (a dtype baked into a trace, say)."""
        try:
            # Leaves no graph in attributes that hooks compute, which could not be copied.
            with torch.no_grad():
                mine = self.output(self.batches[0])
                copy = self._copy_in_float64()
            copy, its = copy.widened()
            if copy.depends_on(self.parameters.values()):  # which would not move with the copy's
                return None
            with torch.no_grad():  # a loss of the user's own may hold constants in float32
                copy.loss.total(its, copy.batches[0])
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None  # TorchScript and exported graphs fail in many ways; each means "not in float64"
        tolerance = 1e-2 if self.dtype == torch.float32 else 1e-8
        least = tolerance * float(mine.abs().max().clamp(min=1e-30))
        same = its.dtype == torch.float64 and torch.allclose(mine.double(), its, tolerance, least)
        return copy if same else None

    def _copy_in_float64(self) -> Problem:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is deprecated inside exported graphs
            module = copied(self.module)  # TorchScript would record it
            module = in_precision_(module, torch.float64)
        named = dict(module.named_parameters(remove_duplicate=False))
        return replace(
            self,
            module=module,
            parameters={name: named[name].requires_grad_() for name in self.parameters},
            batches=doubled(self.batches),
            loss=self.loss.doubled(),
            original=None if self.dtype == torch.float64 else self,
        )


@contextmanager
def all_differentiated(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, all parameters of the module, which are given, require gradients, also those that were not chosen."""
    every: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if p.is_floating_point()}
    constant = [p for p in every.values() if not p.requires_grad]
    for parameter in constant:
        parameter.requires_grad_(True)
    try:
        yield every
    finally:
        for parameter in constant:
            parameter.requires_grad_(False)


@contextmanager
def parameters_at(leaves: Sequence[Tensor], values: Iterable[Tensor]) -> Iterator[None]:
    """Inside, the leaves have these values, in memory of their own: what shares theirs is a constant, and stays."""
    before = [leaf.data for leaf in leaves]
    try:
        for leaf, value in zip(leaves, values, strict=True):
            leaf.data = value.view_as(leaf)
        yield
    finally:
        for leaf, value in zip(leaves, before, strict=True):
            leaf.data = value


def parameters_moved(
    leaves: Sequence[Tensor], direction: Tensor, step: float
) -> AbstractContextManager[None]:
    """Inside, the leaves are at theta + step v; v [n] has the leaves' entries one after the other."""
    parts = direction.split([leaf.numel() for leaf in leaves])
    pairs = zip(leaves, parts, strict=True)
    moved = [leaf.detach().add(part.view_as(leaf), alpha=step) for leaf, part in pairs]
    return parameters_at(leaves, moved)
