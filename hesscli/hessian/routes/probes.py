"""A recorded pass with a zero probe at the output of each affine use, to differentiate by.

With the probe eps_l added to z_l, `delta_l = dPhi / d eps_l` where

    Phi = L + sum over l of <w_l, a_l>,      eps = 0, w = 0,

and one more derivative of delta_k along a direction u of z_k gives both d delta_l / d z_k u (by eps_l: the mixed
derivative is symmetric) and d a_l / d z_k u (by w_l) in one reverse pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from hesscli.hessian.aten.definitions import exact_derivatives
from hesscli.hessian.autodiff import batched_grad, unit_rows
from hesscli.hessian.chunk_sizes import chunk_sizes, ranges
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.operator import Linear, loss_hessian
from hesscli.hessian.proofs.analysis import Analyses
from hesscli.hessian.proofs.channels import Channels
from hesscli.hessian.proofs.uses import Use
from hesscli.hessian.routes.costs import numbers_along
from hesscli.hessian.routes.output_hessian import OutputHessian


@dataclass(frozen=True)
class Cut:
    """The loss behind a value that everything passes through, to second order, for each sample."""

    value: int  # its number
    gradient: Tensor  # dL/dc, of its shape
    curvature: Tensor  # d^2 L / dc^2, [B, N, N]


class Probed:
    """A batch's pass, replayed with probes. Where it is linearised, the model's tangent stands in its place, and the
    Hessian is the generalised Gauss-Newton matrix.

    Args:
        analyses: of the batches.
        batch: one of them.
        zs: the values that get a probe.
        leaves: parameters to keep as variables.
        activations: the values that get a dual.
        cut: where the pass ends, if not at the output.
        linearised: whether second derivatives of the model are left out.
    """

    # dPhi / dz at each probe, with its graph, once it is `differentiated`.
    deltas: dict[int, Tensor]

    def __init__(
        self,
        analyses: Analyses,
        batch: Batch,
        zs: Iterable[int],
        leaves: Sequence[str] = (),
        activations: Iterable[int] = (),
        cut: Cut | None = None,
        linearised: bool = False,
    ) -> None:
        self.analysis = analysis = analyses.of(batch)
        self.problem, self.batch = replace(analyses.problem, loss=analysis.loss), batch
        tape = analysis.tape
        self.probes: dict[int, Tensor] = {}
        wanted = set(zs)

        def probed(number: int, value: Tensor) -> Tensor:
            if number not in wanted:
                return value
            self.probes[number] = torch.zeros_like(value).requires_grad_()
            return value + self.probes[number]

        parameters, numbers = self.problem.parameters, tape.parameters
        self.leaves = {name: parameters[name].detach().requires_grad_() for name in leaves}
        given = {numbers[name]: leaf for name, leaf in self.leaves.items() if name in numbers}
        self.cut = cut
        end = tape.output if cut is None else cut.value
        self._tape, self._end = tape, end
        self.known = tape.replay(given, probed, tape.until(end))
        self.output = self.known[end]
        if not self.output.requires_grad:  # a constant follows: there are derivatives, of zero
            varied = (*self.probes.values(), *self.leaves.values())
            nothing = sum(each.flatten()[:0].abs().sum() for each in varied)
            self.output = self.output + nothing
        self.samples = tape.shapes[tape.output][0]
        self.linearised, self.weight = linearised, None
        if cut is not None:
            self.weight = cut.gradient.clone().requires_grad_()
        elif linearised:  # what the model's derivative is multiplied by, and is linear in
            self.weight = torch.ones_like(self.output).requires_grad_()
        self.duals = {a: torch.zeros_like(self.known[a]).requires_grad_() for a in activations}

    @cached_property
    def value(self) -> Tensor:
        """The loss; at a cut, what has the same derivative by everything before it."""
        if self.weight is not None:
            return (self.weight * self.output).sum()
        with exact_derivatives():
            total, _ = self.problem.loss.total(self.output, self.batch)
        return total / self.problem.denominator

    @cached_property
    def phi(self) -> Tensor:
        """Phi: the loss, and <w_l, a_l> of each dual."""
        return self.value + sum((self.known[a] * w).sum() for a, w in self.duals.items())

    def differentiated(self) -> Probed:
        """This pass, with its `deltas`."""
        found = self.derivatives(list(self.probes.values()))
        self.deltas = dict(zip(self.probes, found, strict=True))
        return self

    def derivatives(self, variables: Sequence[Tensor]) -> list[Tensor]:
        """dPhi by probes and leaves, with its graph; zeros without one where Phi does not depend on one."""
        found = torch.autograd.grad(self.phi, variables, create_graph=True, allow_unused=True)
        pairs = zip(variables, found, strict=True)
        return [torch.zeros_like(x) if gradient is None else gradient for x, gradient in pairs]

    def gradients(self, values: Sequence[int]) -> dict[int, Tensor | None]:
        """dL/dy at some values with probes; None where L does not depend on one."""
        if not values or not self.value.requires_grad:
            return dict.fromkeys(values)
        probes = [self.probes[y] for y in values]
        grads = torch.autograd.grad(self.value, probes, retain_graph=True, allow_unused=True)
        return dict(zip(values, grads, strict=True))

    def along(
        self, delta: Tensor, inputs: Sequence[Tensor], seeds: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The derivatives of the gradients by inputs, probes and duals, along directions of z [directions, *z.shape];
        delta is dPhi/dz, with its graph.
        """
        if self.weight is None:
            return batched_grad(delta, inputs, seeds)
        bending = [] if self.linearised else inputs
        moved, *found = batched_grad(delta, [self.weight, *bending], seeds)
        bent = found or [None] * len(inputs)
        if moved is None:
            return tuple(bent)
        back = batched_grad(self.output, inputs, self._turned(moved))
        return tuple(
            b if f is None else f if b is None else f + b for f, b in zip(bent, back, strict=True)
        )

    def _turned(self, moved: Tensor) -> Tensor:
        """How far the end moves along directions, times the curvature there."""
        if self.cut is None:
            return self._multiply(moved)
        by_sample = moved.reshape(len(moved), self.samples, -1).transpose(0, 1)
        return (by_sample @ self.cut.curvature).transpose(0, 1).reshape(moved.shape)

    @cached_property
    def _multiply(self) -> Linear:
        """u -> the loss's own Hessian at the output times u."""
        with torch.enable_grad(), exact_derivatives():
            return loss_hessian(self.problem, self.batch, self.output.detach())

    def numbers(self, z: int, inputs: int) -> int:
        """How many a direction of z makes; see `numbers_along`."""
        return numbers_along(self._tape, z, inputs, self._end)

    def inputs(self, use: Use) -> Tensor:
        """The inputs of a use's affine map, [B, T, groups m], without their graph."""
        with torch.no_grad():
            return use.inputs(self.known).detach()

    def output_hessian(self, channels: Channels) -> OutputHessian:
        """The loss's own Hessian at each site of the output: in general, a column for each number of a site."""
        f, rank = self.output.detach(), self.analysis.loss_rank(channels)
        if rank and (softmaxes := self.analysis.softmaxes(channels)) is not None:
            return self._behind_softmaxes(f, channels, softmaxes)
        if not rank:
            return OutputHessian.elementwise(channels.by_site(self._multiply(torch.ones_like(f))))
        count = f.numel() // channels.n
        by_site = f.new_empty(count, channels.n, channels.n)
        for some in ranges(channels.n, chunk_sizes(f.device).output // max(1, f.numel())):
            seeds = (
                unit_rows(f, some.start, len(some), channels.n).unsqueeze(1).expand(-1, count, -1)
            )
            columns = channels.by_site(self._multiply(channels.spread(seeds, f.shape))).view_as(
                seeds
            )
            by_site[:, some.start : some.stop] = columns.transpose(0, 1)
        return OutputHessian(None, by_site)

    def _behind_softmaxes(
        self, f: Tensor, channels: Channels, softmaxes: Mapping[int, Channels]
    ) -> OutputHessian:
        """That of a loss which is linear in these values of its tape, log softmax(s f + c)."""
        terms, parts = self.analysis.terms, []
        known = terms.replay({terms.inputs[0]: f.requires_grad_()})
        total, _ = self.problem.loss.total_of(known[terms.output], self.batch)
        mean = total / self.problem.denominator
        # The gradient of log softmax is what comes in where that sums up to zero over the classes.
        unit = f.new_ones(f.numel() // channels.n, channels.n)
        unit[:, 0] = 1 - channels.n
        grad = partial(torch.autograd.grad, retain_graph=True, materialize_grads=True)
        for value, classes in softmaxes.items():
            log_p = known[value]
            weighted = (classes.spread(unit, log_p.shape) * log_p).sum()
            (g,), (s,) = grad(mean, log_p), grad(weighted, f)
            w = -classes.by_site(g).sum(1, keepdim=True)
            log_p = classes.by_site(log_p.detach())
            parts.append(OutputHessian.softmax(log_p, w, channels.by_site(s) / unit))
        return OutputHessian.sum(parts)

    def output_seeds(self) -> Tensor:
        """The unit vectors of the output, the same in every sample: [C, *output.shape]."""
        return self.unit_seeds(self.output, range(self.output.numel() // self.samples))

    def unit_seeds(self, like: Tensor, entries: range) -> Tensor:
        """Some unit vectors of a value [B, ...], the same in every sample: [entries, *like.shape]."""
        size = like.numel() // self.samples
        units = unit_rows(like, entries.start, len(entries), size).unsqueeze(1)
        return units.expand(-1, self.samples, -1).reshape(len(entries), *like.shape)


def passes(
    count: int,
    analyses: Analyses,
    batch: Batch,
    zs: Sequence[int],
    activations: Iterable[int] = (),
    cut: Cut | None = None,
    linearised: bool = False,
) -> list[Probed]:
    """So many passes that are differentiated again, one for each thread; see `Probed`."""
    every = [Probed(analyses, batch, zs, (), activations, cut, linearised) for _ in range(count)]
    return [probed.differentiated() for probed in every]
