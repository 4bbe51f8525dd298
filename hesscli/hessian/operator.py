"""The curvature of a problem as something that multiplies vectors: no matrix is ever formed.

    hessian   H v = d/d theta <dL/d theta, v>                 by double backward
    ggn       G v = 1/D sum over batches of J^T (d^2 l / d f^2) J v
    fisher    F v = 1/D sum over samples of g_i <g_i, v>

f is the model's output, J = df / d theta, l the sum of the loss terms, D the denominator, and g_i the gradient of
sample i's own loss terms. The last two are J^T M J with an M that works at the output: the loss's own Hessian, or
delta_i delta_i^T per sample, delta = dl / df.

`Products` linearises each batch once, and keeps its graph as far as the memory given allows; what does not fit is made
again for every product. Kept graphs are multiplied side by side, each on a thread of its own. Measured on an MLP
256-512-256-10 with 2048 samples, a product then costs 1.4 gradients, as does a Pearlmutter pass written by hand, so
there is no second way.

Source: B. Pearlmutter, Fast exact multiplication by the Hessian, 1994; N. Schraudolph, Fast curvature matrix-vector
products for second-order gradient descent, 2002.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from hesscli.hessian.applicability import NotApplicable, explained
from hesscli.hessian.aten.definitions import exact_derivatives
from hesscli.hessian.autodiff import batched_grad, seeded_grad, unit_rows
from hesscli.hessian.chunk_sizes import chunk_sizes
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.objective.saved import saved_sizes
from hesscli.hessian.workers import in_order, workers
from hesscli.widest import widest

_GRAPHS = 3  # a kept graph holds about this many times what a forward pass saves
_TILE = 1 << 15  # columns of a product that are added to the sum at a time, in the cache

Linear = Callable[[Tensor], Tensor]  # [*output.shape] -> the same, or of k of them
Middle = Callable[[Problem, Batch, Tensor], Linear]  # u -> M u / D at a batch's output
Row = Sequence[Tensor]  # [P], or [k, P], parameter after parameter


class LinearMap:
    """A symmetric linear map v -> H v of vectors [P]: a problem's parameters, flattened one after the other."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.names = list(problem.parameters)
        self.leaves = list(problem.parameters.values())
        self.sizes = [leaf.numel() for leaf in self.leaves]
        self.size = sum(self.sizes)
        # Vectors multiplied so far; whoever begins something that counts them sets it to 0.
        self.count = 0

    def __call__(self, vectors: Tensor) -> Tensor:
        """H v [P] of a vector [P], or of each row of a block [k, P]."""
        raise NotImplementedError

    def matrix_rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop of the matrix, [stop - start, P]."""
        return self(unit_rows(self.leaves[0], start, stop - start, self.size))

    def by_parameter(self, vectors: Tensor) -> dict[str, Tensor]:
        """[..., P] by parameter, in the parameters' shapes."""
        parts = vectors.split(self.sizes, -1)
        return {
            name: part.reshape((*vectors.shape[:-1], *leaf.shape))
            for name, part, leaf in zip(self.names, parts, self.leaves, strict=True)
        }


class Products(LinearMap):
    """v -> H v by derivatives of the problem.

    Args:
        problem: what is differentiated.
        middle: M, where the matrix is J^T M J; None for the Hessian.
        memory: bytes that graphs may take.
        rows: how many vectors may share one pass; no more than the device gains from.

    Raises:
        NotApplicable: an operator lacks a derivative.
    """

    def __init__(
        self,
        problem: Problem,
        middle: Middle | None = None,
        memory: int = 0,
        rows: int | None = None,
    ) -> None:
        super().__init__(problem)
        usual = chunk_sizes(problem.device).vectors
        self.middle, self.rows = middle, max(1, min(rows or usual, usual))
        self.kept: dict[int, Callable[[Tensor], Row]] = {}
        self.keeps = self._that_fit(memory)

    def __call__(self, vectors: Tensor) -> Tensor:
        """See `LinearMap`; the sum over batches is taken in float64."""
        self.count += 1 if vectors.dim() == 1 else len(vectors)
        try:
            if vectors.dim() == 2 and len(vectors) > self.rows:
                return torch.cat([self._sum(part) for part in vectors.split(self.rows)])
            return self._sum(vectors)
        except NotApplicable:  # as its own cause, it would hold on to the failed pass
            raise
        except Exception as error:
            raise explained(error) from error

    def _sum(self, vectors: Tensor) -> Tensor:
        if len(self.problem.batches) == 1:
            return torch.cat(list(self._linear(0)(vectors)), -1).detach()
        total = torch.zeros(vectors.shape, dtype=widest(vectors.device), device=vectors.device)
        sums = total.split(self.sizes, -1)

        def add(row: Row) -> None:
            for mine, more in zip(sums, row, strict=True):
                for a, b in zip(mine.split(_TILE, -1), more.split(_TILE, -1), strict=True):
                    a += b

        linear = [self._linear(index) for index in range(self.keeps)]
        threads = workers(vectors.device, self.keeps)
        in_order(linear, threads, lambda multiply: multiply(vectors), add)
        for index in range(self.keeps, len(self.problem.batches)):
            add(self._linear(index)(vectors))
        return total.to(vectors.dtype)

    def _that_fit(self, memory: int) -> int:
        """How many of the batches, from the first on, keep their graphs."""
        batches = self.problem.batches
        if len(batches) == 1:
            return 1  # one is needed at a time anyway
        for count, batch in enumerate(batches):
            memory -= _GRAPHS * sum(saved_sizes(self.problem, batch, self.problem.value))
            if memory < 0:
                return count
        return len(batches)

    def _linear(self, index: int) -> Callable[[Tensor], Row]:
        if index in self.kept:
            return self.kept[index]
        batch = self.problem.batches[index]
        if self.middle is None:
            grads = gradient_graph(self.problem, batch, self.leaves)
            made = self._transposed(self._joined(grads))
        else:
            with exact_derivatives():
                made = self._output(batch, self.middle)
        if index < self.keeps:
            self.kept[index] = made
        return made

    def _output(self, batch: Batch, at_output: Middle) -> Callable[[Tensor], Row]:
        """v -> J^T M J v. J v is the derivative of J^T u, which is linear in u, along v."""
        output, zeros = self.problem.output(batch), partial(_zeros, self.sizes)
        if not output.requires_grad:
            return zeros
        u = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(output, self.leaves, u, create_graph=True, allow_unused=True)
        joined = self._joined(pulled)
        if not joined.requires_grad:
            return zeros
        forward = _pull(joined, [u])
        middle = at_output(self.problem, batch, output.detach())
        backward = self._transposed(output)

        def multiply(vectors: Tensor) -> Row:
            (along,) = forward(vectors)
            return zeros(vectors) if along is None else backward(middle(along))

        return multiply

    def _joined(self, grads: Sequence[Tensor | None]) -> Tensor:
        parts, start = [], 0
        for g, leaf in zip(grads, self.leaves, strict=True):
            if g is not None and g.requires_grad and (start % 2 or self.size % 2):
                # Its seed, or that of another row, begins at an odd place, where pairs are no complex numbers.
                g.register_hook(torch.clone)
            parts.append((torch.zeros_like(leaf) if g is None else g).reshape(-1))
            start += leaf.numel()
        return torch.cat(parts)

    def _transposed(self, value: Tensor) -> Callable[[Tensor], Row]:
        """seed [*value.shape] -> (d value / d theta)^T seed, and the same for each of k seeds."""
        dim, sizes = value.dim(), self.sizes  # without this object, which keeps what is made here
        pull = _pull(value, self.leaves) if value.requires_grad else None

        def multiply(seeds: Tensor) -> Row:
            batch = seeds.shape[: seeds.dim() - dim]
            found = [None] * len(sizes) if pull is None else pull(seeds)
            return [
                seeds.new_zeros(*batch, size) if part is None else part.reshape(*batch, size)
                for part, size in zip(found, sizes, strict=True)
            ]

        return multiply


def _zeros(sizes: list[int], vectors: Tensor) -> Row:
    return torch.zeros_like(vectors).split(sizes, -1)


def gradient_graph(
    problem: Problem, batch: Batch, leaves: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """A batch's share of dL/dtheta by these parameters, with its graph; None where L does not depend on one."""
    with exact_derivatives():
        value = problem.value(batch)
        if not value.requires_grad:
            return [None] * len(leaves)
        return torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)


def loss_hessian(problem: Problem, batch: Batch, output: Tensor) -> Linear:
    """u -> d^2 l / d f^2 u / D, the loss's own Hessian at a batch's output."""
    f = output.requires_grad_()
    total, _ = problem.loss.total(f, batch)
    (delta,) = torch.autograd.grad(
        total / problem.denominator, f, create_graph=True, materialize_grads=True
    )
    if not delta.requires_grad:
        return torch.zeros_like
    pull = _pull(delta, [f])

    def multiply(u: Tensor) -> Tensor:
        (part,) = pull(u)
        return torch.zeros_like(u) if part is None else part

    return multiply


def loss_gradient(problem: Problem, batch: Batch, output: Tensor) -> Tensor:
    """delta = dl / df at a batch's output, not divided by D."""
    f = output.requires_grad_()
    total, _ = problem.loss.total(f, batch)
    return torch.autograd.grad(total, f, materialize_grads=True)[0]


def gradient_outer(problem: Problem, batch: Batch, output: Tensor) -> Linear:
    """u -> delta_i <delta_i, u_i> / D of each sample i at a batch's output."""
    delta = loss_gradient(problem, batch, output)
    axes = list(range(-delta.dim(), 0))  # of one sample
    if not problem.one_sample:
        axes = axes[1:]

    def multiply(u: Tensor) -> Tensor:
        along = (u * delta).sum(axes, keepdim=True) if axes else u * delta  # of no axes, all
        return delta * along / problem.denominator

    return multiply


def _pull(value: Tensor, inputs: Sequence[Tensor]) -> Callable[[Tensor], tuple[Tensor | None, ...]]:
    """seeds -> the vector-Jacobian products of a value; one seed, or a block of them with an axis in front."""
    # Where its graph begins, not the value itself: P numbers for each batch.
    edge, dim = get_gradient_edge(value), value.dim()

    def multiply(seeds: Tensor) -> tuple[Tensor | None, ...]:
        grad = seeded_grad if seeds.dim() == dim else batched_grad
        return grad(edge, inputs, seeds)

    return multiply
