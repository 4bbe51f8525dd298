"""On a GPU the same numbers come out, and running out of its memory is survived."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import BY_NAME, Case, expected, save
from oracles import relative_error
from problems import blocks_of, compute_blocks, problem_of, routes_of
from torch import nn

import hesscli
from hesscli.errors import DeviceMismatchError
from hesscli.gradients import gradients_on
from hesscli.hessian.guests import guest
from hesscli.hessian.objective.batch import Batch
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.objective.refusals import not_accepted
from hesscli.hessian.routes.hvp import HessianVectorProducts
from hesscli.hessian.routes.preactivation import Preactivation
from hesscli.job.compute import compute
from hesscli.job.options import ComputeOptions
from hesscli.job.setup import opening
from hesscli.job.setup.batches import free_memory
from hesscli.job.setup.settings import random_kept

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


IN_TORCHSCRIPT = """The following operation failed in the TorchScript interpreter.
Traceback of TorchScript (most recent call last):
RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB. (pretended)
"""
OUT_OF_MEMORY = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory (pretended)"),
    "pinned": RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 5.56 GB, max allowed: 6.80 GB)."),
    "torchscript": RuntimeError(IN_TORCHSCRIPT),
}  # fmt: skip


class Greedy(Preactivation):
    """Runs out of memory until it has been told to shrink twice."""

    shrunk = 0
    error: Exception

    def add(self, *arguments: object) -> None:
        if self.shrunk < 2:
            raise self.error
        super().add(*arguments)  # type: ignore[arg-type]

    def shrink(self) -> bool:
        self.shrunk += 1
        return super().shrink()


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_chunks_and_goes_on(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Greedy, "error", OUT_OF_MEMORY[error], raising=False)
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


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_pass_that_runs_out_of_memory(
    error: str, cli, net, monkeypatch: pytest.MonkeyPatch
) -> None:
    def returned(*arguments: object) -> object:
        with guest(partial(not_accepted, None)):  # type: ignore[arg-type]
            raise OUT_OF_MEMORY[error]

    monkeypatch.setattr(Problem, "returned", returned)
    done = cli("compute", *net)
    said = IN_TORCHSCRIPT if error == "torchscript" else str(OUT_OF_MEMORY[error])
    (line,) = [line for line in said.splitlines() if "emory" in line or "ALLOC" in line]
    assert done.fails(6) == f"out of memory: {line.removeprefix('RuntimeError: ')}"
    assert done.hint.endswith("--batch-size 1")


def test_what_pytorch_keeps_of_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "mem_get_info": (5, 100),
        "memory_reserved": 70,
        "memory_allocated": 30,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(torch.device("cuda")) == 5 + 40


def test_forked_from_a_process_that_used_a_gpu(
    cli, net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There CUDA cannot be used, and all is done on the CPU."""

    def refuse(*arguments: object) -> object:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    for name, function in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "_is_in_bad_fork": lambda: True,
        "_lazy_init": refuse,
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    assert cli("compute", *net, "--json").document["device"] == "cpu"
    assert "no device cuda" in cli("compute", *net, "--device", "cuda").fails(6)
    hesscli.compute(nn.Linear(3, 2), (torch.randn(4, 3), torch.randn(4, 2)))


def test_random_numbers_of_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's go on as if there had been none of ours."""
    state = [torch.tensor([7])]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda given: state.__setitem__(0, given))
    with random_kept():
        state[0] = torch.tensor([0])
    assert state == [torch.tensor([7])]


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_autocast_of_the_caller_is_off_inside(device: str) -> None:
    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, True)
    try:
        with gradients_on():
            assert not torch.is_autocast_enabled(device)
        assert torch.is_autocast_enabled(device)
    finally:
        torch.set_autocast_enabled(device, before)


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


@pytest.mark.parametrize(
    "said",
    [
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
        "Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the same",
        "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first.",
        "Tensor for argument weight is on cpu but expected on mps",
        "Placeholder storage has not been allocated on MPS device!",
        "Passed CPU tensor to MPS op",
    ],
)  # fmt: skip
def test_what_pytorch_says_of_other_devices(said: str) -> None:
    batch = Batch((torch.ones(2, 3),), None)
    assert isinstance(not_accepted(batch, said, RuntimeError(said)), DeviceMismatchError)


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
