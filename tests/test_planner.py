"""The planner takes the cheapest route that is exact, and says why."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import labels, normal
from problems import (
    blocks_and_truth,
    blocks_of,
    compute_blocks,
    planner_of,
    problem_of,
    routes_of,
)
from torch import nn

from hesscli.hessian.applicability import NotApplicable
from hesscli.hessian.batch_size import Passes
from hesscli.hessian.curvatures import CURVATURES
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.planner import Planner
from hesscli.hessian.proofs.analysis import Analyses
from hesscli.hessian.routes import sweep
from hesscli.hessian.routes.base import Choice
from hesscli.hessian.routes.chain import Step, find_chains, most_numbers
from hesscli.hessian.routes.costs import Work
from hesscli.hessian.routes.cuts import Cuts
from hesscli.hessian.routes.factored_hessian import FactoredHessian
from hesscli.hessian.routes.first_batch import FirstBatch
from hesscli.hessian.routes.rates import Rates


def plan(problem: Problem, structure: str) -> dict[str, Choice]:
    planner = planner_of(problem)
    return {
        block.name: planner.choices(block, structure == "elements")[0]
        for block in blocks_of(problem, structure)
    }


def tanh_mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def classify(module: nn.Module, samples: int, *shape: int, classes: int = 10) -> Problem:
    return problem_of(module, [normal(samples, *shape)], labels(classes, samples), "cross-entropy")


def test_smooth_layers_go_along_their_neurons() -> None:
    chosen = plan(classify(tanh_mlp(30, 64, 20, 10), 256, 30), "block_diagonal")
    assert str(chosen["0.weight"]) == "preactivation (64 seeds)"
    assert str(chosen["2.weight"]) == "preactivation (20 seeds)"


def test_a_piecewise_linear_tail_takes_its_classes() -> None:
    conv = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(192, 10)
    )
    chosen = plan(classify(conv, 128, 1, 8, 8), "block_diagonal")
    assert str(chosen["0.weight"]) == "gauss-newton (10 classes)"


def test_one_curved_function_before_a_piecewise_linear_tail_takes_its_classes() -> None:
    conv = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(192, 10)
    )
    chosen = plan(classify(conv, 128, 1, 8, 8), "block_diagonal")
    assert str(chosen["0.weight"]) == "gauss-newton (10 classes)"


def test_rows_near_the_output_are_cheap() -> None:
    problem = classify(tanh_mlp(200, 200, 200, 10), 64, 200)
    first, *_, last = [
        planner_of(problem).choices(block, False, "hvp")[0].work.flops / block.size
        for block in blocks_of(problem, "block_diagonal")
    ]
    assert last < first / 10


def test_what_is_used_twice() -> None:
    """A weight has its directions at both values; a bias would gain nothing by them, and goes by products."""
    layer = nn.Linear(60, 60)
    chosen = plan(
        classify(nn.Sequential(layer, nn.Tanh(), layer), 8, 60, classes=60), "block_diagonal"
    )
    assert str(chosen["0.weight"]) == "preactivation (120 seeds)"
    assert str(chosen["0.bias"]) == "hvp: used twice"


def test_a_layer_behind_itself_is_assembled_from_both_ends() -> None:
    """Rows of two values, z and z', from derivatives along z' as well as from those of the inputs along z."""
    layer, samples, n = nn.Linear(60, 60, bias=False), 8, 60
    problem = classify(nn.Sequential(layer, nn.Tanh(), layer), samples, n, classes=n)
    (block,) = blocks_of(problem, "full")
    work = planner_of(problem).choices(block, False, "preactivation")[0].work
    assert work.flops > 2 * (2 * n * samples * 2 * n * block.size)


def test_samples_that_mix_are_named() -> None:
    class Centred(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0)

    chosen = plan(classify(nn.Sequential(nn.Linear(6, 4), Centred()), 8, 6, classes=4), "full")
    assert str(chosen["hessian"]) == "hvp: mean may mix samples"


def test_the_diagonal_of_a_chain_takes_one_sweep() -> None:
    chosen = plan(classify(tanh_mlp(30, 64, 64, 20, 10), 256, 30), "elements")
    assert str(chosen["0.weight"]) == "preactivation (chain)"


def test_ggn_takes_a_pass_for_each_output_and_fisher_one() -> None:
    problem = classify(tanh_mlp(30, 64, 64, 10), 256, 30)
    block, passes = blocks_of(problem, "block_diagonal")[0], {}
    for curvature in ("ggn", "fisher"):
        cuts = Cuts(Analyses(problem), Passes(64))
        (choice,) = (
            route.choice(FirstBatch(cuts), block, False)
            for route in CURVATURES[curvature].routes(cuts, lambda: problem)
            if route.name == "gauss-newton"
        )
        passes[curvature] = choice.common.flops
    assert passes["ggn"] > 4 * passes["fisher"] > 0


def test_ggn_goes_along_neurons_where_there_are_more_outputs() -> None:
    def chosen(classes: int) -> str:
        problem = classify(tanh_mlp(30, 16, classes), 64, 30, classes=classes)
        cuts = Cuts(Analyses(problem), Passes(64))
        planner = Planner(cuts, CURVATURES["ggn"].routes(cuts, lambda: problem))
        return str(planner.choices(blocks_of(problem, "block_diagonal")[0], False)[0])

    assert chosen(10) == "gauss-newton (10 classes)"
    assert chosen(300) == "preactivation (16 seeds)"


def test_every_choice_ends_with_differences() -> None:
    problem = classify(tanh_mlp(3, 4, 10), 5, 3)
    for block in blocks_of(problem, "block_diagonal"):
        assert planner_of(problem).choices(block, False)[-1].method == "finite-difference"


def test_a_forced_route_that_is_not_exact_is_refused() -> None:
    problem = classify(tanh_mlp(3, 4, 4, 10), 5, 3)
    first = blocks_of(problem, "block_diagonal")[0]
    with pytest.raises(NotApplicable, match="tanh is not piecewise linear"):
        planner_of(problem).choices(first, False, "gauss-newton")


def test_a_wider_batch_costs_more_and_a_faster_machine_takes_less() -> None:
    few, many = (
        planner_of(classify(tanh_mlp(30, 64, 10), n, 30))
        .choices(blocks_of(classify(tanh_mlp(30, 64, 10), n, 30), "full")[0], False)[0]
        .work
        for n in (64, 256)
    )
    assert many.flops > 3 * few.flops
    assert many.seconds(Rates()) > few.seconds(Rates())
    slow, fast = Rates(1e9, 1e9, 1e-5), Rates(1e10, 1e10, 1e-6)
    assert many.seconds(slow) == pytest.approx(10 * many.seconds(fast))


def test_what_cannot_be_batched_takes_its_time_in_each_row() -> None:
    """As the derivative of GELU, for which PyTorch has no rule; it has one for that of a sigmoid."""
    seconds, rows = {}, {}
    for act in (nn.GELU(), nn.Sigmoid()):
        problem = classify(
            nn.Sequential(nn.Linear(20, 30), act, nn.Linear(30, 5)), 2, 20, classes=5
        )
        planner, block = planner_of(problem), blocks_of(problem, "full")[0]
        work = planner.choices(block, False, "hvp")[0].work
        name = type(act).__name__
        seconds[name], rows[name] = work.seconds(Rates(1e30, 1e30, 1.0)) - work.calls, block.size
    assert seconds["Sigmoid"] == 0
    assert seconds["GELU"] > rows["GELU"]


def test_few_samples_go_along_neurons() -> None:
    """Rows by products would take ten times as long: each makes the calls of two GELUs for itself."""
    net = nn.Sequential(
        nn.Linear(40, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)
    )
    chosen = plan(classify(net, 2, 40), "block_diagonal")
    assert str(chosen["0.weight"]) == "preactivation (64 seeds)"
    assert str(chosen["2.weight"]) == "preactivation (64 seeds)"


def test_what_is_added_moves_through_memory_and_views_do_not() -> None:
    class Flow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x + 1, x.cumsum(1)], 1).t().unsqueeze(0)[0].t()

    costs = planner_of(classify(nn.Sequential(nn.Linear(5, 5), Flow()), 8, 5)).first.costs
    assert costs is not None
    works = zip(costs.tape.calls, costs._each, strict=True)
    moved = {call.name: moved for call, (_, moved, *_) in works}
    once = 2 * 8 * 5 * 8
    expected = {"add": once, "cumsum": once, "cat": 2 * once, "t": 0, "unsqueeze": 0, "select": 0}
    assert moved == expected | {"addmm": once}


def convolution_flops(module: nn.Module, channels: int, side: int = 6) -> float:
    problem = problem_of(module, [normal(3, channels, side, side)], labels(2, 3), "output")
    costs = planner_of(problem).first.costs
    assert costs is not None
    calls = zip(costs.tape.calls, costs._each, strict=True)
    return sum(flops for call, (flops, *_) in calls if call.name == "convolution")


def conv(i: int, o: int, kind: type = nn.Conv2d, **options: int) -> nn.Module:
    return nn.Sequential(kind(i, o, 3, **options), nn.Flatten(), nn.Tanh())


def test_few_channels_take_as_long_as_a_vector_of_them() -> None:
    """Of eight numbers in float64."""
    whole = 2 * 3 * 8 * 4 * 4 * 8 * 9
    assert convolution_flops(conv(8, 8), 8) == pytest.approx(whole)
    assert convolution_flops(conv(1, 2), 1) == pytest.approx(whole)
    assert convolution_flops(conv(9, 3), 9) == pytest.approx(2 * whole)
    # Those of groups fill the outputs of each alone.
    assert convolution_flops(conv(4, 4, groups=4), 4) == pytest.approx(4 * whole / 8)


def test_a_transposed_convolution_multiplies_each_input() -> None:
    transposed = conv(8, 16, nn.ConvTranspose2d, stride=2)
    assert convolution_flops(transposed, 8) == pytest.approx(2 * 3 * 8 * 6 * 6 * 16 * 9)


def test_each_direction_of_a_diagonal_goes_through_all_positions() -> None:
    flops = []
    for positions in (3, 6):
        problem = problem_of(
            nn.Sequential(nn.Linear(20, 5), nn.Tanh(), nn.Flatten(), nn.Linear(5 * positions, 2)),
            [normal(4, positions, 20)], labels(2, 4), "cross-entropy",
        )  # fmt: skip
        planner, weight = planner_of(problem), blocks_of(problem, "elements")[0]
        use = planner.first.proven()[0].use(weight.name)
        work = planner.first.proven()[1].own(use, diagonal=True)
        assert work.flops == 2 * 4 * positions**2 * 5 * 20
        flops.append(work.flops)
    assert flops[1] == 4 * flops[0]


@pytest.mark.parametrize(
    "widths", [(5, 40, 30), (7,) * 9, (5, 60, 3, 60, 10), (4, 20, 20, 20, 12), (5, 20, 20, 90)]
)
@pytest.mark.parametrize("loss", ["cross-entropy", "bce-with-logits", "mse"])
def test_the_rows_along_a_chain_are_counted_as_they_are_held(widths, loss, monkeypatch) -> None:
    classes = widths[-1]
    target = labels(classes, 2) if loss == "cross-entropy" else labels(2, 2, classes).double()
    problem = problem_of(tanh_mlp(*widths), [normal(2, widths[0])], target, loss)
    analysis = Analyses(problem).of(problem.batches[0])
    (chain,), held = find_chains(analysis, problem.parameters), []

    def back(curvature: FactoredHessian, step: Step, *others: Any) -> None:
        known(curvature, step, *others)
        rows = 2 * curvature.left.shape[1] + sum(v.shape[1] for v, _ in curvature.weighted)
        held.append(rows * chain.width(step.before))

    known = sweep._back
    monkeypatch.setattr(sweep, "_back", back)
    compute_blocks(
        routes_of(problem)["preactivation"], blocks_of(problem, "elements"), diagonal=True
    )
    counted = most_numbers(chain, True)
    at_output = classes * max(1, 2 * chain.rank)
    assert max(held) <= counted <= max(1.5 * max(held), at_output, 2 * classes * widths[-2])


def test_work_adds_up() -> None:
    assert Work(1, 2, 3) + Work(1, 1, 1) == Work(2, 3, 4)
    assert Work(1, 2, 3).times(4) == Work(4, 8, 12)
    assert Work(1, 2, 3).times(4, calls=2) == Work(4, 8, 6)


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize(
    "module",
    [
        tanh_mlp(5, 7, 6, 4, 3),
        tanh_mlp(5, 4, 3, 4, 3, 4, 3, 4, 3),
        nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 12), nn.Softplus(), nn.Linear(12, 3)),
        nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6).eval(), nn.SiLU(), nn.Linear(6, 3)),
        nn.Sequential(nn.Linear(5, 9, bias=False), nn.Sigmoid(), nn.Linear(9, 2), nn.ELU(),
                      nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3), nn.Tanh()),
        nn.Linear(5, 3),
        nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 30)),
    ],
    ids=["tanh", "deep", "narrow-wide", "batch-norm", "bottleneck", "linear", "wide-output"],
)  # fmt: skip
@pytest.mark.parametrize("loss", ["cross-entropy", "bce-with-logits", "mse"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_all_diagonals_of_a_chain_at_once(
    module: nn.Module, loss: str, curvature: str, batch_size: int | None
) -> None:
    x = normal(8, 5)
    shape = module.double()(x).shape
    target = labels(shape[1], 8) if loss == "cross-entropy" else labels(2, *shape).double()
    problem = problem_of(module, [x], target, loss, batch_size=batch_size)
    blocks = blocks_of(problem, "full")
    routes = routes_of(problem, curvature=curvature)
    whole = compute_blocks(routes["hvp"], blocks)["hessian"]
    route = routes["preactivation" if curvature == "hessian" else "gauss-newton"]
    chain = compute_blocks(route, blocks_of(problem, "elements"), diagonal=True)
    for block, truth in blocks_and_truth(problem, whole, "elements"):
        torch.testing.assert_close(chain[block.name], truth, rtol=1e-10, atol=1e-13)
