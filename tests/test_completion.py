"""What TAB offers: commands, blocks and parameters, without loading torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hessian_files import symmetric, write
from safetensors.torch import save_file

WEIGHTS = {"fc1.weight": torch.ones(2, 3), "fc1.bias": torch.ones(2), "head.scale": torch.ones(1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("completion")
    write(tmp_path / "hessian.safetensors", {"fc1.weight": symmetric(2), "fc2": symmetric(1)})
    write(tmp_path / "other", {"odd name": symmetric(2)})
    torch.save(WEIGHTS, tmp_path / "weights.pt")
    torch.save(torch.nn.Linear(2, 1).state_dict(), tmp_path / "linear.pt")
    adam = {"state": {0: {"exp_avg": torch.ones(2, 3)}}, "param_groups": []}
    torch.save({"step": 3, "optimizer": adam, "model": WEIGHTS}, tmp_path / "checkpoint.pt")
    torch.save({"a\x1b[31m\n": torch.ones(1), "b": torch.ones(1)}, tmp_path / "steering.pt")
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2, affine=False))
    torch.jit.script(net).save(tmp_path / "script.pt")
    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 not a zip")
    return tmp_path


OFFERED = [
    ("hesscli sh", ["show"]),
    ("hesscli show --block ", ["fc1.weight", "fc2"]),
    ("hesscli show --block fc2", ["fc2"]),
    ("hesscli show other --block ", ["odd name"]),
    ("hesscli show none --block ", []),
    ("hesscli show broken.pt --block ", []),
    ("hesscli eigen --block fc1", ["fc1.weight"]),
    ("hesscli compute weights.pt d.npz --params ", list(WEIGHTS)),
    ("hesscli compute weights.safetensors d.npz -p fc1", ["fc1.weight", "fc1.bias"]),
    ("hesscli compute weights.pt d.npz --params !fc1.b", ["!fc1.bias"]),
    ("hesscli compute linear.pt d.npz --params ", ["weight", "bias"]),
    ("hesscli compute checkpoint.pt d.npz --params ", list(WEIGHTS)),
    ("hesscli compute steering.pt d.npz --params ", ["b"]),
    ("hesscli compute script.pt d.npz --params ", ["0.weight", "0.bias"]),
    ("hesscli compute broken.pt d.npz --params ", []),
    ("hesscli compute none.pt d.npz --params ", []),
]

EACH = """
import json, os, sys
from hesscli.cli import app
for number, line in enumerate(json.load(sys.stdin)):
    if not os.fork():
        for descriptor, end in (1, "out"), (2, "err"):
            os.dup2(os.open(f"{number}.{end}", os.O_WRONLY | os.O_CREAT), descriptor)
        os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = line, str(line.count(" "))
        try:
            app(prog_name="hesscli")
        finally:
            assert not {"torch", "numpy"} & sys.modules.keys()
        sys.exit()
    os.wait()
"""


@pytest.fixture(scope="module")
def offered(folder: Path) -> dict[str, list[str]]:
    """What bash would be offered at the end of each line: a process of its own, but for its imports."""
    done = subprocess.run(
        [sys.executable, "-c", EACH],
        input=json.dumps([line for line, _ in OFFERED]),
        cwd=folder,
        env=os.environ | {"_HESSCLI_COMPLETE": "complete_bash"},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = {}
    for number, (line, _) in enumerate(OFFERED):
        assert (folder / f"{number}.err").read_text() == "", line
        found[line] = [name for name in (folder / f"{number}.out").read_text().split("\n") if name]
    return found


@pytest.mark.parametrize(("line", "names"), OFFERED)
def test_offered(offered: dict[str, list[str]], line: str, names: list[str]) -> None:
    assert sorted(offered[line]) == sorted(names)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_it_installs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hesscli", "--show-completion", "bash"],
        env=os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True, encoding="utf-8", timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
