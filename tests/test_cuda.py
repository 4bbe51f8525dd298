"""On a GPU the same numbers come out, and running out of its memory is survived."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import BY_NAME, Case, expected, save
from oracles import relative_error
from problems import blocks_of, compute_blocks, problem_of, routes_of
from torch import nn

from hesscli.errors import DeviceMismatchError
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.routes.hvp import HessianVectorProducts
from hesscli.hessian.routes.preactivation import Preactivation
from hesscli.job.compute import compute
from hesscli.job.options import ComputeOptions
from hesscli.job.setup import opening

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
    monkeypatch.setattr("hesscli.hessian.curvatures.Preactivation", Greedy)
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


class Inline(nn.Module):
    """Makes a tensor without asking where."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + torch.tensor([1.0, 2.0])


def save_inline(folder: Path) -> tuple[Path, Path]:
    model, data = folder / "net.pt", folder / "data.npz"
    torch.jit.script(Inline()).save(model)
    np.savez(data, x=np.ones((4, 3), np.float32), y=np.zeros((4, 2), np.float32))
    return model, data


@pytest.mark.cuda
def test_a_model_that_makes_tensors_on_the_cpu_stays_there(cli, tmp_path: Path) -> None:
    model, data = save_inline(tmp_path)
    done = cli("compute", model, data, "--json")
    assert done.code == 0, done.stderr
    assert done.document["device"] == "cpu"
    assert "the model makes tensors on the CPU, so all is done there" in done.notes
    assert len(done.notes) == len(set(done.notes))
    asked = cli("compute", model, data, "--device", "cuda")
    assert "the model makes tensors on another device" in asked.fails(4)
    assert "--device cpu" in asked.hint


def test_where_the_model_makes_its_tensors_is_tried_once(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without a GPU: the first pass fails as it would on one."""
    model, data = save_inline(tmp_path)
    load, call, loads = opening.load_model, Problem.returned, []

    def loaded(*words: object, **options: object) -> object:
        loads.append(words)
        return load(*words, **options)  # type: ignore[arg-type]

    def called(self: Problem, batch: object) -> object:
        if len(loads) == 1:
            raise DeviceMismatchError("the model makes tensors on another device", "--device cpu")
        return call(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(opening, "load_model", loaded)
    monkeypatch.setattr(Problem, "returned", called)
    done = cli("compute", model, data, "--json")
    assert done.code == 0, done.stderr
    assert done.notes.count("the model makes tensors on the CPU, so all is done there") == 1
    assert len(done.notes) == len(set(done.notes))
    loads.clear()
    assert "another device" in cli("compute", model, data, "--device", "cpu").fails(4)
