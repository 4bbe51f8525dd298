"""`torchrun -m hesscli eigen|trace|density|hvp`: data on several processes, against one process with all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Ran
from safetensors.numpy import load_file, save_file
from torch import nn

from hesscli.hessian.problem import Batch, Problem
from hesscli.job.batches import _even
from hesscli.job.share import Share

# Each rank runs the commands one after the other in one group, and keeps what it printed and its exit code.
COMMANDS = """
import contextlib, json, os, sys
from pathlib import Path
from hesscli.cli import main
from hesscli.job.team import Team
group = Team().__enter__()
leave, Team.__exit__ = Team.__exit__, lambda *error: None
for name, words in json.loads(Path("commands.json").read_text()).items():
    sys.argv = ["hesscli", *words]
    at = f"{name}.{os.environ['RANK']}"
    code = 0
    with open(f"{at}.out", "w") as out, open(f"{at}.err", "w") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code or 0
    Path(f"{at}.code").write_text(str(int(code)))
leave(group, None, None, None)
"""


def torchrun(ranks: int, folder: Path, script: str, *words: object) -> subprocess.Popen[bytes]:
    (folder / "run.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "run.py", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@dataclass(frozen=True)
class Rank:
    """What one rank left of one command."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.stdout)


def on_ranks(
    ranks: int, folder: Path, commands: dict[str, tuple[object, ...]], before: str = ""
) -> dict[str, list[Rank]]:
    """Runs the commands on so many ranks."""
    listed = {name: [str(word) for word in words] for name, words in commands.items()}
    (folder / "commands.json").write_text(json.dumps(listed))
    process = torchrun(ranks, folder, before + COMMANDS)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0, said.decode()

    def of(name: str, rank: int) -> Rank:
        parts = [(folder / f"{name}.{rank}.{end}").read_text() for end in ("code", "out", "err")]
        return Rank(int(parts[0]), *parts[1:])

    return {name: [of(name, rank) for rank in range(ranks)] for name in commands}


@pytest.fixture
def net(tmp_path: Path) -> tuple[Path, Path]:
    """A model of 706 parameters, and eleven samples."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(20, 26), nn.Tanh(), nn.Linear(26, 6, bias=False)).eval()
    x = torch.randn(11, 20)
    torch.jit.trace(module, x).save(tmp_path / "net.pt")
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=np.arange(11) % 6)
    np.savez(tmp_path / "other.npz", x=x.numpy()[:5] + 1, y=np.arange(5))
    return tmp_path / "net.pt", tmp_path / "data.npz"


def close(a: Any, b: Any, dtype: str) -> None:
    """Equal to rounding, relative to the largest."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    assert a.shape == b.shape
    limit = {"float32": 1e-6, "float64": 1e-12}[dtype]
    assert np.abs(a - b).max() <= limit * np.abs(b).max()


def same_files(a: str, b: str, dtype: str) -> None:
    mine, theirs = load_file(a), load_file(b)
    assert mine.keys() == theirs.keys()
    for name in mine:
        close(mine[name], theirs[name], dtype)


# --- which samples are whose ----------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 3, 10, 11])
@pytest.mark.parametrize("most", [1, 2, 4, 100])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_every_sample_is_one_ranks(samples, most, ranks):
    largest, bounds = _even(samples, most, ranks)
    lengths = np.diff(bounds)
    assert (bounds[0], bounds[-1]) == (0, samples)
    assert max(lengths) == largest <= most
    assert max(lengths) - min(lengths) <= 1
    assert len(lengths) >= min(samples, ranks)
    batches = [Batch((torch.arange(a, b),), None) for a, b in pairwise(bounds)]
    problem = Problem(nn.Identity(), {}, batches, None)  # type: ignore[arg-type]
    share, seen = Share(), []
    share.team.size = ranks
    for rank in range(ranks):
        share.team.rank = rank
        own = share.own(problem).batches
        seen.append([int(i) for index in range(len(own)) for i in own[index].inputs[0]])
        # Whatever batches another rank has room for, this one's samples are these.
        assert seen[-1] == list(range(rank * samples // ranks, (rank + 1) * samples // ranks))
    assert list(chain(*seen)) == list(range(samples))


# --- the same results -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_ranks(cli: Callable[..., Ran], net, tmp_path, dtype):
    base = (*net, "--dtype", dtype, "--json")
    save_file(
        {
            "0.weight": np.random.default_rng(0).standard_normal((3, 26, 20)),
            "0.bias": np.zeros((3, 26)),
            "2.weight": np.ones((3, 6, 26)),
        },
        tmp_path / "v.safetensors",
    )
    commands: dict[str, tuple[object, ...]] = {
        "eigen": ("eigen", *base, "--top", 3, "--tol", 1e-8 if dtype == "float64" else 1e-5),
        "ends": ("eigen", *base, "--per-block", "--tol", 1e-8 if dtype == "float64" else 1e-5),
        "dense": ("eigen", *base, "--top", 4, "--params", "0.bias", "--which", "both"),
        "ggn": ("trace", *base, "--curvature", "ggn", "--method", "hvp", "--max-products", 20),
        "exact": ("trace", *base),
        "density": ("density", *base, "--probes", 2, "--steps", 6, "--curvature", "fisher"),
        "batches": ("hvp", *base, "--vector", "random", "--gradient", "--batch-size", 2),
        "stack": ("hvp", *base, "--vector", "v.safetensors", "--curvature", "ggn"),
        "differences": ("hvp", *base, "--vector", "gradient", "--method", "finite-difference"),
        "fedavg": ("hvp", *base, "--per-fedavg", 0.3, "--query", "other.npz"),
        "train": ("hvp", *base, "--vector", "gradient", "--train-mode"),
        "one": ("hvp", *base, "--vector", "gradient", "--samples", "3:4"),
        "missing": ("hvp", net[0], "nothing.npz", "--vector", "gradient"),
        "refused": ("hvp", *base, "--vector", "gradient", "--method", "gauss-newton"),
    }
    writes = ("batches", "stack", "differences", "fedavg", "train", "one")
    for name in (*writes, "eigen"):
        commands[name] += ("-o", f"{name}.safetensors")
    shared = on_ranks(2, tmp_path, commands)
    for name, words in commands.items():
        first, second = shared[name]
        assert (second.stdout, second.stderr) == ("", ""), name
        if name in writes:
            Path(f"{name}.safetensors").rename(f"{name}.two.safetensors")
        alone = cli(*words)
        assert first.code == alone.code, (name, first.stderr)
        if first.code:
            assert first.stderr == alone.stderr, name
            continue
        mine, theirs = first.document, alone.document
        if name in writes:
            same_files(
                f"{name}.two.safetensors",
                f"{name}.safetensors",
                "float32" if name == "differences" else dtype,
            )
        for key in ("loss.value", "loss.denominator", "gradient_norm"):
            a, b = mine, theirs
            for part in key.split("."):
                a, b = a[part], b[part]
            close(a, b, dtype)
        assert mine["check"]["kind"] == theirs["check"]["kind"]
        assert mine["check"]["relative_error"] < {"float32": 1e-3, "float64": 1e-6}[dtype]
        assert mine["products"] == theirs["products"] if "products" in theirs else True
        for key in ("eigenvalues", "nodes", "weights"):
            if key in theirs:
                close(mine[key], theirs[key], dtype)
        if name in ("ggn", "exact"):
            close(
                [b["trace"] for b in mine["blocks"]], [b["trace"] for b in theirs["blocks"]], dtype
            )
        idle = [note for note in mine["notes"] if "nothing to do" in note]
        assert bool(idle) == (name in ("train", "one")), name
    assert shared["missing"][0].code == 2
