"""`eigen`, `trace`, `density` and `hvp` of a model from the command line, against dense matrices."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import BY_NAME, expected, save
from conftest import REPOSITORY, read
from interruptions import MULTIPLYING
from oracles import closed_form_linear_regression, hessian
from safetensors.numpy import load_file, save_file
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

import hesscli
from hesscli.cli.density import _edge as edge_text
from hesscli.cli.density import lengths
from hesscli.errors import UsageError
from hesscli.hessian.differences.check import Certificate
from hesscli.hessian.differences.products import Differences
from hesscli.hessian.objective.problem import Problem
from hesscli.hessian.operator import Products
from hesscli.hessian.workers import workers
from hesscli.job import model_eigen, trace
from hesscli.job.setup import batches
from hesscli.spectrum import quadrature

SAMPLES = REPOSITORY / "sample_models"
MLP = (SAMPLES / "digits_mlp.pt", SAMPLES / "digits.npz")
CNN = (
    SAMPLES / "digits_cnn.safetensors", SAMPLES / "digits.npz",
    "--arch", f"{SAMPLES / 'digits_cnn.py'}:digits_cnn",
)  # fmt: skip


def saved(folder: Path, model: nn.Module, **arrays: np.ndarray) -> tuple[Path, Path]:
    torch.jit.script(model).save(folder / "net.pt")
    np.savez(folder / "data.npz", **arrays)
    return folder / "net.pt", folder / "data.npz"


WRITTEN: dict[tuple[str, ...], bytes] = {}


def dense(cli, *words) -> np.ndarray:
    """The whole matrix, which is in `full.safetensors` too; computed once."""
    file, key = Path("full.safetensors"), tuple(map(str, words))
    if key not in WRITTEN:
        ran = cli("compute", *words, "-b", "full", "--dtype", "float64", "-q", "-o", file)
        assert ran.code == 0, ran.stderr
        WRITTEN[key] = file.read_bytes()
    file.write_bytes(WRITTEN[key])
    return load_file(file)["hessian"]


# --- eigen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("which", ["largest", "magnitude", "both"])
@pytest.mark.parametrize("model", [MLP, CNN], ids=["mlp", "cnn"])
def test_top_ten(cli, model, which, curvature):
    matrix = dense(cli, *model, "--curvature", curvature)
    truth = np.linalg.eigvalsh(matrix)[::-1]
    if which == "both":
        truth = np.r_[truth[:5], truth[-5:]]
    elif which == "magnitude":
        truth = truth[np.argsort(-np.abs(truth))][:10]
    # The zeros of a singular matrix are as many as they are hard to tell from zero.
    tolerance = 1e-3 if which == "both" and curvature != "hessian" else 1e-5
    options = ("--curvature", curvature, "--which", which, "--tol", tolerance)
    ran = cli("eigen", *model, *options, "--dtype", "float64", "--json")
    assert ran.code == 0, ran.stderr
    found = ran.document
    assert found["converged"] is True
    assert found["curvature"] == {"fisher": "empirical_fisher"}.get(curvature, curvature)
    assert found["blocks"] == ["hessian"] * 10
    scale = abs(truth[0])
    np.testing.assert_allclose(
        found["eigenvalues"], truth[:10], rtol=1e-8, atol=tolerance * scale / 5
    )
    assert len(found["residuals"]) == 10
    assert max(found["residuals"]) <= tolerance * scale
    assert found["check"]["relative_error"] < 1e-6


def test_float32_and_batches(cli):
    some = (*MLP, "--samples", "0:40")
    truth = np.linalg.eigvalsh(dense(cli, *some))[::-1][:5]
    for batch in ("auto", 17, 1):
        ran = cli("eigen", *some, "--top", 5, "--json", "--batch-size", batch)
        np.testing.assert_allclose(ran.document["eigenvalues"], truth, rtol=1e-4)
        assert ran.document["check"]["relative_error"] < 3e-6  # of differences in float64


def test_each_thread_gets_batches(cli, two_threads, monkeypatch):
    words = ("eigen", *MLP, "--top", "3", "--dtype", "float64", "--device", "cpu", "--json")
    several = cli(*words).document
    whole = cli(*words, "--threads", 1).document
    assert several["eigenvalues"] == pytest.approx(whole["eigenvalues"], rel=1e-12)
    assert several["eigenvalues"] != whole["eigenvalues"]  # summed in another order


@pytest.mark.parametrize(
    ("samples", "threads", "saved", "count"),
    [
        (64, 2, 0.1, 2),
        (64, 2, 1.9, 2),
        (64, 2, 2.1, 4),  # of three, one thread would work on two, and the other would wait
        (64, 1, 2.1, 3),
        (100, 16, 0.1, 15),  # of 7 samples at most
        (8, 16, 0.1, 1),  # the threads share what is in it
    ],
)
def test_all_threads_get_as_many_batches(monkeypatch, samples, threads, saved, count):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    enough = 1 << 20
    batch = batches._for_threads(samples, int(saved * enough) // samples, enough)
    assert -(-samples // batch) == count
    assert workers(torch.device("cpu"), count) == min(threads, count)


def test_vectors_in_a_file(cli, tmp_path):
    matrix = dense(cli, *MLP)
    ran = cli("eigen", *MLP, "--top", 3, "--tol", 1e-6, "--dtype", "float64", "-o", "e.safetensors")
    assert ran.code == 0, ran.stderr
    document, tensors = read(tmp_path / "e.safetensors")
    V, values = tensors["eigenvectors"].numpy(), tensors["eigenvalues"].numpy()
    np.testing.assert_allclose(V @ V.T, np.eye(3), atol=1e-9)
    assert np.linalg.norm(matrix @ V.T - V.T * values) < 1e-5
    assert "path" not in document["model"]
    first = (tmp_path / "e.safetensors").read_bytes()
    cli("eigen", *MLP, "--top", 3, "--tol", 1e-6, "--dtype", "float64", "-o", "e.safetensors")
    assert (tmp_path / "e.safetensors").read_bytes() == first


@pytest.mark.parametrize("outputs", [3, 10])
def test_every_eigenvalue_as_often_as_there_are_outputs(cli, tmp_path, outputs):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((300, 200)) * np.linspace(0.2, 2, 200)
    model = nn.Linear(200, outputs, bias=False)
    files = saved(tmp_path, model, x=x.astype(np.float32), y=np.zeros((300, outputs), np.float32))
    truth = closed_form_linear_regression(torch.from_numpy(x), 1, bias=False) / outputs
    truth = np.repeat(np.linalg.eigvalsh(truth.numpy())[::-1], outputs)
    ran = cli("eigen", *files, "--top", 12, "--json")
    assert ran.code == 0, ran.stderr
    np.testing.assert_allclose(ran.document["eigenvalues"], truth[:12], rtol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "layer-norm",
        "weight-norm",
        "multihead-attention",
        "gru",
        "mlp-relu",
        "ce-weight-ignore-smoothing",
    ],
)
def test_small_models_are_done_densely(cli, tmp_path, name):
    model, data = save(BY_NAME[name], "trace", tmp_path)
    truth = np.linalg.eigvalsh(expected(BY_NAME[name]).numpy())[::-1]
    ran = cli("eigen", model, data, *BY_NAME[name].arguments(), "--json", "--top", 4)
    assert ran.code == 0, ran.stderr
    np.testing.assert_allclose(ran.document["eigenvalues"], truth[:4], atol=1e-8)
    assert ran.document["products"] == len(truth)


def test_without_second_derivatives(cli, tmp_path):
    model, data = save(BY_NAME["segments"], "script", tmp_path)
    truth = np.linalg.eigvalsh(expected(BY_NAME["segments"]).numpy())[::-1]
    ran = cli("eigen", model, data, *BY_NAME["segments"].arguments(), "--json", "--top", 2)
    assert ran.code == 0, ran.stderr
    assert ran.document["method"] == "finite-difference"
    assert any("finite-difference instead" in note for note in ran.notes)
    np.testing.assert_allclose(ran.document["eigenvalues"], truth[:2], atol=1e-4)


def test_params_and_extremes_of_blocks(cli):
    ran = cli("compute", *MLP, "--stats", "all", "--json", "-q")
    blocks = {facts["name"]: facts for facts in ran.document["blocks"]}
    one = cli("eigen", *MLP, "--params", "fc1.weight", "--top", 1, "--json").document
    assert one["eigenvalues"][0] == pytest.approx(blocks["fc1.weight"]["eig_max"], rel=1e-4)
    ran = cli("eigen", *MLP, "--per-block", "--json", "-o", "e.safetensors")
    assert ran.code == 0, ran.stderr
    found = ran.document
    V = load_file("e.safetensors")["eigenvectors"]
    np.testing.assert_allclose(np.linalg.norm(V, axis=1), 1)
    own = ((V @ dense(cli, *MLP)) * V).sum(1)
    np.testing.assert_allclose(own, found["eigenvalues"], rtol=1e-4, atol=1e-4)
    for i in range(0, 8, 2):
        facts = blocks[found["blocks"][i]]
        assert found["blocks"][i + 1] == facts["name"]
        assert found["eigenvalues"][i] == pytest.approx(facts["eig_max"], rel=1e-4)
        assert found["eigenvalues"][i + 1] == pytest.approx(facts["eig_min"], abs=1e-4)
    text = cli("eigen", *MLP, "--per-block").stdout
    assert "fc1.weight" in text
    assert "eig_min" in text


class Attention(nn.Module):
    """Its key's bias adds the same to all scores of a query, which the softmax takes out."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.query(x) @ self.key(x).mT
        return (scores.softmax(-1) @ self.value(x)).sum(1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tolerance", [0.1, 1e-3, 0])
def test_a_block_that_is_zero_but_for_rounding(cli, tmp_path, dtype, tolerance):
    torch.manual_seed(0)
    files = saved(tmp_path, Attention(), x=torch.randn(7, 4, 3), y=torch.randn(7, 3))
    words = ("--per-block", "--dtype", dtype, "--tol", tolerance, "--json")
    ran = cli("eigen", *files, *words)
    assert ran.code == 0, ran.stderr
    document = ran.document
    ends = [
        v
        for n, v in zip(document["blocks"], document["eigenvalues"], strict=True)
        if "key.bias" in n
    ]
    assert np.abs(ends).max() < 1e-6 * max(document["eigenvalues"])


@pytest.mark.parametrize(
    ("words", "job", "function", "left"),
    [
        (("eigen", "--per-block"), model_eigen, "search", [1, 1, 1, 1]),
        (("trace",), trace, "compute_blocks", [0]),
    ],
)
def test_graphs_give_way_to_what_takes_their_place(cli, monkeypatch, words, job, function, left):
    """Each block's to those of the next one; those of the check, which are of the whole matrix, to both."""
    made, kept = weakref.WeakSet(), []
    init, work = Products.__init__, getattr(job, function)

    def counted(self, *arguments):
        made.add(self)
        init(self, *arguments)

    def worked(*arguments):
        found = work(*arguments)
        kept.append(sum(bool(each.kept) for each in made))
        return found

    monkeypatch.setattr(Products, "__init__", counted)
    monkeypatch.setattr(job, function, worked)
    assert cli(words[0], *MLP, *words[1:], "--samples", 20).code == 0
    assert kept == left


def test_the_check_of_several_blocks_is_the_worst():
    checks = [{"relative_error": error, "directions": 1} for error in (1e-9, 3e-7, 1e-8)]
    assert model_eigen._worst(checks) == {"relative_error": 3e-7, "directions": 3}


def test_one_parameter_and_a_zero_hessian(cli, tmp_path):
    x = np.arange(1, 5, dtype=np.float32).reshape(4, 1)
    one = saved(tmp_path, nn.Linear(1, 1, bias=False), x=x, y=np.zeros((4, 1), np.float32))
    ran = cli("eigen", *one, "--json")
    assert ran.document["eigenvalues"] == pytest.approx([2 * float((x**2).mean())])
    x = np.ones((4, 700), np.float32)
    flat = saved(tmp_path, nn.Linear(700, 1), x=x, y=np.full((4, 1), -9, np.float32))
    ran = cli("eigen", *flat, "--loss", "l1", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.document["eigenvalues"] == [0.0] * 10
    assert cli("trace", *flat, "--loss", "l1", "--json").document["total"]["trace"] == 0


@pytest.mark.parametrize(
    "command", [("eigen", "--tol", 0), ("trace", "--method", "hvp", "--rel-error", 0)]
)
def test_a_tolerance_of_zero_is_what_rounding_leaves_or_all_products(cli, command):
    name, *options = command
    document = cli(name, *MLP, *options, "--max-products", 200, "--json").document
    assert document["converged"] == (name == "eigen")
    assert document["products"] <= 200


@pytest.mark.parametrize(("products", "code"), [(1000, 0), (600, 5)])
def test_a_search_without_end_where_the_whole_matrix_costs_less(cli, tmp_path, products, code):
    """Hundreds of zeros at the wanted end; more products than the matrix has rows find them all the same."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 10))
    files = saved(
        tmp_path, net, x=torch.randn(40, 20).numpy(), y=torch.randint(0, 10, (40,)).numpy()
    )
    options = ("--curvature", "ggn", "--dtype", "float64", "--which", "smallest", "--json")
    ran = cli("eigen", *files, *options, "--max-products", products)
    assert ran.code == code, ran.stderr
    assert ran.document["products"] <= products
    if not code:
        np.testing.assert_allclose(ran.document["eigenvalues"], 0, atol=1e-12)


def test_not_converged(cli, tmp_path):
    ran = cli("eigen", *MLP, "--max-products", 12, "-o", "e.safetensors", "--json")
    assert ran.code == 5
    assert ran.document["converged"] is False
    assert ran.document["output"] is None
    assert len(ran.document["residuals"]) == 10
    assert "not converged after 12 products" in ran.stderr
    assert "--max-products 300" in ran.hint  # thirty for each
    assert not (tmp_path / "e.safetensors").exists()


@pytest.mark.parametrize("words", [("--top", 2), ("--top", 40), ("--per-block",)])
def test_products_that_a_matrix_takes_beyond_those_allowed_are_noted(cli, words):
    """41 parameters, in blocks of 4 to 20."""
    files = (SAMPLES / "ann.pt", SAMPLES / "ann.npz")
    ran = cli("eigen", *files, *words, "--max-products", 19, "--json")
    assert ran.code == 0, ran.stderr
    said = "--max-products 19 has no effect where the matrix is formed"
    assert sum(note.startswith(said) for note in ran.notes) == 1
    most = 20 if words == ("--per-block",) else 41
    assert not any("--max" in n for n in cli("eigen", *files, *words, "--max-products", most).notes)


def test_nan(cli, tmp_path):
    class Rooted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x * self.a.abs().sqrt()

    files = saved(tmp_path, Rooted(), x=np.ones((2, 3), np.float32), y=np.ones((2, 3), np.float32))
    for command in (["eigen"], ["trace"], ["density"], ["hvp", "--vector", "gradient"]):
        assert "norm is" in cli(command[0], *files, *command[1:]).fails(5)


def test_a_product_that_is_wrong_is_refused(cli, monkeypatch):
    right = Products.__call__
    monkeypatch.setattr(Products, "__call__", lambda self, v: 1.1 * right(self, v))
    for dtype, hint in (("float32", "--dtype float64"), ("float64", "--method finite-difference")):
        ran = cli("eigen", *MLP, "--method", "hvp", "--dtype", dtype)
        assert "differs from differences of gradients" in ran.fails(5)
        assert hint in ran.hint
    ran = cli("eigen", *MLP, "--json", "--top", 1)  # the last resort is right
    assert ran.document["method"] == "finite-difference"
    for options in ((), ("--per-block",)):
        ran = cli("eigen", *MLP, "--no-check", *options, "--json")
        assert ran.document["check"] is None
    double = Differences.__call__
    monkeypatch.setattr(Differences, "__call__", lambda self, v: 1.1 * double(self, v))
    ran = cli("eigen", *MLP, "--dtype", "float64")
    assert "hint" not in ran.stderr  # both were tried
    assert ran.code == 5


@pytest.mark.parametrize(
    "words", [("eigen",), ("eigen", "--per-block"), ("trace",), ("density",), ("hvp",)]
)
@pytest.mark.parametrize("right", [0, 1])
def test_products_that_are_not_finite(cli, monkeypatch, words, right):
    """From the first one on, which is the check's, or after it."""
    made, product = [], Products.__call__

    def broken(self: Products, v: Tensor) -> Tensor:
        made.append(v)
        return product(self, v) * (1 if len(made) <= right else torch.nan)

    monkeypatch.setattr(Products, "__call__", broken)
    vector = ("--vector", "gradient") if words == ("hvp",) else ()
    for check in ("--check", "--no-check"):
        made.clear()
        ran = cli(words[0], *CNN, *words[1:], *vector, "--method", "hvp", check)
        assert "product is not finite (NaN or inf)" in ran.fails(5)


def test_vectors_for_which_there_is_no_memory(cli, monkeypatch):
    from hesscli.job import operator

    monkeypatch.setattr(operator, "free_memory", lambda device: 4 * 30 * 1210)
    ran = cli("eigen", *MLP, "--top", 10)
    assert "--top 10 holds 38 vectors of 1210 numbers, 184 kB; 145 kB" in ran.fails(6)
    assert ran.hint.endswith("--top 7")
    assert cli(*shlex.split(ran.hint)[1:]).code == 0
    assert cli("eigen", *MLP, "--top", 8).code == 6
    ran = cli("density", *MLP, "--probes", 1, "--steps", 40)
    assert "--steps 40 holds 44 vectors of 1210 numbers, 213 kB" in ran.fails(6)
    assert cli("density", *MLP, "--probes", 1, *ran.hint.split()[-2:]).code == 0
    ran = cli("density", *MLP, "--probes", 61, "--steps", 20)
    assert "the whole matrix holds 7260 vectors" in ran.fails(6)
    assert cli("density", *MLP, "--steps", 20, *ran.hint.split()[-2:]).code == 0
    ran = cli("trace", *MLP, "--method", "hvp")
    assert "the estimate holds 40 vectors" in ran.fails(6)
    assert ran.hint.endswith("--params fc2.weight")
    assert cli(*shlex.split(ran.hint)[1:]).code == 0
    monkeypatch.setattr(operator, "free_memory", lambda device: 5 * 8 * 1210**2)
    for command, *words in (("eigen", "--top", 404), ("density", "--probes", 16)):
        ran = cli(command, *MLP, *words)  # in float64, and LAPACK's work beside it
        assert "the whole matrix holds 7260 vectors of 1210 numbers, 70.3 MB" in ran.fails(6)
    assert ran.hint.endswith("--probes 15")
    # A search holds three vectors for each eigenvalue, and eight.
    monkeypatch.setattr(operator, "free_memory", lambda device: 4 * 40 * 1210)
    ran = cli("eigen", *MLP, "--top", 404)
    assert "the whole matrix" in ran.fails(6)
    assert ran.hint.endswith("--top 10")


@pytest.mark.parametrize(("vectors", "limit"), [(12 * 1210, 310), (12 * 1210 - 1, 1520)])
def test_a_search_gives_way_to_a_matrix_only_where_there_is_memory(
    cli, monkeypatch, vectors, limit
):
    from hesscli.job import model_eigen, operator

    given = []

    def noted(operator, options, max_products):
        given.append(max_products)
        raise KeyboardInterrupt

    monkeypatch.setattr(model_eigen, "_lanczos", noted)
    monkeypatch.setattr(operator, "free_memory", lambda device: 4 * vectors * 1210)
    assert cli("eigen", *MLP, "--top", 2, "--max-products", 1520).code == 130
    assert given == [limit]


def test_a_file_of_all_blocks_for_which_there_is_no_memory(cli, monkeypatch):
    from hesscli.job import operator

    monkeypatch.setattr(operator, "free_memory", lambda device: 7 * 8 * 1210)
    ran = cli("eigen", *MLP, "--per-block", "--samples", 20, "-o", "e.safetensors")
    assert "the file holds 8 vectors of 1210 numbers, 77.4 kB" in ran.fails(6)
    assert ran.hint.endswith("--params fc1.weight")
    assert cli(*shlex.split(ran.hint)[1:]).code == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["eigen", *MLP, "--block", "fc1.weight"], 2, "--block goes with a Hessian file"),
        (["eigen", *MLP, "--method", "preactivation"], 2, "products are made by hvp"),
        (
            ["eigen", *MLP, "--method", "finite-difference", "--curvature", "ggn"],
            2,
            "Hessian alone",
        ),
        (["eigen", "none.pt", MLP[1]], 2, "none.pt"),
        (["hvp", *MLP], 2, "expected one of --vector and --per-fedavg"),
        (["hvp", *MLP, "--vector", "gradient", "--query", MLP[1]], 2, "--query goes with"),
        (["hvp", *MLP, "--query", MLP[1]], 2, "--query goes with"),
        (["hvp", *MLP, "--vector", "none.safetensors"], 2, "none.safetensors"),
        (["hvp", *MLP, "--per-fedavg", 0.1, "--curvature", "ggn"], 2, "defined with the Hessian"),
        (["density", *MLP, "--plot", "p.gif"], 2, ".png, .svg, .pdf"),
        (["density", *MLP, "-o", "p.txt"], 2, ".safetensors nor .json"),
        (
            ["compute", *MLP, "--curvature", "fisher", "--method", "preactivation"],
            5,
            "preactivation is not exact here: it does not give this matrix",
        ),
    ],
)
def test_refused(cli, words, code, said):
    assert said in cli(*words).fails(code)


def test_what_another_command_wrote_is_no_hessian(cli):
    cli("hvp", *MLP, "--vector", "gradient", "-o", "products.safetensors", "-q")
    for command in ("show", "eigen"):
        ran = cli(command, "products.safetensors")
        assert "products.safetensors: written in the format hesscli.hvp/1; this" in ran.fails(3)


def test_options_of_a_problem_do_not_go_with_a_file(cli):
    cli("compute", *MLP, "-q")
    assert cli("eigen", "--top", 1).code == 0
    assert cli("eigen", "hessian.safetensors", "--loss", "mse").code == 2
    assert cli("eigen", "hessian.safetensors", "--no-check").code == 2


# --- trace ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("model", [MLP, CNN], ids=["mlp", "cnn"])
def test_exact_trace(cli, model, curvature):
    matrix = dense(cli, *model, "--curvature", curvature)
    ran = cli("trace", *model, "--curvature", curvature, "--dtype", "float64", "--json")
    assert ran.code == 0, ran.stderr
    total = ran.document["total"]
    assert total["trace"] == pytest.approx(np.trace(matrix), rel=1e-10)
    assert total["standard_error"] == 0
    assert total["mean"] == pytest.approx(np.trace(matrix) / len(matrix))
    assert ran.document["exact"] is True
    offset = 0
    for facts in ran.document["blocks"]:
        part = np.diag(matrix)[offset : offset + facts["size"]]
        assert facts["trace"] == pytest.approx(part.sum(), rel=1e-9)
        assert facts["mean"] == pytest.approx(part.mean(), rel=1e-9)
        assert facts["standard_error"] == 0
        offset += facts["size"]
    assert "exact" in cli("trace", *model, "--curvature", curvature).stdout


@pytest.mark.parametrize("method", ["preactivation", "gauss-newton"])
def test_a_trace_by_a_route_that_makes_no_products(cli, method):
    ran = cli("trace", *MLP, "--method", method, "--json", "--max-products", 2)
    assert (ran.code, ran.document["method"], ran.document["exact"]) == (0, method, True)
    expected = cli("trace", *MLP, "--json").document["total"]["trace"]
    assert ran.document["total"]["trace"] == pytest.approx(expected, rel=1e-5)


def test_an_exact_trace_has_one_copy_in_float64(cli, monkeypatch):
    """Of the check of a product, and of that of the diagonal."""
    double, copies = Problem.double, []
    monkeypatch.setattr(Problem, "double", lambda self: copies.append(1) or double(self))
    assert cli("trace", *MLP, "--samples", 20).code == 0
    assert len(copies) == 1


def test_estimated_trace(cli):
    matrix = dense(cli, *MLP)
    estimate = ("--method", "hvp", "--json", "--max-products", 400)
    hits = []
    for seed in range(10):
        ran = cli("trace", *MLP, *estimate, "--seed", seed)
        assert ran.code == 0, ran.stderr
        total = ran.document["total"]
        hits.append(abs(total["trace"] - np.trace(matrix)) <= 2 * total["standard_error"])
        assert total["standard_error"] > 0
        assert ran.document["converged"] == (total["standard_error"] <= 0.01 * total["trace"])
        parts = [facts["trace"] for facts in ran.document["blocks"]]
        assert sum(parts) == pytest.approx(total["trace"])
        ends = np.cumsum([facts["size"] for facts in ran.document["blocks"]])
        truth = [part.sum() for part in np.split(np.diag(matrix), ends[:-1])]
        errors = np.array([facts["standard_error"] for facts in ran.document["blocks"]])
        assert (np.abs(np.array(parts) - truth) <= 5 * errors).all()
    assert sum(hits) >= 7
    assert "+- " in cli("trace", *MLP, "--method", "hvp", "--rel-error", 0.1).stdout


def test_a_trace_that_an_estimate_does_not_reach_is_exact_where_that_costs_no_more(cli, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 10)).double()
    files = saved(
        tmp_path, model, x=np.random.default_rng(0).random((30, 20)), y=np.zeros((30, 10))
    )
    rough = ("trace", *files, "--method", "hvp", "--json", "--rel-error")
    found = cli(*rough, 1e-6).document
    assert (found["exact"], found["converged"]) == (True, True)
    assert found["total"]["trace"] == pytest.approx(np.trace(dense(cli, *files)), rel=1e-10)
    assert cli(*rough, 1e-6, "--max-products", 600).document["exact"] is False
    assert cli(*rough, 0.1).document["exact"] is False


def test_a_trace_is_exact_where_products_of_a_deep_narrow_model_cost_more(cli, tmp_path):
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU())]
    x, y = np.random.default_rng(0).standard_normal((8, 16)), np.arange(8) % 2
    files = saved(tmp_path, nn.Sequential(*layers, nn.Linear(16, 2)).double(), x=x, y=y)
    found = cli("trace", *files, "--json").document
    assert found["exact"] is True
    assert found["products"] < 10
    rows = cli("compute", *files, "-b", "elements", "--method", "hvp", "--json", "-o", "rows.st")
    assert found["total"]["trace"] == pytest.approx(rows.document["total"]["trace"], rel=1e-8)


def test_an_estimate_that_is_interrupted_is_not_made_exact(cli, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 10)).double()
    x, y = np.random.default_rng(0).random((30, 20)), np.zeros((30, 10))

    def interrupted(listener, most, products, relative, tolerance):
        if products >= 20:
            raise KeyboardInterrupt

    monkeypatch.setattr("hesscli.job.trace.report", interrupted)
    words = ("--method", "hvp", "--rel-error", 1e-6, "--json")
    ran = cli("trace", *saved(tmp_path, model, x=x, y=y), *words)
    assert ran.code == 130
    assert (ran.document["exact"], ran.document["interrupted"]) == (False, True)
    assert ran.document["products"] < 60


def test_a_trace_by_differences(cli):
    words = ("--method", "finite-difference", "--max-products", 20, "--json")
    document = cli("trace", *MLP, *words).document
    assert (document["method"], document["exact"]) == ("finite-difference", False)
    assert document["products"] == 20
    total = document["total"]
    truth = np.trace(dense(cli, *MLP))
    assert abs(total["trace"] - truth) <= 5 * total["standard_error"]


def test_a_trace_that_stays_rough_passes_no_gate(cli):
    rough = ("trace", *MLP, "--method", "hvp", "--max-products", 20)
    total = cli(*rough, "--json").document["total"]
    reached = total["standard_error"] / total["trace"]
    assert cli(*rough).code == 0
    ran = cli(*rough, "--fail-above", 1e9)
    assert ran.code == 5
    assert "+- " in ran.stdout
    assert f"the standard error is {reached:.2g} of the total after 20 products" in ran.stderr
    assert ran.hint.endswith("--max-products 80")


# --- density --------------------------------------------------------------------------------------


def test_density_of_a_file_and_of_a_model(cli, tmp_path):
    truth = np.linalg.eigvalsh(dense(cli, *MLP))
    ran = cli("density", "full.safetensors", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.document["exact"] is True
    np.testing.assert_allclose(ran.document["nodes"], truth, atol=1e-10)
    ran = cli("density", *MLP, "--probes", 4, "--steps", 40, "--json", "-o", "d.safetensors")
    assert ran.code == 0, ran.stderr
    found = ran.document
    assert sum(found["weights"]) == pytest.approx(1)
    assert found["products"] == 160
    assert sum(found["histogram"]["mass"]) == pytest.approx(1)
    mean = np.dot(found["nodes"], found["weights"])
    assert mean == pytest.approx(truth.mean(), abs=0.01)
    assert max(found["nodes"]) == pytest.approx(truth[-1], rel=1e-3)
    document, tensors = read(tmp_path / "d.safetensors")
    assert tensors["nodes"].tolist() == found["nodes"]
    assert tensors["weights"].tolist() == found["weights"]
    assert document["probes"] == 4


def test_density_of_a_small_model_is_exact(cli, tmp_path):
    model, data = save(BY_NAME["mlp-tanh"], "script", tmp_path)
    ran = cli("density", model, data, "--json", "-o", "d.json")
    assert ran.code == 0, ran.stderr
    truth = np.linalg.eigvalsh(expected(BY_NAME["mlp-tanh"]).numpy())
    np.testing.assert_allclose(ran.document["nodes"], truth, atol=1e-9)
    assert (ran.document["probes"], ran.document["steps"]) == (0, None)
    kept = json.loads((tmp_path / "d.json").read_text())
    assert kept["nodes"] == ran.document["nodes"]
    assert cli("density", model, data, "-o", "d.json").code == 0  # its own file is replaced
    (tmp_path / "notes.json").write_text("{}")
    assert cli("density", model, data, "-o", "notes.json").code == 2
    assert (tmp_path / "notes.json").read_text() == "{}"


def test_density_is_exact_where_that_takes_no_more_products(cli):
    truth = np.linalg.eigvalsh(dense(cli, *MLP))
    size = len(truth)
    steps = -(-size // 16)
    ran = cli("density", *MLP, "--probes", 16, "--steps", steps, "--json", "--dtype", "float64")
    assert ran.document["exact"] is True
    assert size == ran.document["products"] <= 16 * steps
    np.testing.assert_allclose(ran.document["nodes"], truth, atol=1e-6)
    ran = cli("density", *MLP, "--probes", 1, "--steps", size // 16, "--json")
    assert ran.document["exact"] is False


@pytest.mark.parametrize("blocks", ["diag", "elements", "full"])
def test_density_is_printed(cli, blocks):
    cli("compute", *MLP, "-q", "-b", blocks)
    text = cli("density").stdout
    lines = [line for line in text.splitlines() if " to " in line]
    assert len(lines) == 24
    assert max(map(len, text.splitlines())) <= 80
    shares = [line.split()[3] for line in lines]
    assert sum(float(s) for s in shares if s != "-") == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("least", "most", "width"),
    [(0, 1e-9, 8), (1, 1 + 1e-5, 13), (0, 1e12, 8), (1e9, 1e9 + 1, 17), (-1e8, 1e8, 9), (0, 30, 4)],
)
def test_edges_are_told_apart(least, most, width):
    edges = np.linspace(least, most, 25).tolist()
    texts = [edge_text(edge, edges) for edge in edges]
    assert len(set(texts)) == len(edges)
    assert max(map(len, texts)) <= width
    np.testing.assert_allclose(list(map(float, texts)), edges, atol=0.05 * (most - least))


def test_shares_that_are_rounding_do_not_set_the_scale():
    assert lengths([1.0, 0.1, 0.01, 0.0], 100) == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert lengths([0.1, 0.01, 1e-17], 100) == pytest.approx([3 / 4, 2 / 4, 0])


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_density_is_drawn(cli, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    ran = cli("density", *MLP, "--probes", 1, "--steps", 20, "--plot", f"p.{suffix}")
    assert ran.code == 0, ran.stderr
    drawn = (tmp_path / f"p.{suffix}").read_bytes()
    assert drawn.startswith(starts[suffix])
    ran = cli("density", *MLP, "--probes", 1, "--steps", 20, "--plot", f"p.{suffix}")
    assert ran.code == 0, ran.stderr  # its own picture is replaced, with the same bytes
    assert (tmp_path / f"p.{suffix}").read_bytes() == drawn
    assert {p.name for p in tmp_path.iterdir()} == {f"p.{suffix}"}


def test_no_matplotlib(cli, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = cli("density", *MLP, "--plot", "p.png")
    assert "matplotlib is not installed" in ran.fails(2)
    assert ran.hint == "pip install 'hesscli[plot]'"


# --- hvp ------------------------------------------------------------------------------------------


def pieces(tensors: dict[str, np.ndarray], prefix: str = "") -> np.ndarray:
    names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    return np.concatenate([tensors[prefix + name].reshape(-1) for name in names])


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_products(cli, tmp_path, curvature):
    matrix = dense(cli, *MLP, "--curvature", curvature)
    options = ("--dtype", "float64", "--curvature", curvature)
    ran = cli("hvp", *MLP, *options, "--vector", "gradient", "--gradient", "--json")
    assert ran.code == 0, ran.stderr
    tensors = load_file(tmp_path / "hvp.safetensors")
    g, Hg = pieces(tensors, "gradient."), pieces(tensors)
    np.testing.assert_allclose(Hg, matrix @ g, rtol=1e-8, atol=1e-10)
    assert tensors["fc1.weight"].shape == (16, 64)
    assert ran.document["rayleigh"][0] == pytest.approx(g @ matrix @ g / (g @ g))
    # k vectors, stacked
    shapes = {"fc1.weight": (16, 64), "fc1.bias": (16,), "fc2.weight": (10, 16), "fc2.bias": (10,)}
    drawn = np.random.default_rng(0)
    V = {name: drawn.standard_normal((3, *shape)) for name, shape in shapes.items()}
    save_file(V, "v.safetensors")
    words = ("--vector", "v.safetensors", "-o", "k.safetensors", "--json")
    ran = cli("hvp", *MLP, *options, *words)
    assert ran.code == 0, ran.stderr
    found = load_file(tmp_path / "k.safetensors")
    assert set(found) == set(V)  # no gradient, which was not asked for
    for k in range(3):
        v = pieces({name: value[k] for name, value in V.items()})
        one = pieces({name: value[k] for name, value in found.items()})
        np.testing.assert_allclose(one, matrix @ v, rtol=1e-8, atol=1e-9)
        assert ran.document["rayleigh"][k] == pytest.approx(v @ matrix @ v / (v @ v))
    assert ran.document["vectors"] == 3
    for facts in ran.document["blocks"]:
        name = facts["name"]
        assert facts["vector_norm"] == pytest.approx(np.linalg.norm(V[name].ravel()))
        assert facts["product_norm"] == pytest.approx(np.linalg.norm(found[name].ravel()))
    for key in ("vector_norm", "product_norm"):
        parts = [facts[key] for facts in ran.document["blocks"]]
        assert ran.document["total"][key] == pytest.approx(np.linalg.norm(parts))


def test_no_path_gets_into_a_file(cli, tmp_path):
    folder = Path("somewhere")
    folder.mkdir()
    x, y = np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)
    net = nn.Linear(3, 2)
    files = saved(folder, net, x=x, y=y)
    np.savez(folder / "query.npz", x=x, y=y)
    hessian, vector = folder / "h.safetensors", folder / "v.safetensors"
    assert cli("compute", *files, "-o", hessian).code == 0
    save_file({name: p.detach().numpy() for name, p in net.named_parameters()}, vector)
    for name, words in {
        "a.safetensors": ("hvp", *files, "--vector", vector),
        "b.safetensors": ("hvp", *files, "--per-fedavg", 0.1, "--query", folder / "query.npz"),
        "c.safetensors": ("eigen", *files),
        "d.safetensors": ("eigen", hessian),
        "e.safetensors": ("density", *files),
        "f.safetensors": ("density", hessian),
        "g.json": ("density", hessian),
    }.items():
        ran = cli(*words, "-o", name)
        assert ran.code == 0, ran.stderr
        assert b"somewhere" not in Path(name).read_bytes(), name


def test_random_vectors_follow_the_seed(cli, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        cli("hvp", *MLP, "--vector", "random", "--seed", seed, "-o", f"{name}.safetensors")
    a, b, c = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_vectors_that_do_not_fit(cli):
    save_file({"fc1.weight": np.zeros((16, 64))}, "v.safetensors")
    ran = cli("hvp", *MLP, "--vector", "v.safetensors")
    assert "holds no tensor 'fc1.bias'" in ran.fails(4)
    assert cli("hvp", *MLP, "--vector", "v.safetensors", "--params", "fc1.weight").code == 0
    save_file({"fc1.weight": np.zeros((64, 16))}, "v.safetensors")
    assert "expected [16, 64], or [k, 16, 64]" in cli(
        "hvp", *MLP, "--vector", "v.safetensors"
    ).fails(4)
    assert "is an input" in cli(
        "hvp", *MLP, "--vector", "v.safetensors", "-o", "v.safetensors"
    ).fails(2)


@pytest.mark.parametrize(
    ("weight", "bias", "code", "said"),
    [
        ((2, 10, 16), (3, 10), 4, "fc2.weight has shape [2, 10, 16], fc2.bias has shape [3, 10]"),
        ((2, 10, 16), (10,), 4, "expected as many vectors in each, one or more"),
        ((10, 16), None, 5, "holds NaN or infinity"),
    ],
)
def test_tensors_that_are_no_vector(cli, weight, bias, code, said):
    bias = np.zeros(bias) if bias else np.full(10, np.inf)
    save_file({"fc2.weight": np.zeros(weight), "fc2.bias": bias}, "v.safetensors")
    ran = cli("hvp", *MLP, "--vector", "v.safetensors", "--params", "fc2.*")
    assert said in ran.fails(code)


def test_no_vectors(cli):
    shape = {"fc1.weight": np.zeros((0, 16, 64))}
    save_file(shape, "v.safetensors")
    ran = cli("hvp", *MLP, "--vector", "v.safetensors", "--params", "fc1.weight")
    assert "fc1.weight has shape [0, 16, 64]; expected as many vectors" in ran.fails(4)


@pytest.mark.parametrize(
    ("count", "before", "after"),
    [
        (1, "", "-"),
        (2, "2 vectors, ", "-, -"),
        (5, "5 vectors, ", "-, -, -, -, -"),
        (6, "6 vectors, ", "-, -, -, -, -, ..."),
    ],
)
def test_vectors_are_counted(cli, count, before, after):
    """Of vectors that are zero there is no quotient."""
    save_file({"fc2.bias": np.zeros((count, 10))}, "v.safetensors")
    ran = cli("hvp", *MLP, "--vector", "v.safetensors", "--params", "fc2.bias")
    assert f"\nvector   {before}v.safetensors, v'Hv / v'v = {after}\n" in ran.stdout


def test_complex_vectors(cli):
    save_file({"fc2.bias": np.full(10, 1j, "c8")}, "v.safetensors")
    ran = cli("hvp", *MLP, "--vector", "v.safetensors", "--params", "fc2.bias")
    assert "fc2.bias is complex" in ran.fails(4)


def test_eigenvectors_are_no_products(cli):
    assert cli("eigen", *MLP, "-o", "e.safetensors").code == 0
    refused = cli("hvp", *MLP, "--vector", "e.safetensors")
    assert "e.safetensors: what hesscli eigen wrote; expected" in refused.fails(3)
    assert "hint: " not in refused.stderr


def test_products_are_vectors(cli, tmp_path):
    """H (H v), from one file to the next."""
    matrix = dense(cli, *MLP)
    options = ("--dtype", "float64", "--vector")
    assert cli("hvp", *MLP, *options, "gradient", "-o", "a.safetensors").code == 0
    assert cli("hvp", *MLP, *options, "a.safetensors", "-o", "b.safetensors").code == 0
    names = [name for name, _ in torch.jit.load(MLP[0]).named_parameters()]
    first, second = (
        np.concatenate([read(tmp_path / file)[1][name].numpy().reshape(-1) for name in names])
        for file in ("a.safetensors", "b.safetensors")
    )
    np.testing.assert_allclose(second, matrix @ first, atol=1e-9)


@pytest.mark.parametrize("other", [False, True])
def test_per_fedavg(cli, tmp_path, other):
    """(I - a H(theta)) grad L'(theta - a grad L(theta)), by autograd on a twin."""
    a, generator = 0.3, torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = (torch.randn(6, n, generator=generator).double() for n in (3, 2))
    qx, qy = (torch.randn(5, n, generator=generator).double() for n in (3, 2)) if other else (x, y)
    files = saved(tmp_path, model, x=x.numpy(), y=y.numpy())
    np.savez("query.npz", x=qx.numpy(), y=qy.numpy())
    leaves = list(model.parameters())

    def gradient(x, y):
        value = nn.functional.mse_loss(model(x), y)
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, leaves)])

    H, g = hessian(model, nn.functional.mse_loss, (x,), y), gradient(x, y)
    with torch.no_grad():
        for p, step in zip(leaves, g.split([p.numel() for p in leaves]), strict=True):
            p -= a * step.view_as(p)
    adapted = gradient(qx, qy)
    truth = adapted - a * H @ adapted
    query = ("--query", "query.npz") if other else ()
    ran = cli("hvp", *files, "--per-fedavg", a, *query, "--json")
    assert ran.code == 0, ran.stderr
    told = [line.partition(": ") for line in ran.stderr.splitlines()]
    notes = [text for kind, _, text in told if kind == "note"]
    assert len(notes) == len(set(notes)) == (5 if other else 3)  # of inputs, targets and loss
    assert set(json.loads(ran.stdout)["notes"]) == set(notes)
    found = load_file(tmp_path / "hvp.safetensors")
    names = [name for name, _ in model.named_parameters()]
    flat = np.concatenate([found[name].reshape(-1) for name in names])
    np.testing.assert_allclose(flat, truth.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("option", ["--targets", "--inputs"])
def test_a_file_beside_the_data_is_not_the_querys(cli, tmp_path, option):
    torch.jit.script(nn.Linear(2, 1)).save("net.pt")
    for name, width in (("x", 2), ("y", 1), ("qx", 2), ("other", 2 if option == "--inputs" else 1)):
        np.save(f"{name}.npy", np.random.default_rng(0).standard_normal((7, width)))
    words = ("hvp", "net.pt", "x.npy", option, "other.npy", "--loss", "mse", "--per-fedavg", 0.1)
    assert "other.npy: a file beside DATA" in cli(*words, "--query", "qx.npy").fails(2)


def test_a_query_has_the_loss_of_the_data(cli, tmp_path):
    """One-hot targets alone would look like those of a regression."""
    torch.manual_seed(0)
    x, classes = np.random.default_rng(0).random((6, 3)), np.array([0, 1, 2, 1, 0, 2])
    files = saved(tmp_path, nn.Linear(3, 3).double(), x=x, y=classes)
    np.savez("query.npz", x=x, y=np.eye(3)[classes])
    np.savez("same.npz", x=x, y=classes)
    norms = []
    for query in ("query.npz", "same.npz"):
        ran = cli("hvp", *files, "--per-fedavg", 0.1, "--query", query, "--json")
        assert ran.code == 0, ran.stderr
        norms.append(np.linalg.norm(load_file(tmp_path / "hvp.safetensors")["weight"]))
    assert norms[0] == pytest.approx(norms[1])


# --- parameters of no axis, and of no numbers -----------------------------------------------------


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.layer = nn.Linear(3, 2)
        self.none = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.layer(x) + self.none.sum()


@pytest.fixture
def odd(tmp_path) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, n, generator=generator).numpy() for n in (3, 2))
    torch.manual_seed(0)
    return saved(tmp_path, Odd(), x=x, y=y)


def test_a_scalar_and_an_empty_parameter(cli, odd):
    matrix = dense(cli, *odd)
    ran = cli("hvp", *odd, "--vector", "random", "--gradient", "--dtype", "float64", "--json")
    assert ran.code == 0, ran.stderr
    found = load_file("hvp.safetensors")
    assert {name: found[name].shape for name in ("scale", "none")} == {"scale": (), "none": (0, 3)}
    v = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    names = [part["name"] for part in ran.document["parameters"]]
    product = np.concatenate([found[name].reshape(-1) for name in names])
    np.testing.assert_allclose(product, matrix @ v, atol=1e-12)
    assert cli("hvp", *odd, "--per-fedavg", "0.1").code == 0
    ran = cli("eigen", *odd, "--per-block", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.document["blocks"].count("scale") == 1


@pytest.mark.parametrize(
    "words",
    [("eigen",), ("eigen", "--per-block"), ("trace",), ("density",), ("hvp", "--vector", "random")],
)
def test_no_numbers(cli, odd, words):
    ran = cli(words[0], *odd, *words[1:], "--params", "none")
    assert "every parameter is empty: none" in ran.fails(4)


@pytest.mark.parametrize("blocks", ["diag", "elements"])
def test_a_file_with_an_empty_block(cli, odd, blocks):
    assert cli("compute", *odd, "--gradient", "-b", blocks, "--fail-above", 1e9).code == 0
    assert cli("show").code == 0
    assert cli("diff", "hessian.safetensors", "hessian.safetensors").code == 0
    assert cli("compute", *odd, "-b", "full", "-o", "full.safetensors").code == 0
    assert cli("diff", "full.safetensors", "hessian.safetensors", "--force").code == 0
    loaded = hesscli.load("hessian.safetensors")
    loaded.verify()
    assert loaded.gradient("none").shape == (0, 3)


def test_a_density_of_nothing(cli, odd):
    assert cli("compute", *odd, "--params", "none").code == 0
    assert cli("density").stdout.splitlines()[-2:] == ["density  exact", ""]


# --- the operator in Python -----------------------------------------------------------------------


def test_scipy_takes_the_operator(cli):
    matrix = dense(cli, *MLP)
    H = hesscli.operator(*MLP, dtype="float64")
    assert isinstance(H, LinearOperator)
    assert H.shape == matrix.shape
    assert H.dtype == np.float64
    v = np.random.default_rng(0).standard_normal((len(matrix), 3))
    np.testing.assert_allclose(H @ v[:, 0], matrix @ v[:, 0], atol=1e-9)
    np.testing.assert_allclose(H.matmat(v), matrix @ v, atol=1e-9)
    np.testing.assert_allclose(H.T @ v, matrix @ v, atol=1e-9)
    values = eigsh(H, 3, which="LA")[0][::-1]
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix)[::-1][:3], rtol=1e-9)
    with pytest.raises(hesscli.HesscliError, match="complex"):
        H @ np.full(H.shape[0], 1j)
    part = hesscli.operator(str(MLP[0]), str(MLP[1]), params="fc2.*", dtype="float64")
    np.testing.assert_allclose(part @ np.eye(170), matrix[1040:, 1040:], atol=1e-9)
    assert hesscli.operator(*MLP).dtype == np.float32


def test_the_operator_of_a_module():
    torch.manual_seed(0)
    net, x, y = (
        nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double(),
        torch.randn(5, 3),
        torch.randn(5, 2),
    )
    x, y = x.double(), y.double()
    truth = hessian(net, nn.functional.mse_loss, (x,), y).numpy()
    H = hesscli.operator(net, (x, y))
    with torch.no_grad():
        net[0].weight.zero_()  # the operator's is a copy
    for loss in ("mse", lambda output, target: (output - target) ** 2):
        again = hesscli.operator(net, {"x": x, "y": y}, loss=loss)
        assert again.dtype == np.float64
        assert not np.allclose(again @ np.eye(8), truth)
    np.testing.assert_allclose(H @ np.eye(8, dtype=">f4"), truth, atol=1e-12)
    np.testing.assert_allclose(H @ np.eye(8, dtype=np.longdouble)[0], truth[0], atol=1e-12)
    assert (H @ np.zeros((8, 0))).shape == (8, 0)
    with pytest.raises(hesscli.HesscliError, match="3 arrays"):
        hesscli.operator(net, (x, y, y))


def test_the_operator_knows_its_options():
    with pytest.raises(UsageError, match="no option is called 'blocks'"):
        hesscli.operator(*MLP, blocks="full")


def test_importing_hesscli_loads_no_torch():
    code = "import sys, hesscli, hesscli.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


@pytest.mark.parametrize("command", ["eigen --top 1", "compute -b elements", "compute -b full"])
def test_neither_scipy_nor_sympy_is_loaded(command, tmp_path):
    name, *options = command.split()
    if name == "compute":
        options += ["-o", str(tmp_path / "h.safetensors")]
    code = (
        "import sys\nfrom hesscli.cli import main\n"
        f"sys.argv = ['hesscli', {name!r}, *{[*map(str, MLP)]}, *{options}, '-q']\n"
        "try:\n    main()\nfinally:\n    print({'scipy', 'sympy'} & sys.modules.keys())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ, capture_output=True, text=True
    )
    assert ran.stdout.splitlines()[-1] == "set()"


# --- Ctrl-C ---------------------------------------------------------------------------------------


def test_an_exact_trace_that_is_interrupted(cli, monkeypatch):
    real = trace.compute_blocks

    def first(plan, blocks):
        yield next(iter(real(plan, blocks)))
        raise KeyboardInterrupt

    monkeypatch.setattr(trace, "compute_blocks", first)
    ran = cli("trace", *MLP, "--json")
    assert ran.code == 130
    known = [block["trace"] is not None for block in ran.document["blocks"]]
    assert (known, ran.document["total"]["trace"]) == ([True, False, False, False], None)
    errors = [block["standard_error"] for block in ran.document["blocks"]]
    assert errors == [0, None, None, None]
    assert (ran.document["interrupted"], ran.document["converged"]) == (True, False)


def test_an_exact_trace_that_is_interrupted_leaves_the_estimate_before_it(
    cli, tmp_path, monkeypatch
):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hesscli.job.trace.compute_blocks", interrupted)
    x, y = np.random.default_rng(0).random((30, 20)), np.zeros((30, 10))
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 10)).double()
    words = ("--method", "hvp", "--rel-error", 1e-6, "--json")
    ran = cli("trace", *saved(tmp_path, model, x=x, y=y), *words)
    assert ran.code == 130
    assert ran.document["total"]["standard_error"] > 0
    assert (ran.document["interrupted"], ran.document["converged"]) == (True, False)


def test_a_small_matrix_that_is_interrupted(cli, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(model_eigen, "dense", interrupted)
    ran = cli("eigen", *save(BY_NAME["mlp-tanh"], "script", tmp_path), "--json")
    assert ran.code == 130
    assert (ran.document["eigenvalues"], ran.document["interrupted"]) == ([], True)


def test_a_density_that_is_interrupted_is_neither_written_nor_drawn(cli, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    real = quadrature.lanczos_quadrature

    def interrupted(*arguments):
        return replace(real(*arguments), interrupted=True)

    monkeypatch.setattr(quadrature, "lanczos_quadrature", interrupted)
    words = ("--probes", 1, "--steps", 4, "-o", "d.json", "--plot", "d.png")
    assert cli("density", *MLP, *words).code == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["eigen", "trace", "density"])
def test_interrupted(warm, tmp_path, command):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 10))
    x = torch.randn(3000, 200).numpy()
    files = saved(tmp_path, model, x=x, y=np.arange(3000) % 10)
    options = {
        "eigen": ["--top", "100", "--dtype", "float64", "--max-products", "100000"],
        "trace": ["--method", "hvp", "--rel-error", "1e-9", "--max-products", "100000"],
        "density": ["--probes", "100000", "--steps", "4"],
    }[command]
    child = subprocess.Popen(
        [warm, "-c", MULTIPLYING, command, *files, *options, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    try:
        while "multiplying" not in child.stderr.readline():
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130, stderr
    assert stderr.rstrip().endswith("error: interrupted")
    document = json.loads(stdout)
    assert document["interrupted"] is True
    if command == "eigen":
        assert document["converged"] is False
        assert len(document["residuals"]) == len(document["eigenvalues"]) > 10
    elif command == "trace":
        assert document["total"]["standard_error"] > 0
    else:
        assert sum(document["weights"]) == pytest.approx(1)


def test_all_blocks_are_checked_with_one_copy_in_float64(cli, monkeypatch):
    real, calls = Problem.double, []
    monkeypatch.setattr(Problem, "double", lambda self: calls.append(1) or real(self))
    ran = cli("eigen", *MLP, "--per-block", "--json")
    assert ran.document["check"]["relative_error"] < 1e-3
    assert len(calls) == 1


def test_interrupted_while_a_block_is_checked(cli, monkeypatch):
    real, calls = Certificate.product, []

    def product(*arguments):
        calls.append(1)
        if len(calls) == 3:  # after the whole, and the first block
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(Certificate, "product", product)
    ran = cli("eigen", *MLP, "--per-block", "--json")
    assert ran.code == 130
    assert ran.document["blocks"] == ["fc1.weight"] * 2
    assert ran.document["interrupted"]


@pytest.mark.parametrize(
    ("words", "products"), [(("--per-block",), 200), (("--top", 3, "--params", "fc1.bias"), 15)]
)
def test_products_that_were_not_spent_are_not_to_blame(cli, words, products):
    """Those of all blocks are more than each may have; a small matrix takes one for each row anyway."""
    ran = cli("eigen", *MLP, *words, "--tol", "1e-9", "--max-products", products, "--json")
    assert ran.code == 5
    assert ran.document["products"] > products
    assert not ran.document["spent"]
    assert "rounding in float32" in ran.stderr


@pytest.mark.parametrize("params", ["*", "fc1.bias"])  # by Lanczos, and densely
def test_a_tolerance_that_rounding_keeps_out_of_reach(cli, params):
    words = ("eigen", *MLP, "--top", 3, "--params", params, "--json", "-q")
    ran = cli(*words, "--tol", "1e-9")
    document = ran.document
    assert ran.code == 5
    assert not document["converged"]
    assert max(np.array(document["residuals"]) / document["eigenvalues"]) > 1e-9
    assert ran.hint.endswith("--dtype float64")
    in_float64 = cli(*words, "--tol", "1e-9", "--dtype", "float64").document
    assert in_float64["converged"]
    relative = np.array(in_float64["residuals"]) / in_float64["eigenvalues"]
    assert relative.max() <= 1e-9
    assert cli(*words, "--tol", 0).document["converged"]  # as far as rounding lets it
    ran = cli(*words, "--tol", "1e-19", "--dtype", "float64")
    assert ran.code == 5
    assert cli(*words, "--dtype", "float64", "--tol", ran.hint.split()[-1]).code == 0


def test_a_tolerance_next_to_zero_is_out_of_reach_too(cli, tmp_path):
    """A residual of 1000 over it is more than float64 holds."""
    x = 1e3 * np.random.default_rng(0).standard_normal((50, 700), np.float32)
    files = saved(tmp_path, nn.Linear(700, 1), x=x, y=np.zeros((50, 1), np.float32))
    ran = cli("eigen", *files, "--top", 2, "--tol", "1e-320")
    assert ran.code == 5, ran.stderr
    assert "not converged" in ran.stderr


class Cancels(nn.Module):
    """Terms a million times as large as their sum: products have their rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(x @ torch.outer(self.w, self.w))
        return ((1e6 + 1) * z - 1e6 * z.sin().asin()).sum(1)


def test_no_tolerance_of_products_that_round_much(cli, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 5)
    torch.jit.trace(Cancels(), x).save("net.pt")
    np.savez("data.npz", x=x.numpy())
    options = ("--dtype", "float64", "--loss", "output", "--no-check", "--json")
    document = cli("eigen", "net.pt", "data.npz", "--top", 3, "--tol", 0, *options).document
    assert document["converged"]
    assert max(document["residuals"]) > 1e-14 * document["eigenvalues"][0]


@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.parametrize("seed", range(3))
def test_independent_outputs_repeat_every_eigenvalue(cli, tmp_path, which, seed):
    """Of the smallest, the first copies lie close to the next values."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((200, 130)), rng.standard_normal((200, 4))
    files = saved(tmp_path, nn.Linear(130, 4, bias=False).double(), x=x, y=y)
    ran = cli("eigen", *files, "--top", 6, "--which", which, "--json", "-q")
    truth = np.sort(np.linalg.eigvalsh(2 * x.T @ x / 800).repeat(4))
    truth = truth[:6] if which == "smallest" else truth[::-1][:6]
    np.testing.assert_allclose(ran.document["eigenvalues"], truth, rtol=1e-3)


def test_copies_that_were_not_sought_are_noted(cli):
    words = ("eigen", *MLP, "--top", 3, "--json")
    whole = cli(*words)
    products = whole.document["products"]
    short = cli(*words, "--max-products", products - 4)
    assert short.code == 0, short.stderr
    (note,) = set(short.document["notes"]) - set(whole.document["notes"])
    assert note in short.stderr
    assert f"--max-products {products - 4} ended the search for copies" in note


def test_blocks_say_the_same_once(cli, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 20)
    )
    x, y = torch.randn(40, 40).numpy(), torch.randn(40, 20).numpy()
    words = ("--per-block", "--tol", 0.1, "--max-products", 24, "--json")
    notes = cli("eigen", *saved(tmp_path, net, x=x, y=y), *words).document["notes"]
    assert sum("--max-products 24 ended" in note for note in notes) == 1


@pytest.mark.parametrize("scale", [1e-13, 1e10])
def test_eigenvalues_whose_squares_float32_cannot_hold(cli, tmp_path, scale):
    rng = np.random.default_rng(0)
    x = (scale * rng.standard_normal((50, 600))).astype(np.float32)
    files = saved(tmp_path, nn.Linear(600, 1, bias=False), x=x, y=np.ones((50, 1), np.float32))
    ran = cli("eigen", *files, "--top", 2, "--json", "-q")
    truth = np.linalg.eigvalsh(2 * x.astype(float).T @ x / 50)[::-1][:2]
    np.testing.assert_allclose(ran.document["eigenvalues"], truth, rtol=1e-4)
