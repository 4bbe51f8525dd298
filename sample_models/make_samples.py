"""Make every other file in this folder again: `python sample_models/make_samples.py`.

Everything is seeded and runs on one thread, so that a second run writes the same bytes. Only this
script needs scikit-learn, for its handwritten digits.
"""

import io
import os
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from digits_cnn import digits_cnn
from safetensors.torch import save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

FOLDER = Path(__file__).parent

# The little network: its data, and the gradients of its mean squared error there, as published.
DATA = [[1.0, 2.0, 3.0]]
LABEL = [[1.0, 1.0, 5.0, 7.0, 8.0]]
GRAD_FC1_BIAS = [-1.0530, 2.3615, -1.5046, -2.0272]
GRAD_FC2_BIAS = [-0.6045, -0.3972, -2.2165, -2.7600, -2.5522]
GRAD_FC2_WEIGHT = [
    [0.2945, -0.2725, -0.8159, -0.6720],
    [0.1936, -0.1791, -0.5362, -0.4416],
    [1.0800, -0.9993, -2.9918, -2.4641],
    [1.3448, -1.2444, -3.7255, -3.0683],
    [1.2436, -1.1507, -3.4450, -2.8373],
]


def mlp(**layers: nn.Module) -> nn.Sequential:
    """Chain layers under names of their own: `fc1.weight` reads better than `0.weight`."""
    return nn.Sequential(OrderedDict(layers))


def make_ann() -> nn.Sequential:
    """Find weights of `fc2(fc1(x))` that have the published gradients.

    Only gradients were published. Write h = fc1(x), e = dL/d fc1.bias and d = dL/d fc2.bias. For
    L = mean((pred - label)^2) over five outputs, the chain rule says

        d = 2/5 (pred - label)    dL/d fc2.weight = d h^T    e = W2^T d    dL/d fc1.weight = e x^T

    so [dL/d fc2.weight | d] = d [h | 1]^T has rank one, and its first singular pair gives d and h
    more accurately than four printed digits do. Any W1 and W2 with W2^T d = e will then serve, as
    the biases make h and pred come true: take W1 as PyTorch draws it, and W2 as near to that as
    possible.
    """
    x, label, e = (torch.tensor(v, dtype=torch.float64) for v in (DATA[0], LABEL[0], GRAD_FC1_BIAS))
    rank_one = torch.tensor(
        [[*row, d] for row, d in zip(GRAD_FC2_WEIGHT, GRAD_FC2_BIAS, strict=True)],
        dtype=torch.float64,
    )
    left, scale, right = torch.linalg.svd(rank_one)
    d = scale[0] * right[0, -1] * left[:, 0]
    h = right[0, :-1] / right[0, -1]

    model = mlp(fc1=nn.Linear(3, 4), fc2=nn.Linear(4, 5)).double()
    with torch.no_grad():
        fc1, fc2 = model.fc1, model.fc2
        fc2.weight += torch.outer(d, e - d @ fc2.weight) / (d @ d)
        fc1.bias.copy_(h - fc1.weight @ x)
        fc2.bias.copy_(label + 5 / 2 * d - fc2.weight @ h)
    return model.float().eval()


def check_ann(model: nn.Module) -> None:
    """Assert that autograd gives the published gradients, to every digit printed."""
    F.mse_loss(model(torch.tensor(DATA)), torch.tensor(LABEL)).backward()
    expected = {
        "fc1.weight": torch.outer(torch.tensor(GRAD_FC1_BIAS), torch.tensor(DATA[0])),
        "fc1.bias": torch.tensor(GRAD_FC1_BIAS),
        "fc2.weight": torch.tensor(GRAD_FC2_WEIGHT),
        "fc2.bias": torch.tensor(GRAD_FC2_BIAS),
    }
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name]).abs().max().item()
        print(f"ann: the gradient of {name} differs by {error:.1e} from the published one")
        assert error < 5e-5, "the last digit printed must not change"
    model.zero_grad()


def train(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """Train on all the data at once: there are then no batches to shuffle."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def check_accuracy(name: str, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Assert that a trained network reads at least 95 % of the unseen digits."""
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    print(f"{name}: test accuracy {accuracy:.1%}")
    assert accuracy >= 0.95


def save_torchscript(model: nn.Module, path: Path) -> None:
    """Script a model and save it without its debug records.

    Those name the folder where torch is installed, and the serialization id hashes them: without
    both, the file does not depend on where it was made.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", r".*torch\.jit.* is (deprecated|not supported)", DeprecationWarning
        )
        whole = torch.jit.script(model).save_to_buffer()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(path, "w") as target:
        for item in source.infolist():
            if not item.filename.endswith((".debug_pkl", "/serialization_id")):
                target.writestr(item, source.read(item))


def main() -> None:
    """Write the samples."""
    torch.set_num_threads(1)
    torch.manual_seed(0)

    ann = make_ann()
    check_ann(ann)
    save_torchscript(ann, FOLDER / "ann.pt")
    (FOLDER / "ann.safetensors").write_bytes(save(ann.state_dict()))
    np.savez(FOLDER / "ann.npz", data=np.float32(DATA), label=np.float32(LABEL))

    digits = load_digits()
    x, test_x, y, test_y = (
        torch.from_numpy(part)
        for part in train_test_split(
            np.float32(digits.data / 16),
            np.int64(digits.target),
            test_size=300,
            random_state=0,
            stratify=digits.target,
        )
    )
    np.savez(FOLDER / "digits.npz", x=test_x.numpy(), y=test_y.numpy())

    digits_mlp = train(mlp(fc1=nn.Linear(64, 16), tanh=nn.Tanh(), fc2=nn.Linear(16, 10)), x, y)
    check_accuracy("digits_mlp", digits_mlp, test_x, test_y)
    save_torchscript(digits_mlp, FOLDER / "digits_mlp.pt")

    cnn = train(digits_cnn(), x, y)
    check_accuracy("digits_cnn", cnn, test_x, test_y)
    (FOLDER / "digits_cnn.safetensors").write_bytes(save(cnn.state_dict()))


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # TorchScript writes a module's constants in the order of a set, which changes with the seed
        os.execve(sys.executable, sys.orig_argv, os.environ | {"PYTHONHASHSEED": "0"})
    main()
