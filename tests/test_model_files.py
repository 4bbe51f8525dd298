"""Model files: every kind loads into the same form, and every refusal says what to do."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import read
from oracles import hessian, relative_error
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from hesscli.cli.values import parse_value
from hesscli.errors import FileError, HesscliError, MismatchError, UsageError
from hesscli.files.models.architectures import build
from hesscli.files.models.call_signature import CallSignature, signature_of
from hesscli.files.models.checkpoints import without_wrappers
from hesscli.files.models.model_file import load_model
from hesscli.files.sniff import Kind, kind_of


class Net(nn.Module):
    """Two tied layers, a batch norm, a frozen parameter and an optional input."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(4, 4, bias=False)
        self.dec = nn.Linear(4, 4, bias=False)
        self.dec.weight = self.enc.weight
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
        return self.dec(self.norm(torch.tanh(self.enc(x)))) * self.scale + shift


class Plain(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


NAMES = ["scale", "enc.weight", "norm.weight", "norm.bias"]
X = torch.linspace(-1, 1, 28).reshape(7, 4)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.norm.running_mean.fill_(0.5)
    return net.eval()


class Masked(nn.Module):
    """A mask made as attention masks are, and numbers made float32 by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        keep = mask & (x < 1)
        return self.layer(x.to(torch.float32) * keep).tanh()


@pytest.fixture(scope="module")
def exported(net: Net, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exporting is slow, so each program is made once."""
    folder = tmp_path_factory.mktemp("exported")
    dynamic = ({0: torch.export.Dim("batch")},)
    programs = {
        "dynamic": torch.export.export(net, (X,), dynamic_shapes=(*dynamic, None)[:1]),
        "fixed": torch.export.export(net, (X,)),
        "half": torch.export.export(Plain().half(), (torch.ones(2, 3).half(),)),
        "keywords": torch.export.export(net, (X,), {"shift": 1.0}),
        "masked": torch.export.export(Masked(), (X, X > 0), dynamic_shapes=dynamic * 2),
    }
    paths = {}
    for name, program in programs.items():
        paths[name] = folder / f"{name}.pt2"
        torch.export.save(program, paths[name])
    return paths


def refused(error: type[HesscliError], path: object, **options: object) -> HesscliError:
    with pytest.raises(error) as caught:
        load_model(path, **options)
    assert "\n" not in caught.value.message
    assert "miniz" not in caught.value.message
    return caught.value


def rewrite(source: Path, target: Path, edit: dict[str, bytes]) -> Path:
    """Copies a zip file, with other content (and its right checksum) for the names in `edit`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            changed = [content for end, content in edit.items() if name.endswith(end)]
            new.writestr(name, changed[0] if changed else old.read(name))
    return target


# --- what a file is ---------------------------------------------------------------------------


def test_kinds_are_told_by_content(net, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(net).save("1")
    torch.jit.trace(net, X).save("2")
    torch.save(net.state_dict(), "3")
    torch.save(net.state_dict(), "4", _use_new_zipfile_serialization=False)
    save_file({"w": torch.ones(2)}, "5")
    np.savez("6.npz", x=1)
    np.savez_compressed("7.npz", x=1)
    np.save("8.npy", np.ones(3))
    for name, content in {
        "9": b"",
        "10": b"\x89HDF\r\n\x1a\n....",
        "11": b"\x08\x08\x12\x07pytorch",
        "12": b"version https://git-lfs.github.com/spec/v1\n",
        "13": b"<!DOCTYPE html><html>",
        "14": b"a,b\n1,2\n",
        "15": b"PK\x03\x04 cut off",
        "16": b"\x80\x04\x95\x00",
        "17": b"\x00\x01\x02\xff",
        "18": b"\x1f\x8b\x08",
    }.items():
        Path(name).write_bytes(content)
    with zipfile.ZipFile("19", "w") as archive:
        archive.writestr("notes.txt", "x")
    np.savez("20.npz")
    os.mkfifo("21")
    Path("22").write_bytes(b'[\n {"x": [1, 2]}]')
    Path("23").write_bytes(b"[a],[b]\n1,2\n")
    files = {int(path.stem): path for path in Path().iterdir()}
    kinds = [kind_of(files[number]).name.lower() for number in sorted(files)]
    expected = (
        "torchscript torchscript torch_zip torch_legacy safetensors npz npz npy empty hdf5 onnx "
        "lfs_pointer html text zip_damaged pickle unknown gzip zip npz special json "
        "text"
    )
    assert " ".join(kinds) == expected
    assert {kind_of(path) for path in exported.values()} == {Kind.EXPORTED}
    Path("24").mkdir()
    assert kind_of("24") is Kind.FOLDER
    assert kind_of(tmp_path) is Kind.NPY_FOLDER


def test_sniffing_loads_neither_torch_nor_numpy():
    code = "import hesscli.files.sniff, sys; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_file_is_a_usage_error(tmp_path):
    error = refused(UsageError, tmp_path / "no.pt")
    assert error.exit_code == 2
    assert error.message.endswith("no.pt: no such file")
    (tmp_path / "file").touch()
    assert refused(UsageError, tmp_path / "file" / "no.pt").exit_code == 2


@pytest.mark.parametrize(
    ("content", "words", "hint"),
    [
        (b"", "an empty file", "torch.jit.script(model)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer", "git lfs pull"),
        (b"<html>", "an HTML page", "fetch the file again"),
        (b"\x08\x08\x12\x07pytorch", "an ONNX model", "torch.export.save(torch.export.export("),
        (b"PK\x03\x04" + b"x" * 99, "damaged or cut off", "download the file again"),
        (b"\x80\x04\x95....", "which torch.save did not write", "state_dict"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, words, hint):
    path = tmp_path / "net.pt"
    path.write_bytes(content)
    error = refused(FileError, path)
    assert error.exit_code == 3
    assert words in error.message
    assert hint in error.hint


def test_data_in_place_of_the_model(tmp_path):
    np.savez(tmp_path / "data.npz", x=1)
    for name in ("data.csv", "data.tsv", "data.txt"):
        (tmp_path / name).write_text("a,b\n1,2\n")
    for name in ("data.npz", "data.csv", "data.tsv"):
        error = refused(FileError, tmp_path / name)
        assert error.hint == "the model comes first: hesscli compute MODEL DATA"
    assert "save model.state_dict()" in refused(FileError, tmp_path / "data.txt").hint


def test_a_pipe_and_a_folder_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(FileError, tmp_path / "pipe").message
    assert "a folder" in refused(FileError, tmp_path).message


def test_an_unreadable_file(tmp_path):
    path = tmp_path / "net.pt"
    path.write_bytes(b"x")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads everything")
    assert "Permission denied" in refused(FileError, path).message


# --- TorchScript ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(net, tmp_path, how, recwarn):
    with torch.no_grad():
        expected = net(X)
    path = tmp_path / "net"
    (torch.jit.script(net) if how == "script" else torch.jit.trace(net, X)).save(str(path))
    recwarn.clear()
    saved = load_model(path)
    assert not recwarn.list
    assert saved.form == "torchscript"
    assert [name for name, _ in saved.module.named_parameters()] == NAMES
    assert [p.requires_grad for p in saved.module.parameters()] == [False, True, True, True]
    torch.testing.assert_close(saved.module(X), expected)
    assert not saved.module.training
    assert saved.signature.most == (2 if how == "script" else 1)
    assert (saved.notes, saved.batch_sizes, len(saved.sha256)) == ((), (1, None), 64)


class MadeOnAGpu(nn.Module):
    """Its code names the device of the machine that it was saved on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), AddsOnes())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x + torch.zeros(3, device=torch.device("cuda:1")))


class AddsOnes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 2:
            x = x + torch.ones(3, device="cuda").to("cuda:0")
        return x


def test_torchscript_runs_on_another_device_than_it_was_made_on(tmp_path):
    module = MadeOnAGpu()
    torch.jit.script(module).save(str(tmp_path / "net.pt"))
    saved = load_model(tmp_path / "net.pt")
    torch.testing.assert_close(saved.module(X[:, :3]), module.inner[0](X[:, :3]) + 1)


class Padding(Enum):
    SAME = "same"
    VALID = "valid"


class Rank(Enum):
    FLAT = 1
    DEEP = 2


class OfEnums(nn.Module):
    """Keeps what it was told as members of enums, as timm's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.padding, self.rank = Padding.SAME, Rank.DEEP

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        if self.padding == Padding.SAME and self.rank == Rank.DEEP:
            x = torch.tanh(x)
        return x


def test_torchscript_with_enums(tmp_path):
    module = OfEnums()
    torch.jit.script(module).save(str(tmp_path / "net.pt"))
    saved = load_model(tmp_path / "net.pt")
    torch.testing.assert_close(saved.module(X), module(X))
    assert [name for name, _ in saved.module.named_parameters()] == ["layer.weight", "layer.bias"]


SCALES = torch.tensor([1.0, 2.0, 3.0])


class OfConstants(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * SCALES + SCALES.sum()


def test_a_trace_with_constants_of_several_numbers(tmp_path):
    module = OfConstants(4, 3)
    torch.jit.trace(module, X).save(tmp_path / "net.pt")
    torch.testing.assert_close(load_model(tmp_path / "net.pt").module(X), module(X))


def test_train_mode(net, tmp_path):
    torch.jit.script(net).save(str(tmp_path / "script"))
    torch.jit.trace(net, X).save(str(tmp_path / "trace"))
    script = load_model(tmp_path / "script", train_mode=True)
    assert script.module.training
    assert script.notes == ()
    (note,) = load_model(tmp_path / "trace", train_mode=True).notes
    assert note == "train mode has no effect: a traced model keeps the mode it had"


def test_frozen_torchscript_has_no_parameters(net, tmp_path):
    torch.jit.freeze(torch.jit.script(net)).save(str(tmp_path / "net.pt"))
    error = refused(FileError, tmp_path / "net.pt")
    assert error.exit_code == 3
    assert "without parameters; frozen and quantised models" in error.message
    hint = "save it before torch.jit.freeze or quantising: "
    assert error.hint == hint + "torch.jit.script(model).save('net.pt')"


def test_torchscript_is_never_unpickled(net, tmp_path, monkeypatch):
    torch.jit.script(net).save(str(tmp_path / "net.pt"))
    monkeypatch.setattr(torch, "load", lambda *_a, **_k: pytest.fail("unpickled"))
    assert load_model(tmp_path / "net.pt", allow_pickle=True).form == "torchscript"


def test_an_unneeded_architecture_is_noted(net, tmp_path):
    torch.jit.script(net).save(str(tmp_path / "net.pt"))
    (note,) = load_model(tmp_path / "net.pt", arch="mlp").notes
    assert note.startswith("--arch mlp has no effect")


class Copies(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        copies = torch.zeros(len(x), 3, dtype=torch.float64)
        copies.copy_(self.bias)
        return torch.cat([copies, super().forward(x)], 1)


def test_copies_of_a_decomposed_program(tmp_path):
    """They have the shape and the type of what is written to."""
    module = Copies(4, 3)
    program = torch.export.export(module, (X,)).run_decompositions()
    torch.export.save(program, tmp_path / "net.pt2")
    torch.testing.assert_close(load_model(tmp_path / "net.pt2").module(X), module(X))


@pytest.mark.parametrize("forward", [partial(nn.functional.linear, weight=X), None], ids=["C", "-"])
def test_a_forward_that_declares_nothing(forward):
    module = nn.Linear(3, 2)
    module.forward = forward
    assert signature_of(module) == CallSignature()


# --- damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["script", "zip", "legacy", "exported", "safetensors"])
@pytest.mark.parametrize("part", [0.02, 0.4, 0.7, 0.97])
def test_files_cut_off(net, exported, tmp_path, kind, part):
    path = tmp_path / "net.pt"
    if kind == "script":
        torch.jit.script(Plain()).save(str(path))
    elif kind == "exported":
        path.write_bytes(exported["dynamic"].read_bytes())
    elif kind == "safetensors":
        save_file({"w": torch.ones(50)}, path)
    else:
        new = kind == "zip"
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=new)
    content = path.read_bytes()
    path.write_bytes(content[: max(16, int(len(content) * part))])
    error = refused(FileError, path, arch="mlp")
    assert error.exit_code == 3
    assert "cut off" in error.message


@pytest.mark.parametrize("kind", ["script", "zip", "exported"])
def test_a_flipped_bit_is_found(exported, tmp_path, kind):
    """PyTorch loads it; the Hessian would be that of another model."""
    path = tmp_path / "net.pt"
    if kind == "script":
        torch.jit.script(Plain()).save(str(path))
    elif kind == "zip":
        torch.save(Plain().state_dict(), path)
    else:
        path.write_bytes(exported["dynamic"].read_bytes())
    end = "weights/weight_1" if kind == "exported" else "data/0"
    with zipfile.ZipFile(path) as archive:
        member = next(m for m in archive.infolist() if m.filename.endswith(end))
        value = archive.read(member)
    content = path.read_bytes()
    at = content.index(value)
    path.write_bytes(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
    error = refused(FileError, path)
    assert f"{end} is not what was written" in error.message
    assert error.hint == "copy or download the file again"


def test_files_without_checksums_load(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "net.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert load_model(tmp_path / "net.pt", arch="mlp").form == "state_dict"


LIT = """
from torch import nn
from torch.nn.utils import prune


class Net(nn.Sequential):
    def __init__(self, hidden, act="relu", out=2):
        kind = {"relu": nn.ReLU, "tanh": nn.Tanh}[act]
        super().__init__(nn.Linear(3, hidden), kind(), nn.Linear(hidden, out))


def any_of(**arguments):
    arguments.pop("lr")
    return Net(**arguments)


class Whole(Net):
    def __init__(self, conf, **others):
        super().__init__(conf["hidden"], conf.get("act", "relu"), **others)


ready = Net(5, "tanh")
"""

PRUNED = """

def pruned(**arguments):
    import torch
    model = Net(**arguments)
    torch.nn.utils.prune.identity(model.get_submodule('0'), 'weight')
    return model
"""


@pytest.mark.parametrize(
    ("factory", "given", "act", "noted"),
    [
        ("Net", {}, nn.Tanh, "arguments of Net: hidden=5, act='tanh', as saved with the weights"),
        ("Net", {"act": "relu"}, nn.ReLU, "arguments of Net: hidden=5, as saved with the weights"),
        ("Net", {"act": "relu", "hidden": 5}, nn.ReLU, None),
        ("any_of", {}, nn.Tanh, "arguments of any_of: hidden=5, lr=0.1, act='tanh', as saved"),
        ("ready", {}, nn.Tanh, None),
    ],
)
def test_arguments_that_a_checkpoint_keeps(tmp_path, factory, given, act, noted):
    """As Lightning's `save_hyperparameters()` does: a factory gets those that it takes, as `load_from_checkpoint`."""
    (tmp_path / "lit.py").write_text(LIT)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    kept = {"hidden": 5, "lr": 0.1, "act": "tanh"}
    torch.save({"state_dict": net.state_dict(), "hyper_parameters": kept}, tmp_path / "last.ckpt")
    arch = f"{tmp_path / 'lit.py'}:{factory}"
    saved = load_model(tmp_path / "last.ckpt", arch=arch, arch_arguments=given)
    assert type(saved.module[1]) is act
    torch.testing.assert_close(saved.module[0](X[:2, :3]), net[0](X[:2, :3]))
    notes = [note for note in saved.notes if note.startswith("arguments")]
    assert [note[: len(noted)] for note in notes] == [noted] if noted else not notes


def test_a_note_of_a_saved_argument_is_the_same_in_every_run(tmp_path):
    """It goes into the file: no addresses."""
    (tmp_path / "lit.py").write_text(LIT)
    kept = {"hidden": 5, "lr": object(), "act": "tanh"}
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    torch.save({"state_dict": net.state_dict(), "hyper_parameters": kept}, tmp_path / "last.ckpt")
    arch = f"{tmp_path / 'lit.py'}:any_of"
    saved = load_model(tmp_path / "last.ckpt", arch=arch, allow_pickle=True)
    assert "arguments of any_of: hidden=5, lr, act='tanh', as saved with the weights" in saved.notes


def test_pruned_weights_of_an_architecture_that_is_not(tmp_path):
    (tmp_path / "lit.py").write_text(LIT + PRUNED)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    prune.l1_unstructured(net[0], "weight", amount=4)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    arguments = {"hidden": 5, "act": "tanh"}
    arch = f"{tmp_path / 'lit.py'}:Net"
    error = refused(MismatchError, tmp_path / "net.pt", arch=arch, arch_arguments=arguments)
    assert "torch.nn.utils.prune.identity(model.get_submodule('0'), 'weight')" in error.hint
    arch = f"{tmp_path / 'lit.py'}:pruned"
    saved = load_model(tmp_path / "net.pt", arch=arch, arch_arguments=arguments)
    torch.testing.assert_close(saved.module(X[:2, :3]), net(X[:2, :3]))


@pytest.mark.parametrize(
    ("factory", "given", "width"),
    [("Whole", {}, 5), ("Whole", {"conf": {"hidden": 4}}, 4), ("Net", {}, 5)],
)
def test_arguments_that_a_checkpoint_keeps_as_one(tmp_path, factory, given, width):
    """Lightning's `hparams_name` is the parameter that took a mapping of all arguments, if the factory has it."""
    (tmp_path / "lit.py").write_text(LIT)
    net = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))
    kept = {"hyper_parameters": {"hidden": 5, "act": "tanh"}, "hparams_name": "conf"}
    torch.save({"state_dict": net.state_dict(), **kept}, tmp_path / "last.ckpt")
    arch = f"{tmp_path / 'lit.py'}:{factory}"
    saved = load_model(tmp_path / "last.ckpt", arch=arch, arch_arguments=given)
    torch.testing.assert_close(saved.module[0](X[:2, :3]), net[0](X[:2, :3]))
    assert any("conf={'hidden': 5" in note for note in saved.notes) == (
        factory == "Whole" and not given
    )


# --- torch.export -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_exported(net, exported, caplog):
    saved = load_model(exported["dynamic"])
    assert saved.form == "exported"
    assert [name for name, _ in saved.module.named_parameters()] == NAMES
    assert [p.requires_grad for p in saved.module.parameters()] == [False, True, True, True]
    torch.testing.assert_close(saved.module(X[:5]), net(X[:5]))
    assert (saved.batch_sizes, saved.signature.most) == ((1, None), 1)
    assert not saved.module.training
    assert not caplog.records


def test_exported_models_are_tied_again(net, exported):
    module = load_model(exported["dynamic"]).module
    assert module.get_parameter("enc.weight") is module.get_parameter("dec.weight")
    (gradient,) = torch.autograd.grad(module(X).sum(), module.get_parameter("enc.weight"))
    (expected,) = torch.autograd.grad(net(X).sum(), net.enc.weight)
    torch.testing.assert_close(gradient, expected)


def test_masks_of_exported_models(exported):
    module = load_model(exported["masked"]).module
    layer = module.layer
    x, mask = X[:4] / 2, X[:4] > 0
    expected = torch.tanh((x * mask * (x < 1)) @ layer.weight.T + layer.bias)
    torch.testing.assert_close(module(x, mask), expected)


def test_exported_models_in_float64(exported, cli, tmp_path):
    """PyTorch's program says float32 where numbers are converted, and asserts it."""
    x = torch.linspace(-1, 2, 16, dtype=torch.float64).reshape(4, 4)
    np.savez(tmp_path / "d.npz", x=x, mask=x > 0, y=np.ones((4, 2)))
    ran = cli(
        "compute", exported["masked"], tmp_path / "d.npz", "--inputs", "x", "--inputs", "mask",
        "-b", "full", "--dtype", "float64",
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert "what the model itself computes in float32 is computed in float64" in ran.notes
    document, found = read(tmp_path / "hessian.safetensors")
    assert document["check"]["dtype"] == "float64"
    layer = nn.Linear(4, 2).double()
    layer.load_state_dict(load_model(exported["masked"]).module.layer.state_dict())
    inputs, target = x.where((x > 0) & (x < 1), 0), torch.ones(4, 2, dtype=torch.float64)
    truth = hessian(nn.Sequential(layer, nn.Tanh()), F.mse_loss, (inputs,), target)
    assert relative_error(found["hessian"], truth) < 1e-9


def test_the_batch_size_of_an_exported_model(exported):
    assert load_model(exported["fixed"]).batch_sizes == (7, 7)


def test_exported_models_keep_their_mode(exported):
    (note,) = load_model(exported["dynamic"], train_mode=True).notes
    assert note == "train mode has no effect: an exported model keeps the mode it had"


def test_constants_that_a_program_was_exported_with(net, exported):
    saved = load_model(exported["keywords"])
    torch.testing.assert_close(saved.module(X), net(X, shift=1.0))
    assert saved.signature == CallSignature(1, ("x",))


def test_half_precision_is_widened(exported, tmp_path):
    saved = load_model(exported["half"])
    assert saved.notes == ("weights stored in float16, and widened",)
    assert saved.module(torch.ones(2, 3)).dtype is torch.float32
    torch.jit.script(Plain().bfloat16()).save(str(tmp_path / "net.pt"))
    saved = load_model(tmp_path / "net.pt")
    assert saved.notes == ("weights stored in bfloat16, and widened",)
    assert saved.module(torch.ones(2, 3)).dtype is torch.float32


def edited_program(source: Path, target: Path, edit) -> Path:
    with zipfile.ZipFile(source) as archive:
        name = next(n for n in archive.namelist() if n.endswith("models/model.json"))
        program = json.loads(archive.read(name))
    edit(program)
    return rewrite(source, target, {"models/model.json": json.dumps(program).encode()})


@pytest.fixture
def code_of(exported, tmp_path, monkeypatch) -> Callable[..., str]:
    """Refuses a program that was changed, unread; gives what of it would run code."""
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("loaded"))

    def run(edit: Callable[[dict], None]) -> str:
        error = refused(FileError, edited_program(exported["fixed"], tmp_path / "net.pt2", edit))
        assert error.hint == "--allow-pickle"
        return re.search(r"\((.*)\), which run code when loaded", error.message)[1]

    return run


@pytest.mark.parametrize(
    "target",
    [
        *("torch.serialization.load", "torch.load", "builtins.eval"),
        *("_operator.call", "_operator.attrgetter", "_operator.methodcaller"),
        *("torch.ops.aten.from_file.out", "torch.ops.aten.save.default"),
        "torch.ops.debugprims.load_tensor.default",
        *("torch.ops.aten.__add__.Tensor", "torch.ops.aten.add.__call__"),
        *("torch.ops.aten.add.Tensor.more", "torch.ops.aten.add.Tensor and open"),
        *("math.sqrt.more", "torch.sym_max.more"),
    ],
)
def test_exported_programs_that_call_more_than_operators(code_of, target):
    def edit(program):
        program["graph_module"]["graph"]["nodes"][0]["target"] = target

    assert code_of(edit) == f"call of {target}"


@pytest.mark.parametrize(
    "code",
    [
        *("__import__('os').system('x')", "open", "__builtins__", "x.size()", "(lambda: 0)()"),
        *("Symbol('open(1)')", "Symbol('a b')", "Symbol(b'x')", "f'{x}'", "[i for i in x]"),
        *("x if (y := 1) else 2", "1 +", "a" + "(" * 5000),
    ],
)
def test_sizes_of_exported_programs_that_are_code(code_of, code):
    def edit(program):
        value = program["graph_module"]["graph"]["tensor_values"]["x"]
        value["sizes"][0] = {"as_expr": {"expr_str": code, "hint": None}}

    assert code_of(edit) == f"expression {code[:60]!r}"


@pytest.mark.parametrize(
    "code",
    [
        *("__import__('os').system('x')", "L['x'].apply_(print)", "L['x'].__class__"),
        *("L['x'].numpy()", "L['a b']"),
    ],
)
def test_guards_of_exported_programs_that_are_code(code_of, code):
    def edit(program):
        program["guards_code"] = ["L['x'].size()[0] == 7", code]

    assert code_of(edit) == f"expression {code!r}"


def test_exported_programs_that_hold_pickles(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("loaded"))
    torch.save({"inputs": Plain()}, tmp_path / "pickle")
    pickled = (tmp_path / "pickle").read_bytes()
    config = json.dumps({"config": {"c": {"path_name": "c_0", "use_pickle": True}}}).encode()
    for changed, added, words in (
        ({"sample_inputs/model.pt": pickled}, {}, f"({__name__}.Plain)"),
        ({"constants_config.json": config}, {"c_0": pickled}, f"({__name__}.Plain)"),
        ({}, {"opaque_obj_0": b""}, "(opaque object)"),
    ):
        target = rewrite(exported["fixed"], tmp_path / "net.pt2", changed)
        with zipfile.ZipFile(target, "a") as archive:
            folder = archive.namelist()[0].partition("/")[0] + "/data/constants/"
            for name, content in added.items():
                archive.writestr(folder + name, content)
        assert words in refused(FileError, target).message


def test_exported_programs_of_another_version(exported, tmp_path):
    def edit(program):
        program["schema_version"]["major"] = 99

    error = refused(FileError, edited_program(exported["fixed"], tmp_path / "net.pt2", edit))
    assert "a torch.export program that cannot be read" in error.message


# --- state dicts ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_state_dict_needs_an_architecture(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    if form == "safetensors":
        save_file(Plain().state_dict(), "net.pt")
    else:
        new = form == "zip"
        torch.save(Plain().state_dict(), "net.pt", _use_new_zipfile_serialization=new)
    error = refused(FileError, "net.pt")
    assert error.exit_code == 3
    assert error.message == "net.pt: a state dict holds weights but no architecture"
    assert error.hint == "--arch mypkg.nets:make_mlp"
    saved = load_model("net.pt", arch=f"{__name__}:Plain")
    assert saved.form == "state_dict"
    assert saved.signature.most == 1


def test_ties_of_the_architecture(net, tmp_path):
    path = tmp_path / "net.safetensors"
    weights = {name: t for name, t in net.state_dict().items() if name != "dec.weight"}
    save_file(weights, path)  # safetensors keeps one name of a tied parameter
    saved = load_model(path, arch=f"{__name__}:Net")
    torch.testing.assert_close(saved.module(X), net(X))
    assert saved.module.dec.weight is saved.module.enc.weight
    assert saved.signature.most == 2
    save_file({**weights, "dec.weight": torch.zeros(4, 4)}, path)
    error = refused(MismatchError, path, arch=f"{__name__}:Net")
    assert "enc.weight and dec.weight differ, but the architecture ties them" in error.message


def test_double_weights_are_not_rounded(tmp_path):
    weight = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    bias = torch.zeros(2, dtype=torch.float64)
    torch.save({"fc.weight": weight, "fc.bias": bias}, tmp_path / "net.pt")
    module = load_model(tmp_path / "net.pt", arch=f"{__name__}:Plain").module
    assert torch.equal(module.fc.weight, weight)


def test_half_weights_of_a_state_dict(tmp_path):
    torch.save(Plain().half().state_dict(), tmp_path / "net.pt")
    saved = load_model(tmp_path / "net.pt", arch=f"{__name__}:Plain")
    assert saved.notes == ("weights stored in float16, and widened",)
    assert saved.module.fc.weight.dtype is torch.float32


class Halves(Plain):
    """Built in half precision, with a running mean, a count of batches and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.half()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_are_not_rounded_to_a_narrow_architecture(tmp_path, dtype):
    weights = {
        name: (torch.rand_like(t, dtype=dtype) / 3 if t.is_floating_point() else ~t)
        for name, t in Halves().state_dict().items()
    }
    torch.save(weights, tmp_path / "net.pt")
    saved = load_model(tmp_path / "net.pt", arch=f"{__name__}:Halves")
    for name, tensor in saved.module.state_dict().items():
        assert torch.equal(tensor, weights[name].to(tensor.dtype)), name
        assert torch.promote_types(tensor.dtype, weights[name].dtype) is tensor.dtype, name
        assert tensor.is_floating_point() == weights[name].is_floating_point(), name
    narrow = ("weights stored in bfloat16, and widened",)
    assert saved.notes == (narrow if dtype is torch.bfloat16 else ())


def test_weights_do_not_narrow_an_architecture(tmp_path):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "net.pt")
    module = load_model(tmp_path / "net.pt", arch=f"{__name__}:wide").module
    assert {p.dtype for p in module.parameters()} == {torch.float64}


def wide() -> nn.Module:
    return nn.Linear(3, 2).double()


class Picky(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        arguments[-1].append("these weights\nare not mine")


def test_what_a_module_says_of_its_weights(tmp_path):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "net.pt")
    error = refused(MismatchError, tmp_path / "net.pt", arch=f"{__name__}:Picky")
    assert error.message.endswith("the weights do not fit the architecture: are not mine")


def lazy() -> nn.Module:
    return nn.LazyLinear(2)


def test_weights_that_a_lazy_architecture_lacks(tmp_path):
    torch.save(nn.Linear(3, 2).state_dict() | {"scale": torch.ones(1)}, tmp_path / "net.pt")
    error = refused(MismatchError, tmp_path / "net.pt", arch=f"{__name__}:lazy")
    assert error.message.endswith("the weights do not fit the architecture: unexpected: scale")


def test_double_weights_of_a_lazy_architecture_are_not_rounded(tmp_path):
    weights = nn.Linear(3, 2).double().state_dict()
    torch.save(weights, tmp_path / "net.pt")
    module = load_model(tmp_path / "net.pt", arch=f"{__name__}:lazy").module
    assert torch.equal(module.weight, weights["weight"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("arch", ["mlp", f"{__name__}:Plain"])
@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64"])
def test_weights_that_are_not_floating_point(tmp_path, arch, dtype):
    weights = {name: t.to(getattr(torch, dtype)) for name, t in Plain().state_dict().items()}
    save_file(weights, tmp_path / "net.safetensors")
    error = refused(MismatchError, tmp_path / "net.safetensors", arch=arch)
    assert error.exit_code == 4
    assert error.message.endswith(
        f": fc.weight is {dtype}; the architecture wants floating point numbers"
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("arch", ["mlp", f"{__name__}:Plain"])
@pytest.mark.parametrize(
    ("kind", "make", "hint"),
    [
        ("sparse", torch.Tensor.to_sparse, "to_dense"),
        ("meta", lambda t: t.to("meta"), None),
        (
            "quantised",
            lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
            "dequantize",
        ),
    ],
)
def test_weights_that_are_not_dense(tmp_path, arch, kind, make, hint):
    weights = Plain().state_dict()
    with warnings.catch_warnings(action="ignore"):
        torch.save({**weights, "fc.weight": make(weights["fc.weight"])}, tmp_path / "net.pt")
    error = refused(MismatchError, tmp_path / "net.pt", arch=arch)
    message = f": fc.weight is a {kind} tensor; the architecture wants a dense one"
    assert error.message.endswith(message)
    assert error.hint == (hint and f"weights['fc.weight'] = weights['fc.weight'].{hint}()")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("arch", ["mlp", f"{__name__}:Plain"])
def test_nested_weights(tmp_path, arch):
    nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)])
    torch.save({**Plain().state_dict(), "fc.weight": nested}, tmp_path / "net.pt")
    error = refused(FileError, tmp_path / "net.pt", arch=arch)
    unread = ": holds a nested tensor; expected dense ones"  # by PyTorch from 2.15 on
    named = ": fc.weight is a nested tensor; expected a dense one"
    assert error.message.endswith(unread if torch.__version__ >= (2, 15) else named)
    assert "pickle" not in error.hint
    if torch.__version__ >= (2, 15):
        read = refused(FileError, tmp_path / "net.pt", arch=arch, allow_pickle=True)
        assert read.message.endswith(named)


class Sparse(Plain):
    """A graph's edges, as an architecture may want them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", torch.zeros(2, 2).to_sparse())


def test_sparse_buffers_that_the_architecture_wants(tmp_path):
    weights = Sparse().state_dict() | {"edges": torch.eye(2).to_sparse()}
    torch.save(weights, tmp_path / "net.pt")
    module = load_model(tmp_path / "net.pt", arch=f"{__name__}:Sparse").module
    assert torch.equal(module.edges.to_dense(), torch.eye(2))


class Versioned(nn.Module):
    """Its first version had the weight transposed, and no file of another one is known to it."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3) + torch.arange(9.0).reshape(3, 3))

    def _load_from_state_dict(self, state, prefix, facts, *rest):
        if facts.get("version") not in (1, 2):
            raise ValueError(f"unknown version: {facts.get('version')}")
        if facts["version"] == 1:
            state[f"{prefix}weight"] = state[f"{prefix}weight"].T
        super()._load_from_state_dict(state, prefix, facts, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class OfVersions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Versioned()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda model: model,
        nn.DataParallel,
        lambda model: nn.Sequential(nn.Identity(), model),
        torch.compile,
    ],
    ids=["plain", "parallel", "part", "compiled"],
)
@pytest.mark.parametrize("entry", [None, "state_dict"])
def test_weights_of_another_version_are_brought_up_to_date(
    tmp_path, monkeypatch, version, wrapped, entry
):
    module = OfVersions()
    monkeypatch.setattr(Versioned, "_version", version)
    state = wrapped(module).state_dict()
    monkeypatch.undo()
    torch.save(state if entry is None else {entry: state, "epoch": 3}, tmp_path / "net.pt")
    loaded = load_model(tmp_path / "net.pt", arch=f"{__file__}:OfVersions").module
    weight = module.inner.weight
    assert torch.equal(loaded.inner.weight, weight.T if version == 1 else weight)


def test_weights_that_the_architecture_does_not_take(tmp_path):
    save_file(OfVersions().state_dict(), tmp_path / "net.safetensors")
    words = "net.safetensors: the architecture does not take the weights: ValueError: unknown version: None"
    with pytest.raises(MismatchError, match=words) as caught:
        load_model(tmp_path / "net.safetensors", arch=f"{__file__}:OfVersions")
    assert caught.value.hint == "torch.save(model.state_dict(), 'net.pt')"


def test_weights_that_do_not_fit_are_listed(tmp_path):
    path = tmp_path / "net.pt"
    extra = {f"extra{i}": torch.ones(1) for i in range(12)}
    torch.save({"fc.weight": torch.ones(2, 5), **extra}, path)
    error = refused(MismatchError, path, arch=f"{__name__}:Plain")
    assert error.exit_code == 4
    assert error.message == (
        f"{path}: the weights do not fit the architecture: missing: fc.bias; "
        f"unexpected: {', '.join(f'extra{i}' for i in range(10))} and 2 more; "
        "of another shape: fc.weight [2, 5] (the architecture has [2, 3])"
    )
    assert error.hint.endswith("--arch-arg K=V")


@pytest.mark.parametrize("arch", [None, f"{__name__}:Plain", "transformers:AutoModel"])
def test_an_adapter_alone(tmp_path, arch):
    factors = {"lora_A": torch.ones(1, 3), "lora_B": torch.ones(2, 1)}
    weights = {f"base_model.model.fc.{name}.weight": t for name, t in factors.items()}
    weights["base_model.model.head.weight"] = torch.ones(2)  # of `modules_to_save`
    save_file(weights, tmp_path / "adapter_model.safetensors")
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        error = refused(FileError, path, arch=arch)
        assert "an adapter's weights (PEFT) without those of the model" in error.message
        assert "merge_and_unload()" in error.hint
    weights["base_model.model.fc.base_layer.weight"] = torch.ones(2, 3)
    save_file(weights, tmp_path / "whole.safetensors")
    error = refused(MismatchError, tmp_path / "whole.safetensors", arch=f"{__name__}:Plain")
    assert "do not fit the architecture" in error.message
    save_file({"lora.lora_A.weight": torch.ones(1, 3)}, tmp_path / "own.safetensors")
    error = refused(MismatchError, tmp_path / "own.safetensors", arch=f"{__name__}:Plain")
    assert "do not fit the architecture" in error.message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3, "lr": 0.1}, "it holds epoch (int), lr (float)"),
        ({}, "it is empty"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "holds a Tensor"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "net.pt")
    error = refused(FileError, tmp_path / "net.pt", arch="mlp")
    assert words in error.message
    assert error.hint == "torch.save(model.state_dict(), 'net.pt')"


def test_a_hessian_is_no_model(tmp_path):
    save_file({"w": torch.ones(1, 1)}, tmp_path / "h.safetensors", {"hesscli": "{}"})
    error = refused(FileError, tmp_path / "h.safetensors")
    assert "a Hessian that hesscli wrote" in error.message
    assert error.hint.startswith("hesscli show ")


# --- pickles ----------------------------------------------------------------------------------


class Ran:
    """An object that writes a file when it is unpickled."""

    def __reduce__(self):
        return (open, ("ran", "w"))


def objects() -> dict:
    """What training scripts keep beside weights, and no reader of weights takes."""
    arguments = argparse.Namespace(lr=0.1, data=Path("data"), every=defaultdict(list, a=[1]))
    return {"args": arguments, "best": np.float64(0.5), "random": np.random.get_state()}


@pytest.mark.parametrize("new", [True, False])
def test_objects_beside_weights_stay_unread(tmp_path, monkeypatch, new):
    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    kept = objects() | {"model": net.state_dict(), "more": Ran()}
    torch.save(kept, "last.pth", _use_new_zipfile_serialization=new)
    saved = load_model(Path("last.pth"), arch="mlp", arch_arguments={"activation": "tanh"})
    torch.testing.assert_close(saved.module(X[:, :4]), net(X[:, :4]))
    assert saved.notes[0].startswith("Python objects left unread: argparse.Namespace, ")
    assert "numpy.dtype" in saved.notes[0]
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "entries",
    [
        lambda net: {"model": net, "averaged": {"w": torch.ones(2)}},
        lambda net: {"model": net.state_dict() | {"0.weight": Ran()}},
        lambda net: {"model": net.state_dict(), "hyper_parameters": {"act": [Ran()]}},
        lambda net: net.state_dict(),
    ],
    ids=["a module", "a weight", "an argument", "at the top"],
)
def test_objects_that_weights_need_are_not_left_unread(tmp_path, monkeypatch, entries):
    monkeypatch.chdir(tmp_path)
    torch.save(objects() | entries(Plain()), "last.pth")
    error = refused(FileError, "last.pth", arch="mlp")
    assert "holds pickled Python objects (argparse.Namespace)" in error.message
    assert error.hint == "--allow-pickle"
    assert not Path("ran").exists()


@pytest.mark.parametrize("new", [True, False])
def test_a_pickled_module_needs_permission(tmp_path, monkeypatch, new):
    monkeypatch.chdir(tmp_path)
    torch.save(Plain(), "my net.pt", _use_new_zipfile_serialization=new)
    error = refused(FileError, "my net.pt")
    assert error.exit_code == 3
    assert error.message == (
        f"my net.pt: holds pickled Python objects ({__name__}.Plain), which run code when loaded"
    )
    assert error.hint == "--allow-pickle"
    saved = load_model("my net.pt", allow_pickle=True)
    assert saved.form == "pickle"
    assert [name for name, _ in saved.module.named_parameters()] == ["fc.weight", "fc.bias"]
    assert not saved.module.training
    assert load_model("my net.pt", allow_pickle=True, train_mode=True).module.training


class Nested(Plain):
    class Config:
        width = 4

    def __init__(self):
        super().__init__()
        self.config = self.Config()


def test_a_class_within_a_class(tmp_path):
    """Which a pickle names as what getattr gives."""
    torch.save(Nested(), tmp_path / "net.pt")
    assert "Nested" in refused(FileError, tmp_path / "net.pt").message
    assert load_model(tmp_path / "net.pt", allow_pickle=True).module.config.width == 4


class Named:
    """Made by keywords, as `partial(Named.__new__, Named, name=...)()` in a pickle of protocol 2."""

    def __new__(cls, *, name):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (), {"name": "it"}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "held",
    [deque([1]), deque([1, 2]), defaultdict(int, a=1, b=2), Counter("a"), {1, 2}, Named(name="it")],
    ids=lambda held: type(held).__name__,
)
def test_what_a_pickled_module_holds(tmp_path, protocol, held):
    module = Plain()
    module.held = held
    torch.save(module, tmp_path / "net.pt", pickle_protocol=protocol)
    loaded = load_model(tmp_path / "net.pt", allow_pickle=True).module.held
    assert type(loaded) is type(held)


def test_no_code_runs_without_permission(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"w": Trap()}, tmp_path / "net.pt")
    assert "mkdir" in refused(FileError, tmp_path / "net.pt", arch="mlp").message
    assert not (tmp_path / "ran").exists()


def test_newer_pickle_protocols_need_permission(tmp_path):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "net.pt", pickle_protocol=4)
    assert "pickle protocol 4" in refused(FileError, tmp_path / "net.pt").message
    saved = load_model(tmp_path / "net.pt", arch="mlp", allow_pickle=True)
    assert saved.form == "state_dict"


def test_a_pickled_class_that_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone.py").write_text("from torch import nn\nclass Gone(nn.Linear): pass\n")
    path = tmp_path / "net.pt"
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        torch.save(__import__("gone").Gone(2, 2), path)
    sys.modules["gone"] = ModuleType("gone")
    error = refused(FileError, path, allow_pickle=True)
    assert "its classes cannot be imported: Can't get attribute 'Gone' on" in error.message
    del sys.modules["gone"]
    error = refused(FileError, path, allow_pickle=True)
    assert "its classes cannot be imported: No module named 'gone'" in error.message
    assert "--arch FILE.py:CLASS" in error.hint
    monkeypatch.chdir(tmp_path)  # the current folder is importable
    assert load_model(path, allow_pickle=True).form == "pickle"
    del sys.modules["gone"]


SCRIPT = """
import sys
from dataclasses import dataclass
import torch

@dataclass
class Options:
    width: int = 4

class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(3, Options().width), torch.nn.Tanh())

if __name__ == "__main__":
    net = Net()
    torch.save(net, sys.argv[1])
    torch.save({"options": Options(), "model": net.state_dict()}, sys.argv[2])
"""


def test_what_a_script_saved_has_its_classes_in_the_script(cli, tmp_path):
    """PyTorch calls them those of `__main__`, which is another script now."""
    (tmp_path / "train.py").write_text(SCRIPT)
    subprocess.run([sys.executable, "train.py", "net.pt", "last.ckpt"], cwd=tmp_path, check=True)
    np.savez("d.npz", x=np.ones((5, 3), np.float32), y=np.zeros((5, 4), np.float32))
    for file, missing in (("net.pt", "Net"), ("last.ckpt", "Options")):
        words = ("compute", file, "d.npz", "--allow-pickle")
        ran = cli(*words)
        assert f"{missing} is of the script that saved it" in ran.fails(3)
        assert ran.hint == f"hesscli {' '.join(words)} --arch FILE.py:{missing}"
        ran = cli(*words, "--arch", "train.py:Net", "-q", "-o", file + ".safetensors")
        assert ran.code == 0, ran.stderr
        assert not any("no effect" in note for note in ran.notes)
    named = [read(Path(file + ".safetensors"))[1] for file in ("net.pt", "last.ckpt")]
    assert set(named[0]) == set(named[1]) == {"0.weight", "0.bias"}
    for name, block in named[0].items():
        np.testing.assert_array_equal(block, named[1][name])


def test_a_pickle_of_something_else(tmp_path):
    torch.save(torch.optim.SGD(Plain().parameters()), tmp_path / "net.pt")
    error = refused(FileError, tmp_path / "net.pt", allow_pickle=True)
    assert "holds a SGD; expected an nn.Module or a state dict" in error.message


def test_a_module_without_parameters(tmp_path):
    torch.save(nn.ReLU(), tmp_path / "net.pt")
    error = refused(FileError, tmp_path / "net.pt", allow_pickle=True)
    assert "a model without parameters has no Hessian" in error.message
    assert "before it was quantised" in str(error.hint)


# --- architectures ----------------------------------------------------------------------------

NETS = """
import sys
import torch
from torch import nn
from torch.nn.utils import prune
import helper

print("loud")

class Net(nn.Module):
    def __init__(self, width, act="tanh"):
        super().__init__()
        self.fc = nn.Linear(width, 2)
        self.act = act

    def later(self):
        from neighbour_of_test import number
        return number

def make(**options):
    return Net(**options)

def number():
    return 3

def broken():
    raise RuntimeError("no way")

def of_words(*sizes, width):
    return Net(width)

def leaving():
    raise SystemExit("bye")

ready = nn.Linear(2, 2)
constant = 5
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    for name in ("nets_of_test.py", "code/nets_of_file.py", "code/my nets.py"):
        (tmp_path / name).write_text(NETS.replace("import helper", ""))
    (tmp_path / "code" / "neighbour_of_test.py").write_text("number = 3")
    (tmp_path / "code" / "needy.py").write_text("import neighbour_of_test, no_such_thing\n")
    (tmp_path / "leaving_of_test.py").write_text("raise SystemExit('bye')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("nets_of_test", None)


@pytest.mark.parametrize("source", ["nets_of_test", "code/nets_of_file.py"])
def test_factories(nets, source, capsys):
    path = list(sys.path)
    net = build(f"{source}:Net", {"width": 4}, {})
    assert net.fc.in_features == 4
    assert build(f"{source}:make", {"width": 5, "act": "relu"}, {}).act == "relu"
    assert isinstance(build(f"{source}:ready", {}, {}), nn.Linear)
    assert capsys.readouterr().out == ""  # stdout is for data
    assert sys.path[: len(path)] == path
    if source.startswith("code"):
        assert build(f"{source}:Net", {"width": 4}, {}).later() == 3


LEFT = {
    "gradients": "torch.set_grad_enabled(False)",
    "inference": "torch.inference_mode().__enter__()",
    "autocast": "torch.autocast('cpu').__enter__()",
    "folder": "import os; os.chdir('code')",
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("left", LEFT)
def test_what_scripts_leave_on_ends_with_them(nets, left, inside):
    statement = f"def make():\n    {LEFT[left]}" if inside else f"{LEFT[left]}\ndef make():"
    (nets / "script.py").write_text(
        f"import torch\n{statement}\n    return torch.nn.Linear(2, 2)\n"
    )
    net = build("script.py:make", {}, {})
    assert net(torch.ones(1, 2)).requires_grad
    assert net(torch.ones(1, 2)).dtype is torch.float32
    assert not torch.ones(1).is_inference()
    assert Path.cwd() == nets
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(torch.ones(1, 2))
    # The next autocast goes on with these weights where an outer one was left on.
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not net(torch.ones(1, 2)).any()


@pytest.mark.parametrize(
    ("arch", "arguments", "words", "hint"),
    [
        ("nets_of_test", {}, "expected PKG.MOD:FACTORY, FILE.py:FACTORY, ", ":FACTORY"),
        (
            "code.nets.Net",
            {},
            "expected PKG.MOD:FACTORY, FILE.py:FACTORY, ",
            "--arch code.nets:Net",
        ),
        ("code/nets.py", {}, "expected PKG.MOD:FACTORY, FILE.py:FACTORY, ", "nets.py:FACTORY"),
        ("MLP", {}, "expected PKG.MOD:FACTORY, FILE.py:FACTORY, ", "--arch mlp"),
        ("torch:matmul", {}, "matmul raised TypeError", "--debug"),
        (":", {}, "expected PKG.MOD:FACTORY, FILE.py:FACTORY, ", "--arch mypkg:nets"),
        ("nets:", {}, "expected PKG.MOD:FACTORY, FILE.py:FACTORY, ", "--arch nets:FACTORY"),
        ("my.nets-2", {}, "expected PKG.MOD:FACTORY, FILE.py:FACTORY, ", "my.nets-2:FACTORY"),
        ("no.py:Net", {}, "no such file: no.py", "path/to/net.py:FACTORY"),
        ("no_such:Net", {}, "no module named no_such", "path/to/no_such.py:FACTORY"),
        ("no such:Net", {}, "no module named no such", "--arch 'path/to/no such.py:FACTORY'"),
        ("code/my nets.py:net", {}, "has no net", "--arch 'code/my nets.py:Net'"),
        ("code/needy.py:Net", {}, "imports no_such_thing", "pip install no_such_thing"),
        ("leaving_of_test:Net", {}, "raised SystemExit: bye", "python -c 'import leaving_of_test'"),
        ("nets_of_test:net", {}, "has no net; it has: Net, make", "--arch nets_of_test:Net"),
        ("nets_of_test:Net", {}, "raised TypeError", "--arch-arg width=VALUE"),
        ("nets_of_test:broken", {}, "raised RuntimeError: no way", "--debug"),
        ("nets_of_test:Net", {"width": (4, 5)}, "raised TypeError", "--debug"),
        ("nets_of_test:Net", {"act": "$(x)"}, "raised TypeError", "--arch-arg 'act=$(x)'"),
        ("nets_of_test:make", {"width": 4, "no": 1}, "raised TypeError", "--debug"),
        ("nets_of_test:of_words", {}, "raised TypeError", ":of_words --arch-arg width=VALUE"),
        ("nets_of_test:leaving", {}, "raised SystemExit: bye", "--debug"),
        ("nets_of_test:number", {}, "returned a int; expected an nn.Module", "from number"),
        ("nets_of_test:constant", {}, "constant is a int", ":FACTORY"),
        ("nets_of_test:ready", {"a": 1}, "takes no --arch-arg (a)", "--arch nets_of_test:ready"),
    ],
)
def test_architectures_that_cannot_be_built(nets, arch, arguments, words, hint):
    with pytest.raises(UsageError) as caught:
        build(arch, arguments, {})
    assert caught.value.exit_code == 2
    assert caught.value.message.startswith(f"--arch {arch}: ")
    assert words in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_libraries_that_are_not_installed(monkeypatch, library):
    monkeypatch.setattr(sys, "path", [])
    for arch in (f"{library}:resnet18", f"{library}.models:resnet18"):
        monkeypatch.delitem(sys.modules, arch.partition(":")[0], raising=False)
        with pytest.raises(UsageError, match=f"no module named {library} ") as caught:
            build(arch, {}, {})
        assert caught.value.hint == f"pip install {library}"


def test_values():
    texts = ["3", "1e-3", "[1, 2]", "TRUE", "false", "None", "none", "tanh", "'3'", "2 +", "(1,)"]
    values = [3, 1e-3, [1, 2], True, False, None, "none", "tanh", "3", "2 +", (1,)]
    assert [parse_value(text) for text in texts] == values
    # The last two are more than Python reads.
    for text in ("{[]: 1}", "-" * 3000 + "1", "-" * 100_000 + "1"):
        assert parse_value(text) == text


# --- mlp --------------------------------------------------------------------------------------


def test_mlp_equals_the_model_it_was_saved_from(tmp_path):
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5, bias=False), nn.Tanh())
    model.append(nn.Linear(5, 2))
    outer = nn.ModuleDict({"net": model})
    save_file(outer.state_dict(), tmp_path / "net.pt")
    saved = load_model(tmp_path / "net.pt", arch="mlp", arch_arguments={"activation": "Tanh"})
    assert set(dict(saved.module.named_parameters())) == set(dict(outer.named_parameters()))
    x = torch.randn(4, 3)
    torch.testing.assert_close(saved.module(x), model(x))
    note = "mlp: net.0 (3 -> 5), net.2 (5 -> 5), net.4 (5 -> 2), in this order"
    assert saved.notes == (note,)


def test_wrappers_are_kept_where_two_names_would_be_one():
    weights, notes = {"module.a.weight": torch.ones(2, 3), "a.weight": torch.ones(2, 2)}, []
    assert without_wrappers(weights, notes) == weights
    assert notes == []


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
def test_mlp_without_its_wrappers(tmp_path, prefix):
    weights = {f"{prefix}fc.{name}": t for name, t in nn.Linear(3, 2).state_dict().items()}
    torch.save(weights, tmp_path / "net.pt")
    saved = load_model(tmp_path / "net.pt", arch="mlp")
    assert [name for name, _ in saved.module.named_parameters()] == ["fc.weight", "fc.bias"]
    assert f"names: {prefix}fc.weight is fc.weight in the architecture, and so on" in saved.notes


def test_mlp_of_one_layer_needs_no_activation(tmp_path):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "net.pt")
    saved = load_model(tmp_path / "net.pt", arch="mlp")
    assert [name for name, _ in saved.module.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("name", ["ReLU", "gelu", "silu", "Sigmoid", "identity", None, "ELU"])
def test_activations(name):
    weights = {"a1.weight": torch.eye(2), "a2.weight": torch.eye(2)}
    module = build("mlp", {"activation": name}, weights)
    module.load_state_dict(weights)
    x = torch.tensor([[-1.0, 2.0]])
    functions = {"ReLU": torch.relu, "Sigmoid": torch.sigmoid, "ELU": nn.functional.elu}
    functions |= {"gelu": nn.functional.gelu, "silu": nn.functional.silu}
    torch.testing.assert_close(module(x), functions.get(name, lambda v: v)(x))


def test_layers_are_ordered_as_numbers():
    sizes = list(range(2, 14))
    weights = {f"fc{i}.weight": torch.ones(sizes[i], sizes[i - 1]) for i in range(1, 12)}
    shuffled = dict(sorted(weights.items()))  # fc1, fc10, fc11, fc2, ...
    module = build("mlp", {"activation": "relu"}, shuffled)
    assert module(torch.ones(1, 2)).shape == (1, 13)


def test_the_order_of_unnumbered_layers_is_the_files():
    weights = {"inner.weight": torch.ones(4, 3), "body.weight": torch.ones(2, 4)}
    assert build("mlp", {"activation": "relu"}, weights)(torch.ones(1, 3)).shape == (1, 2)
    same = {"inner.weight": torch.ones(3, 3), "body.weight": torch.ones(3, 3)}
    with pytest.raises(MismatchError, match="do not tell the order of the layers"):
        build("mlp", {"activation": "relu"}, same)
    numbered = {"a10.weight": torch.ones(3, 3), "a9.weight": torch.ones(3, 3)}
    assert str(build("mlp", {"activation": "relu"}, numbered)) == "a9 (3 -> 3), a10 (3 -> 3)"


@pytest.mark.parametrize(
    ("shapes", "arguments", "error", "words"),
    [
        ({"a.weight": (4, 3), "b.weight": (2, 4)}, {}, UsageError, "do not tell the activation"),
        ({"a.weight": (4, 3)}, {"width": 3}, UsageError, "no argument is called width"),
        ({"a.weight": (4, 3)}, {"activation": "tan"}, UsageError, "no activation is called tan"),
        ({"a.weight": (4, 3)}, {"activation": "prelu"}, UsageError, "called prelu"),
        (
            {"a1.weight": (4, 3), "a2.weight": (2, 5)},
            {"activation": "relu"},
            MismatchError,
            "chain",
        ),
        ({"a.weight": (4, 3), "a.bias": (3,)}, {}, MismatchError, "a.bias [3] does not belong"),
        ({"c.weight": (4, 3, 3, 3)}, {}, MismatchError, "not c.weight [4, 3, 3, 3]"),
        ({"a.weight": (4, 3), "n.running_mean": (4,)}, {}, MismatchError, "not n.running_mean [4]"),
        ({"weight": (3, 3), "a.weight": (2, 3)}, {}, MismatchError, "not weight [3, 3]"),
        ({"a.weight": (4, 3)}, {"activation": 3}, UsageError, "no activation is called 3"),
    ],
)
def test_weights_that_are_no_mlp(shapes, arguments, error, words):
    weights = {name: torch.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(error) as caught:
        build("mlp", arguments, weights)
    assert words in caught.value.message
    assert "--arch" in caught.value.hint


@pytest.mark.parametrize("argument", ["activation=tahn", "width=4"])
def test_the_hint_of_a_wrong_argument_of_an_mlp(cli, tmp_path, argument):
    torch.save({"a.weight": torch.ones(4, 3), "b.weight": torch.ones(2, 4)}, tmp_path / "w.pt")
    np.savez(tmp_path / "d.npz", x=np.ones((5, 3), "f4"), y=np.ones((5, 2), "f4"))
    ran = cli("compute", "w.pt", "d.npz", "--arch", "mlp", "--arch-arg", argument)
    ran.fails(2)
    assert cli(*shlex.split(ran.hint)[1:]).code == 0
