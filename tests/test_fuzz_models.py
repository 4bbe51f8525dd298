"""Random models through the whole command, against Hessians in float64 that share no code with it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from conftest import read
from fuzz_nets import ACTIVATIONS, build
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

from hesscli.cli import app

SMOOTH = ("Residual", "Scale", "Gated", "Attention", "Twice", "LayerNorm", "BatchNorm1d")
LOSSES = {
    "mse": F.mse_loss,
    "huber": F.huber_loss,
    "smooth-l1": F.smooth_l1_loss,
    "bce-with-logits": F.binary_cross_entropy_with_logits,
    "poisson-nll": F.poisson_nll_loss,
    "cross-entropy": F.cross_entropy,
}


@dataclass(frozen=True)
class Trial:
    spec: list[tuple[Any, ...]]
    shape: tuple[int, ...]
    outputs: int
    loss: str
    reduction: str
    form: str
    dtype: torch.dtype
    samples: int
    batch: int
    blocks: str
    method: str
    computed: str
    seed: int


@st.composite
def trials(draw: st.DrawFn) -> Trial:
    spec: list[tuple[Any, ...]] = []
    if draw(st.integers(0, 3)) == 0:
        channels, size = draw(st.integers(1, 2)), draw(st.integers(3, 5))
        shape: tuple[int, ...] = (channels, size, size)
        filters, kernel = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        groups = channels if draw(st.booleans()) else 1
        padding, stride = draw(st.integers(0, 1)), draw(st.integers(1, 2))
        spec.append(("Conv2d", channels, filters * groups, kernel, stride, padding, 1, groups))
        filters *= groups
        size = (size + 2 * padding - kernel) // stride + 1
        between = draw(st.sampled_from(["none", "BatchNorm2d", "GroupNorm", "InstanceNorm2d"]))
        if between == "BatchNorm2d":
            spec.append((between, filters))
        if between == "GroupNorm" and filters * size * size > 1:
            spec.append((between, 1, filters))
        if between == "InstanceNorm2d" and size > 1:
            spec.append((between, filters, 1e-5, 0.1, True))
        spec.append((draw(st.sampled_from(list(ACTIVATIONS))),))
        if size >= 2 and draw(st.booleans()):
            spec.append((draw(st.sampled_from(["AvgPool2d", "MaxPool2d"])), 2))
            size //= 2
        spec.append(("Flatten",))
        width = filters * size * size
    else:
        width = draw(st.integers(1, 4))
        shape = (width,)
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["Linear", *ACTIVATIONS, *SMOOTH, "weight_norm", "Recurrent"]))
        if kind in ("Linear", "weight_norm", "Recurrent"):
            new = draw(st.integers(1, 4))
            if kind == "Recurrent":
                spec.append((kind, new))
            else:
                spec.append((kind, width, new, draw(st.booleans())))
            width = new
        elif kind in ACTIVATIONS:
            spec.append((kind,))
        elif kind == "Twice":
            spec.append((kind, width, width))
        elif kind == "LayerNorm" and width == 1:
            continue  # its output does not depend on its input
        else:
            spec.append((kind, width))
    outputs = draw(st.integers(1, 3))
    spec.append(("Linear", width, outputs, draw(st.booleans())))
    samples = draw(st.integers(1, 5))
    form = draw(st.sampled_from(["script", "trace", "state_dict", "safetensors"] * 4 + ["pt2"]))
    if form == "script" and any(layer[0] == "weight_norm" for layer in spec):
        form = "trace"  # a parametrisation cannot be scripted
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    computed = draw(st.sampled_from(["auto", "float64", "float64"]))
    if form == "trace" and any(layer[0] == "Recurrent" for layer in spec):
        computed = "auto"  # the trace holds a first state of its own dtype
    return Trial(
        spec,
        shape,
        outputs,
        draw(st.sampled_from([name for name in LOSSES if outputs > 1 or name != "cross-entropy"])),
        draw(st.sampled_from(["mean", "sum"])),
        form,
        dtype,
        samples,
        samples if form == "pt2" else draw(st.integers(1, samples)),
        draw(st.sampled_from(["diag", "full", "module", "elements"])),
        draw(st.sampled_from(["auto"] * 6 + ["hvp"])),
        computed,
        draw(st.integers(0, 2**16)),
    )


def save(net: nn.Module, trial: Trial, x: Tensor, folder: Path) -> list[object]:
    path = folder / "net"
    if trial.form == "script":
        torch.jit.script(net).save(str(path))
    elif trial.form == "trace":
        torch.jit.trace(net, x).save(str(path))
    elif trial.form == "pt2":
        torch.export.save(torch.export.export(net, (x,)), path)
    else:
        if trial.form == "safetensors":
            from safetensors.torch import save_model

            save_model(net, str(path))
        else:
            torch.save(net.state_dict(), path)
        arch = ["--arch", "fuzz_nets:build", "--arch-arg", f"spec={trial.spec!r}"]
        return [path, *arch, "--arch-arg", "seed=7"]
    return [path]


def target_of(trial: Trial, generator: torch.Generator) -> Tensor:
    if trial.loss == "cross-entropy":
        return torch.randint(0, trial.outputs, (trial.samples,), generator=generator)
    y = torch.randn(trial.samples, trial.outputs, generator=generator, dtype=torch.float64)
    return {"bce-with-logits": y.sigmoid(), "poisson-nll": y.abs()}.get(trial.loss, y)


def truth(net: nn.Module, trial: Trial, x: Tensor, y: Tensor) -> Tensor:
    """By definition; by differences where PyTorch's own second derivative is wrong."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return LOSSES[trial.loss](output, target, reduction=trial.reduction)

    wrong = any(layer[0] == "weight_norm" for layer in trial.spec)
    oracle = oracles.hessian_by_differences if wrong else oracles.hessian
    return oracle(net, loss, (x,), y)


def expected_blocks(whole: Tensor, net: nn.Module, blocks: str) -> dict[str, Tensor]:
    """The blocks of the whole matrix under the names that the file gives them."""
    places, offset = {}, 0
    for name, p in net.named_parameters():
        places[name], offset = slice(offset, offset + p.numel()), offset + p.numel()
    if blocks == "full":
        return {"hessian": whole}
    shapes = {name: p.shape for name, p in net.named_parameters()}
    if blocks == "elements":
        return {name: whole.diagonal()[s].reshape(shapes[name]) for name, s in places.items()}
    if blocks == "diag":
        return {name: whole[s, s] for name, s in places.items()}
    modules: dict[str, list[int]] = {}
    for name, s in places.items():
        owner = name.rpartition(".")[0].partition(".parametrizations")[0]
        modules.setdefault(owner, []).extend(range(s.start, s.stop))
    return {name: whole[rows][:, rows] for name, rows in modules.items()}


def run(trial: Trial, folder: Path) -> None:
    generator = torch.Generator().manual_seed(trial.seed)
    x = torch.randn(trial.samples, *trial.shape, generator=generator, dtype=torch.float64)
    y = target_of(trial, generator)
    net = build(trial.spec, trial.seed).to(trial.dtype)
    words = save(net, trial, x.to(trial.dtype), folder)
    single = trial.dtype is torch.float32 and trial.computed == "auto"
    if single:  # the data is rounded to what the model computes in
        x, y = x.float().double(), y.float().double() if y.is_floating_point() else y
    np.savez(folder / "data.npz", x=x.numpy(), y=y.numpy())
    output = folder / "h.safetensors"
    words += [
        *("--loss", trial.loss, "--reduction", trial.reduction, "-b", trial.blocks),
        *("--batch-size", trial.batch, "--dtype", trial.computed, "--method", trial.method),
        *("-o", output),
    ]
    arguments = ["compute", str(words[0]), str(folder / "data.npz"), *map(str, words[1:])]
    sys.argv = ["hesscli", *arguments]
    done = CliRunner().invoke(app, arguments)
    note(done.stderr)
    assert "Traceback" not in done.stderr
    assert done.exit_code == 0, done.stderr
    whole = truth(net.double(), trial, x, y)
    expected = expected_blocks(whole, net, trial.blocks)
    _, found = read(output)
    assert set(found) == set(expected)
    scale = float(whole.abs().max())
    for name, block in expected.items():
        error = float((found[name].double() - block).abs().max())
        limit = 2e-3 if single else 1e-6
        assert error <= limit * max(float(block.abs().max()), 1e-2 * scale, 1e-9), (name, error)


SETTINGS = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@settings(SETTINGS, max_examples=20)
@given(trial=trials())
def test_random_models(trial: Trial, tmp_path: Path) -> None:
    run(trial, tmp_path)


@pytest.mark.long
@settings(SETTINGS, max_examples=2500, derandomize=False, print_blob=True)
@given(trial=trials())
def test_many_random_models(trial: Trial, tmp_path: Path) -> None:
    run(trial, tmp_path)
