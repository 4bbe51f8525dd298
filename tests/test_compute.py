"""`hesscli compute` from the command line to the file."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, KINDS, Case, expected, save
from conftest import REPOSITORY, read
from oracles import hessian, relative_error
from safetensors.numpy import save_file
from torch import nn

import hesscli
from hesscli.errors import ResourceError
from hesscli.files.hessians.hessian_file import HessianFile
from hesscli.files.hessians.tensor_file import sync_folder
from hesscli.hessian.blocks import partition
from hesscli.job.matrix import memory, planning, room
from hesscli.job.matrix.journal import Journal, read_journal
from hesscli.job.matrix.unfinished import Unfinished
from hesscli.job.options import Listener
from hesscli.job.setup.parameters import chosen_parameters

STRUCTURES = {
    "diag": "block_diagonal", "module": "module", "full": "full", "elements": "elements",
}  # fmt: skip
ARCH = ["--arch", f"{REPOSITORY / 'tests' / 'architectures.py'}:build", "--arch-arg"]


def options(case: Case, kind: str) -> list[str]:
    architecture = [*ARCH, f"case={case.name}"] if kind == "state_dict" else []
    return [*case.arguments(), *architecture]


def folder(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def saved_net(path: Path, model: nn.Module, name: str = "net.pt") -> Path:
    torch.jit.script(model).save(path / name)
    return path / name


def saved_data(path: Path, name: str = "data.npz", **arrays: np.ndarray) -> Path:
    np.savez(path / name, **arrays)
    return path / name


@pytest.fixture
def mlp(tmp_path) -> tuple[Path, Path]:
    return save(BY_NAME["mlp-tanh"], "script", tmp_path)


CE = ("--loss", "cross-entropy")


# --- numbers ----------------------------------------------------------------------------------

# (case, kinds); all kinds where that is cheap, each mechanism at least once
RUNS = [
    *(("mlp-tanh", kind) for kind in KINDS),
    *(("conv2d", kind) for kind in KINDS),
    ("gru", "script"), ("gru", "trace"), ("lstm", "state_dict"), ("transformer-gelu", "exported"),
    ("transformer-gelu", "script"), ("tied-names", "state_dict"), ("tied-names", "script"),
    ("weight-norm", "trace"), ("group-norm", "script"), ("batch-norm1d", "exported"),
    ("layer-norm", "trace"), ("embedding-padding", "script"), ("segments", "script"),
    ("ce-weight-ignore-smoothing", "trace"), ("two-inputs", "script"), ("unused", "script"),
    ("dict-output", "script"), ("output-mean", "trace"), ("l1-of-linear", "script"),
    ("mlp-relu", "exported"), ("frozen", "script"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), RUNS, ids=["-".join(run) for run in RUNS])
def test_every_structure(cli, tmp_path, name, kind):
    case, oracle = BY_NAME[name], expected(BY_NAME[name])
    model, data = save(case, kind, tmp_path)
    sizes = {n: p.numel() for n, p in case.make().named_parameters() if p.requires_grad}
    shapes = {n: tuple(p.shape) for n, p in case.make().named_parameters() if p.requires_grad}
    offsets = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
    for option, structure in STRUCTURES.items():
        ran = cli("compute", model, data, *options(case, kind), "-b", option)
        assert ran.code == 0, ran.stderr
        assert not any("differs from gradients" in note for note in ran.notes)
        document, tensors = read(tmp_path / "hessian.safetensors")
        assert document["structure"] == structure
        assert {p["name"]: tuple(p["shape"]) for p in document["parameters"]} == shapes
        assert {p["name"]: p["offset"] for p in document["parameters"]} == offsets
        # A file may list its parameters in another order; the document says which.
        order = {p["name"]: tuple(p["shape"]) for p in document["parameters"]}
        blocks = partition(order, structure)
        assert [facts["name"] for facts in document["blocks"]] == [b.name for b in blocks]
        assert set(tensors) == {b.name for b in blocks}
        for block in blocks:
            found = tensors[block.name]
            index = torch.cat([torch.arange(sizes[p]) + offsets[p] for p in block.parameters])
            truth = oracle[index][:, index]
            if option == "elements":
                truth = truth.diagonal().reshape(shapes[block.name])
            assert found.shape == truth.shape
            assert found.dtype == torch.float64
            error = float((found - truth).norm())
            assert error <= 1e-6 * max(float(truth.norm()), 1e-3 * float(oracle.norm()))
            if option != "elements":
                assert torch.equal(found, found.T)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "script") for name in ("mlp-tanh", "conv2d", "gru", "layer-norm", "mlp-relu")),
        ("gru", "trace"),  # which makes its first state in float32
        ("lstm", "exported"),
    ],
)
def test_float32(cli, tmp_path, name, kind):
    case = BY_NAME[name]
    model, data = save(case, kind, tmp_path, torch.float32)
    for dtype, limit in (("auto", 1e-3), ("float32", 1e-3), ("float64", 1e-6)):
        ran = cli("compute", model, data, *options(case, kind), "-b", "full", "--dtype", dtype)
        assert ran.code == 0, ran.stderr
        document, tensors = read(tmp_path / "hessian.safetensors")
        assert document["check"]["dtype"] == "float64"
        wanted = "float64" if dtype == "float64" else "float32"
        assert str(tensors["hessian"].dtype) == f"torch.{wanted}"
        assert document["dtype"] == wanted
        assert relative_error(tensors["hessian"], expected(case)) < limit


@pytest.mark.parametrize("batch_size", ["auto", 1, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_and_reductions(cli, tmp_path, batch_size, reduction):
    case = BY_NAME["ce-weight-ignore-smoothing"]
    model, data = save(case, "script", tmp_path)
    ran = cli("compute", model, data, *case.arguments(), "-b", "full", "--reduction", reduction,
              "--batch-size", batch_size)  # fmt: skip
    assert ran.code == 0, ran.stderr
    document, tensors = read(tmp_path / "hessian.safetensors")
    weight = case.loss_arguments["weight"]
    kept = case.target[case.target != case.loss_arguments["ignore_index"]]
    denominator = float(weight[kept].sum())
    loss = document["loss"]
    assert loss["reduction"] == reduction
    assert loss["denominator"] == pytest.approx(1 if reduction == "sum" else denominator)
    scale = denominator if reduction == "sum" else 1
    value = case.reference(case.make()(*case.inputs), case.target).item()
    assert loss["value"] == pytest.approx(value * scale)
    assert relative_error(tensors["hessian"], scale * expected(case)) < 1e-9


def test_the_gradient(cli, tmp_path):
    case = BY_NAME["conv2d"]
    model, data = save(case, "script", tmp_path)
    assert cli("compute", model, data, *case.arguments(), "--gradient").code == 0
    document, tensors = read(tmp_path / "hessian.safetensors")
    module = case.make()
    case.reference(module(*case.inputs), case.target).backward()
    total = 0.0
    for name, p in module.named_parameters():
        assert relative_error(tensors[f"gradient.{name}"], p.grad) < 1e-12
        total += float(p.grad.square().sum())
    assert document["gradient_norm"] == pytest.approx(total**0.5)
    assert len(tensors) == 2 * len(document["blocks"])
    assert cli("compute", model, data, *case.arguments()).code == 0
    document, tensors = read(tmp_path / "hessian.safetensors")
    assert not any(key.startswith("gradient") for key in tensors)
    assert "gradient_norm" in document


@pytest.mark.parametrize("blocks", STRUCTURES)
@pytest.mark.parametrize("parameter", ["zero", "number"])
def test_unusual_parameters(cli, tmp_path, parameter, blocks):
    """Without elements, or without axes."""

    class Odd(nn.Module):
        def __init__(self, shape: list[int]):
            super().__init__()
            self.lin = nn.Linear(3, 2)
            self.p, self.q = (nn.Parameter(torch.ones(shape)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.lin(x)) * (self.p.sum() + self.q.sum() + 1)

    torch.manual_seed(0)
    module = Odd([0, 2] if parameter == "zero" else []).double()
    model = saved_net(tmp_path, module)
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    data = saved_data(tmp_path, x=x.numpy(), y=y.numpy())
    ran = cli("compute", model, data, "-b", blocks)
    assert ran.code == 0, ran.stderr
    document, tensors = read(tmp_path / "hessian.safetensors")
    truth = hessian(module, nn.functional.mse_loss, (x,), y)
    names = [p["name"] for p in document["parameters"]]
    assert names == ["p", "q", "lin.weight", "lin.bias"]
    if blocks == "full":
        assert relative_error(tensors["hessian"], truth) < 1e-9
    elif blocks == "elements":
        flat = torch.cat([tensors[name].reshape(-1) for name in names])
        assert relative_error(flat, truth.diagonal()) < 1e-9
        assert tensors["p"].shape == ((0, 2) if parameter == "zero" else ())
    assert cli("eigen", "--top", 3).code == 0


# --- the document -----------------------------------------------------------------------------


def test_the_documents_fields(cli, mlp, tmp_path):
    import hashlib

    ran = cli("compute", *mlp, *CE, "--device", "cpu", "--json")
    assert ran.code == 0, ran.stderr
    document, tensors = read(tmp_path / "hessian.safetensors")
    assert document["schema"] == "hesscli.hessian/1"
    assert {"hesscli", "torch"} <= set(document["versions"])
    assert document["versions"]["torch"] == torch.__version__
    for part, path in zip(("model", "data"), mlp, strict=True):
        assert document[part]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert document["data"]["samples"] == 6
    assert {"name", "arguments", "reduction", "denominator", "value", "inferred"} <= set(
        document["loss"]
    )
    assert document["loss"]["name"] == "cross-entropy"
    assert document["loss"]["inferred"] is False
    assert (document["loss"]["reduction"], document["loss"]["denominator"]) == ("mean", 6)
    assert (document["dtype"], document["device"]) == ("float64", "cpu")
    check = document["check"]
    assert {"kind", "directions", "relative_error", "tolerance"} <= set(check)
    assert check["directions"] >= 4
    assert check["relative_error"] <= check["tolerance"] == 1e-6
    assert check["relative_error"] == max(facts["check_error"] for facts in document["blocks"])
    assert 0 <= document["symmetry_error"] < 1e-6
    for facts in document["blocks"]:
        matrix = tensors[facts["name"]].numpy()
        eigenvalues = np.linalg.eigvalsh(matrix)
        assert facts["size"] == len(matrix)
        assert facts["method"] in ("preactivation", "gauss-newton", "hvp", "finite-difference")
        assert facts["trace"] == pytest.approx(np.trace(matrix))
        assert facts["eig_max"] == pytest.approx(eigenvalues[-1])
        assert facts["eig_min"] == pytest.approx(eigenvalues[0], abs=1e-12)
        assert facts["fro_norm"] == pytest.approx(np.linalg.norm(matrix))
        assert facts["bytes"] == matrix.nbytes
    total = document["total"]
    for key in ("trace", "size", "bytes"):
        assert total[key] == pytest.approx(sum(facts[key] for facts in document["blocks"]))
    norms = [facts["fro_norm"] for facts in document["blocks"]]
    assert total["fro_norm"] == pytest.approx(np.linalg.norm(norms))
    assert total["eig_max"] == max(facts["eig_max"] for facts in document["blocks"])
    assert total["eig_min"] == min(facts["eig_min"] for facts in document["blocks"])
    # What `--json` prints is the file's document, with times and paths besides.
    printed = ran.document
    assert printed["seconds"] > 0
    assert printed["model"].pop("path") == str(mlp[0])
    assert printed["data"].pop("path") == str(mlp[1])
    assert {k: printed[k] for k in document} == document
    text = json.dumps(document)
    assert str(tmp_path) not in text
    assert "seconds" not in text


@pytest.mark.parametrize("level", ["none", "basic", "auto", "all"])
def test_stats(cli, mlp, tmp_path, level, monkeypatch):
    monkeypatch.setattr("hesscli.spectrum.statistics.QUICK_LIMIT", limit := 4)
    assert cli("compute", *mlp, *CE, "--stats", level).code == 0
    document, tensors = read(tmp_path / "hessian.safetensors")
    assert {len(tensor) for tensor in tensors.values()} == {3, 4, 12}
    for facts in document["blocks"]:
        matrix = tensors[facts["name"]].numpy()
        found = [facts[key] for key in ("trace", "fro_norm", "eig_max", "eig_min")]
        values = np.linalg.eigvalsh(matrix)
        truth = [np.trace(matrix), np.linalg.norm(matrix), values[-1], values[0]]
        quick = level == "all" or (level == "auto" and len(matrix) <= limit)
        known = 0 if level == "none" else 4 if quick else 2
        assert found[:known] == pytest.approx(truth[:known], abs=1e-12)
        assert found[known:] == [None] * (4 - known)
    total = document["total"]
    assert (total["trace"] is None) == (total["fro_norm"] is None) == (level == "none")
    for key, furthest in (("eig_max", max), ("eig_min", min)):
        known = [facts[key] for facts in document["blocks"] if facts[key] is not None]
        assert total[key] == furthest(known, default=None)


def test_the_same_command_gives_the_same_bytes(cli, mlp, tmp_path):
    for option in STRUCTURES:
        assert cli("compute", *mlp, *CE, "-b", option, "-o", "one").code == 0
        assert cli("compute", *mlp, *CE, "-b", option, "-o", "two").code == 0
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copies = [elsewhere / f"other{p.suffix}" for p in mlp]
    for path, copy in zip(mlp, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    assert cli("compute", *copies, *CE, "-b", "elements", "-o", "three").code == 0
    assert (tmp_path / "three").read_bytes() == (tmp_path / "two").read_bytes()


def test_no_path_gets_into_the_file(cli, tmp_path):
    X = np.random.default_rng(0).normal(size=(8, 3)).astype("f4")
    np.save(tmp_path / "x.npy", X)
    torch.jit.script(nn.Linear(3, 1)).save(str(tmp_path / "m.pt"))
    written = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "y.npy", X[:, :1])
        (tmp_path / folder / "l.py").write_text("def f(output, y): return (output - y)**2")
        named = ["--targets", f"{folder}/y.npy", "--loss", f"./{folder}/l.py:f"]
        assert cli("compute", "m.pt", "x.npy", *named, "-o", "h").code == 0
        written.append((tmp_path / "h").read_bytes())
    assert written[0] == written[1]
    document, _ = read(tmp_path / "h")
    assert (document["data"]["targets"], document["loss"]["name"]) == ("y.npy", "l.py:f")


# --- parameters -------------------------------------------------------------------------------


def blocks_of(cli, tmp_path, *words) -> list[str]:
    ran = cli("compute", *words)
    assert ran.code == 0, ran.stderr
    document, tensors = read(tmp_path / "hessian.safetensors")
    names = [facts["name"] for facts in document["blocks"]]
    assert set(names) == set(tensors)
    return names


@pytest.mark.parametrize(
    ("globs", "names"),
    [
        (["*.weight"], ["0.weight", "2.weight"]),
        (["!*.bias"], ["0.weight", "2.weight"]),
        (["0.*", "!*.bias"], ["0.weight"]),
        (["2.bias", "0.weight"], ["0.weight", "2.bias"]),
        (["?.b*"], ["0.bias", "2.bias"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_params(cli, mlp, tmp_path, globs, names):
    words = [word for glob in globs for word in ("--params", glob)]
    assert blocks_of(cli, tmp_path, *mlp, *CE, *words) == names
    _, tensors = read(tmp_path / "hessian.safetensors")
    ran = cli("compute", *mlp, *CE, "-o", "all.safetensors")
    assert ran.code == 0
    _, everything = read(tmp_path / "all.safetensors")
    for name in names:
        assert relative_error(tensors[name], everything[name]) < 1e-12


@pytest.mark.parametrize("glob", ["nothing.*", "!*"])
def test_params_that_match_nothing(cli, mlp, glob):
    ran = cli("compute", *mlp, *CE, "--params", glob)
    assert "0.weight" in ran.fails(2) or "0.weight" in ran.hint


def test_parameters_in_one_memory_are_tied_in_memory_and_in_a_file(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model.double()
    model[2].weight.data = model[0].weight.data
    torch.save(model, tmp_path / "net.pt")
    data = torch.randn(2, 5, 3, dtype=torch.float64)
    live = hesscli.compute(model, tuple(data), loss="mse", framework="torch")
    saved = hesscli.compute(tmp_path / "net.pt", tuple(data), allow_pickle=True, framework="torch")
    assert live.metadata["parameters"] == saved.metadata["parameters"]
    assert torch.equal(live.block("0.weight"), saved.block("0.weight"))
    one = nn.Sequential(model[0], nn.Tanh(), model[0])
    truth = hessian(one, F.mse_loss, (data[0],), data[1])
    assert relative_error(live.block("0.weight"), truth) < 1e-10


@pytest.mark.parametrize(("frozen", "left"), [("0.weight", "2.weight"), ("2.weight", "0.weight")])
def test_a_frozen_parameter_in_the_memory_of_another(cli, tmp_path, frozen, left):
    """They are two: autograd differentiates by the one, and the other is a constant."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model.double()
    model[2].weight.data = model[0].weight.data
    model.get_parameter(frozen).requires_grad_(False)
    torch.save(model, tmp_path / "net.pt")
    x, y = torch.randn(2, 5, 3, dtype=torch.float64)
    np.savez(tmp_path / "d.npz", x=x.numpy(), y=y.numpy())
    assert cli("compute", "net.pt", "d.npz", "--allow-pickle").code == 0
    document, tensors = read(tmp_path / "hessian.safetensors")
    assert document["frozen"] == [frozen]
    assert list(tensors) == [left]
    truth = hessian(model, F.mse_loss, (x,), y)
    assert float((tensors[left] - truth).norm()) < 1e-10 * float(truth.norm())


def test_frozen_parameters(cli, tmp_path):
    case = BY_NAME["frozen"]
    model, data = save(case, "script", tmp_path)
    assert blocks_of(cli, tmp_path, model, data) == ["0.bias", "2.weight"]
    document, _ = read(tmp_path / "hessian.safetensors")
    assert document["frozen"] == ["0.weight", "2.bias"]
    ran = cli("compute", model, data)
    assert any("0.weight" in note and "2.bias" in note for note in ran.notes)
    assert blocks_of(cli, tmp_path, model, data, "-p", "0.*") == ["0.weight", "0.bias"]
    truth = hessian(case.make(), case.reference, case.inputs, case.target, ["0.weight"])
    _, tensors = read(tmp_path / "hessian.safetensors")
    assert relative_error(tensors["0.weight"], truth) < 1e-9


def test_notes_of_many_parameters_are_short():
    """Of a model with adapters, or with a tower that the loss does not reach, as CLIP has."""
    model = nn.ModuleList(nn.Linear(2, 1) for _ in range(40)).double()
    for layer in model[20:]:
        layer.requires_grad_(False)
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    found = hesscli.compute(model, (torch.ones(3, 2).double(), torch.ones(3, 1).double()))
    frozen, unused = (
        next(note for note in found.metadata["notes"] if word in note)
        for word in ("frozen", "unused")
    )
    assert frozen.startswith("skipped, frozen: 20.weight, 20.bias, 21.weight, ")
    assert "24.bias and 30 more (name them with --params" in frozen
    assert unused.startswith("1.weight, 1.bias, 2.weight, ")
    assert unused.endswith(
        "5.bias and 28 more: unused, detached or under torch.no_grad, so their blocks are zero"
    )
    assert len(found.metadata["frozen"]) == 40
    assert sum(block.get("unused", False) for block in found.metadata["blocks"]) == 38


@pytest.mark.parametrize("kind", ["script", "state_dict"])
@pytest.mark.parametrize("name", ["embed.weight", "score.weight"])
def test_tied_parameters(cli, tmp_path, name, kind):
    case = BY_NAME["tied-names"]
    model, data = save(case, kind, tmp_path)
    names = blocks_of(cli, tmp_path, model, data, *options(case, kind), "-p", name)
    assert names == ["embed.weight"]
    document, tensors = read(tmp_path / "hessian.safetensors")
    assert document["parameters"][0]["tied"] == ["score.weight"]
    n = tensors["embed.weight"].shape[0]
    assert relative_error(tensors["embed.weight"], expected(case)[:n, :n]) < 1e-9


def test_a_matrix_and_its_transpose_are_not_tied():
    net, w = nn.Module(), torch.randn(3, 3)
    net.a, net.b = nn.Parameter(w), nn.Parameter(w.T)
    parameters, tied, _ = chosen_parameters(net, (), lambda text: None)
    assert (list(parameters), tied) == (["a", "b"], {})


@pytest.mark.parametrize("large", [planning.LARGE, 1])
def test_unused_parameters(cli, tmp_path, monkeypatch, large):
    monkeypatch.setattr(planning, "LARGE", large)
    case = BY_NAME["unused"]
    model, data = save(case, "script", tmp_path)
    ran = cli("compute", model, data)
    assert ran.code == 0
    document, tensors = read(tmp_path / "hessian.safetensors")
    for facts in document["blocks"]:
        spare = facts["name"].startswith("spare")
        assert facts.get("unused", False) is spare
        assert bool(tensors[facts["name"]].any()) is not spare
        assert any(facts["name"] in note and "unused" in note for note in ran.notes) is spare


def test_many_long_names_fit_the_header(cli, tmp_path):
    """Notes about each of many parameters with long names still find room in the file."""

    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(2, 1)
            for i in range(40):
                self.register_parameter(f"{'spare_' * 80}{i}", nn.Parameter(torch.ones(1)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = saved_net(tmp_path, Long())
    data = saved_data(tmp_path, x=np.ones((3, 2), "f4"), y=np.ones((3, 1), "f4"))
    assert len(blocks_of(cli, tmp_path, model, data, "-b", "elements")) == 42


# --- what is printed, and where ---------------------------------------------------------------


def test_inferences_are_said(cli, mlp, tmp_path):
    ran = cli("compute", *mlp)
    assert ran.code == 0
    assert any("cross-entropy" in note for note in ran.notes)
    document, _ = read(tmp_path / "hessian.safetensors")
    assert document["loss"]["inferred"] is True
    assert document["notes"] == ran.notes


def test_quiet(cli, mlp):
    ran = cli("compute", *mlp, "-q")
    assert (ran.code, ran.stdout, ran.stderr) == (0, "", "")


def test_dry_run(cli, mlp, tmp_path):
    before = folder(tmp_path)
    for option in STRUCTURES:
        ran = cli("compute", *mlp, *CE, "-b", option, "--dry-run", "--json")
        assert ran.code == 0, ran.stderr
        document = ran.document
        assert document["total"]["bytes"] == sum(f["bytes"] for f in document["blocks"]) > 0
        assert document["total"]["memory"] > 0
        assert document["total"]["estimated_seconds"] > 0
        for facts in document["blocks"]:
            assert facts["method"]
            assert "trace" not in facts
    ran = cli("compute", *mlp, *CE, "--dry-run")
    assert ran.code == 0
    assert "0.weight" in ran.stdout
    assert folder(tmp_path) == before


def test_to_standard_output(cli, mlp, tmp_path):
    before = folder(tmp_path)
    ran = cli("compute", *mlp, *CE, "-o", "-", "--json")
    assert ran.code == 0, ran.stderr
    assert folder(tmp_path) == before
    assert cli("compute", *mlp, *CE).code == 0
    assert ran.bytes == (tmp_path / "hessian.safetensors").read_bytes()
    talk = ran.stderr[ran.stderr.index("{") :]
    assert json.loads(talk)["schema"] == "hesscli.hessian/1"


# --- files that are in the way ----------------------------------------------------------------


def test_a_foreign_file_is_refused(cli, mlp, tmp_path):
    path = tmp_path / "out.safetensors"
    save_file({"w": np.ones(3)}, path)
    before = folder(tmp_path)
    ran = cli("compute", *mlp, *CE, "-o", path)
    assert "out.safetensors" in ran.fails(2)
    assert "--force" in ran.hint
    assert folder(tmp_path) == before
    assert cli(*shlex.split(ran.hint)[1:]).code == 0  # the hint can be pasted
    read(path)


def test_an_earlier_result_is_replaced(cli, mlp, tmp_path):
    assert cli("compute", *mlp, *CE, "-b", "full").code == 0
    assert cli("compute", *mlp, *CE, "-b", "elements").code == 0
    assert read(tmp_path / "hessian.safetensors")[0]["structure"] == "elements"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("way", ["same", "link", "hard-link"])
@pytest.mark.parametrize("which", [0, 1])
def test_model_and_data_are_never_overwritten(cli, mlp, tmp_path, which, way, force):
    path = mlp[which]
    if way != "same":
        path = tmp_path / "alias"
        path.symlink_to(mlp[which]) if way == "link" else os.link(mlp[which], path)
    before = folder(tmp_path)
    ran = cli("compute", *mlp, *CE, "-o", path, *(["--force"] if force else []))
    ran.fails(2)
    assert folder(tmp_path) == before


def test_a_hessian_used_as_data_is_not_overwritten(cli, tmp_path, mlp):
    """A file that hesscli wrote may be replaced, but not by the command that reads it."""
    assert cli("compute", *mlp, *CE, "-b", "full", "-o", "h.safetensors").code == 0
    before = folder(tmp_path)
    cli("compute", mlp[0], "h.safetensors", *CE, "-o", "h.safetensors").fails(2)
    assert folder(tmp_path) == before


def test_a_folder_and_no_folder(cli, mlp, tmp_path):
    cli("compute", *mlp, *CE, "-o", tmp_path).fails(2)
    cli("compute", *mlp, *CE, "-o", tmp_path / "none" / "h.safetensors").fails(2)
    assert not (tmp_path / "none").exists()


def test_a_pipe_is_not_replaced_by_a_file(cli, mlp, tmp_path):
    """/dev/null is the like; whoever forces that loses it."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    ran = cli("compute", *mlp, *CE, "-o", fifo, "--force")
    assert fifo.is_fifo()
    ran.fails(2)


# --- failures ---------------------------------------------------------------------------------


def npz(tmp_path, **arrays):
    return saved_data(tmp_path, **{k: np.asarray(v) for k, v in arrays.items()})


X, Y = np.ones((4, 3), "f4"), np.ones((4, 2), "f4")


@pytest.fixture
def net(tmp_path) -> Path:
    torch.manual_seed(0)
    return saved_net(tmp_path, nn.Linear(3, 2))


def test_a_loss_in_a_file(cli, net, tmp_path, monkeypatch):
    """From the current folder, as a module or as a file; the terms of each sample are told apart."""
    (tmp_path / "own_losses.py").write_text(
        "import torch\n\n\ndef log_cosh(output, target):\n"
        "    print('not into stdout')\n"
        "    return torch.log(torch.cosh(output - target)).mean(1)\n"
    )
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    data, found = npz(tmp_path, x=X, y=Y), []
    for spec in ("own_losses:log_cosh", "own_losses.py:log_cosh"):
        ran = cli("compute", net, data, "--loss", spec, "-b", "full", "--dtype", "float64", "-f",
                  "--method", "preactivation", "--json")  # fmt: skip
        assert ran.code == 0, ran.stderr
        assert ran.document["loss"]["name"] == spec
        found.append(read(tmp_path / "hessian.safetensors")[1]["hessian"])
    model = nn.Linear(3, 2).double()
    model.load_state_dict(torch.jit.load(net).state_dict())
    x, y = torch.as_tensor(X).double(), torch.as_tensor(Y).double()
    truth = hessian(model, lambda z, y: torch.log(torch.cosh(z - y)).mean(), (x,), y)
    for matrix in found:
        torch.testing.assert_close(matrix, truth)
    refused = cli("compute", net, data, "--loss", "own_losses.py:log_kosh")
    assert "own_losses.py has no log_kosh; it has: log_cosh" in refused.fails(2)
    assert "--loss own_losses.py:log_cosh" in refused.hint
    assert "no such file" in cli("compute", net, data, "--loss", "none.py:f").fails(2)
    assert "not a function" in cli("compute", net, data, "--loss", "own_losses:torch").fails(2)


def test_no_memory_left(cli, net, tmp_path):
    """The CPU's allocator has no error of its own."""
    (tmp_path / "large.py").write_text(
        "import torch\n\n\ndef loss(output, target):\n    return torch.empty(1 << 60)\n\n\n"
        "class Net(torch.nn.Linear):\n    def forward(self, x):\n        return loss(x, x)\n"
    )
    data = npz(tmp_path, x=X, y=Y)
    ran = cli("compute", net, data, "--loss", "large.py:loss")
    assert "out of memory: " in ran.fails(6)
    assert ran.hint.endswith("--loss large.py:loss --batch-size 1")
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "large.pt")
    arch = ("--arch", "large.py:Net", "--arch-arg", "in_features=3", "--arch-arg", "out_features=2")
    assert "out of memory: " in cli("compute", "large.pt", data, *arch).fails(6)
    assert not (tmp_path / "hessian.safetensors").exists()


@pytest.mark.parametrize("words", ["show", "eigen", "density", "diff h h"])
def test_no_memory_left_for_a_hessian(cli, net, tmp_path, monkeypatch, words):
    """Which has no batches that could be smaller."""
    assert cli("compute", net, npz(tmp_path, x=X, y=Y), "-o", "h").code == 0

    def verified(file, name):
        raise MemoryError

    monkeypatch.setattr(HessianFile, "verified", verified)
    ran = cli(*words.split(), *(["h"] if " " not in words else []))
    assert ran.fails(6) == "out of memory"
    assert "hint" not in ran.stderr


def test_usage_errors(cli, net, tmp_path):
    data = npz(tmp_path, x=X, y=Y)
    before = folder(tmp_path)
    assert "none.pt" in cli("compute", "none.pt", data).fails(2)
    assert "none.npz" in cli("compute", net, "none.npz").fails(2)
    assert "x1" in cli("compute", net, data, "--inputs", "x1").fails(2)
    assert "hinge" in cli("compute", net, data, "--loss", "hinge").fails(2)
    assert "delta" in cli("compute", net, data, "-l", "mse", "--loss-arg", "delta=1").fails(2)
    cli("compute", net, data, "--loss-arg", "weight=@w").fails(2)
    cli("compute", net, data, "--device", "abacus").fails(2)
    for words in (["--blocks", "rows"], ["--batch-size", "0"], ["--loss-arg", "x"], ["--nope"]):
        ran = cli("compute", net, data, *words)
        assert (ran.code, ran.stdout) == (2, "")
        assert words[-1] in ran.stderr or words[0] in ran.stderr
    assert folder(tmp_path) == before


def test_file_errors(cli, net, tmp_path):
    data = npz(tmp_path, x=X, y=Y)
    (tmp_path / "text.pt").write_text("not a model")
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "weights.pt")
    torch.save(nn.Linear(3, 2), tmp_path / "pickle.pt")
    (tmp_path / "cut.npz").write_bytes(data.read_bytes()[:100])
    before = folder(tmp_path)
    assert "text.pt" in cli("compute", "text.pt", data).fails(3)
    ran = cli("compute", "weights.pt", data)
    assert ran.fails(3).startswith("weights.pt: a state dict holds weights but no architecture")
    assert "--arch" in ran.hint
    assert "pickle.pt" in cli("compute", "pickle.pt", data).fails(3)
    assert "cut.npz" in cli("compute", net, "cut.npz").fails(3)
    assert folder(tmp_path) == before


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.lin(x), 0.5, training=True)


@pytest.mark.filterwarnings("ignore")
def test_mismatches(cli, net, tmp_path):
    data = npz(tmp_path, x=X, y=Y)
    for name, arrays in {
        "narrow": {"x": X[:, :2], "y": Y},
        "column": {"x": X, "y": Y[:, :1]},
        "flat": {"x": X, "y": Y[:, 0]},
        "short": {"x": X, "y": Y[:3]},
        "classes": {"x": X, "y": np.array([0, 1, 2, 0])},
        "ignored": {"x": X, "y": np.full(4, -100)},
    }.items():
        saved_data(tmp_path, f"{name}.npz", **arrays)
    dropping = torch.jit.trace(Dropping(), torch.from_numpy(X), check_trace=False)
    dropping.save(tmp_path / "dropping.pt")
    before = folder(tmp_path)
    for name in ("narrow", "column", "flat", "short", "classes", "ignored"):
        assert cli("compute", net, f"{name}.npz").fails(4)
    ran = cli("compute", "dropping.pt", data)
    assert "dropout" in ran.fails(4)
    assert "eval()" in ran.hint
    assert folder(tmp_path) == before


def test_one_output_and_flat_targets_do_not_broadcast(cli, tmp_path):
    model = saved_net(tmp_path, nn.Linear(3, 1))
    ran = cli("compute", model, npz(tmp_path, x=X, y=Y[:, 0]))
    message = ran.fails(4)
    assert "[4, 1]" in message
    assert "[4]" in message
    ran = cli("compute", saved_net(tmp_path, nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))),
              npz(tmp_path, x=X, y=Y[:, :1]))  # fmt: skip
    ran.fails(4)
    assert not (tmp_path / "hessian.safetensors").exists()


def test_arguments_that_do_not_fit(cli, net, tmp_path):
    data = npz(tmp_path, x=X, y=Y, w=np.ones(5, "f4"))
    cli("compute", net, data, "-l", "bce-with-logits", "--loss-arg", "pos_weight=@w").fails(4)
    cli("compute", net, data, "-l", "mse", "--loss-arg", "weight=@w").fails(4)
    cli("compute", net, data, "-l", "mse", "--loss-arg", "weight=[1,2,3]").fails(4)
    data = npz(tmp_path, x=X, y=Y, w=np.float32(np.nan))
    ran = cli("compute", net, data, "-l", "mse", "--loss-arg", "weight=@w")
    assert "array w (float32 []) holds NaN" in ran.fails(5)
    ran = cli("compute", net, data, "-l", "mse", "--loss-arg", "weight=wide")
    assert "weight is 'wide'" in ran.fails(2)
    ran = cli("compute", net, data, "-l", "huber", "--loss-arg", "delta=wide")
    assert ran.code in (2, 4), ran.stderr
    assert ran.fails(ran.code)


@pytest.mark.parametrize(
    ("loss", "argument", "numbers"),
    [
        ("bce-with-logits", "pos_weight", "5"),
        ("huber", "weight", "2"),
        ("mse", "weight", "[1, 2.5]"),
    ],
)
def test_numbers_as_weights(cli, net, tmp_path, loss, argument, numbers):
    data = npz(tmp_path, x=X, y=Y, w=np.broadcast_to(np.float32(json.loads(numbers)), (2,)))
    found = []
    for value in ("@w", numbers):
        ran = cli("compute", net, data, "-l", loss, "--loss-arg", f"{argument}={value}")
        assert ran.code == 0, ran.stderr
        found.append(read(tmp_path / "hessian.safetensors")[1])
    for name, block in found[0].items():
        np.testing.assert_array_equal(found[1][name], block)


class Named(nn.Module):
    """A module and a parameter of one's own, under a name."""

    def __init__(self, module: str, own: str) -> None:
        super().__init__()
        self.add_module(module, nn.Linear(3, 2))
        self.register_parameter(own, nn.Parameter(torch.ones(2)))
        self.module, self.own = module, own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.module)(x) * self.get_parameter(self.own)


@pytest.mark.parametrize(
    ("module", "own", "words", "taken"),
    [
        ("gradient", "weight", ("compute", "--gradient"), "gradient.weight"),
        ("gradient", "weight", ("hvp", "--vector", "random", "--gradient"), "gradient.weight"),
        ("layer", "__metadata__", ("compute",), "__metadata__"),
        ("layer", "__metadata__", ("hvp", "--vector", "random"), "__metadata__"),
        ("__metadata__", "weight", ("compute", "--blocks", "module"), "__metadata__"),
        ("(root)", "weight", ("compute", "--blocks", "module"), "(root)"),
    ],
)
def test_names_that_the_file_needs(cli, tmp_path, module, own, words, taken):
    torch.jit.trace(Named(module, own), torch.from_numpy(X)).save(tmp_path / "net.pt")
    data = npz(tmp_path, x=X, y=Y)
    ran = cli(words[0], tmp_path / "net.pt", data, *words[1:])
    assert ran.fails(2).startswith(f"{taken}: a file keeps this name for ")
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]
    again = shlex.split(ran.hint)[1:]
    assert again[-1] == f"!{taken}*"
    assert cli(*again).code == 0


def test_numbers_that_are_not_finite(cli, tmp_path):
    model = saved_net(tmp_path, nn.Linear(3, 2))
    for bad in (np.nan, np.inf):
        x = X.copy()
        x[1, 1] = bad
        cli("compute", model, npz(tmp_path, x=x, y=Y)).fails(5)
    far = np.full((len(X), 2), 3e19, np.float32)  # whose gradient is finite
    assert "the loss is inf" in cli("compute", model, npz(tmp_path, x=X, y=far)).fails(5)
    broken = nn.Linear(3, 2)
    broken.weight.data[0, 0] = torch.nan
    cli("compute", saved_net(tmp_path, broken), npz(tmp_path, x=X, y=Y)).fails(5)
    assert not (tmp_path / "hessian.safetensors").exists()


def test_a_gradient_that_is_not_finite(cli, tmp_path):
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.w).abs().sqrt()

    cli("compute", saved_net(tmp_path, Root()), npz(tmp_path, x=X, y=Y)).fails(5)
    assert set(folder(tmp_path)) == {"data.npz", "net.pt"}


def test_a_method_that_would_be_inexact(cli, tmp_path):
    case = BY_NAME["mlp-softmax"]
    saved = save(case, "script", tmp_path)
    before = folder(tmp_path)
    ran = cli("compute", *saved, *case.arguments(), "--method", "gauss-newton")
    message = ran.fails(5)
    assert "0.weight" in message
    assert "softmax" in message
    assert folder(tmp_path) == before
    assert cli(*shlex.split(ran.hint)[1:]).code == 0


def test_no_device(cli, net, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    ran = cli("compute", net, npz(tmp_path, x=X, y=Y), "--device", "cuda")
    ran.fails(6)
    assert cli(*shlex.split(ran.hint)[1:]).code == 0


@pytest.mark.parametrize("resource", ["available_memory", "free_disk"])
@pytest.mark.parametrize("kind", ["script", "state_dict"])
def test_what_would_not_fit(cli, tmp_path, monkeypatch, resource, kind):
    case = BY_NAME["ce-weight"]
    model, data = save(case, kind, tmp_path)
    command = ("compute", model, data, *options(case, kind))
    before = folder(tmp_path)
    # What `full` needs is a little more than there is.
    plan = cli(*command, "-b", "full", "--dry-run", "--json").document["total"]
    if resource == "available_memory":
        # A share of it may be used; what a sample takes is in the memory already, and the class weights.
        taken = memory.PROCESS + 6 * (3 * 8 + 8) + 3 * 8
        free = (plan["memory"] - taken) / memory._SHARE - 8
    else:
        free = plan["bytes"] - 1
    module = memory if resource == "available_memory" else room
    monkeypatch.setattr(module, resource, lambda *folder: int(free))
    ran = cli(*command, "-b", "full")
    ran.fails(6)
    assert folder(tmp_path) == before
    pasted = cli(*shlex.split(ran.hint)[1:])
    assert pasted.code == 0, f"{ran.hint}: {pasted.stderr}"
    document, _ = read(tmp_path / "hessian.safetensors")
    assert document["structure"] != "full"
    assert document["loss"]["name"] == "cross-entropy"
    assert document["loss"]["arguments"]  # the same loss, class weights included


@pytest.mark.parametrize(
    ("least", "fitting"),
    [("full", "module"), ("module", "diag"), ("diag", "elements"), ("elements", None)],
)
def test_the_blocks_that_fit(cli, mlp, monkeypatch, least, fitting):
    """Where there is a byte too few for some: in the memory the largest block counts, on the disk all of them."""
    command = ("compute", *mlp, *CE, "-b", "full", "-f", "--batch-size", 1)
    plans = {
        blocks: cli(*command, "-b", blocks, "--dry-run", "--json").document["total"]
        for blocks in ("full", least)
    }
    taken = memory.PROCESS + 6 * (3 * 8 + 8)  # by the samples
    free = (plans[least]["memory"] - taken) / memory._SHARE - 8
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_memory", lambda: int(free))
        ran = cli(*command)
        assert "full (its largest block is " in ran.fails(6)
        option = f"--blocks {fitting}" if fitting else r"--memory \d+MB"
        assert re.search(f"{option}$", ran.hint)
        assert cli(*shlex.split(ran.hint)[1:]).code == 0
    monkeypatch.setattr(room, "free_disk", lambda folder: plans[least]["bytes"] - 1)
    ran = cli(*command, "-o", "h")
    ran.fails(6)
    assert ran.hint.endswith(f"--blocks {fitting}" if fitting else "-o elsewhere.safetensors")
    if fitting:
        assert cli(*shlex.split(ran.hint)[1:]).code == 0


def test_a_full_disk(cli, mlp, tmp_path, monkeypatch):
    """Room runs out while writing: an error line, and no temporary file."""
    from hesscli.files.hessians import placed_writes

    before = folder(tmp_path)

    def sync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(placed_writes.os, "fdatasync", sync)
    ran = cli("compute", *mlp, *CE)
    assert "No space left" in ran.fails(6)
    assert folder(tmp_path) == before


def test_a_full_disk_for_the_journal(cli, mlp, tmp_path, monkeypatch):
    def sync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hesscli.job.matrix.journal.os.fsync", sync)
    ran = cli("compute", *mlp, *CE, "-o", "h", "--shard", "1/2")
    assert ran.fails(6) == ".h.journal.1-of-2: No space left on device"
    assert not list(tmp_path.glob(".h.journal*"))


@pytest.mark.parametrize(
    ("module", "words"),
    [("files.hessians.result_files", ()), ("job.matrix.journal", ("--shard", "1/1"))],
)
def test_names_are_on_the_disk(cli, mlp, tmp_path, monkeypatch, module, words):
    """Of the result and of the journal: else a loss of power takes them."""
    synced = []
    monkeypatch.setattr(f"hesscli.{module}.sync_folder", lambda path: synced.append(path.resolve()))
    assert cli("compute", *mlp, *CE, *words).code == 0
    assert synced == [tmp_path.resolve()]


def test_a_folder_outlasts_a_loss_of_power(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    sync_folder(tmp_path)
    assert synced == [tmp_path.stat().st_ino]
    sync_folder(tmp_path / "none")  # as where folders cannot be opened


def test_a_journal_names_what_is_on_the_disk(tmp_path):
    class Writer:
        start = 0

        def sync(self):
            before.append(folder(tmp_path))

    before = []
    journal = Journal(tmp_path / "h", {}, {})
    unfinished = Unfinished(Writer(), journal, 1, False, Listener())
    unfinished.add("a", {})
    unfinished.flush()
    assert before == [{}]
    assert journal.path.exists()


def test_a_journal_keeps_whole_lines_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(descriptor):
        os.truncate(descriptor, os.fstat(descriptor).st_size - 5)
        raise OSError(errno.ENOSPC, "No space left on device")

    journal = Journal(tmp_path / "h", {}, {})
    journal.append({"a": {}})
    with monkeypatch.context() as patch:
        patch.setattr("hesscli.job.matrix.journal.os.fsync", full)
        with pytest.raises(ResourceError):
            journal.append({"b": {}})
    assert list(read_journal(journal.path).finished) == ["a"]
    journal.append({"b": {}})
    assert list(read_journal(journal.path).finished) == ["a", "b"]


def test_a_bug_says_so(cli, mlp, tmp_path, monkeypatch):
    before = folder(tmp_path)

    def broken(*arguments, **options):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("hesscli.job.matrix.small.statistics.of_block", broken)
    ran = cli("compute", *mlp, *CE)
    assert ran.code == 70
    assert "Traceback" in ran.stderr
    assert "bug in hesscli" in ran.stderr
    assert folder(tmp_path) == before


def test_ctrl_c(cli, mlp, tmp_path, monkeypatch):
    before = folder(tmp_path)

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hesscli.job.matrix.small.statistics.of_block", interrupted)
    ran = cli("compute", *mlp, *CE)
    assert ran.code == 130
    assert "Traceback" not in ran.stderr
    assert folder(tmp_path) == before


def test_without_a_sample_axis(cli, tmp_path):
    class Number(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.w * x)

    model = saved_net(tmp_path, Number())
    data = npz(tmp_path, x=np.float32(0.5), y=np.ones(2, "f4"))
    ran = cli("compute", model, data, "--unbatched", "-b", "full", "--dtype", "float64")
    assert ran.code == 0, ran.stderr
    _, tensors = read(tmp_path / "hessian.safetensors")
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    truth = torch.autograd.functional.hessian(lambda t: ((torch.tanh(0.5 * t) - 1) ** 2).mean(), w)
    assert relative_error(tensors["hessian"], truth) < 1e-9


# --- processes --------------------------------------------------------------------------------


def test_streams_and_codes_of_a_process(mlp, tmp_path):
    hesscli = [sys.executable, "-m", "hesscli"]
    ran = subprocess.run(
        [*hesscli, "compute", *map(str, mlp), "--json"], capture_output=True, text=True,
        cwd=tmp_path, check=False,
    )  # fmt: skip
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["structure"] == "block_diagonal"
    assert "note: " in ran.stderr
    ran = subprocess.run(
        [*hesscli, "compute", str(mlp[0]), "none.npz"], capture_output=True, text=True,
        cwd=tmp_path, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: none.npz")


def test_every_kind_and_tag_is_run():
    assert {kind for _, kind in RUNS} == set(KINDS)
    tags = {tag for name, _ in RUNS for tag in BY_NAME[name].tags}
    every = {tag for case in CASES for tag in case.tags}
    assert len(every - tags) <= 3, every - tags


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_group_norm_of_channels_last(warm, tmp_path, curvature):
    """PyTorch's gradient of its weight alone ends the process where its input has none."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(4, 3)

        def forward(self, x):
            z = self.norm(x.contiguous(memory_format=torch.channels_last))
            return self.head(torch.tanh(z).mean((2, 3)))

    net = Net().double().eval()
    x, y = torch.randn(5, 4, 3, 3).double(), torch.arange(5) % 3
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    program = torch.export.export(net, (x,)).run_decompositions()
    torch.export.save(program, tmp_path / "net.pt2")
    hesscli = [warm, "-m", "hesscli", "compute", "net.pt2", "data.npz"]
    options = ["--params", "norm.weight", "--curvature", curvature]
    ran = subprocess.run([*hesscli, *options], cwd=tmp_path, check=False)
    assert ran.returncode == 0
    _, found = read(tmp_path / "hessian.safetensors")

    def output(weight):
        z = nn.functional.group_norm(x, 2, weight, net.norm.bias)
        return net.head(torch.tanh(z).mean((2, 3)))

    def loss(f):
        return nn.functional.cross_entropy(f, y)

    weight = net.norm.weight.detach()
    expected = torch.autograd.functional.hessian(lambda w: loss(output(w)), weight)
    if curvature == "ggn":
        jacobian = torch.autograd.functional.jacobian(output, weight).flatten(0, 1)
        of_loss = torch.autograd.functional.hessian(loss, output(weight).detach())
        expected = jacobian.T @ of_loss.view(15, 15) @ jacobian
    assert relative_error(found["norm.weight"], expected) < 1e-12


def test_instance_norm_before_a_recurrent_layer(cli):
    """PyTorch's first derivative is wrong there; the certificate must not take its word for it."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 1, 1), nn.InstanceNorm2d(1, affine=True)
            self.rnn, self.head = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 1)

        def forward(self, x):
            z = torch.tanh(self.norm(self.conv(x))).flatten(1)
            return self.head(self.rnn(z.unsqueeze(-1))[0][:, -1])

    def norm_by_definition(z, weight, bias, eps):
        z = z - z.mean((2, 3), keepdim=True)
        return z / torch.sqrt((z * z).mean((2, 3), keepdim=True) + eps) * weight + bias

    net = Net().double().eval()
    x, y = torch.randn(4, 1, 3, 3).double(), torch.randn(4, 1).double()
    torch.jit.script(net).save("net.pt")
    np.savez("data.npz", x=x.numpy(), y=y.numpy())
    ran = cli("compute", "net.pt", "data.npz", "--batch-size", 2, "--gradient")
    assert ran.code == 0, ran.stderr
    assert not any("instead" in note for note in ran.notes)
    _, found = read(Path("hessian.safetensors"))
    norm = net.norm
    norm.forward = lambda z: norm_by_definition(z, norm.weight, norm.bias, norm.eps)
    value = nn.functional.mse_loss(net(x), y)
    (gradient,) = torch.autograd.grad(value, net.conv.weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), net.conv.weight)
    torch.testing.assert_close(found["conv.weight"].flatten(), second.flatten())
    torch.testing.assert_close(found["gradient.conv.weight"], gradient.detach())


class RMSNorm(nn.Module):
    """As language models write it: in float32, whatever the dtype."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, width))

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("blocks", ["full", "elements"])
def test_models_that_compute_in_float32_by_themselves(cli, how, dtype, blocks):
    """Differences of gradients that were rounded to float32 on the way would show noise alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), RMSNorm(4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    (torch.jit.script(net) if how == "script" else torch.jit.trace(net, x)).save("net.pt")
    np.savez("data.npz", x=x.numpy(), y=y.numpy())
    ran = cli("compute", "net.pt", "data.npz", "--dtype", dtype, "-b", blocks)
    assert ran.code == 0, ran.stderr
    assert not any("instead" in note for note in ran.notes)
    document, found = read(Path("hessian.safetensors"))
    assert document["check"]["dtype"] == "float64"
    whole = net.double()
    norm = whole[1]
    norm.forward = lambda x: norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    truth = hessian(whole, nn.functional.mse_loss, (x.double(),), y.double())
    if blocks == "elements":
        values = torch.cat([found[name].flatten() for name, _ in whole.named_parameters()])
        truth = truth.diagonal()
    else:
        values = found["hessian"]
    assert relative_error(values, truth) < (1e-9 if dtype == "float64" else 1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1e-11, 3e-11, 3e10])
@pytest.mark.parametrize("options", [(), ("-b", "elements"), ("-b", "full"), ("--no-check",)])
def test_numbers_whose_squares_leave_float32(cli, tmp_path, options, scale):
    torch.manual_seed(0)
    torch.jit.script(nn.Linear(3, 1)).save(str(tmp_path / "m.pt"))
    x = np.random.default_rng(0).normal(size=(20, 3)).astype("f4") * np.float32(scale)
    np.savez(tmp_path / "d.npz", x=x, y=x[:, :1])
    ran = cli("compute", "m.pt", "d.npz", "--json", *options)
    assert ran.code == 0, ran.stderr
    blocks = ran.document["blocks"]
    assert all(np.isfinite(facts["fro_norm"]) for facts in blocks)
    own = 2 * x.astype("f8").T @ x.astype("f8") / 20
    if not options:
        assert blocks[0]["fro_norm"] == pytest.approx(np.linalg.norm(own), rel=1e-5, abs=0)


@pytest.mark.parametrize("scale", [1e-90, 1e90])
def test_the_norm_of_all_blocks_whose_squares_leave_float64(cli, tmp_path, scale):
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    model = saved_net(tmp_path, net)
    data = saved_data(tmp_path, x=np.full((1, 1), scale), y=np.zeros((1, 1)))
    ran = cli("compute", model, data, "--no-check", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.document["total"]["fro_norm"] == pytest.approx(2 * scale**2, rel=1e-12, abs=0)
    shown = cli("show", "--wide", "--json").document
    assert shown["total"]["fro_norm"] == ran.document["total"]["fro_norm"]


class Keys(nn.Module):
    """Attention to three vectors: what all keys have in common, their bias, changes no weight."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return (self.query(x) @ self.key(x).mT).softmax(-1) @ x


def test_the_symmetry_error_is_that_of_all_blocks_together():
    """What rounding leaves of a block that is zero is no more symmetric than not."""
    torch.manual_seed(0)
    model, data = Keys(), (torch.randn(5, 3, 4), torch.randn(5, 3, 4))
    found = hesscli.compute(model, data, method="hvp")
    worst = max(facts["symmetry_error"] for facts in found.blocks.values())
    assert worst == found.blocks["key.bias"]["symmetry_error"] > 1e-2
    assert 0 < found.metadata["symmetry_error"] < 1e-5
    without_norms = hesscli.compute(model, data, method="hvp", stats="none")
    assert without_norms.metadata["symmetry_error"] == found.metadata["symmetry_error"]
    diagonal = hesscli.compute(model, data, blocks="elements")
    assert diagonal.metadata["symmetry_error"] is None
