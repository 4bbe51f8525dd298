"""What the dry run counts: with rates that are given, not measured, so that every part is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import labels, normal
from problems import blocks_of, planner_of, problem_of
from torch import nn

from hesscli.hessian.differences.check import Certificate, gradients
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.routes.base import Choice, Route, seconds_of
from hesscli.hessian.routes.costs import Work
from hesscli.hessian.routes.rates import Rates
from hesscli.job.matrix import dry_run
from hesscli.job.matrix.dry_run import START, estimate

RATES = Rates(flops=1e9, memory=1e9, call=1e-3)
SECOND = Work(flops=1e9)
PROBLEM = problem_of(nn.Linear(2, 1), [normal(3, 2)], normal(3, 1))


def test_the_parts_add_up() -> None:
    choices = [Choice(Route(PROBLEM), "", SECOND.times(3))]
    found = estimate(choices, RATES, check=2.0, decomposed=[1000, 1000], size=2 * 10**9)
    assert found == pytest.approx(START + 3 + 2 + 0.4 + 2)


def test_what_blocks_share_counts_once_for_each_route() -> None:
    one, other = Route(PROBLEM), Route(PROBLEM)
    chain = [Choice(one, "chain", SECOND, common=SECOND.times(n)) for n in (5, 7, 2)]
    classes = [Choice(other, "", SECOND, common=SECOND.times(4))] * 2
    assert seconds_of(chain, RATES) == 3 + 7
    assert seconds_of([*chain, *classes], RATES) == 3 + 7 + 2 + 4
    assert seconds_of([], RATES) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", ["block_diagonal", "elements"])
def test_the_check_takes_as_many_gradients_as_are_counted(
    dtype: torch.dtype, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        [normal(6, 4)], labels(3, 6), "cross-entropy", dtype=dtype,
    )  # fmt: skip
    double = problem.double()
    assert double is not None
    blocks = blocks_of(problem, structure)
    truth = {
        name: torch.autograd.functional.hessian(
            lambda value, name=name: _loss(double, name, value), double.parameters[name].detach()
        ).reshape(double.parameters[name].numel(), -1)
        for name in double.parameters
    }
    certificate = Certificate(double, dtype, seed=0)
    taken = 0
    once = Problem.gradient

    def counted(self: Problem, names: list[str]) -> dict[str, torch.Tensor]:
        nonlocal taken
        taken += 1
        return once(self, names)

    monkeypatch.setattr(Problem, "gradient", counted)
    for block in blocks:
        values = truth[block.name].to(dtype)
        diagonal = structure == "elements"
        judge = certificate.diagonal if diagonal else certificate.matrix
        assert certificate.passed(judge(block, values.diagonal() if diagonal else values))
    assert taken == gradients(len(blocks), dtype, torch.float64)


def _loss(problem: Problem, name: str, value: torch.Tensor) -> torch.Tensor:
    (batch,) = problem.batches
    output = torch.func.functional_call(problem.module, {name: value}, batch.inputs)
    return nn.functional.cross_entropy(output, batch.target)


def test_the_sweep_along_a_chain_is_shared() -> None:
    layers = [nn.Linear(9, 9) if i % 2 == 0 else nn.Tanh() for i in range(9)]
    problem = problem_of(nn.Sequential(*layers), [normal(20, 9)], labels(9, 20), "cross-entropy")
    planner = planner_of(problem)
    chosen = [
        planner.choices(block, True, "preactivation")[0] for block in blocks_of(problem, "elements")
    ]
    assert {str(choice) for choice in chosen} == {"preactivation (chain)"}
    apart = sum(choice.work.seconds(RATES) for choice in chosen)
    assert seconds_of(chosen, RATES) < apart / 3


@pytest.mark.parametrize(
    ("options", "decomposed", "checked"),
    [
        ((), [200, 200, 1], True),  # not the one of 2000 rows
        (("--stats", "all"), [2000, 200, 200, 1], True),
        (("--stats", "basic", "--no-check"), [], False),
        (("-b", "elements", "--stats", "all"), [], True),
    ],
)
def test_eigenvalues_and_the_check_are_counted_where_they_are_wanted(
    cli, monkeypatch, options, decomposed, checked
) -> None:
    net = nn.Sequential(nn.Linear(10, 200), nn.Tanh(), nn.Linear(200, 1))
    torch.jit.script(net).save("net.pt")
    np.savez("d.npz", x=normal(3, 10).float().numpy(), y=normal(3, 1).float().numpy())
    given = []

    def noted(choices, rates, check, sizes, size):
        given.append((sorted(sizes), check > 0))
        return 1.0

    monkeypatch.setattr(dry_run, "estimate", noted)
    assert cli("compute", "net.pt", "d.npz", "--dry-run", *options).code == 0
    assert given == [(sorted(decomposed), checked)]
