"""The benchmarks run, and all peers that are installed agree. Times need a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def benchmarks(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "tests.benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def toy(python: str, task: str, folder: Path, *options: str) -> dict[str, Any]:
    """What a task gave at toy size, as the JSON document has it."""
    document = folder / "numbers.json"
    ran = benchmarks(python, "--toy", "--threads", "1", "--json", str(document), task, *options)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (found,) = json.loads(document.read_text())["tasks"]
    return found


def tools_of(task: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {tool["name"]: tool for tool in task["tools"]}


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("full-mlp", ()),
        ("diag-transformer", ("--peer", "vmap-jvp-grad")),
        ("elements-cnn", ("--peer", "vmap-jvp-grad", "--peer", "backpack")),
    ],
)
def test_peers_agree_at_toy_size(
    warm: str, task: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    tools = tools_of(toy(warm, task, tmp_path, *options))
    assert tools["hesscli"]["runs"]
    assert tools["vmap-jvp-grad"]["error"] < 1e-3


def test_eigenvalues_agree_with_a_float64_reference_at_toy_size(warm: str, tmp_path: Path) -> None:
    tools = tools_of(toy(warm, "eigen-mlp", tmp_path))
    for name in ("hesscli", "eigsh-operator"):
        assert tools[name]["error"] < 1e-3
        assert tools[name]["residual"] < 1e-3
        assert tools[name]["products"] > 10


def test_products_agree_with_a_float64_reference_at_toy_size(warm: str, tmp_path: Path) -> None:
    task = toy(warm, "product-mlp", tmp_path)
    assert 0 < tools_of(task)["hesscli"]["error"] < 1e-5
    assert task["in_gradients"] > 0


def test_list_and_unknown_task() -> None:
    listed = benchmarks(sys.executable, "--list")
    assert listed.returncode == 0
    assert "full-mlp" in listed.stdout
    unknown = benchmarks(sys.executable, "no-such-task")
    assert unknown.returncode == 2
    assert "full-mlp" in unknown.stderr
