"""From a module and its data to a Problem, its blocks and its routes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from cases import Case
from torch import Tensor, nn

from hesscli.hessian.batch_size import Passes
from hesscli.hessian.blocks import Block, partition
from hesscli.hessian.curvatures import CURVATURES
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.loss import Loss
from hesscli.hessian.objective.losses import ELEMENT_WEIGHTED
from hesscli.hessian.objective.measure import measure
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.planner import Planner
from hesscli.hessian.proofs.analysis import Analyses
from hesscli.hessian.routes.base import Diagonal, Route, Rows, fitting
from hesscli.hessian.routes.cuts import Cuts
from hesscli.hessian.symmetry import mirror_, symmetrise_

STRUCTURES = ("full", "module", "block_diagonal", "elements")
FAST = ("preactivation", "gauss-newton")


def problem_of(
    module: nn.Module,
    inputs: Sequence[Tensor],
    target: Tensor | None,
    loss: str = "mse",
    reduction: str = "mean",
    output_key: str | int | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float64,
    **arguments: Any,
) -> Problem:
    """The problem, as the command line would pose it."""

    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    module = module.to(dtype)
    inputs, target = tuple(map(cast, inputs)), cast(target)
    arguments = {key: cast(value) for key, value in arguments.items()}
    samples = len(inputs[0]) if inputs[0].dim() else 1
    size = batch_size or samples
    batches = []
    for start in range(0, samples, size):
        part = slice(start, start + size)
        mine = dict(arguments)
        weight = arguments.get("weight")
        if loss in ELEMENT_WEIGHTED and weight is not None and weight.dim() == target.dim():
            mine["weight"] = weight[part]
        batches.append(
            Batch(tuple(inputs), target, mine)
            if size == samples
            else Batch(
                tuple(x[part] for x in inputs), None if target is None else target[part], mine
            )
        )
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    key = None if output_key is None else str(output_key)
    posed = Problem(module, parameters, batches, Loss(loss, reduction), output_key=key)
    return measure(posed)[0]


def problem_of_case(
    case: Case, dtype: torch.dtype = torch.float64, batch_size: int | None = None
) -> Problem:
    target = case.target if case.loss != "output" else None
    return problem_of(
        case.make(), case.inputs, target, case.loss, output_key=case.output_key,
        batch_size=batch_size, dtype=dtype, **case.loss_arguments,
    )  # fmt: skip


def shapes_of(problem: Problem) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in problem.parameters.items()}


def routes_of(problem: Problem, chunk: int = 7, curvature: str = "hessian") -> dict[str, Route]:
    cuts = Cuts(Analyses(problem), Passes(chunk))
    routes = CURVATURES[curvature].routes(cuts, lambda: problem.double() or problem)
    return {route.name: route for route in routes}


def planner_of(problem: Problem) -> Planner:
    cuts = Cuts(Analyses(problem), Passes(64))
    return Planner(cuts, CURVATURES["hessian"].routes(cuts, lambda: problem))


def blocks_of(problem: Problem, structure: str) -> list[Block]:
    return partition(shapes_of(problem), structure)


def compute_blocks(
    route: Route, blocks: Sequence[Block], diagonal: bool = False
) -> dict[str, Tensor]:
    """The blocks by one route, over all batches, as the job puts them together."""
    like = next(iter(route.problem.parameters.values())).detach()
    if diagonal:
        diagonals = [Diagonal.of(block, like) for block in blocks]
        fitting(route, lambda: route.sum(diagonals))
        return {part.block.name: part.out for part in diagonals}
    rows = [Rows.of(block, like) for block in blocks]
    fitting(route, lambda: route.sum(rows))
    return {part.block.name: finished(route, part) for part in rows}


def finished(route: Route, rows: Rows) -> Tensor:
    if route.symmetric:
        mirror_(rows.out)
    if not route.symmetric:
        symmetrise_(rows.out)
    return route.layout(rows.block).ordered(rows.out)


def part_of(whole: Tensor, problem: Problem, block: Block, diagonal: bool = False) -> Tensor:
    """The rows and columns of a block in the whole matrix; or their diagonal."""
    offsets, total = {}, 0
    for name, p in problem.parameters.items():
        offsets[name], total = total, total + p.numel()
    assert whole.shape == (total, total)
    index = torch.cat(
        [
            torch.arange(offsets[name], offsets[name] + size)
            for name, size in zip(block.parameters, block.sizes, strict=True)
        ]
    )
    part = whole[index][:, index]
    return part.diagonal() if diagonal else part


def blocks_and_truth(
    problem: Problem, whole: Tensor, structure: str
) -> Iterator[tuple[Block, Tensor]]:
    for block in blocks_of(problem, structure):
        yield block, part_of(whole, problem, block, structure == "elements")


class Net(nn.Module):
    """A forward function and what it uses: tensors become parameters, modules stay modules."""

    def __init__(self, function: Callable[..., Tensor], **parts: Tensor | nn.Module):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_parameter(name, nn.Parameter(part))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)
