"""On a GPU the same numbers come out, and running out of its memory is survived."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import BY_NAME, Case, expected, save
from oracles import relative_error
from problems import blocks_of, compute_blocks, problem_of, routes_of
from torch import nn

from hesscli.hessian.problem import Problem
from hesscli.hessian.routes.hvp import HessianVectorProducts
from hesscli.hessian.routes.preactivation import Preactivation
from hesscli.job.compute import compute
from hesscli.job.options import ComputeOptions

NAMES = ("mlp-tanh", "mlp-relu", "conv2d", "layer-norm", "group-norm", "weight-norm", "lstm",
         "transformer-gelu", "embedding", "residual-norm")  # fmt: skip


class Silent:
    def note(self, text: str) -> None: ...

    def progress(self, done: int, total: int, doing: str) -> None: ...


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("blocks", ["diag", "full", "elements"])
def test_a_gpu_gives_the_same_numbers(name: str, blocks: str, tmp_path: Path) -> None:
    case: Case = BY_NAME[name]
    model, data = save(case, "trace", tmp_path)
    options = ComputeOptions(
        model=model, data=data, loss=case.loss, blocks=blocks, device="cuda",
        output=tmp_path / "hessian.safetensors",
    )  # fmt: skip
    document = compute(options, Silent())
    assert document["device"] == "cuda"
    assert document["check"]["relative_error"] < 1e-6
    if blocks == "full":
        from safetensors.numpy import load_file

        whole = torch.from_numpy(load_file(options.output)["hessian"])  # type: ignore[arg-type]
        assert relative_error(whole, expected(case)) < 1e-9


class Greedy(Preactivation):
    """Runs out of memory until it has been told to shrink twice."""

    shrunk = 0

    def add(self, *arguments: object) -> None:
        if self.shrunk < 2:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        super().add(*arguments)  # type: ignore[arg-type]

    def shrink(self) -> bool:
        self.shrunk += 1
        return super().shrink()


def test_out_of_memory_halves_the_chunks_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hesscli.hessian.routes.all.Preactivation", Greedy)
    case = BY_NAME["mlp-tanh"]
    model, data = save(case, "trace", tmp_path)
    options = ComputeOptions(
        model=model, data=data, loss=case.loss, blocks="full", method="preactivation",
        output=tmp_path / "hessian.safetensors",
    )  # fmt: skip
    document = compute(options, Silent())
    assert document["blocks"][0]["method"] == "preactivation"


def test_smaller_chunks_give_the_same_numbers() -> None:
    problem: Problem = problem_of(nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)),
                                  [torch.randn(6, 4)], torch.randn(6, 3))  # fmt: skip
    (whole,) = blocks_of(problem, "full")
    for route in (routes_of(problem)["preactivation"], HessianVectorProducts(problem, 8)):
        before = compute_blocks(route, [whole])["hessian"]
        assert route.shrink()
        if isinstance(route, Preactivation):
            route.workspace = 1  # one direction at a time
        torch.testing.assert_close(compute_blocks(route, [whole])["hessian"], before)
    assert not HessianVectorProducts(problem, 1).shrink()
