"""Sums over data that two processes share, both of them in this one, against one problem with all of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from oracles import relative_error
from problems import problem_of
from torch import Tensor, nn

from hesscli.errors import MismatchError
from hesscli.hessian.blocks import Block
from hesscli.hessian.curvatures import CURVATURES
from hesscli.hessian.differences.directional import DirectionalDifference
from hesscli.hessian.differences.here import Here
from hesscli.hessian.objective.problem import Problem
from hesscli.job.setup import many_processes
from hesscli.job.setup.many_processes import ManyProcesses
from hesscli.job.setup.shared_problem import Gradient, Question, SharedDifference, SharedProblem


class Pair:
    """What the first process sends goes to the second, whose answer is added to its own."""

    rank, size = 0, 2

    def __init__(self, second: ManyProcesses) -> None:
        self.second = second

    def broadcast(self, question: Any) -> Any:
        self.question = question
        return question

    def broadcast_tensor(self, tensor: Tensor) -> Tensor:
        self.tensor = tensor
        return tensor

    def all_gather(self, said: Any) -> list[Any]:
        try:
            self.answer = self.second._answer(self.question, self.tensor)
        except MismatchError as error:
            return [said, error]
        return [said, None]

    def reduce(self, tensor: Tensor) -> Tensor:
        return (tensor.double() + self.answer.double()).to(tensor.dtype)


def pair_of(problem: Problem) -> tuple[SharedProblem, ManyProcesses, ManyProcesses]:
    """The problem with its data on two processes, and these."""
    double = problem.double()
    opened: Any = SimpleNamespace(problem=problem, double=double, passes=SimpleNamespace(rows=4))
    first, second = ManyProcesses(), ManyProcesses()
    first.team, second.team = Pair(second), SimpleNamespace(rank=1, size=2)  # type: ignore[assignment]
    first.opened, second.opened = [opened], [opened]
    return first.problem(opened), first, second


def net(batches: int, dtype: torch.dtype, kinks: str = "all") -> Problem:
    """Six samples in so many batches; the inputs, or those of the first half, are right at the kink of a ReLU."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 3), nn.Tanh())
    x = torch.randn(6, 3)
    x[: 4 if kinks == "all" else 2] = 0
    return problem_of(module, [x], torch.randn(6, 3), batch_size=-(-6 // batches), dtype=dtype)


def truth(problem: Problem) -> Tensor:
    """The Hessian [P, P] of the mean squared error."""
    x = torch.cat([batch.inputs[0] for batch in problem.batches])
    y = torch.cat([batch.target for batch in problem.batches if batch.target is not None])
    shapes = {name: p.shape for name, p in problem.parameters.items()}

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        given = {n: part.view(shapes[n]) for n, part in zip(shapes, parts, strict=True)}
        return nn.functional.mse_loss(torch.func.functional_call(problem.module, given, (x,)), y)

    theta = torch.cat([p.detach().reshape(-1) for p in problem.parameters.values()])
    return torch.autograd.functional.hessian(loss, theta)


WHOLE = Block("hessian", ("0.weight", "2.weight", "2.bias"), (12, 12, 3))


@pytest.mark.parametrize("batches", [1, 2, 3])  # with one, the other process has nothing to do
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_products(batches, curvature):
    problem = net(batches, torch.float64)
    shared, first, second = pair_of(problem)
    products = first.products(shared, curvature, 4)
    v = torch.randn(5, 27, dtype=torch.float64)
    expected = CURVATURES[curvature].products(problem, 1 << 20)(v)
    if curvature == "hessian":
        assert relative_error(expected, v @ truth(problem)) < 1e-12
    assert relative_error(products(v), expected) < 1e-14
    kept = [process.kept for process in (first, second)]
    assert relative_error(products(v.T.contiguous().T[1]), expected[1]) < 1e-14
    assert products.count == 6
    # The graphs serve vectors and blocks of them.
    assert [process.kept for process in (first, second)] == kept
    for name in {"ggn", "fisher"} - {curvature}:
        other = first.products(shared, name, 4)(v[0])
        assert relative_error(other, CURVATURES[name].products(problem)(v[0])) < 1e-14


def test_graphs_give_way_before_others_are_made(monkeypatch):
    problem = net(2, torch.float64)
    shared, first, second = pair_of(problem)
    v = torch.ones(27, dtype=torch.float64)
    first.products(shared, "hessian", 4)(v)
    seen = []

    def products(*words: object) -> Mock:
        seen.append((first.kept, second.kept))
        return Mock(return_value=v)

    made = SimpleNamespace(products=products)
    monkeypatch.setattr(many_processes, "CURVATURES", {"ggn": made})
    first.products(shared, "ggn", 4)(v)
    assert [kept[place] for place, kept in enumerate(seen)] == [None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize(("batches", "kinks"), [(1, "all"), (2, "all"), (3, "all"), (3, "some")])
def test_differences(dtype, curvature, batches, kinks):
    problem = net(batches, dtype, kinks).double()
    assert problem is not None
    shared, _, _ = pair_of(net(batches, dtype, kinks))
    if dtype == torch.float32:
        wide = shared.double()
        assert isinstance(wide, SharedProblem)
        shared = wide
    assert shared.dtype == torch.float64
    v = torch.randn(27, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kind = CURVATURES[curvature].difference
    alone = kind(problem, WHOLE, v, Here(problem))
    along = SharedDifference(shared, WHOLE, v, Here(shared), curvature=curvature)
    assert along.scale == alone.scale
    assert relative_error(along.quotient(1e-4), alone.quotient(1e-4)) < 1e-10
    if curvature == "hessian":
        one = along.one_sided_quotient(1e-4)
        assert one is not None
        assert relative_error(one, alone.one_sided_quotient(1e-4)) < 1e-10
    for by_original in (False, True):
        mine = along.held_quotient(1e-4, by_original)
        its = alone.held_quotient(1e-4, by_original)
        assert (mine is None) == (its is None)
        if mine is not None and its is not None:
            assert relative_error(mine, its) < 1e-10
    assert (its is None) == (curvature != "hessian")


def test_a_restricted_problem():
    problem = net(2, torch.float64)
    shared, _, _ = pair_of(problem)
    own = shared.restricted(["2.bias"])
    assert isinstance(own, SharedProblem)
    whole = problem.flat_gradient(list(problem.parameters))
    assert relative_error(own.flat_gradient(["2.bias"]), whole[-3:]) < 1e-14
    assert own.gradient_norm() == pytest.approx(float(whole[-3:].norm()), rel=1e-14)
    double = own.double()
    assert double is not None
    assert list(double.parameters) == ["2.bias"]


def test_a_model_that_runs_in_float64_on_one_process_alone():
    shared, first, second = pair_of(net(2, torch.float32))
    (opened,) = second.opened
    second.opened = [SimpleNamespace(**vars(opened) | {"double": None})]  # type: ignore[list-item]
    names = tuple(shared.parameters)
    question = Question(Gradient(names), 0, torch.float64, names, (27,))
    with pytest.raises(MismatchError, match="on some of the processes only"):
        first.ask(question, torch.zeros(27, dtype=torch.float64))


def test_kinks_are_held_where_the_check_wants_them(monkeypatch):
    """On each process: where they are in the reference, or in the pass that it is a copy of."""
    shared, _, _ = pair_of(net(2, torch.float64))
    seen = []
    monkeypatch.setattr(
        DirectionalDifference, "held_quotient", lambda self, *words: seen.append(words)
    )
    v = torch.ones(27, dtype=torch.float64)
    along = SharedDifference(shared, WHOLE, v, Here(shared), curvature="hessian")
    for by_original in (False, True):
        assert along.held_quotient(1e-4, by_original) is None
    assert seen == [(1e-4, False)] * 2 + [(1e-4, True)] * 2
