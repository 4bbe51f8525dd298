"""Bounds that make a command exit with 1 after it has done everything else."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cases import BY_NAME, save
from conftest import read
from hessian_files import symmetric, write

from hesscli.cli.gates import gate
from hesscli.errors import CheckError


def test_compute(cli, tmp_path):
    model, data = save(BY_NAME["mlp-tanh"], "script", tmp_path)
    command = ("compute", model, data, *BY_NAME["mlp-tanh"].arguments())
    assert cli(*command).code == 0
    document, tensors = read(tmp_path / "hessian.safetensors")
    tops = {b: float(np.linalg.eigvalsh(t.numpy())[-1]) for b, t in tensors.items()}
    name = max(tops, key=tops.get)
    (tmp_path / "hessian.safetensors").unlink()
    ran = cli(*command, "--fail-above", tops[name] * 0.99, "--json", "-q")
    assert ran.code == 1
    assert ran.stderr == (
        f"error: eig_max of {name} is {tops[name]:.6g}, above --fail-above {tops[name] * 0.99:g}\n"
    )
    assert json.loads(ran.stdout)["blocks"]
    assert read(tmp_path / "hessian.safetensors")[0] == document
    assert cli(*command, "--fail-above", tops[name] * 1.01).code == 0


def test_compute_needs_the_eigenvalues_of_every_block(cli, tmp_path, monkeypatch):
    model, data = save(BY_NAME["mlp-tanh"], "script", tmp_path)
    command = ("compute", model, data, *BY_NAME["mlp-tanh"].arguments())
    ran = cli(*command, "--fail-above", 1, "--stats", "basic")
    assert "--stats basic computes none" in ran.fails(2)
    assert ran.hint.endswith("--stats all")
    assert not (tmp_path / "hessian.safetensors").exists()
    monkeypatch.setattr("hesscli.spectrum.statistics.QUICK_LIMIT", 1)
    assert cli(*command, "--fail-above", 1e6).code == 0
    document, _ = read(tmp_path / "hessian.safetensors")
    assert all(block["eig_max"] is not None for block in document["blocks"])


def test_a_dry_run_checks_nothing(cli, tmp_path):
    model, data = save(BY_NAME["mlp-tanh"], "script", tmp_path)
    ran = cli(
        "compute", model, data, *BY_NAME["mlp-tanh"].arguments(), "--dry-run", "--fail-above", -1e9
    )
    assert ran.code == 0


@pytest.mark.parametrize("structure", ["block_diagonal", "elements"])
def test_eigen(cli, tmp_path, structure):
    matrix = symmetric(5)
    block = matrix.diagonal().copy() if structure == "elements" else matrix
    write(tmp_path / "hessian.safetensors", {"p": block}, structure)
    values = np.sort(block) if structure == "elements" else np.linalg.eigvalsh(block)
    low, high = values[0], values[-1]
    above = ("eigen", "--top", 2, "--json", "--fail-above")
    ran = cli(*above, high - 1e-3)
    assert ran.code == 1
    said = f"an eigenvalue of p is {high:.6g}, above --fail-above {high - 1e-3:g}"
    assert ran.stderr == f"error: {said}\n"
    assert ran.document["eigenvalues"][0] == pytest.approx(high)
    assert cli(*above, high + 1e-3).code == 0
    below = ("eigen", "--top", 2, "--which", "smallest", "-o", "e.safetensors", "--fail-below")
    ran = cli(*below, low + 1e-3)
    assert ran.code == 1
    assert f"an eigenvalue of p is {low:.6g}, below --fail-below" in ran.stderr
    assert (tmp_path / "e.safetensors").exists()
    assert cli(*below, low - 1e-3).code == 0


@pytest.mark.parametrize(
    ("option", "which", "hint"),
    [
        ("--fail-below", "largest", "smallest"),
        ("--fail-below", "magnitude", "smallest"),
        ("--fail-above", "smallest", "largest"),
        ("--fail-above", "magnitude", "largest"),
    ],
)
def test_a_bound_on_the_other_end_is_refused(cli, tmp_path, option, which, hint):
    """It would pass whatever the matrix is."""
    write(tmp_path / "hessian.safetensors", {"p": symmetric(5)})
    ran = cli("eigen", "--which", which, option, 0)
    assert f"--which {which} need not find it" in ran.fails(2)
    assert ran.hint.endswith(f"--which {hint}")


def test_one_of_both_ends_is_the_largest_alone(cli, tmp_path):
    write(tmp_path / "hessian.safetensors", {"p": symmetric(5)})
    ran = cli("eigen", "--fail-above", 1, "--fail-below", 0)
    assert ran.hint.endswith("--which both")
    both = ("eigen", "--which", "both", "--fail-below", 0, "--top")
    ran = cli(*both, 1)
    assert "--top 1 finds the largest alone" in ran.fails(2)
    assert ran.hint.endswith("--top 2")
    assert cli(*both, 2).code == 1


def test_trace(cli, tmp_path):
    model, data = save(BY_NAME["mlp-tanh"], "script", tmp_path)
    command = ("trace", model, data, *BY_NAME["mlp-tanh"].arguments(), "--json")
    total = cli(*command).document["total"]["trace"]
    ran = cli(*command, "--fail-above", total - 1e-3)
    assert ran.code == 1
    said = f"error: the trace is {total:.6g}, above --fail-above {total - 1e-3:g}"
    assert ran.stderr.splitlines()[-1] == said
    assert ran.document["total"]["trace"] == total
    assert cli(*command, "--fail-above", total + 1e-3).code == 0


@pytest.mark.parametrize("options", [("--which", "both"), ("--per-block",), ()])
def test_eigen_of_a_model(cli, tmp_path, options):
    model, data = save(BY_NAME["mlp-tanh"], "script", tmp_path)
    command = ("eigen", model, data, *BY_NAME["mlp-tanh"].arguments(), *options)
    assert cli(*command, "--fail-above", 1e6).code == 0
    ran = cli(*command, "--fail-above", 1e-6)
    assert ran.code == 1
    assert "above --fail-above 1e-06" in ran.stderr
    assert "eigenvalue" in ran.stdout or "eig_max" in ran.stdout
    below = cli(*command, "--fail-below", 1)
    assert below.code == (1 if options else 2)


def test_nan_is_no_bound(cli, tmp_path):
    write(tmp_path / "hessian.safetensors", {"p": symmetric(5)})
    assert cli("eigen", "--fail-above", "nan").code == 2


def test_gate():
    values = [("a", 1.0), ("b", 3.0), ("c", -2.0)]
    gate(values)
    gate(values, above=3.0, below=-2.0)
    with pytest.raises(CheckError, match=r"b is 3, above --fail-above 0\.5"):
        gate(values, above=0.5)
    with pytest.raises(CheckError, match="c is -2, below --fail-below -1"):
        gate(values, below=-1)
    for unknown in (None, float("nan")):
        with pytest.raises(CheckError, match="d is not known"):
            gate([*values, ("d", unknown)], above=10)
        gate([("d", unknown)])
