"""Jobs with torch, each in a process of its own."""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesscli.files.resources import available_memory
from tests.benchmarks import models, spectra
from tests.benchmarks.models import Problem
from tests.benchmarks.peers import DIAGONAL_PEERS, ROW_PEERS, RowPeer, Rows
from tests.benchmarks.tasks import BY_NAME, CHUNKS, PACKAGES

Result = dict[str, Any]
MORE = (512, 1024, 2048)  # rows at a time, which only a GPU gains from


def build(task: str, toy: bool, model: str, data: str) -> Result:
    problem = models.build(task, toy)
    models.save(problem, Path(model), Path(data))
    count = sum(p.numel() for p in problem.module.parameters())
    # Where each place of a sample has a class, each is one of the Jacobians that a matrix is made of.
    return {"parameters": count, "samples": problem.target.numel()}


def tune(task: str, toy: bool, peer: str, model: str, data: str) -> Result:
    """The number of rows at a time that serves this peer best, on the largest block."""
    problem = models.load(task, toy, Path(model), Path(data))
    blocks = _blocks(problem, BY_NAME[task].blocks)
    _, names, size = max(blocks, key=lambda block: block[-1])
    rows = ROW_PEERS[peer](problem, names)
    if not CHUNKS[peer]:
        return {"chunk": _largest(rows, size)}
    seconds: dict[int, float] = {}  # of one row
    chunks = (*CHUNKS[peer], *(MORE if torch.get_default_device().type == "cuda" else ()))
    for chunk in sorted({min(chunk, size) for chunk in chunks}):
        try:
            times = [_timed(lambda c=chunk: rows(0, c)) for _ in range(3)]
        except RuntimeError:  # out of memory
            break
        seconds[chunk] = min(times) / chunk
        if seconds[chunk] > 1.3 * min(seconds.values()) or times[-1] > 5:
            break
    return {"chunk": min(seconds, key=lambda chunk: seconds[chunk])}


def _largest(rows: Rows, size: int) -> int:
    """The fewest equal parts that fit into memory."""
    while True:
        try:
            rows(0, size)
        except RuntimeError as error:
            short = "allocate memory" in str(error) or isinstance(error, torch.OutOfMemoryError)
            if not short or size == 1:
                raise
            size = -(-size // 2)
        else:
            return size


def run(
    task: str,
    toy: bool,
    peer: str,
    model: str,
    data: str,
    output: str,
    chunk: int | None,
    limit: float,
) -> Result:
    """Model file to Hessian file; `missing` is the time that rows left out would have taken."""
    import_module(PACKAGES.get(peer, "torch"))
    started = time.perf_counter()
    problem = models.load(task, toy, Path(model), Path(data))
    if peer in DIAGONAL_PEERS:
        tensors, missing, share = DIAGONAL_PEERS[peer](problem), 0.0, 1.0
    else:
        structure = BY_NAME[task].blocks
        tensors, missing, share = _by_rows(problem, ROW_PEERS[peer], structure, chunk, limit)
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, output)
    return {"seconds": time.perf_counter() - started, "missing": missing, "share": share}


def _by_rows(
    problem: Problem, peer: RowPeer, structure: str, chunk: int | None, limit: float
) -> tuple[dict[str, Tensor], float, float]:
    """Tensors, seconds of the rows left out, share of rows made.

    Once `limit` is spent, in proportion to the sizes of the blocks, a block's other rows are
    taken to cost what its rows cost so far, the first ones excepted.
    """
    blocks = _blocks(problem, structure)
    total = sum(size for _, _, size in blocks)
    tensors: dict[str, Tensor] = {}
    missing, made, reached, started = 0.0, 0, 0, time.perf_counter()
    for key, names, size in blocks:
        reached += size
        rows, step = peer(problem, names), chunk or size
        shape = (size,) if structure == "elements" else (size, size)
        result = torch.empty(shape, device="cpu")
        times: list[float] = []
        done = 0
        while done < size:
            late = time.perf_counter() - started > limit * reached / total
            if late and len(times) > 1:
                missing += (size - done) / step * statistics.median(times[1:])
                break
            first, done = done, min(done + step, size)
            before = time.perf_counter()
            part = rows(first, done).detach()
            result[first:done] = part.diagonal(first) if structure == "elements" else part
            times.append(time.perf_counter() - before)
        tensors[key] = result[:done]
        made += done
    return tensors, missing, made / total


def _blocks(problem: Problem, structure: str) -> list[tuple[str, list[str], int]]:
    """Tensor key, parameters, size."""
    sizes = {name: p.numel() for name, p in problem.module.named_parameters()}
    if structure == "full":
        return [("hessian", list(sizes), sum(sizes.values()))]
    return [(name, [name], size) for name, size in sizes.items()]


def gradient(task: str, toy: bool, model: str, data: str) -> Result:
    """The time of one gradient, warmed up."""
    problem = models.load(task, toy, Path(model), Path(data))
    chosen = list(problem.module.parameters())

    def once() -> None:
        loss = problem.loss(problem.module(problem.inputs), problem.target)
        torch.autograd.grad(loss, chosen)

    return {"seconds": statistics.median([_timed(once) for _ in range(23)][3:])}


def gemm() -> Result:
    """This machine's float32 matrix product, in flop/s."""
    n = 2048
    left, right, out = (torch.randn(n, n) for _ in range(3))
    seconds = min(_timed(lambda: torch.mm(left, right, out=out)) for _ in range(8))
    return {"rate": 2 * n**3 / seconds}


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _limit_memory() -> None:
    """Makes a peer that asks for too much fail, instead of taking the machine down."""
    if sys.platform == "linux" and torch.get_default_device().type == "cpu":
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.7 * available_memory()), hard))


JOBS: dict[str, Callable[..., Result]] = {
    job.__name__: job
    for job in (build, tune, run, gradient, gemm, spectra.eigen, spectra.judge, spectra.product)
}


def perform(job: str, arguments: dict[str, Any], device: str) -> Result:
    """One of the jobs above, under the conditions that all share."""
    warnings.simplefilter("ignore")
    if device != "cpu" and job != "build":  # the same numbers on each
        torch.set_default_device(device)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    _limit_memory()
    with sdpa_kernel(SDPBackend.MATH):  # the only attention with second derivatives
        return JOBS[job](**arguments)
