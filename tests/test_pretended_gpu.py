"""Without a GPU: on one that is pretended no tensor meets one of the CPU, and the same numbers come out."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretended_gpu import pretended_gpu
from safetensors.numpy import load_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import hesscli
from hesscli.job import model_eigen
from hesscli.spectrum import dense

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")

RNG = np.random.default_rng(0)
DATA = {"x": RNG.normal(size=(6, 1, 3)).astype(np.float32), "y": np.arange(6) % 2}
ROUTES = ("preactivation", "gauss-newton", "hvp", "finite-difference")


def smooth() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 2, 2), nn.GELU(), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 2))  # fmt: skip


def piecewise() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 2, 2), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(2, 2))  # fmt: skip


def test_what_is_refused() -> None:
    def mixed() -> object:
        return on_gpu + torch.ones(3)

    def as_array() -> object:
        return on_gpu.numpy()

    def placed() -> object:
        on_gpu[torch.tensor([0, 1])] = torch.ones(2)
        return on_gpu

    for wrong in (mixed, as_array, placed):
        gpu = pretended_gpu()
        gpu.__enter__()
        on_gpu = torch.ones(3, device="cuda")
        with pytest.raises((RuntimeError, TypeError), match="device"):
            wrong()
        with pytest.raises(AssertionError, match="device"):
            gpu.__exit__(None, None, None)
    with pretended_gpu("mps"):
        on_gpu = torch.ones(3, device="mps")
        for wide in (on_gpu.double, lambda: on_gpu.to("cpu", torch.float64)):
            with pytest.raises(TypeError, match="float64"):
                wide()
    with pretended_gpu():
        on_gpu = torch.ones(3, device="cuda")
        assert on_gpu.device == torch.device("cuda:0") != on_gpu.cpu().device
        assert (on_gpu[torch.tensor([0, 1])] * torch.tensor(2.0)).tolist() == [2, 2]


def assert_close(found: np.ndarray, expected: np.ndarray, rounding: float = 1e-5) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=rounding * np.abs(expected).max())


@pytest.mark.parametrize(
    ("method", "blocks", "kind"),
    [
        (method, blocks, kind)
        for method in ROUTES
        for blocks, kind in (("full", "cuda"), ("diag", "cuda"), ("elements", "cuda"), ("diag", "mps"))
        if (method, blocks) != ("gauss-newton", "full")  # exact for own blocks only
    ],
)  # fmt: skip
def test_routes(method: str, blocks: str, kind: str) -> None:
    make = piecewise if method == "gauss-newton" else smooth
    params = "3.*" if method == "finite-difference" else "*"  # which takes long
    options: dict[str, Any] = {"blocks": blocks, "method": method, "params": params}
    on_cpu = hesscli.compute(make(), DATA, **options)
    with pretended_gpu(kind):
        found = hesscli.compute(make(), DATA, device=kind, batch_size=4, gradient=True, **options)
    assert found.metadata["device"] == kind
    for name in on_cpu.blocks:
        # Differences on MPS are in float32.
        rounding = 1e-2 if method == "finite-difference" and kind == "mps" else 1e-5
        assert_close(found.block(name), on_cpu.block(name), rounding)


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_curvatures(curvature: str) -> None:
    options: dict[str, Any] = {"blocks": "full", "curvature": curvature}
    on_cpu = hesscli.compute(smooth(), DATA, **options)
    with pretended_gpu():
        found = hesscli.compute(smooth(), DATA, device="cuda", **options)
    assert_close(found.matrix(), on_cpu.matrix())


LOSSES: dict[str, dict[str, Any]] = {
    "own": {"loss": lambda z, y: F.cross_entropy(z, y)},
    "own, of pairs": {"loss": lambda z, y: (z[:, None] - z[None]).square().mean()},
    "own, of a module": {"loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))},
    "weights": {"loss_arguments": {"weight": [1.0, 3.0], "label_smoothing": 0.1}},
    "probabilities": {"loss": "kl-div", "targets": "p", "inputs": ("x",)},
}


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss: str, kind: str) -> None:
    data = DATA | {"p": RNG.dirichlet((1, 1), size=6).astype(np.float32)}
    options = {"targets": "y", "blocks": "full", "batch_size": 4} | LOSSES[loss]
    on_cpu = hesscli.compute(smooth(), data, **options)
    with pretended_gpu(kind):
        found = hesscli.compute(smooth(), data, device=kind, **options)
    assert_close(found.matrix(), on_cpu.matrix())


def test_weights_that_are_computed() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(3, 2)), nn.Tanh(), nn.Linear(2, 2))

    on_cpu = hesscli.compute(make(), DATA, method="preactivation", blocks="full")
    with pretended_gpu():
        found = hesscli.compute(make(), DATA, method="preactivation", blocks="full", device="cuda")
    assert_close(found.matrix(), on_cpu.matrix())


COMMANDS = {
    "compute, large": "compute --blocks full --gradient",
    "eigen": "eigen --top 3",
    "eigen of blocks": "eigen --per-block",
    "trace": "trace",
    "trace, estimated": "trace --method hvp --rel-error 9 --max-products 25",
    "density": "density --probes 2 --steps 5",
    "hvp": "hvp --vector random --gradient",
    "hvp of differences": "hvp --vector gradient --method finite-difference",
    "per-fedavg": "hvp --per-fedavg 0.01",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_commands(
    command: str, kind: str, cli, tmp_path: Path, small_bands, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (model_eigen, dense):
        monkeypatch.setattr(module, "DENSE", 4)
    torch.save(smooth(), tmp_path / "net.pt")
    np.savez(tmp_path / "d.npz", **DATA)
    name, *words = COMMANDS[command].split()
    words += ["--batch-size", "4", "--allow-pickle", "--json"]
    results = []
    for device in ("cpu", kind):
        output = [] if name == "trace" else ["-o", f"{device}.safetensors"]
        with pretended_gpu(kind) if device == kind else nullcontext():
            done = cli(name, "net.pt", "d.npz", *words, "--device", device, *output)
        assert done.code == 0, done.stderr
        assert done.document["device"] == device
        traces = [block["trace"] for block in done.document.get("blocks", []) if output == []]
        results.append(load_file(output[1]) if output else {"traces": np.array(traces)})
    on_cpu, found = results
    assert on_cpu.keys() == found.keys()
    for key, expected in on_cpu.items():
        if key != "eigenvectors":  # which have either sign
            assert_close(found[key], expected, 1e-2 if "differences" in command else 1e-4)


def test_what_lies_on_a_gpu() -> None:
    """A module and data that the caller has there."""
    identity = np.eye(sum(p.numel() for p in smooth().parameters()), dtype=np.float32)
    expected = hesscli.operator(smooth(), DATA) @ identity
    with pretended_gpu():
        model = smooth().to("cuda")
        data = {name: torch.tensor(array, device="cuda") for name, array in DATA.items()}
        H = hesscli.operator(model, data)
        assert_close(H @ identity, expected)
        found = hesscli.compute(model, data, blocks="full", framework="torch")
        assert found.metadata["device"] == "cuda"
        assert {str(p.device) for p in model.parameters()} == {"cuda:0"}
        assert not found.matrix().is_cuda
    assert_close(found.matrix().numpy(), expected)


@pytest.mark.parametrize("options", [[], ["--dtype", "float64"]])
def test_float64_on_mps(options: list[str], cli, tmp_path: Path) -> None:
    torch.save(smooth() if options else smooth().double(), tmp_path / "net.pt")
    np.savez(tmp_path / "d.npz", **DATA)
    with pretended_gpu("mps"):
        done = cli("compute", "net.pt", "d.npz", "--allow-pickle", "--device", "mps", *options)
    assert "mps has no float64" in done.fails(6)
    assert done.hint.endswith("--device cpu")
    if not options:
        with pretended_gpu("mps"), pytest.raises(hesscli.HesscliError, match="mps has no float64"):
            hesscli.compute(smooth().double(), DATA, device="mps")


def test_a_loss_that_makes_tensors_on_the_cpu_stays_there(cli, tmp_path: Path) -> None:
    torch.save(smooth(), tmp_path / "net.pt")
    np.savez(tmp_path / "d.npz", **DATA)
    (tmp_path / "own.py").write_text(
        "import torch\ndef far(z, y): return (z - torch.tensor([[1.0, 2.0]])).square().sum(1)"
    )
    words = ["compute", "net.pt", "d.npz", "--allow-pickle", "--loss", "own.py:far"]
    with pretended_gpu(strict=False):
        done = cli(*words, "--json")
        asked = cli(*words, "--device", "cuda")
    assert done.code == 0, done.stderr
    assert done.document["device"] == "cpu"
    (note,) = [note for note in done.notes if "on the CPU" in note]
    assert note == "the loss own.py:far makes tensors on the CPU, so all is done there"
    assert "the loss own.py:far makes tensors on another device" in asked.fails(4)
    assert asked.hint.endswith("--device cpu")
