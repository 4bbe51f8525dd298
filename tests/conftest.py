"""What the tests of the command line share."""

from __future__ import annotations

import errno
import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As the command has it, and before PyTorch reads it: threads that wait for work take the time of those that have some.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from typer import testing
from typer.main import get_command

torch.set_num_threads(1)  # the models are too small to share
# Else typer makes all commands anew for each that runs, which takes as long as the Hessian of a small model.
testing._get_command = functools.cache(get_command)

REPOSITORY = Path(__file__).resolve().parent.parent
PLAIN = {
    "PYTHONIOENCODING": "utf-8",
    "PYTHONWARNINGS": "ignore:`torch.jit.load` is deprecated",  # as PyTorch says from 2.14 on
}
"""What a process takes from its environment where its output is compared."""


@dataclass(frozen=True)
class Ran:
    """A finished command."""

    code: int
    stdout: str
    stderr: str
    bytes: bytes

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.stdout)

    def fails(self, code: int) -> str:
        """Checks that it failed as the contract says; gives the error's text."""
        assert self.code == code, self.stderr
        assert self.stdout == ""
        errors = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.stderr
        assert "Traceback" not in self.stderr
        return errors[0].removeprefix("error: ")

    @property
    def hint(self) -> str:
        (hint,) = [line for line in self.stderr.splitlines() if line.startswith("hint: ")]
        return hint.removeprefix("hint: ")

    @property
    def notes(self) -> list[str]:
        lines = self.stderr.splitlines()
        return [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]


@pytest.fixture(scope="session")
def warm() -> Iterator[str]:
    """A Python whose processes begin with torch and hesscli imported."""
    file = REPOSITORY / "tests" / "warm.py"
    with tempfile.TemporaryDirectory() as folder:
        python, path = Path(folder, "python"), Path(folder, "socket")
        asking = shlex.join([sys.executable, "-IS", str(file), "ask", str(path)])
        python.write_text(f'#!/bin/sh\nexec {asking} "$@"\n')
        python.chmod(0o700)
        environment = os.environ | PLAIN | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        serving = [sys.executable, str(file), "serve", str(path), str(python)]
        with subprocess.Popen(serving, stdin=subprocess.PIPE, env=environment):
            while not path.exists():
                time.sleep(0.01)
            yield str(python)


def torchrun(
    python: str, ranks: int, folder: Path, script: str, *words: object
) -> subprocess.Popen[bytes]:
    """A script on several ranks."""
    (folder / "run.py").write_text(script)
    command = [python, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "run.py", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def fill_disk(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Lets the disk be full after so many bytes."""
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal room
        room -= len(data)
        if room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As on a machine with two cores."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Runs hesscli in this process, in an empty folder."""
    from hesscli.cli import app

    monkeypatch.chdir(tmp_path)

    def run(*words: object, stdin: bytes | None = None) -> Ran:
        arguments = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", ["hesscli", *arguments])
        done = testing.CliRunner().invoke(app, arguments, input=stdin)
        try:
            stdout = done.stdout_bytes.decode()
        except UnicodeDecodeError:
            stdout = ""
        return Ran(done.exit_code, stdout, done.stderr, done.stdout_bytes)

    return run


@pytest.fixture
def net(tmp_path: Path) -> tuple[Path, Path]:
    """A model of 149 parameters, traced, and its data."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 6)).eval()
    x = torch.randn(11, 6)
    torch.jit.trace(module, x).save(tmp_path / "net.pt")
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=np.arange(11) % 6)
    return tmp_path / "net.pt", tmp_path / "data.npz"


@pytest.fixture
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of more than 8 rows are large, and computed in several bands."""
    from hesscli.job.matrix import memory, planning, unfinished

    monkeypatch.setattr(planning, "LARGE", 8)
    monkeypatch.setattr(memory, "BAND", 900)
    monkeypatch.setattr(memory, "LONG_BAND", 900)
    monkeypatch.setattr(unfinished, "INTERVAL", 0.0)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A safetensors file's document and its tensors, by safetensors alone."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert metadata["format"] == "pt"
    assert set(metadata) == {"format", "hesscli"}
    return json.loads(metadata["hesscli"]), tensors


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
