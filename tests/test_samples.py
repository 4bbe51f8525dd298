"""The samples: what was published of the first network, and that the digits can be read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, read
from safetensors.torch import load_file

SAMPLES = REPOSITORY / "sample_models"

GRADIENTS = {
    "fc2.bias": [-0.6045, -0.3972, -2.2165, -2.7600, -2.5522],
    "fc1.bias": [-1.0530, 2.3615, -1.5046, -2.0272],
    "fc1.weight": np.outer([-1.0530, 2.3615, -1.5046, -2.0272], [1, 2, 3]),
    "fc2.weight": [
        [0.2945, -0.2725, -0.8159, -0.6720],
        [0.1936, -0.1791, -0.5362, -0.4416],
        [1.0800, -0.9993, -2.9918, -2.4641],
        [1.3448, -1.2444, -3.7255, -3.0683],
        [1.2436, -1.1507, -3.4450, -2.8373],
    ],
}
ANN = {
    "script": ("ann.pt",),
    "state-dict": ("ann.safetensors", "--arch", "mlp", "--arch-arg", "activation=identity"),
}


def test_the_folder_is_small():
    files = [p for p in SAMPLES.rglob("*") if p.is_file()]
    assert {"ann.pt", "ann.safetensors", "ann.npz", "digits_mlp.pt", "digits_cnn.safetensors",
            "digits_cnn.py", "digits.npz", "make_samples.py"} <= {p.name for p in files}  # fmt: skip
    assert 0 < sum(p.stat().st_size for p in files) < 2e6


@pytest.fixture
def ann():
    data = np.load(SAMPLES / "ann.npz")
    assert data.files == ["data", "label"]
    assert data["data"].tolist() == [[1, 2, 3]]
    assert data["label"].tolist() == [[1, 1, 5, 7, 8]]
    return torch.jit.load(SAMPLES / "ann.pt"), data


@pytest.mark.parametrize("kind", ANN)
def test_the_published_gradients(cli, tmp_path, kind):
    model, *options = ANN[kind]
    ran = cli("compute", SAMPLES / model, SAMPLES / "ann.npz", *options, "--gradient")
    assert ran.code == 0, ran.stderr
    document, tensors = read(tmp_path / "hessian.safetensors")
    assert document["loss"]["name"] == "mse"
    for name, truth in GRADIENTS.items():
        found = tensors[f"gradient.{name}"].numpy()
        assert found.shape == np.shape(truth)
        np.testing.assert_allclose(found, truth, rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", ANN)
def test_every_weights_own_second_derivative(cli, tmp_path, kind):
    model, *options = ANN[kind]
    ran = cli(
        "compute", SAMPLES / model, SAMPLES / "ann.npz", *options, "-b", "elements", "--dtype",
        "float64",
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    _, found = read(tmp_path / "hessian.safetensors")
    weights = {k: v.double() for k, v in load_file(SAMPLES / "ann.safetensors").items()}
    x = torch.tensor([1.0, 2, 3], dtype=torch.float64)
    h = weights["fc1.weight"] @ x + weights["fc1.bias"]
    through = 0.4 * weights["fc2.weight"].square().sum(0)
    truth = {
        "fc2.bias": torch.full((5,), 0.4, dtype=torch.float64),
        "fc2.weight": (0.4 * h.square()).expand(5, 4),
        "fc1.weight": torch.outer(through, x.square()),
        "fc1.bias": through,
    }
    assert set(found) == set(truth)
    for name, values in truth.items():
        assert found[name].shape == values.shape
        torch.testing.assert_close(found[name].double(), values, rtol=1e-7, atol=1e-9)


def test_both_files_hold_the_same_network(ann):
    model, _ = ann
    stored = load_file(SAMPLES / "ann.safetensors")
    named = dict(model.named_parameters())
    assert set(named) == set(stored) == set(GRADIENTS)
    for name, value in stored.items():
        assert torch.equal(named[name], value)


@pytest.fixture
def digits():
    data = np.load(SAMPLES / "digits.npz")
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])
    assert x.shape[0] == y.shape[0] >= 200
    assert y.unique().tolist() == list(range(10))
    return x, y


def test_the_perceptron_reads_digits(digits):
    x, y = digits
    model = torch.jit.load(SAMPLES / "digits_mlp.pt")
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert shapes == [(16, 64), (16,), (10, 16), (10,)]
    assert (model(x).argmax(1) == y).float().mean() >= 0.95


def test_the_convolutions_read_digits(digits, monkeypatch):
    x, y = digits
    monkeypatch.syspath_prepend(SAMPLES)
    from digits_cnn import digits_cnn

    model = digits_cnn().eval()
    model.load_state_dict(load_file(SAMPLES / "digits_cnn.safetensors"))
    assert (model(x).argmax(1) == y).float().mean() >= 0.95


def test_the_cards_two_commands(cli):
    first = cli("compute", SAMPLES / "digits_mlp.pt", SAMPLES / "digits.npz", "--blocks", "diag")
    assert first.code == 0, first.stderr
    assert "block_diagonal" in first.stdout
    assert any("cross-entropy" in note for note in first.notes)
    second = cli("eigen", "--top", 10)
    assert second.code == 0
    lines = second.stdout.splitlines()
    assert [line.split()[0] for line in lines[-10:]] == [str(i + 1) for i in range(10)]


def test_a_state_dict_with_its_factory(cli):
    ran = cli(
        "compute", SAMPLES / "digits_cnn.safetensors", SAMPLES / "digits.npz",
        "--arch", f"{SAMPLES / 'digits_cnn.py'}:digits_cnn", "--params", "conv.*", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert [facts["name"] for facts in document["blocks"]] == ["conv.weight", "conv.bias"]
    assert document["check"]["relative_error"] <= document["check"]["tolerance"] <= 1e-3
