"""Every kind of file in the README's tables, made by the library that makes it, gives one and the same Hessian."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Ran, read
from safetensors.torch import save_file
from torch import Tensor, nn

from hesscli.files.models.model_file import load_model
from hesscli.hessian.objective.batch import Batches

ARCH = ("--arch", f"{__name__}:Net")
X = np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)
Y = np.array([0, 1, 1, 0, 1])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.fc1 = nn.Linear(3, 4)
        self.fc2 = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(self.norm(x))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def same(cli: Callable[..., Ran], net: Net, tmp_path: Path) -> Callable[..., Ran]:
    """Runs `compute` and compares with the Hessian of the TorchScript model and the npz file."""
    torch.jit.script(net).save("reference.pt")
    np.savez("reference.npz", x=X, y=Y)
    assert cli("compute", "reference.pt", "reference.npz", "-o", "reference").code == 0
    _, expected = read(tmp_path / "reference")

    def run(*words: object) -> Ran:
        ran = cli("compute", *words, "-o", "h")
        assert ran.code == 0, ran.stderr
        _, found = read(tmp_path / "h")
        assert found.keys() == expected.keys()
        for name, block in expected.items():
            torch.testing.assert_close(found[name], block, rtol=1e-4, atol=1e-6)
        return ran

    return run


# --- models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["script", "trace", "pt2", "pickle", "state_dict", "legacy"])
def test_what_torch_writes(same, net, form):
    words: tuple[str, ...] = ()
    if form == "script":
        torch.jit.script(net).save("m.pt")
    elif form == "trace":
        torch.jit.trace(net, torch.from_numpy(X)).save("m.pt")
    elif form == "pt2":
        batch = {0: torch.export.Dim("batch")}
        program = torch.export.export(net, (torch.from_numpy(X),), dynamic_shapes=(batch,))
        with open("m.pt", "wb") as file:
            torch.export.save(program, file)
    elif form == "pickle":
        torch.save(net, "m.pt")
        words = ("--allow-pickle",)
    else:
        torch.save(net.state_dict(), "m.pt", _use_new_zipfile_serialization=form != "legacy")
        words = ARCH
    same("m.pt", "reference.npz", *words)


def test_safetensors(same, net):
    save_file(net.state_dict(), "m.safetensors")
    same("m.safetensors", "reference.npz", *ARCH)


@pytest.mark.parametrize(
    "entry", ["state_dict", "model_state_dict", "model", "module", "net", "my_weights"]
)
def test_checkpoints(same, net, entry):
    optimiser = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 3)).sum().backward()
    optimiser.step()
    net.load_state_dict(torch.jit.load("reference.pt").state_dict())
    content = {entry: net.state_dict(), "optimizer": optimiser.state_dict(), "epoch": 3}
    torch.save(content, "m.pt")
    ran = same("m.pt", "reference.npz", *ARCH)
    assert f"weights: the entry {entry} of the checkpoint (not optimizer, epoch)" in ran.notes


def test_a_checkpoint_with_averaged_weights_says_which_it_takes(same, net):
    averaged = {name: torch.zeros_like(t) for name, t in net.state_dict().items()}
    torch.save({"ema": averaged, "model": net.state_dict(), "loss": torch.ones(())}, "m.pt")
    ran = same("m.pt", "reference.npz", *ARCH)
    assert "weights: the entry model of the checkpoint (not ema, loss)" in ran.notes


def test_a_checkpoint_that_holds_a_module(same, net, cli):
    torch.save({"epoch": 1, "model": net}, "m.pt")
    assert "run code when loaded" in cli("compute", "m.pt", "reference.npz").fails(3)
    same("m.pt", "reference.npz", "--allow-pickle")


def test_data_parallel(same, net):
    torch.save(nn.DataParallel(net).state_dict(), "m.pt")
    ran = same("m.pt", "reference.npz", *ARCH)
    note = "names: module.norm.weight is norm.weight in the architecture, and so on"
    assert note in ran.notes


def test_compiled(same, net):
    torch.save(torch.compile(net).state_dict(), "m.pt")
    ran = same("m.pt", "reference.npz", *ARCH)
    assert any(note.startswith("names: _orig_mod.norm.weight is norm.weight") for note in ran.notes)


def test_a_compiled_part(same, net):
    weights = {
        name.replace("fc1.", "fc1._orig_mod."): t
        for name, t in nn.DataParallel(net).state_dict().items()
    }
    torch.save({"model": weights}, "m.pt")
    same("m.pt", "reference.npz", *ARCH)


def test_the_prefix_of_a_lightning_module(same, net):
    weights = {f"model.{name}": t for name, t in net.state_dict().items()}
    weights["criterion.weight"] = torch.ones(2)
    torch.save({"state_dict": weights, "pytorch-lightning_version": "2.5.0"}, "m.ckpt")
    ran = same("m.ckpt", "reference.npz", *ARCH)
    assert "left out, not the architecture's: criterion.weight" in ran.notes


@pytest.mark.parametrize("own", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("first", [True, False])
def test_the_architectures_own_names_come_before_a_copy(same, net, own, first):
    weights = {f"{own}{name}": t for name, t in net.state_dict().items()}
    averaged = {f"ema.{name}": t + 1 for name, t in weights.items()}
    torch.save(weights | averaged if first else averaged | weights, "m.pt")
    ran = same("m.pt", "reference.npz", *ARCH)
    left = ", ".join(list(averaged)[:5])
    assert f"left out, not the architecture's: {left} and {len(averaged) - 5} more" in ran.notes
    named = [f"names: {own}norm.weight is norm.weight in the architecture, and so on"]
    assert [note for note in ran.notes if note.startswith("names:")] == (named if own else [])


def test_several_prefixes(same, cli, net):
    teacher = {f"teacher.{name}": t + 1 for name, t in net.state_dict().items()}
    student = {f"student.{name}": t.clone() for name, t in net.state_dict().items()}
    torch.save({"state_dict": teacher | student}, "m.pt")
    ran = cli("compute", "m.pt", "reference.npz", *ARCH)
    assert ran.fails(4) == (
        "m.pt: the weights fit the architecture under several prefixes: "
        "teacher., student.; expected one"
    )
    keep, _, code = ran.hint.partition(": ")
    assert keep == "keep one of them"
    exec(code.replace("teacher", "student"), {"torch": torch, "weights": teacher | student})
    same("net.pt", "reference.npz", *ARCH)


def test_one_module_under_several_prefixes(same, net):
    owner = nn.ModuleDict({"model": net, "loss": nn.ModuleDict({"model": net})})
    torch.save(owner.state_dict(), "m.pt")
    same("m.pt", "reference.npz", *ARCH)


def test_names_too_many_beside_the_architectures_own(cli, net):
    torch.save(net.state_dict() | {"ema.fc1.weight": net.fc1.weight}, "m.pt")
    np.savez("d.npz", x=X, y=Y)
    assert "unexpected: ema.fc1.weight" in cli("compute", "m.pt", "d.npz", *ARCH).fails(4)


def test_lightning(same, net):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = net

    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(Module())
    trainer.save_checkpoint("m.ckpt")
    same("m.ckpt", "reference.npz", *ARCH)


def test_names_that_are_right_are_left_alone(tmp_path, net):
    """A module that is itself called model, or module, keeps its name."""
    outer = nn.ModuleDict({"module": nn.Linear(3, 2)})
    torch.save(outer.state_dict(), tmp_path / "m.pt")
    saved = load_model(tmp_path / "m.pt", arch=f"{__name__}:outer")
    assert saved.notes == ()
    assert torch.equal(saved.module.get_parameter("module.weight"), outer["module"].weight)


def outer() -> nn.Module:
    return nn.ModuleDict({"module": nn.Linear(3, 2)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights(same, net, dtype):
    for p in net.parameters():
        p.data = p.data.to(dtype).float()
    torch.jit.script(net).save("reference.pt")
    save_file({name: t.to(dtype) for name, t in net.state_dict().items()}, "m.safetensors")
    torch.manual_seed(0)
    narrow = Net().eval()
    narrow.load_state_dict(net.state_dict())
    torch.save(narrow.to(dtype), "m.pt")
    for words in (("m.safetensors", *ARCH), ("m.pt", "--allow-pickle")):
        saved = load_model(words[0], arch=ARCH[1], allow_pickle=True)
        name = str(dtype).removeprefix("torch.")
        assert f"weights stored in {name}, and widened" in saved.notes
        assert torch.equal(saved.module.get_parameter("fc1.weight"), net.fc1.weight)


@pytest.mark.parametrize(("stem", "form"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_sharded(same, net, stem, form):
    import json

    Path("m").mkdir()
    weights = net.state_dict()
    names = list(weights)
    places = {name: f"part-{i % 2}.{form}" for i, name in enumerate(names)}
    for part in set(places.values()):
        save = save_file if form == "safetensors" else torch.save
        save({n: weights[n] for n in names if places[n] == part}, Path("m", part))
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    listing = Path("m", f"{stem}.{form}.index.json")
    listing.write_text(json.dumps(index))
    same("m", "reference.npz", *ARCH)
    same(listing, "reference.npz", *ARCH)


def test_one_of_several_files(cli, same, net, tmp_path):
    test_sharded(same, net, "model", "safetensors")
    Path("m", "another.index.json").write_text("[]")
    ran = cli("compute", "m/part-1.safetensors", "reference.npz", *ARCH)
    ran.fails(4)
    words = "it is one of several files: give their index, m/model.safetensors.index.json"
    assert ran.hint.endswith(words)


def test_shards_that_are_gone(cli, same, net, tmp_path):
    test_sharded(same, net, "model", "safetensors")
    index = Path("m", "model.safetensors.index.json")
    Path("m", "part-1.safetensors").rename("moved")
    assert "part-1.safetensors: no such file" in cli("compute", "m", "reference.npz", *ARCH).fails(
        2
    )
    Path("moved").rename("m/part-1.safetensors")
    index.write_text(index.read_text().replace('"fc1.bias": "part-0', '"fc1.bias": "part-1'))
    message = cli("compute", index, "reference.npz", *ARCH).fails(3)
    assert "where it is not" in message


def test_onnx_is_refused_with_the_way_out(cli, same, net):
    pytest.importorskip("onnx")
    torch.onnx.export(net, (torch.from_numpy(X),), "m.onnx", dynamo=False)
    ran = cli("compute", "m.onnx", "reference.npz")
    assert "m.onnx: an ONNX model" in ran.fails(3)
    assert "torch.export.save(torch.export.export(model, (x,)), 'net.pt2')" in ran.hint


@pytest.mark.parametrize(
    "arch", ["timm:tiny", "torchvision.models:tiny", "torchvision.models.tiny:tiny"]
)
def test_architectures_of_libraries(same, net, monkeypatch, arch):
    """Stand-ins with the libraries' interfaces: `pip install timm torchvision` brings gigabytes."""

    def tiny(num_classes: int = 1000, weights: object = None) -> nn.Module:
        assert (num_classes, weights) == (2, None)
        return Net()

    def create_model(name: str, pretrained: bool = True, **arguments: int) -> nn.Module:
        assert (name, pretrained) == ("tiny", False)
        return tiny(**arguments)

    for name, members in {
        "timm": {"create_model": create_model},
        "torchvision": {},
        "torchvision.models": {"tiny": tiny},
        "torchvision.models.tiny": {"tiny": tiny},
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    torch.save(net.state_dict(), "m.pt")
    same("m.pt", "reference.npz", "--arch", arch, "--arch-arg", "num_classes=2")


# --- data -------------------------------------------------------------------------------------


def test_npy_pairs(same):
    np.save("images.npy", X)
    np.save("classes.npy", Y)
    same("reference.pt", "images.npy", "--targets", "classes.npy")
    Path("d").mkdir()
    Path("images.npy").rename("d/x.npy")
    Path("classes.npy").rename("d/y.npy")
    ran = same("reference.pt", "d")
    assert "inputs: x (float32 [5, 3]), inferred from its name" in ran.notes


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", ">f8", "<f8"])
@pytest.mark.parametrize("form", ["npz", "compressed", "npy"])
def test_memory_orders(same, order, dtype, form):
    x = np.asarray(X, dtype=dtype, order=order)
    if form == "npy":
        np.save("x.npy", x)
        np.save("y.npy", Y.astype(">i4"))
        same("reference.pt", "x.npy", "--targets", "y.npy", "--batch-size", 2)
    else:
        (np.savez if form == "npz" else np.savez_compressed)("d.npz", x=x, y=Y.astype(">i4"))
        same("reference.pt", "d.npz", "--batch-size", 2)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint16, np.uint64, bool])
def test_integer_targets(same, dtype):
    np.savez("d.npz", x=X, y=Y.astype(dtype))
    same("reference.pt", "d.npz")


def test_torch_and_safetensors(same):
    tensors = {"x": torch.from_numpy(X), "y": torch.from_numpy(Y)}
    save_file(tensors, "d.safetensors")
    torch.save(tensors, "d.pt")
    torch.save(tuple(tensors.values()), "pair.pt")
    for file in ("d.safetensors", "d.pt", "pair.pt"):
        same("reference.pt", file)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv(same, delimiter):
    lines = [delimiter.join(["a", "b", "c", "name", "species"])]
    for x, y in zip(X, Y, strict=True):
        lines.append(delimiter.join([*map(repr, map(float, x)), "iris", str(y)]))
    Path("d.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    ran = same("reference.pt", "d.csv", "--targets", "species")
    assert "inputs: the columns a, b, c (float64 [5, 3])" in ran.notes
    assert "array name skipped: not numbers ('iris' in line 2)" in ran.notes
    same(
        "reference.pt",
        "d.csv",
        "--targets",
        "species",
        *("--inputs a --inputs b --inputs c".split()),
    )


def test_csv_without_names(same):
    np.savetxt("d.csv", np.column_stack([X, Y]), delimiter=",")
    ran = same("reference.pt", "d.csv", "--targets", "3", "--loss", "cross-entropy")
    assert "no line of names: the columns are called 0 to 3" in ran.notes
    assert "inputs: the columns 0, 1, 2 (float64 [5, 3])" in ran.notes


class Scores(nn.Module):
    """Users and items, by number, as tables of ratings have them."""

    def __init__(self):
        super().__init__()
        self.u, self.v = nn.Embedding(3, 2), nn.Embedding(4, 2)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return (self.u(user) * self.v(item)).sum(1)


@pytest.mark.parametrize(
    "inputs", ["", "--inputs user --inputs item", "--inputs item --inputs user"]
)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_columns_that_are_called_as_the_models_inputs(cli, tmp_path, kind, inputs):
    torch.manual_seed(0)
    torch.jit.script(Scores()).save("m.pt")
    user, item = np.array([0, 1, 2, 2, 0]), np.array([3, 2, 1, 0, 0])
    columns = {"user": user, "item": item, "rating": X[:, 0], "w": np.ones(5)}
    np.savez("d.npz", **columns)
    if kind == "parquet":
        pq.write_table(pa.table(columns), "d.parquet")
    else:
        rows = np.column_stack([*columns.values()])
        formats = ["%d", "%d", "%.9g", "%.9g"]
        np.savetxt("d.csv", rows, formats, ",", header="user,item,rating,w", comments="")
    words = ("--targets", "rating", "-b", "full", "--loss-arg", "weight=@w")
    named = ("--inputs", "user", "--inputs", "item")
    assert cli("compute", "m.pt", "d.npz", *words, *named, "-o", "a").code == 0
    ran = cli("compute", "m.pt", f"d.{kind}", *words, *inputs.split(), "-o", "b")
    assert ran.code == 0, ran.stderr
    assert torch.equal(*(read(tmp_path / name)[1]["hessian"] for name in "ab"))


OWN = """
import torch.nn.functional as F

def loss(f, y):
    return F.cross_entropy(f, y, reduction="none")
"""


@pytest.mark.parametrize("loss", ["auto", "own.py:loss"])
def test_columns_of_indices(cli, tmp_path, loss):
    (tmp_path / "own.py").write_text(OWN)
    torch.manual_seed(0)
    torch.jit.script(nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 3))).save("m.pt")
    words = np.array([[0, 1, 2], [4, 3, 0], [1, 1, 1], [2, 0, 4], [3, 2, 1]])
    np.savez("d.npz", x=words, y=Y)
    np.savetxt("d.csv", np.column_stack([words, Y]), "%d", ",", header="a,b,c,y", comments="")
    words = ("-b", "full", "--loss", loss)
    assert cli("compute", "m.pt", "d.npz", *words, "-o", "a").code == 0
    ran = cli("compute", "m.pt", "d.csv", *words, "-o", "b")
    assert ran.code == 0, ran.stderr
    assert "inputs: whole numbers, taken as indices" in ran.notes
    assert not any("taken as classes" in note for note in ran.notes)  # which they are
    assert torch.equal(*(read(tmp_path / name)[1]["hessian"] for name in "ab"))


def test_a_weight_is_no_input(cli, tmp_path):
    torch.manual_seed(0)
    torch.jit.script(nn.Linear(3, 3)).save("m.pt")
    w = np.linspace(1, 2, 5)
    np.savez("d.npz", pixels=X, y=Y, w=w)
    Path("l.py").write_text(
        "import torch.nn.functional as F\n\n\ndef loss(f, y, w):\n"
        "    return w * F.cross_entropy(f, y, reduction='none')\n"
    )
    ran = cli("compute", "m.pt", "d.npz", "--loss", "l.py:loss", "--loss-arg", "w=@w", "-o", "a")
    assert ran.code == 0, ran.stderr
    assert "inputs: pixels (float32 [5, 3]), inferred as the only other array" in ran.notes


def test_decimal_commas(cli, tmp_path):
    torch.jit.script(nn.Linear(1, 1)).save("m.pt")
    Path("d.csv").write_text("a;y\n1,5;2,5\n0,5;1,0\n")
    ran = cli("compute", "m.pt", "d.csv")
    ran.fails(3)
    assert "decimal=','" in ran.hint


def test_a_table_of_too_few_columns(cli):
    torch.jit.script(nn.Linear(4, 1)).save("m.pt")
    np.savetxt("d.csv", X, delimiter=",", header="a,b,y", comments="")
    assert "does not accept the inputs float32 [2, 2]" in cli("compute", "m.pt", "d.csv").fails(4)


def test_targets_of_a_table_as_the_output_has_them(cli, tmp_path):
    """[N] numbers for a model that returns [N]."""

    class Flat(nn.Linear):
        def forward(self, x):
            return super().forward(x).squeeze(1)

    torch.manual_seed(0)
    torch.jit.trace(Flat(2, 1), torch.ones(3, 2)).save("m.pt")
    np.savetxt("d.csv", X, delimiter=",", header="a,b,y", comments="")
    ran = cli("compute", "m.pt", "d.csv")
    assert ran.code == 0, ran.stderr
    assert not [note for note in ran.notes if "as a column" in note]


@pytest.mark.parametrize("weighed", [False, True])
def test_a_column_of_targets(cli, tmp_path, weighed):
    """[N] numbers for a model that returns [N, 1]: only a table says that these are a column; and so are weights."""
    torch.manual_seed(0)
    torch.jit.script(nn.Linear(3, 1)).save("m.pt")
    w = np.arange(1.0, 6.0)[:, None]
    np.savez("d.npz", x=X, y=X[:, :1] + 1, w=w)
    words = ("--loss", "huber", "--loss-arg", "weight=@w", "--loss-arg", "delta=0.5")
    words = (*words, "--batch-size", 2) if weighed else ("--inputs", "x")
    assert cli("compute", "m.pt", "d.npz", *words, "-o", "a").code == 0
    table = np.column_stack([X, X[:, :1] + 1, w])
    np.savetxt("d.csv", table, delimiter=",", header="a,b,c,y,w", comments="")
    words = words if weighed else [word for name in "abc" for word in ("--inputs", name)]
    ran = cli("compute", "m.pt", "d.csv", *words, "-o", "b")
    assert "targets: taken as a column [N, 1], as the model's output is" in ran.notes
    (one, left), (two, right) = read(Path("a")), read(Path("b"))
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)
    assert one["loss"]["denominator"] == two["loss"]["denominator"] == 5


def test_targets_of_a_table_that_are_not_whole_are_no_classes(cli, net):
    torch.jit.script(net).save("m.pt")
    Path("d.csv").write_text("a,b,c,y\n1,2,3,0.0\n4,5,6,1.5\n")
    assert "expected integers" in cli("compute", "m.pt", "d.csv", "--loss", "cross-entropy").fails(
        4
    )


def test_a_table_that_does_not_tell_its_targets(cli, net):
    torch.jit.script(net).save("m.pt")
    Path("d.csv").write_text("a,b,the price\n1,2,0\n4,5,1\n")
    ran = cli("compute", "m.pt", "d.csv")
    message = "d.csv: the names do not tell the targets; it holds a (int64 [2]), b (int64 [2]), "
    assert ran.fails(2) == message + "the price (int64 [2])"
    assert ran.hint == "hesscli compute m.pt d.csv --targets 'the price'"


def test_missing_values(cli, net):
    torch.jit.script(net).save("m.pt")
    Path("d.csv").write_text("a,b,c,y\n1,2,3,0\n4,,6,1\n")
    columns = {"a": [1.0, 4.0], "b": [2, None], "c": [3.0, 6.0], "y": [0, 1]}
    pq.write_table(pa.table(columns), "d.parquet")
    for data in ("d.csv", "d.parquet"):
        said = cli("compute", "m.pt", data).fails(5)
        assert "array b (float64 [2]) holds NaN or infinity in 1 place, the first at [1]" in said


def test_parquet(same):
    columns = {name: X[:, i] for i, name in enumerate("abc")}
    pq.write_table(pa.table({**columns, "target": Y, "name": ["iris"] * 5}), "d.parquet")
    ran = same("reference.pt", "d.parquet")
    assert "targets: target (int64 [5]), inferred from its name" in ran.notes
    pq.write_table(pa.table({"features": X.tolist(), "label": Y}), "d.parquet", row_group_size=2)
    same("reference.pt", "d.parquet")


@pytest.mark.parametrize("write", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("packed", [None, "lz4"])
def test_arrow(same, cli, write, packed):
    table = pa.table({"features": X.tolist(), "label": Y, "name": ["iris"] * 5})
    for rows in (5, 2):
        options = pa.ipc.IpcWriteOptions(compression=packed)
        with write("d.arrow", table.schema, options=options) as file:
            file.write_table(table, rows)
        ran = same("reference.pt", "d.arrow")
        assert "targets: label (int64 [5]), inferred from its name" in ran.notes
    swapped = cli("compute", "d.arrow", "reference.pt")
    assert "d.arrow: an Arrow file; expected a TorchScript" in swapped.fails(3)
    assert swapped.hint == "the model comes first: hesscli compute MODEL DATA"


def test_datasets(same, cli):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"features": X.tolist(), "label": Y.tolist()})
    rows.save_to_disk("whole")
    same("reference.pt", "whole")
    rows.save_to_disk("parts", num_shards=3)
    same("reference.pt", "parts")
    arrays = datasets.Features(
        {"features": datasets.Array2D((1, 3), "float32"), "label": datasets.ClassLabel(2)}
    )
    shaped = {"features": X.reshape(5, 1, 3), "label": Y}
    datasets.Dataset.from_dict(shaped, features=arrays).save_to_disk("shaped")
    assert "inputs: features (float32 [5, 1, 3])" in "".join(
        cli("compute", "reference.pt", "shaped").notes
    )
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk("splits")
    ran = cli("compute", "reference.pt", "splits")
    assert "several splits: test, train" in ran.fails(2)
    assert ran.hint == "hesscli compute MODEL splits/test"
    same("reference.pt", "splits/train")


# --- some of the samples, and scaled ----------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "part"),
    [("3", slice(0, 3)), ("1:4", slice(1, 4)), ("2:", slice(2, 5)), (":2", slice(0, 2))],
)
def test_samples(cli, net, samples, part):
    torch.jit.script(net).save("m.pt")
    weight = np.linspace(0.5, 2, 5)[:, None].repeat(2, 1)
    y = np.random.default_rng(0).normal(size=(5, 2))
    np.savez("all.npz", x=X, y=y, w=weight)
    np.savez("some.npz", x=X[part], y=y[part], w=weight[part])
    words = ("--loss", "mse", "--loss-arg", "weight=@w")
    some = cli("compute", "m.pt", "some.npz", *words, "-o", "some")
    assert some.code == 0, some.stderr
    ran = cli("compute", "m.pt", "all.npz", *words, "--samples", samples, "-o", "all", "--json")
    assert ran.document["data"]["samples"] == part.stop - part.start
    assert ran.document["data"]["range"] == [part.start, part.stop]
    torch.testing.assert_close(read(Path("all"))[1], read(Path("some"))[1])


@pytest.mark.parametrize("samples", ["0", "6", "3:3", "4:9", "a", "1:2:3", "-3", ""])
def test_samples_that_are_not_there(cli, net, samples):
    torch.jit.script(net).save("m.pt")
    np.savez("d.npz", x=X, y=Y)
    ran = cli("compute", "m.pt", "d.npz", "--samples", samples)
    assert ran.code == 2
    assert "--samples" in ran.stderr


def test_scale(cli):
    torch.manual_seed(0)
    torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))).save("m.pt")
    images = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 1, 2, 2)
    np.savez("integers.npz", x=images, y=Y[:3])
    np.savez("floats.npz", x=images.astype(np.float32) / 255, y=Y[:3])
    ran = cli("compute", "m.pt", "integers.npz")
    assert "does not accept the inputs uint8 [3, 1, 2, 2]" in ran.fails(4)
    assert ran.hint.endswith("--scale 1/255")
    assert cli("compute", "m.pt", "floats.npz", "-o", "a").code == 0
    for factor in ("1/255", "x=1/255", "0.00392156862745098"):
        ran = cli("compute", "m.pt", "integers.npz", "--scale", factor, "-o", "b")
        assert "scaled: x (uint8 [3, 1, 2, 2]) is multiplied by 0.00392156863" in ran.notes
        torch.testing.assert_close(read(Path("a"))[1], read(Path("b"))[1])
    for factor in ("1/0", "half", "z=2", ""):
        ran = cli("compute", "m.pt", "integers.npz", "--scale", factor)
        assert ran.code == 2
        assert "--scale" in ran.stderr


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 3), nn.Linear(3, 2)

    def forward(self, ids: Tensor, pixels: Tensor, bias: Tensor | None = None) -> Tensor:
        x = self.head(self.table(ids) + pixels)
        return x if bias is None else x + bias


def test_several_inputs(cli, tmp_path):
    torch.manual_seed(0)
    torch.save(Two().state_dict(), "m.pt")
    arrays = {"pixels": X, "ids": np.array([1, 2, 3, 4, 5], np.int32), "y": Y, "bias": X[:, :2]}
    np.savez("d.npz", **arrays)
    arch = ("--arch", f"{__name__}:Two", "--blocks", "full")
    results = []
    for names in ("ids pixels bias", "bias pixels ids", ""):
        words = [word for name in names.split() for word in ("--inputs", name)]
        ran = cli("compute", "m.pt", "d.npz", *arch, *words, "-o", "h", "--batch-size", 2)
        assert ran.code == 0, ran.stderr
        said = "inputs are passed by name: bias, pixels, ids" in ran.notes
        assert said == (names == "bias pixels ids")
        results.append(read(tmp_path / "h")[1]["hessian"])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)
    words = ("--inputs", "ids", "--inputs", "pixels", "--scale", "pixels=2")
    ran = cli("compute", "m.pt", "d.npz", *arch, *words)
    assert "scaled: pixels (float32 [5, 3]) is multiplied by 2" in ran.notes
    np.savez("d.npz", **{**arrays, "ids": arrays["ids"].astype(np.uint8)})
    ran = cli("compute", "m.pt", "d.npz", *arch)
    ran.fails(4)
    assert ran.hint == "store indices as int64: x.astype(np.int64)"


def test_an_exported_model_with_inputs_by_name(cli, tmp_path):
    torch.manual_seed(0)
    net = Two()
    ids, pixels = torch.tensor([1, 2, 3, 4, 5]), torch.from_numpy(X)
    program = torch.export.export(net, (ids,), {"pixels": pixels})
    torch.export.save(program, "m.pt2")
    torch.save(net.state_dict(), "m.pt")
    np.savez("d.npz", pixels=X, ids=ids.numpy(), y=Y)
    ran = cli("compute", "m.pt2", "d.npz", "--blocks", "full", "-o", "a")
    assert ran.code == 0, ran.stderr
    assert (
        cli("compute", "m.pt", "d.npz", "--arch", f"{__name__}:Two", "-b", "full", "-o", "b").code
        == 0
    )
    torch.testing.assert_close(read(tmp_path / "a")[1], read(tmp_path / "b")[1])
    ran = cli("compute", "m.pt2", "d.npz", "--inputs", "ids")
    assert "takes pixels by name, the inputs are ids" in ran.fails(4)


# --- larger than the memory -------------------------------------------------------------------


@pytest.mark.parametrize("form", ["npz", "npy", "safetensors", "pt"])
def test_arrays_stay_in_the_file(tmp_path, form):
    """What is loaded sees a later change of the file: nothing was read into the memory."""
    from hesscli.files.data import load_data

    path = tmp_path / "d"
    x = np.full((1000, 4), 1.5, np.float32)
    if form == "npz":
        with open(path, "wb") as file:
            np.savez(file, x=x)
    elif form == "npy":
        path = tmp_path / "x.npy"
        np.save(path, x)
    elif form == "safetensors":
        save_file({"x": torch.from_numpy(x)}, path)
    else:
        torch.save({"x": torch.from_numpy(x)}, path)
    data = load_data(path, inputs=["x"])
    change(path)
    assert (data.inputs["x"] == 2.5).any()


def test_shards_stay_in_the_file(tmp_path):
    from hesscli.files.models.shards import load_part

    path = tmp_path / "pytorch_model-00001-of-00002.bin"
    torch.save({"weight": torch.full((1000, 4), 1.5)}, path)
    weights = load_part(path)
    change(path)
    assert (weights["weight"] == 2.5).any()


def change(path: Path) -> None:
    """Some of the file's 1.5 become 2.5, in place."""
    place = path.read_bytes().rindex(np.full(4, 1.5, np.float32).tobytes())
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(np.full(4, 2.5, np.float32).tobytes())


def test_batches_are_made_when_they_are_asked_for(cli, net, monkeypatch):
    from hesscli.job.setup import batches

    torch.jit.script(net).save("m.pt")
    np.savez("d.npz", x=X, y=Y)
    words = ("compute", "m.pt", "d.npz", "--batch-size", 2)
    assert cli(*words, "-o", "a").code == 0
    # Not by little free memory: fewer rows would share a pass, and a product of fewer may round otherwise.
    monkeypatch.setattr(batches, "Batches", lambda count, make, kept: Batches(count, make))
    ran = cli(*words, "-o", "b")
    assert ran.code == 0, ran.stderr
    (one, left), (two, right) = read(Path("a")), read(Path("b"))
    torch.testing.assert_close(left, right, rtol=0, atol=0)
    assert one == two
