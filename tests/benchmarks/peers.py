"""The competitors, one small function each.

Most make rows of a Hessian: given a problem and the names of a block's parameters, they return
`rows(start, stop)`. The worker asks for all of them, some at a time, so that a run which would
take too long can be cut short. BackPACK makes all the diagonals at once instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.benchmarks.models import Problem

Rows = Callable[[int, int], Tensor]
RowPeer = Callable[[Problem, Sequence[str]], Rows]


def parameters(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    every = dict(module.named_parameters())
    return {name: every[name] for name in names}


def units(like: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Rows start to stop of the identity."""
    rows = torch.zeros(stop - start, sum(p.numel() for p in like))
    rows[torch.arange(stop - start), torch.arange(start, stop)] = 1
    return rows


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cuts the last axis into parts of these shapes."""
    parts = vector.split([p.numel() for p in like], dim=-1)
    return [v.unflatten(-1, p.shape) for v, p in zip(parts, like, strict=True)]


def _loss_of(problem: Problem, names: Sequence[str]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The loss as a pure function of the named parameters, and their values."""
    values = {name: p.detach() for name, p in problem.module.named_parameters()}

    def loss(*chosen: Tensor) -> Tensor:
        given = values | dict(zip(names, chosen, strict=True))
        return problem.loss(functional_call(problem.module, given, problem.inputs), problem.target)

    return loss, [values[name] for name in names]


def vmap_jvp_grad(problem: Problem, names: Sequence[str]) -> Rows:
    """The honest baseline: Hessian-vector products forward over reverse, many at a time."""
    loss, point = _loss_of(problem, names)
    gradient = torch.func.grad(loss, argnums=tuple(range(len(names))))

    def product(vector: Tensor) -> Tensor:
        return flat(torch.func.jvp(gradient, tuple(point), tuple(split(vector, point)))[1])

    return lambda start, stop: torch.vmap(product)(units(point, start, stop))


def is_grads_batched(problem: Problem, names: Sequence[str]) -> Rows:
    """Double backward of one graph, many at a time."""
    chosen = list(parameters(problem.module, names).values())
    loss = problem.loss(problem.module(problem.inputs), problem.target)
    gradient = torch.autograd.grad(loss, chosen, create_graph=True)

    def rows(start: int, stop: int) -> Tensor:
        vectors = split(units(chosen, start, stop), chosen)
        products = torch.autograd.grad(
            gradient, chosen, vectors, retain_graph=True, is_grads_batched=True
        )
        return torch.cat([p.flatten(1) for p in products], 1)

    return rows


def func_hessian(problem: Problem, names: Sequence[str]) -> Rows:
    loss, point = _loss_of(problem, names)

    def all_rows(start: int, stop: int) -> Tensor:
        nested = torch.func.hessian(loss, argnums=tuple(range(len(names))))(*point)
        return torch.cat(
            [
                torch.cat([b.reshape(p.numel(), -1) for b in row], 1)
                for p, row in zip(point, nested, strict=True)
            ]
        )

    return all_rows


def curvlinops(problem: Problem, names: Sequence[str]) -> Rows:
    from curvlinops import HessianLinearOperator

    chosen = list(parameters(problem.module, names).values())
    data = [(problem.inputs, problem.target)]
    operator = HessianLinearOperator(problem.module, problem.loss, chosen, data)
    return lambda start, stop: (operator @ units(chosen, start, stop).T).T


def pyhessian(problem: Problem, names: Sequence[str]) -> Rows:
    """Its own product, in the loop that it uses; it knows no blocks."""
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    data = (problem.inputs, problem.target)
    computer = hessian(problem.module, problem.loss, data=data, cuda=problem.inputs.is_cuda)
    if len(computer.params) != len(names):
        raise ValueError("PyHessian takes all parameters")

    def rows(start: int, stop: int) -> Tensor:
        vectors = (split(unit, computer.params) for unit in units(computer.params, start, stop))
        return torch.stack(
            [flat(hessian_vector_product(computer.gradsH, computer.params, v)) for v in vectors]
        )

    return rows


def hessian_eigenthings(problem: Problem, names: Sequence[str]) -> Rows:
    from hessian_eigenthings import HessianOperator, match_names, supervised_loss

    chosen = list(parameters(problem.module, names).values())
    operator = HessianOperator(
        problem.module,
        [(problem.inputs, problem.target)],
        supervised_loss(problem.loss),
        param_filter=match_names(*names),
    )
    return lambda start, stop: torch.stack([operator @ unit for unit in units(chosen, start, stop)])


def backpack(problem: Problem) -> dict[str, Tensor]:
    from backpack import backpack, extend
    from backpack.extensions import DiagHessian

    module, loss = extend(problem.module), extend(problem.loss)
    with backpack(DiagHessian()):
        loss(module(problem.inputs), problem.target).backward()
    return {name: p.diag_h for name, p in module.named_parameters()}


ROW_PEERS: dict[str, RowPeer] = {
    "vmap-jvp-grad": vmap_jvp_grad,
    "is-grads-batched": is_grads_batched,
    "func-hessian": func_hessian,
    "curvlinops": curvlinops,
    "curvlinops-chunked": curvlinops,
    "pyhessian": pyhessian,
    "hessian-eigenthings": hessian_eigenthings,
}
DIAGONAL_PEERS = {"backpack": backpack}
