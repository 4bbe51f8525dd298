"""Directions that end at a cut give what they give when they run through all that follows."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import BY_NAME, CASES, GOLDEN, VARYING, MeanOverTime, expected, labels, normal
from problems import (
    blocks_and_truth,
    blocks_of,
    compute_blocks,
    problem_of,
    problem_of_case,
    routes_of,
)
from torch import Tensor, nn

from hesscli.hessian import batch_size
from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.objective.batch import Batch, Batches
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.proofs.analysis import Analyses, Analysis
from hesscli.hessian.recording.recorder import record
from hesscli.hessian.routes import cut_plan
from hesscli.hessian.routes.costs import Costs, Work
from hesscli.hessian.routes.cut_plan import CutPlan, plan_cuts, separators
from hesscli.hessian.routes.rates import Rates


class Residual(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def stack(layers: int, width: int, hidden: int) -> nn.Module:
    """Residual layers over the positions of a sequence."""
    return nn.Sequential(
        nn.Linear(3, width),
        *(Residual(width, hidden) for _ in range(layers)),
        MeanOverTime(),
        nn.Linear(width, 3),
    )


def sequences(module: nn.Module, samples: int = 4, length: int = 3) -> Problem:
    return problem_of(module, [normal(samples, length, 3)], labels(3, samples), "cross-entropy")


def analysis_of(problem: Problem) -> Analysis:
    return Analyses(problem).of(problem.batches[0])


def plan(problem: Problem, room: int = batch_size.CUTS) -> CutPlan:
    analysis = analysis_of(problem)
    samples = sum(len(batch.inputs[0]) for batch in problem.batches)
    return plan_cuts(analysis, Costs(analysis.tape, 4, 64, Rates()), samples, room)


def cut_everywhere(analysis: Analysis) -> CutPlan:
    zs = [use.z for use in analysis.uses.values()]
    values = [c for c in separators(analysis.tape, zs) if cut_plan._in_front(analysis, c)]
    return CutPlan(tuple(values), analysis.tape.maker, Work(), 1)


def compare(problem: Problem, whole: Tensor, structure: str, limit: float) -> int:
    """How many blocks come out right with cuts wherever there can be any."""
    route = routes_of(problem)["preactivation"]
    right = 0
    for batch in problem.batches:
        try:
            analysis = route.analyses.of(batch)  # type: ignore[attr-defined]
        except NotApplicable:
            return 0
        route.cuts.plans[batch] = cut_everywhere(analysis)  # type: ignore[attr-defined]
    for block, truth in blocks_and_truth(problem, whole, structure):
        try:
            found = compute_blocks(route, [block], structure == "elements")[block.name]
        except NotApplicable:
            continue
        size = max(float(truth.norm()), 1e-3 * float(whole.norm()))
        assert float((found - truth).norm()) <= limit * (size or 1), block.name
        right += 1
    return right


@pytest.mark.parametrize("structure", ["module", "block_diagonal", "elements"])
@pytest.mark.parametrize("case", [c for c in CASES if c.oracle != "differences"], ids=str)
def test_cuts_change_nothing(case, structure):
    right = compare(problem_of_case(case), expected(case), structure, 1e-10)
    golden = json.loads(GOLDEN.read_text())[case.name]["preactivation"][structure]
    assert case.name in VARYING or right == golden[0]


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("case", ["residual", "attention-by-hand", "conv2d", "mlp-deep"])
def test_cuts_are_taken(case, batch_size):
    problem = problem_of_case(BY_NAME[case], batch_size=batch_size)
    assert cut_everywhere(analysis_of(problem)).values
    assert compare(problem, expected(BY_NAME[case]), "block_diagonal", 1e-10) >= 3


def test_deep_residual_layers() -> None:
    problem = sequences(stack(3, 4, 5))
    whole = compute_blocks(routes_of(problem)["hvp"], [_everything(problem)])["hessian"]
    assert compare(problem, whole, "block_diagonal", 1e-10) == len(problem.parameters)
    assert compare(problem, whole, "elements", 1e-10) == len(problem.parameters)


def test_batches_that_are_made_anew_have_cuts_of_their_own(monkeypatch) -> None:
    """As of data that does not fit into the memory: what was kept of one must not be taken for another's."""
    monkeypatch.setattr(cut_plan, "_LEAST", 0.0)
    monkeypatch.setattr(cut_plan, "_GAIN", math.inf)
    kept = sequences(stack(3, 8, 8), samples=16, length=8)
    (whole,) = kept.batches
    anew = Batches(
        4, lambda i: Batch((whole.inputs[0][4 * i : 4 * i + 4],), whole.target[4 * i : 4 * i + 4])
    )
    problem = replace(kept, batches=anew)
    route, blocks = routes_of(problem)["preactivation"], blocks_of(problem, "block_diagonal")
    truths = compute_blocks(routes_of(kept)["hvp"], blocks)
    for block in blocks:
        found, truth = compute_blocks(route, [block])[block.name], truths[block.name]
        assert float((found - truth).norm()) <= 1e-10 * float(truth.norm()), block.name
    assert not route.cuts.made  # nor is anything kept of batches that are gone


def test_batches_that_are_made_anew_are_not_recorded_for_each_tensor(monkeypatch) -> None:
    kept = problem_of_case(BY_NAME["mlp-deep"])
    (whole,) = kept.batches
    anew = Batches(5, lambda i: Batch((whole.inputs[0][i : i + 1],), whole.target[i : i + 1]))
    problem = replace(kept, batches=anew)
    recorded: list[Problem] = []
    monkeypatch.setattr(
        "hesscli.hessian.proofs.analysis.record",
        lambda *given: recorded.append(given[0]) or record(*given),
    )
    blocks = blocks_of(problem, "block_diagonal")
    compute_blocks(routes_of(problem)["preactivation"], blocks)
    assert len(blocks) > 5
    assert len(recorded) <= len(anew) + len(blocks)


@pytest.mark.parametrize("name", ["mlp-tanh", "residual", "transformer-gelu"])
def test_what_depends_on_a_value(name) -> None:
    tape = analysis_of(problem_of_case(BY_NAME[name])).tape
    for value in range(max(n for call in tape.calls for n in call.outputs if n is not None) + 1):
        found, places = {value}, []
        for place, call in enumerate(tape.calls):
            if not found.isdisjoint(call.reads):
                found.update(n for n in call.outputs if n is not None)
                places.append(place)
        assert tape.dependent([value]) == found
        assert tape.behind([value]) == places


def _everything(problem: Problem):
    from problems import blocks_of

    (block,) = blocks_of(problem, "full")
    return block


def test_a_deep_model_is_cut_along_its_residual_stream() -> None:
    problem = sequences(stack(6, 32, 64), samples=32, length=16)
    shapes = analysis_of(problem).tape.shapes
    assert [tuple(shapes[c]) for c in plan(problem).values].count((32, 16, 32)) >= 5


def test_a_shallow_model_is_not_cut() -> None:
    problem = problem_of(
        nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)),
        [normal(20, 9)], labels(3, 20), "cross-entropy",
    )  # fmt: skip
    assert plan(problem).values == ()


def test_the_budget_is_kept() -> None:
    problem = sequences(stack(6, 32, 64), samples=32, length=16)
    one = 32 * (16 * 32) ** 2 * 4
    shapes = analysis_of(problem).tape.shapes
    chosen = plan(problem, 4 * one)
    assert chosen.values
    assert chosen.bytes == sum(32 * (shapes[c].numel() // 32) ** 2 * 4 for c in chosen.values)
    assert chosen.bytes <= 4 * one


def test_what_is_kept_at_the_cuts_is_in_the_plan(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.jit.script(stack(6, 32, 64)).save("net.pt")
    np.savez("data.npz", x=normal(32, 16, 3).float().numpy(), y=labels(3, 32).numpy())
    words = ("compute", "net.pt", "data.npz", "--dry-run", "--json")
    with_cuts = cli(*words).document["total"]["memory"]
    limited = cli(*words, "--memory", "400MB").document["total"]["memory"]
    monkeypatch.setattr(batch_size, "CUTS", 0)
    one = 32 * (16 * 32) ** 2 * 4
    assert with_cuts - cli(*words).document["total"]["memory"] >= 5 * one
    assert limited <= 400e6 < with_cuts
