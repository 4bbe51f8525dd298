"""The benchmarks run, and all peers that are installed agree. Times need a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("task", ["full-mlp", "diag-transformer", "elements-cnn"])
def test_peers_agree_at_toy_size(task: str, tmp_path: Path) -> None:
    document = tmp_path / "numbers.json"
    ran = benchmarks("--toy", "--threads", "1", "--json", str(document), task)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    tools = {tool["name"]: tool for tool in json.loads(document.read_text())["tasks"][0]["tools"]}
    assert tools["hesscli"]["runs"]
    assert tools["vmap-jvp-grad"]["error"] < 1e-3


def test_eigenvalues_agree_with_a_float64_reference_at_toy_size(tmp_path: Path) -> None:
    document = tmp_path / "numbers.json"
    ran = benchmarks("--toy", "--threads", "1", "--json", str(document), "eigen-mlp")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    tools = {tool["name"]: tool for tool in json.loads(document.read_text())["tasks"][0]["tools"]}
    for name in ("hesscli", "eigsh-operator"):
        assert tools[name]["error"] < 1e-3
        assert tools[name]["residual"] < 1e-3
        assert tools[name]["products"] > 10


def test_products_agree_with_a_float64_reference_at_toy_size(tmp_path: Path) -> None:
    document = tmp_path / "numbers.json"
    ran = benchmarks("--toy", "--threads", "1", "--json", str(document), "product-mlp")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (task,) = json.loads(document.read_text())["tasks"]
    assert task["tools"][0]["name"] == "hesscli"
    assert 0 < task["tools"][0]["error"] < 1e-5
    assert task["in_gradients"] > 0


def test_list_and_unknown_task() -> None:
    listed = benchmarks("--list")
    assert listed.returncode == 0
    assert "full-mlp" in listed.stdout
    unknown = benchmarks("no-such-task")
    assert unknown.returncode == 2
    assert "full-mlp" in unknown.stderr
