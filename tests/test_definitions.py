"""What runs in place of PyTorch's operators on a GPU, here on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CASES, Case, expected, normal
from oracles import relative_error
from problems import blocks_of, compute_blocks, problem_of, problem_of_case, routes_of
from torch import Tensor, nn

from hesscli.hessian import definitions
from hesscli.hessian.applicability import NotApplicable

RECURRENT = [case for case in CASES if "recurrent" in case.tags and "cell" not in case.name]


@pytest.mark.parametrize("case", RECURRENT, ids=str)
def test_recurrent_layers_step_by_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def noted(name: str, definition: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            ran.append(name)
            return definition(*arguments)

        return run

    steps = {name: noted(name, definition) for name, definition in definitions.STEP_BY_STEP.items()}
    monkeypatch.setattr(definitions, "DEFINITIONS", definitions.DEFINITIONS | steps)
    problem = problem_of_case(case)
    (block,) = blocks_of(problem, "full")
    tried = 0
    for route in routes_of(problem).values():
        if route.name == "finite-difference":
            continue
        try:
            found = compute_blocks(route, [block])["hessian"]
        except NotApplicable:
            continue
        tried += 1
        assert relative_error(found, expected(case)) < 1e-10
    assert tried
    assert ran


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_weight_norm_of_all_digits(dim: int) -> None:
    v = normal(3, 4, seed=1).requires_grad_()
    g = normal(*((3, 1) if dim == 0 else (1, 4)), seed=2).requires_grad_()
    theirs = torch._weight_norm(v, g, dim)
    ours, _ = definitions._weight_norm_of_all_digits(v, g, dim)
    torch.testing.assert_close(ours, theirs)
    seed = normal(3, 4, seed=3)
    for a, b in zip(
        torch.autograd.grad(ours, (v, g), seed), torch.autograd.grad(theirs, (v, g), seed),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


class Positions(nn.Module):
    """Angles of positions in float32, whatever its own dtype, as rotary embeddings have them."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([[0.7, 0.3]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(3).unsqueeze(1).float() @ self.rate.float()
        return x * angles.to(x.dtype).sin().sum()


def test_integers_stay_with_what_is_wide() -> None:
    x, y = normal(4, 2, seed=1), normal(4, 2, seed=2)
    problem, output = problem_of(Positions(), [x], y).widened()
    assert problem.wide
    rate = problem.parameters["rate"].detach()
    angles = torch.arange(3, dtype=torch.float64).unsqueeze(1) @ rate
    torch.testing.assert_close(problem.output(problem.batches[0]), x * angles.sin().sum())
    torch.testing.assert_close(output, x * angles.sin().sum())
