"""`hesscli.load` and `hesscli.compute`: Hessians as objects."""

from __future__ import annotations

import copy
import functools
import gc
import math
import os
import pickle
import random
import resource
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pytest
import torch
from cases import BY_NAME, expected, save
from conftest import read
from hessian_files import symmetric, write
from oracles import relative_error
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import hesscli
from hesscli.errors import ResourceError
from hesscli.hessian.objective.problem import Problem


def test_import_loads_nothing() -> None:
    code = (
        "import sys, hesscli; hesscli.__version__; dir(hesscli)\n"
        "print(sorted({'torch', 'numpy', 'typer'} & sys.modules.keys()))\n"
        "hesscli.load; print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, encoding="utf-8"
    )
    assert done.stdout == "[]\nFalse\n", done.stderr


def test_names() -> None:
    assert set(hesscli.__all__) <= set(dir(hesscli))
    for name in hesscli.__all__:
        assert getattr(hesscli, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hesscli.nothing  # noqa: B018


# --- load -------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("blocks", ["diag", "module", "full", "elements"])
def test_load(cli, tmp_path, blocks, framework):
    model, data = save(BY_NAME["mlp-tanh"], "script", tmp_path)
    command = ("compute", model, data, *BY_NAME["mlp-tanh"].arguments(), "--gradient", "-b", blocks)
    assert cli(*command).code == 0
    document, tensors = read(tmp_path / "hessian.safetensors")
    loaded = hesscli.load(tmp_path / "hessian.safetensors", framework)
    kind = {"numpy": np.ndarray, "torch": torch.Tensor}[framework]
    assert loaded.metadata == document
    assert loaded.structure == document["structure"]
    assert list(loaded.blocks) == [facts["name"] for facts in document["blocks"]]
    assert {k: list(v) for k, v in loaded.parameters.items()} == {
        p["name"]: p["shape"] for p in document["parameters"]
    }
    for name, facts in loaded.blocks.items():
        assert isinstance(loaded.block(name), kind)
        np.testing.assert_array_equal(loaded.block(name), tensors[name])
        assert facts["trace"] is not None
    for name in loaded.parameters:
        np.testing.assert_array_equal(loaded.gradient(name), tensors[f"gradient.{name}"])
    assert isinstance(loaded.matrix(), kind)
    # Against the whole matrix: what the structure leaves out is zero.
    assert cli(*command[:-1], "full", "-o", "full").code == 0
    whole = hesscli.load(tmp_path / "full").matrix()
    found = np.asarray(loaded.matrix())
    kept = found != 0
    np.testing.assert_allclose(found[kept], whole[kept], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found.diagonal(), whole.diagonal(), rtol=1e-6, atol=1e-12)


def test_parameters_that_do_not_lie_together(tmp_path):
    """A module's block, when another module's parameters stand between its own."""
    a, b = symmetric(3), symmetric(2, 1)
    shapes = {"a.x": (1,), "b.x": (2,), "a.y": (2,)}
    write(tmp_path / "h", {"a": a, "b": b}, "module", shapes)
    matrix = hesscli.load(tmp_path / "h").matrix()
    np.testing.assert_array_equal(matrix[np.ix_([0, 3, 4], [0, 3, 4])], a)
    np.testing.assert_array_equal(matrix[np.ix_([1, 2], [1, 2])], b)
    assert not matrix[0, 1:3].any()


def test_the_file_does_not_change(tmp_path):
    write(tmp_path / "h", {"a": symmetric(3)})
    before = (tmp_path / "h").read_bytes()
    block = hesscli.load(tmp_path / "h").block("a")
    with pytest.raises(ValueError, match="read-only"):
        block[0, 0] = 1
    tensor = hesscli.load(tmp_path / "h", "torch").block("a")
    tensor[0, 0] = 77
    assert tensor[0, 0] == 77
    assert (tmp_path / "h").read_bytes() == before


def test_load_errors(tmp_path):
    with pytest.raises(hesscli.HesscliError, match="no such file"):
        hesscli.load(tmp_path / "none")
    write(tmp_path / "h", {"a": symmetric(3)})
    loaded = hesscli.load(tmp_path / "h")
    with pytest.raises(hesscli.HesscliError, match="no block 'b'; it has: a"):
        loaded.block("b")
    with pytest.raises(hesscli.HesscliError, match="no gradient by 'a'; --gradient writes them"):
        loaded.gradient("a")
    with pytest.raises(hesscli.HesscliError, match="no parameter 'b'; it has: a"):
        loaded.gradient("b")
    with pytest.raises(hesscli.HesscliError, match="no framework"):
        hesscli.load(tmp_path / "h", "jax")
    assert "1 blocks, 3 rows" in repr(loaded)


# --- compute ----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 2)
        self.first.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(1)
    return Net().double().train()


X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 2, (12,), generator=torch.Generator().manual_seed(1))


def truth(net: nn.Module) -> torch.Tensor:
    """The Hessian in eval mode by its parameters that require a gradient, by autograd."""
    twin = copy.deepcopy(net).eval()
    named = [n for n, p in twin.named_parameters() if p.requires_grad]

    def loss(*values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(named, values, strict=True))
        output = torch.func.functional_call(twin, given, (X,))
        return nn.functional.cross_entropy(output, Y)

    values = tuple(twin.get_parameter(n).detach() for n in named)
    rows = torch.autograd.functional.hessian(loss, values)
    sizes = [v.numel() for v in values]
    return torch.cat(
        [
            torch.cat([part.reshape(n, m) for part, m in zip(row, sizes, strict=True)], 1)
            for row, n in zip(rows, sizes, strict=True)
        ]
    )


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ((X, Y), {}),
        ([X.numpy(), Y.numpy()], {}),
        ({"input": X, "label": Y.numpy()}, {}),
        ({"a": X, "b": Y, "c": X}, {"inputs": ("a",), "targets": "b"}),
    ],
)
def test_compute_a_live_module(net, data, options):
    found = hesscli.compute(net, data, blocks="full", framework="torch", **options)
    torch.testing.assert_close(found.matrix(), truth(net), rtol=1e-9, atol=1e-11)
    assert found.metadata["model"]["kind"] == "module"
    assert found.metadata["check"]["relative_error"] < 1e-6
    assert found.metadata["frozen"] == ["first.bias"]


@pytest.mark.parametrize(
    "scripted",
    [
        torch.jit.script,
        lambda net: torch.jit.trace(net, X),
        lambda net: nn.Sequential(torch.jit.script(net)),
    ],
    ids=["script", "trace", "within"],
)
def test_torchscript_in_memory(net, scripted):
    model = scripted(net.eval())
    found = hesscli.compute(model, (X, Y), blocks="full", framework="torch")
    torch.testing.assert_close(found.matrix(), truth(net), rtol=1e-9, atol=1e-11)
    assert [name.removeprefix("0.") for name in found.metadata["frozen"]] == ["first.bias"]
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())


def test_structures_and_options(net):
    whole = truth(net)
    diagonal = hesscli.compute(net, (X, Y), blocks="elements")
    np.testing.assert_allclose(diagonal.matrix(), np.diag(whole.diagonal()), atol=1e-11)
    last = hesscli.compute(net, (X, Y), params=("last.bias",), gradient=True)
    assert list(last.blocks) == ["last.bias"]
    np.testing.assert_allclose(last.block("last.bias"), whole[-2:, -2:], atol=1e-11)
    assert last.gradient("last.bias").shape == (2,)
    with pytest.raises(hesscli.HesscliError, match="no option is called 'nothing'"):
        hesscli.compute(net, (X, Y), nothing=1)


@pytest.mark.parametrize(
    "loss",
    [
        "cross-entropy",
        nn.CrossEntropyLoss(),
        nn.functional.cross_entropy,
        lambda output, target: nn.functional.cross_entropy(output, target, reduction="none"),
    ],
)
def test_losses(net, loss):
    found = hesscli.compute(net, (X, Y), loss=loss, blocks="full")
    np.testing.assert_allclose(found.matrix(), truth(net), rtol=1e-9, atol=1e-11)
    assert found.metadata["loss"]["inferred"] is False


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray])
def test_arrays_as_loss_arguments(net, tmp_path, monkeypatch, kind):
    # As a run of more than a second.
    monkeypatch.setattr("hesscli.job.matrix.unfinished.INTERVAL", 0)
    weight, targets = torch.rand(12, 2, dtype=torch.float64), torch.rand(12, 2)
    data = {"x": X, "y": targets, "w": weight}
    options = {"loss": "mse", "batch_size": "auto", "output": tmp_path / "h"}
    named = hesscli.compute(net, data, loss_arguments={"weight": "@w"}, **options)
    block = np.array(named.block("last.bias"))
    given = hesscli.compute(net, data, loss_arguments={"weight": kind(weight)}, **options)
    np.testing.assert_array_equal(given.block("last.bias"), block)
    (text,) = given.metadata["loss"]["arguments"].values()
    assert text.startswith("float64 [12, 2] ")
    other = hesscli.compute(net, data, loss_arguments={"weight": kind(2 * weight)}, **options)
    assert other.metadata["loss"]["arguments"]["weight"] != text


def test_a_function_is_not_the_loss_of_its_name(net):
    def mse(output, target):
        return nn.functional.cross_entropy(output, target, reduction="none")

    found = hesscli.compute(net, (X, Y), loss=mse, blocks="full")
    np.testing.assert_allclose(found.matrix(), truth(net), rtol=1e-9, atol=1e-11)
    assert found.metadata["loss"]["name"] == "test_python:mse"


def test_dropout_in_train_mode(net):
    with pytest.raises(hesscli.HesscliError, match="dropout left on") as refused:
        hesscli.compute(net, (X, Y), train_mode=True)
    assert "--train-mode" in refused.value.hint


def test_nothing_of_the_user_changes(net):
    net.last.weight.grad = torch.ones(2, 4, dtype=torch.float64)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    kept = {name: (p.requires_grad, id(p)) for name, p in net.named_parameters()}
    modes = [module.training for module in net.modules()]
    net.drop.p = 0.0  # else train mode has no Hessian
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    x, y = X.clone(), Y.clone()
    hesscli.compute(net, (x, y), train_mode=True, threads=2, tf32=True, dtype="float32")
    hesscli.compute(net, (x, y), params=("*",))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert {n: (p.requires_grad, id(p)) for n, p in net.named_parameters()} == kept
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(net.last.weight.grad, torch.ones(2, 4, dtype=torch.float64))
    assert net.first.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == tf32
    assert torch.equal(x, X)
    assert torch.equal(y, Y)


def test_random_numbers_go_on_as_before() -> None:
    """Of a model that draws some, of any kind, and needs none; and of each product that passes through it again."""

    class Drawing(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            random.random()
            np.random.rand()
            torch.rand(())
            return super().forward(x)

    def states() -> list[str]:
        of_torch = torch.get_rng_state().tolist()
        return [str(state) for state in (random.getstate(), np.random.get_state(), of_torch)]

    model, data, before = Drawing(3, 1), (torch.ones(4, 3), torch.ones(4, 1)), states()
    hesscli.compute(model, data)
    products = hesscli.operator(model, data, method="finite-difference")
    assert states() == before
    products @ np.ones(4)
    assert states() == before


def test_an_operator_changes_no_settings(net, tmp_path):
    torch.jit.script(net.eval()).save(tmp_path / "net.pt")
    np.savez(tmp_path / "d.npz", x=X.numpy(), y=Y.numpy())
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    H = hesscli.operator(tmp_path / "net.pt", tmp_path / "d.npz", threads=threads + 1, tf32=True)
    H @ np.ones(H.shape[1])
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == tf32


def test_the_temporary_file_goes_with_the_object(net):
    found = hesscli.compute(net, (X, Y))
    path = found.path
    assert path.exists()
    block = found.block("last.bias")
    assert [p.name for p in path.parent.iterdir()] == ["hessian.safetensors"]
    del found
    gc.collect()
    assert not path.parent.exists()
    assert block.shape == (2, 2)


def test_no_room_for_temporary_files(net, tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(ResourceError, match="File too large") as full:
            hesscli.compute(net, (X, Y))
        hesscli.operator(net, (X, Y))  # writes nothing
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(ResourceError, match="No such file or directory") as missing:
        hesscli.compute(net, (X, Y))
    hesscli.compute(net, (X, Y), output=tmp_path / "h.safetensors")  # needs none
    monkeypatch.chdir(tmp_path)
    assert full.value.hint == missing.value.hint
    exec(full.value.hint)
    hesscli.compute(net, (X, Y))


class Counted(nn.Sequential):
    """Knows how many copies there are."""

    copies: ClassVar[weakref.WeakSet[nn.Module]] = weakref.WeakSet()

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self.copies.add(self)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blocks": "elements"},
        {"method": "hvp", "batch_size": 5},
        {"method": "finite-difference"},
        {"curvature": "ggn"},
        {"curvature": "fisher"},
    ],
    ids=str,
)
def test_nothing_is_kept_until_python_looks_for_cycles(options: dict[str, object]) -> None:
    """A model and its data on a GPU, say, of each Hessian in the course of a training."""
    first = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    model = Counted(first, nn.Tanh(), nn.Linear(4, 2)).double()
    gc.collect()
    gc.disable()
    try:
        hesscli.compute(model, (X, Y), **options)
        assert not model.copies
        if options.keys() <= {"curvature", "method", "batch_size"}:
            hesscli.operator(model, (X, Y), **options) @ np.ones(30)
            assert not model.copies
    finally:
        gc.enable()


def test_the_temporary_file_outlives_a_process_that_was_forked(net):
    found = hesscli.compute(net, (X, Y))
    child = os.fork()
    if not child:
        try:
            del found
            gc.collect()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert found.block("last.bias").shape == (2, 2)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_copies_of_a_hessian(net, tmp_path, framework):
    found = hesscli.compute(net, (X, Y), framework=framework)
    name = next(iter(found.blocks))
    block = np.asarray(found.block(name)).copy()
    with pytest.raises(hesscli.HesscliError, match="a Hessian with an output can"):
        pickle.dumps(found)
    copied = copy.deepcopy(found)
    del found
    gc.collect()
    np.testing.assert_array_equal(copied.block(name), block)
    output = tmp_path / "hessian.safetensors"
    kept = hesscli.compute(net, (X, Y), framework=framework, output=output)
    for each in (kept, hesscli.load(output, framework)):
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(each)).block(name), block)


def test_an_output_stays(net, tmp_path, capfd):
    found = hesscli.compute(net, (X, Y), output=tmp_path / "h.safetensors")
    del found
    gc.collect()
    loaded = hesscli.load(tmp_path / "h.safetensors")
    again = hesscli.compute(net, (X, Y))
    assert loaded.metadata == again.metadata  # the same hashes, too
    assert capfd.readouterr() == ("", "")


def test_files_go_through_it_too(tmp_path):
    case = BY_NAME["mlp-tanh"]
    model, data = save(case, "script", tmp_path)
    found = hesscli.compute(str(model), data, loss=case.loss, blocks="full")
    assert found.metadata["model"]["kind"] == "torchscript"
    torch.testing.assert_close(
        torch.as_tensor(np.array(found.matrix())), expected(case), rtol=1e-9, atol=1e-11
    )


def test_compute_errors(net):
    with pytest.raises(hesscli.HesscliError, match="data: the names do not tell") as caught:
        hesscli.compute(net, {"p": X, "q": X, "r": Y})
    assert "hesscli." not in (caught.value.hint or "")
    with pytest.raises(hesscli.HesscliError, match="does not accept the inputs"):
        hesscli.compute(net, (X[:, :2], Y))
    with pytest.raises(hesscli.HesscliError, match="3 arrays; expected"):
        hesscli.compute(net, (X, Y, Y))
    with pytest.raises(hesscli.HesscliError, match="ReLU: a model without parameters"):
        hesscli.compute(nn.ReLU(), (X, X))
    net.cache = [net(X)]
    with pytest.raises(
        hesscli.HesscliError,
        match="Net: cannot be copied: Only Tensors created explicitly by the user",
    ):
        hesscli.compute(net, (X, Y))


def test_an_error_is_shown_once_and_with_its_hint(net):
    with pytest.raises(hesscli.HesscliError) as caught:
        hesscli.compute(net, (X.long(), Y))
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.count(f"MismatchError: {caught.value.message}") == 1
    assert shown.endswith("\nhint: --scale 1\n")
    assert "mat1 and mat2 must have the same dtype" in shown.partition("direct cause")[0]


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("blocks", "foo", "diag, module, full, elements"),
        ("method", "foo", "hvp"),
        ("curvature", "foo", "hessian, ggn, fisher"),
        ("reduction", "SUM", "mean, sum"),
        ("stats", "foo", "basic, auto, all, none"),
        ("dtype", "double", "auto, float32, float64"),
        ("dtype", torch.float16, "auto, float32, float64"),
        ("batch_size", -1, "from 1 on"),
        ("batch_size", 2.5, "from 1 on"),
        ("threads", 0, "from 1 on"),
        ("memory", "4 GB", "from 1 on"),
        ("max_shard_size", "1 GB", "from 1 on"),
        ("threads", 4097, "from 1 to 4096"),
        ("scale", 0.5, "a dict"),
        ("scale", {"x": "1/255"}, "a dict of numbers"),
        ("scale", {"x": None}, "a dict of numbers"),
        ("scale", {"x": math.nan}, "a dict of numbers"),
        ("arch", nn.Linear, "None, or a str"),
        ("targets", Y, "None, or a str"),
        ("output_key", 1.0, "None, or a str"),
        ("output", 3, "None, or a path"),
        ("seed", "a", "a whole number"),
        ("seed", 2**64, "64 bits"),
        ("params", None, "a str, or several"),
        ("params", ("a", 1), "a str, or several"),
        ("inputs", 3, "a str, or several"),
        ("train_mode", 1, "True or False"),
        ("check", None, "True or False"),
        ("gradient", "yes", "True or False"),
        ("shard", 1, "(I, N)"),
        ("shard", (3, 2), "(I, N)"),
        ("shard", (1, 2.0), "(I, N)"),
        ("samples", 3, "(from, up to)"),
        ("samples", (-3, None), "(from, up to)"),
        ("loss", None, "a function"),
    ],
)
def test_wrong_options(net, option, value, wanted):
    with pytest.raises(hesscli.HesscliError) as caught:
        hesscli.compute(net, (X, Y), **{option: value})
    assert caught.value.message.startswith(f"{option} is ")
    assert "\n" not in caught.value.message
    assert wanted in caught.value.message
    assert caught.value.exit_code == 2


def test_a_share_is_no_hessian(net, monkeypatch, tmp_path):
    monkeypatch.setattr("hesscli.job.live.run", None)  # before the work
    with pytest.raises(hesscli.HesscliError, match="one share is no Hessian") as caught:
        hesscli.compute(net, (X, Y), shard=(1, 2), output=tmp_path / "h.safetensors")
    assert caught.value.exit_code == 2


def test_a_device_that_is_not_there(net):
    with pytest.raises(hesscli.HesscliError, match="no device cuda:99") as caught:
        hesscli.compute(net, (X, Y), device="cuda:99")
    assert caught.value.exit_code == 6
    with pytest.raises(hesscli.HesscliError, match="no device is called 'gpu'") as caught:
        hesscli.compute(net, (X, Y), device="gpu")
    assert caught.value.exit_code == 2
    assert hesscli.compute(net, (X, Y), device="auto").metadata["device"] == "cpu"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(3, 1, device="meta"), "weight is on the meta device"),
        (nn.LazyLinear(1), "weight has no shape before the module was called"),
    ],
)
def test_modules_without_values(module, reason):
    with pytest.raises(hesscli.HesscliError, match=f"Linear: {reason}"):
        hesscli.compute(module, (X, X[:, :1]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_any_mode_of_the_caller(net, tmp_path, mode):
    whole = truth(net)
    with mode():
        twin = Net().double()
        twin.load_state_dict(net.state_dict())
        for module in (net, twin):
            found = hesscli.compute(module, (X.clone(), Y), blocks="full", framework="torch")
            torch.testing.assert_close(found.matrix(), whole, rtol=1e-9, atol=1e-11)
    case = BY_NAME["mlp-tanh"]
    files = save(case, "script", tmp_path)
    matrix = expected(case)
    outside = hesscli.operator(*files, loss=case.loss)
    with mode():
        inside = hesscli.operator(*files, loss=case.loss)
        for H in (outside, inside):
            np.testing.assert_allclose(H @ np.eye(len(matrix)), matrix, atol=1e-9)


def test_default_device_of_the_caller(net):
    """As on a GPU, where no number can be drawn from a generator of the CPU; but of meta, which has no numbers."""
    whole = truth(net)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        assert torch.empty(0).is_meta
        return nn.functional.cross_entropy(output, target, reduction="none")

    for given in ("cross-entropy", loss):
        with torch.device("meta"):
            hessian = hesscli.compute(net, (X, Y), loss=given, blocks="full", framework="torch")
            hesscli.compute(net, (X, Y), loss=given, blocks="elements")
            products = hesscli.operator(net, (X, Y), loss=given) @ np.eye(len(whole))
        torch.testing.assert_close(hessian.matrix(), whole, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(products, whole, atol=1e-9)


def test_saved_tensors_hooks_of_the_caller(net):
    """They may compress what autograd saves."""
    whole, x = truth(net), torch.tensor(2.0, requires_grad=True)
    outside = hesscli.operator(net, (X, Y))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t + 100):  # put back too
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t.double()):
            found = hesscli.compute(net, (X, Y), blocks="full", framework="torch")
            for H in (outside, hesscli.operator(net, (X, Y))):
                np.testing.assert_allclose(H @ np.eye(len(whole)), whole, atol=1e-9)
        assert torch.autograd.grad(x * x, x)[0] == 204
    torch.testing.assert_close(found.matrix(), whole, rtol=1e-9, atol=1e-11)


def test_autocast_of_the_caller() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (X.float(), Y)
    hessian = hesscli.compute(model, data, blocks="full").matrix()
    outside = hesscli.operator(model, data)
    identity = np.eye(len(hessian))
    product = outside @ identity
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = hesscli.operator(model, data)
        np.testing.assert_array_equal(
            hesscli.compute(model, data, blocks="full", check=False).matrix(), hessian
        )
        for H in (outside, inside):
            np.testing.assert_array_equal(H @ identity, product)
        assert torch.is_autocast_enabled("cpu")


def test_autocast_of_a_model_is_the_outermost() -> None:
    """Within another it would keep what it cast of the weights."""

    class Casting(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x).float()

    model, data = Casting(3, 1), (X.float(), X[:, :1].float())
    expected = 2 * X.T @ X / len(X)  # of the mean squared error
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found in (
            hesscli.compute(model, data, params="weight", framework="torch").block("weight"),
            torch.as_tensor(hesscli.operator(model, data, params="weight") @ np.eye(3)),
        ):
            assert relative_error(found.double(), expected) < 1e-5
        depth = torch.autocast_increment_nesting()
        torch.autocast_decrement_nesting()
        assert depth == 2
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("set_by_the_caller", "read"),
    [
        ("torch.set_float32_matmul_precision('medium')", "torch.get_float32_matmul_precision()"),
        ("torch.backends.fp32_precision = 'tf32'", "torch.backends.fp32_precision"),
        ("torch.backends.disable_global_flags()", "torch.backends.flags_frozen()"),
        (
            "torch.set_float32_matmul_precision('medium'); torch.backends.cuda.matmul.allow_tf32 = True",
            "torch.backends.cuda.matmul.allow_tf32",
        ),
    ],
)
def test_precision_of_the_caller(warm: str, set_by_the_caller: str, read: str) -> None:
    code = (
        f"import hesscli, torch; {set_by_the_caller}; before = {read}\n"
        "x, y = torch.ones(5, 3), torch.ones(5, 2)\n"
        "hesscli.compute(torch.nn.Linear(3, 2), (x, y))\n"
        f"assert {read} == before\n"
        "hesscli.operator(torch.nn.Linear(3, 2), (x, y)) @ torch.ones(8).numpy()\n"
        f"assert {read} == before"
    )
    done = subprocess.run([warm, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tf32", [False, True])
def test_only_who_asks_has_three_digits_on_a_gpu(net, monkeypatch, tf32):
    """PyTorch's own convolutions have them by default."""
    seen, gradient = set(), Problem.flat_gradient

    def looking(self, names):
        seen.add((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return gradient(self, names)

    monkeypatch.setattr(Problem, "flat_gradient", looking)
    hesscli.compute(net, (X, Y), tf32=tf32)
    H = hesscli.operator(net, (X, Y), tf32=tf32, method="finite-difference")
    assert seen == {(tf32, tf32)}
    seen.clear()
    H @ np.ones(H.shape[1])
    assert seen == {(tf32, tf32)}


def test_threads_leave_settings_as_they_were(net):
    def settings() -> list[bool]:
        cuda = torch.backends.cuda
        return [
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
        ]

    before = settings()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: hesscli.compute(net, (X, Y)), range(12)))
    assert settings() == before


def test_options_in_the_words_of_python(net):
    found = hesscli.compute(
        net, (X, Y), params="last.*", dtype=torch.float32, device=torch.device("cpu")
    )
    assert list(found.parameters) == ["last.weight", "last.bias"]
    assert found.metadata["dtype"] == "float32"


@pytest.mark.parametrize("function", [hesscli.compute, hesscli.operator])
def test_it_listens(net, function):
    class Ear:
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

        def progress(self, done: int, total: int, doing: str) -> None: ...

    ear = Ear()
    function(net, (X, Y), listener=ear)
    assert any("cross-entropy, inferred" in note for note in ear.notes)


@pytest.mark.parametrize("kept", [True, False])
def test_an_interruption_is_no_error(net, tmp_path, kept):
    class Interrupting:
        def note(self, text: str) -> None: ...

        def progress(self, done: int, total: int, doing: str) -> None:
            if done > total / 2:
                raise KeyboardInterrupt

    output = tmp_path / "hessian.safetensors" if kept else None
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted; .* kept$" if kept else "^$"):
        hesscli.compute(net, (X, Y), listener=Interrupting(), output=output)
    if kept:
        hesscli.compute(net, (X, Y), output=output, resume=True)


@pytest.mark.parametrize("module", [True, False])
def test_a_loss_that_holds_numbers_in_float32(module):
    """A module is brought to float64; a function cannot be, so its gradients are compared in float32."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 4), torch.randn(9, 3), torch.randint(0, 4, (9,))
    weight = torch.tensor([1.0, 2, 3, 4])
    loss = nn.CrossEntropyLoss(weight=weight)
    found = hesscli.compute(
        model,
        (x, y),
        loss=loss if module else lambda f, y: loss(f, y),
        blocks="full",
        framework="torch",
    )
    assert found.metadata["check"]["dtype"] == ("float64" if module else "float32")
    same = hesscli.compute(
        model,
        (x, y),
        loss="cross-entropy",
        loss_arguments={"weight": weight},
        blocks="full",
        framework="torch",
    )
    assert same.metadata["check"]["dtype"] == "float64"
    torch.testing.assert_close(found.matrix(), same.matrix(), rtol=1e-4, atol=1e-6)


def test_options_of_numpy() -> None:
    model, data = nn.Linear(3, 1), (np.ones((4, 3)), np.ones((4, 1)))
    plain = hesscli.compute(model, data, batch_size=2, seed=3, dtype="float64")
    same = hesscli.compute(model, data, batch_size=np.int64(2), seed=np.int64(3), dtype=np.float64)
    assert np.array_equal(plain.block("weight"), same.block("weight"))


def test_a_tensor_dataset() -> None:
    model, data = nn.Linear(3, 1), (torch.ones(4, 3), torch.ones(4, 1))
    plain = hesscli.compute(model, data)
    same = hesscli.compute(model, torch.utils.data.TensorDataset(*data))
    assert np.array_equal(plain.block("weight"), same.block("weight"))


class Frame:
    """A table, as that of pandas, whose entries are its columns."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, name: object) -> object:
        raise KeyError(name)

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return self.values


@pytest.mark.parametrize(
    "inputs",
    [
        X.flip(0).numpy()[::-1],
        X.numpy().astype(">f8"),
        np.asfortranarray(X),
        X.tolist(),
        Frame(X.numpy()),
        memoryview(X.numpy()),
    ],
    ids=["backwards", "big-endian", "by-columns", "lists", "table", "memory"],
)
def test_arrays_as_they_may_lie(net: Net, inputs: object) -> None:
    plain = hesscli.compute(net, (X, Y), blocks="full")
    same = hesscli.compute(net, (inputs, Y), blocks="full")
    np.testing.assert_array_equal(same.matrix(), plain.matrix())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "data: a NoneType; expected"),
        ((x for x in (1, 2)), "data: a generator; expected"),
        (torch.utils.data.DataLoader([1]), "data: a DataLoader; expected"),
        ((1, 2, 3), "data: 3 arrays; expected"),
        ({"x": torch.ones(4, 3), "y": "words"}, "data: y is a str; expected an array"),
        ({0: torch.ones(4, 3)}, "data: a key is 0; expected the name of an array"),
        (torch.ones(4, 3).to_sparse(), "data: x is sparse_coo; expected a dense tensor"),
        (
            torch.nested.as_nested_tensor([torch.ones(3)], layout=torch.jagged),
            "data: x is nested; expected a dense",
        ),
        (np.ma.array([[1.0, 2, 3]], mask=[[0, 1, 0]]), "data: x is a MaskedArray; expected an"),
        (
            torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.qint8),
            "data: x is quantized; expected a dense",
        ),
        (np.array([["a", "b", "c"]]), "data: x is a ndarray of <U1; expected an array"),
        (np.zeros((4, 3), "M8[s]"), "data: x is a ndarray of datetime"),
    ],
)
def test_data_that_is_none(data: object, said: str) -> None:
    with pytest.raises(hesscli.HesscliError, match=said) as caught:
        hesscli.compute(nn.Linear(3, 1), data)
    assert "astype" not in (caught.value.hint or "")
    collated = "default_collate" in (caught.value.hint or "")
    assert collated == isinstance(data, (DataLoader, Iterator))


def test_a_large_value_that_an_option_cannot_have_is_called_by_its_type() -> None:
    for value in (np.zeros(3), np.zeros((2, 2)), "x" * 79):
        with pytest.raises(hesscli.HesscliError) as caught:
            hesscli.compute(nn.Linear(3, 1), (X[:, :3], X[:, :1]), seed=value)
        found = {True: repr(value), False: f"a {type(value).__name__}"}[np.ndim(value) == 1]
        assert caught.value.message == f"seed is {found}; expected: a whole number of 64 bits"


def test_several_inputs_side_by_side_are_refused_with_how_they_are_given() -> None:
    model, a, b, y = nn.Bilinear(2, 3, 1), torch.ones(4, 2), torch.ones(4, 3), torch.ones(4, 1)
    for data in (((a, b), y), ({"a": a, "b": b}, y), (a, b, y), TensorDataset(a, b, y)):
        with pytest.raises(hesscli.HesscliError) as caught:
            hesscli.compute(model, data)
        assert isinstance(eval(caught.value.hint or ""), hesscli.Hessian)


def test_samples_that_are_no_arrays_are_refused_with_how_they_become_some() -> None:
    model, x, y = nn.Linear(3, 1), X[:, :3], X[:, :1]
    truth = hesscli.compute(model, (x[:4], y[:4]), framework="torch").block("weight")
    dataset = Subset(TensorDataset(x, y), range(4))
    loader = DataLoader(dataset, batch_size=2, shuffle=True)
    samples = list(dataset)
    batches = [(x[:1], y[:1]), (x[1:3], y[1:3]), (x[3:4], y[3:4])]
    for data in (
        dataset,
        loader,
        samples,
        iter(samples),
        [{"x": x, "y": y} for x, y in samples],
        batches,
        [{"x": x, "y": y} for x, y in batches],
    ):
        with pytest.raises(hesscli.HesscliError, match="expected \\(inputs, targets\\)") as caught:
            hesscli.compute(model, data)
        found = eval(caught.value.hint or "", globals() | locals())
        torch.testing.assert_close(torch.tensor(found.block("weight")), truth)


@pytest.mark.parametrize("kind", ["table", "dataset"])
def test_tables_are_refused_with_how_they_become_arrays(kind: str) -> None:
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    model, x, y = nn.Linear(3, 1), X.numpy(), X[:, :1].numpy()
    truth = hesscli.compute(model, (x, y)).block("weight")
    table = pandas.DataFrame(x)
    table.insert(1, "label", y[:, 0])
    dataset = datasets.Dataset.from_dict({"x": x, "y": y})
    with pytest.raises(hesscli.HesscliError, match="expected \\(inputs, targets\\)") as caught:
        hesscli.compute(model, {"table": table, "dataset": dataset}[kind])
    found = eval((caught.value.hint or "").replace("table['label']", "y"))
    np.testing.assert_allclose(found.block("weight"), truth, rtol=1e-6)


def test_what_is_beside_arrays_is_refused_with_how_it_is_left_out() -> None:
    """As in a `Bunch` of scikit-learn."""
    model, data = nn.Linear(3, 3), {"data": X, "target": Y, "frame": None, "names": np.array("abc")}
    with pytest.raises(hesscli.HesscliError, match="frame is a NoneType") as caught:
        hesscli.compute(model, data)
    assert isinstance(eval(caught.value.hint or "", globals() | locals()), hesscli.Hessian)


@pytest.mark.parametrize("of", [np.longdouble, object])
def test_arrays_of_which_torch_has_no_type_are_refused_with_what_they_become(of: type) -> None:
    x, y = X.numpy().astype(of), X[:, :1]
    with pytest.raises(hesscli.HesscliError, match="expected an array") as caught:
        hesscli.compute(nn.Linear(3, 1), (x, y))
    assert caught.value.hint == 'x = x.astype("float64")'
    exec(caught.value.hint, names := {"x": x})
    hesscli.compute(nn.Linear(3, 1), (names["x"], y))


def test_words_for_classes_are_refused_with_how_they_become_numbers() -> None:
    words = np.array(["cat", "dog", "cow"] * 4)
    for y in (words, words.astype(object)):
        with pytest.raises(hesscli.HesscliError, match="y is a ndarray of words") as caught:
            hesscli.compute(nn.Linear(3, 3), (X, y))
        assert (caught.value.hint or "").endswith("y = pandas.factorize(y)[0]")


def test_an_exported_module(net: Net) -> None:
    whole, program = truth(net), torch.export.export(net.eval(), (X,))
    with pytest.raises(hesscli.HesscliError, match="a ExportedProgram; expected") as caught:
        hesscli.compute(program, (X, Y))
    assert caught.value.hint == "hesscli.compute(model.module(), data)"
    found = hesscli.compute(program.module(), (X, Y), blocks="full", framework="torch")
    torch.testing.assert_close(found.matrix(), whole)


def test_the_place_of_an_output_is_a_number() -> None:
    class Two(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return 3 * super().forward(x), super().forward(x)

    model = Two(3, 1).double()
    truth = 2 * X.T @ X / len(X)  # of the mean squared error
    for place in (1, np.int64(-1)):
        found = hesscli.compute(model, (X, X[:, :1]), output_key=place).block("weight")
        assert relative_error(torch.tensor(found), truth) < 1e-12


def test_a_factor_of_numpy() -> None:
    found = hesscli.compute(nn.Linear(3, 1).double(), (X, X[:, :1]), scale={"x": np.float32(0.5)})
    assert relative_error(torch.tensor(found.block("weight")), X.T @ X / len(X) / 2) < 1e-12


@pytest.mark.parametrize("pair", [tuple, list])
@pytest.mark.parametrize("samples", [2, 4])
def test_several_inputs_of_one_shape_are_not_taken_for_one(pair: type, samples: int) -> None:
    model, a, y = nn.Bilinear(3, 3, 1), torch.ones(samples, 3), torch.ones(samples, 1)
    b = a.clone()
    for arrays in ((a, b), (a.numpy(), b.numpy())):
        for data in ((pair(arrays), y), {"x": pair(arrays), "y": y.tolist()}):
            with pytest.raises(hesscli.HesscliError, match="data: x is a ") as caught:
                hesscli.compute(model, data)
            assert isinstance(eval(caught.value.hint or ""), hesscli.Hessian)


def test_samples_may_be_arrays_in_a_list(net: Net) -> None:
    plain = hesscli.compute(net, (X, Y), blocks="full")
    for data in ((list(X), Y), {"x": list(X), "y": Y.tolist(), "w": torch.ones(3)}):
        same = hesscli.compute(net, data, blocks="full")
        np.testing.assert_array_equal(same.matrix(), plain.matrix())


def test_samples_in_a_list_without_an_axis_or_alone() -> None:
    model, classes = nn.Linear(3, 2), torch.tensor([0, 1, 1, 0])
    truth = hesscli.compute(model, (X[:4, :3], classes)).matrix()
    for y in (classes, list(classes)):
        found = hesscli.compute(model, (list(X[:4, :3]), y))
        np.testing.assert_array_equal(found.matrix(), truth)
    squares = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    truth = hesscli.compute(squares, {"x": X[:4, :3]}, loss="output").matrix()
    found = hesscli.compute(squares, {"x": list(X[:4, :3])}, loss="output")
    np.testing.assert_array_equal(found.matrix(), truth)


@pytest.mark.parametrize("model", [None, len, functools.partial(nn.Linear(2, 1))])
def test_models_that_are_none(model: object) -> None:
    with pytest.raises(hesscli.HesscliError, match="expected a module, or the path of a file"):
        hesscli.operator(model, torch.ones(4, 3))


@pytest.mark.parametrize("method", ["hvp", "preactivation", "gauss-newton"])
def test_sums_over_many_samples_keep_their_digits(method):
    """In float32: one long sum rounds as often as it has terms."""
    torch.manual_seed(0)
    x = torch.rand(1 << 18, 2)
    y, options = torch.randn(len(x), 1), {"loss": "mse", "method": method, "check": False}
    found = hesscli.compute(nn.Linear(2, 1), (x, y), framework="torch", **options)
    expected = 2 * x.double().T @ x.double() / len(x)
    assert relative_error(found.block("weight").double(), expected) < 5e-6


@pytest.mark.parametrize("places", [1, 3])
def test_a_layer_of_many_samples_keeps_its_digits(places):
    """In float32: terms that are alike are rounded in one direction."""
    torch.manual_seed(0)
    x = torch.rand(1 << 17, places, 2)
    net = nn.Sequential(nn.Linear(2, 1), nn.Flatten())
    options = {"loss": "mse", "method": "preactivation", "blocks": "full", "check": False}
    found = hesscli.compute(net, (x, torch.randn(len(x), places)), framework="torch", **options)
    rows = torch.cat([x.double(), torch.ones(len(x), places, 1)], 2).flatten(0, 1)
    assert relative_error(found.matrix().double(), 2 * rows.T @ rows / len(rows)) < 1e-6


def test_a_bias_of_many_samples_keeps_its_digits():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    x, y = torch.randn(100_000, 2), torch.randn(100_000, 1)
    options = {"loss": "mse", "method": "gauss-newton", "params": "2.bias", "check": False}
    found = hesscli.compute(net, (x, y), **options)
    np.testing.assert_allclose(found.block("2.bias"), 2, rtol=1e-5)


def test_a_factor_is_a_number():
    with pytest.raises(hesscli.HesscliError, match="expected: a dict of numbers"):
        hesscli.compute(nn.Linear(3, 1).double(), (X, X[:, :1]), scale={"x": True})


@pytest.mark.parametrize("dtype", ["auto", "float64"])
def test_weights_that_are_cached(dtype):
    """Each pass makes its own, and the cache of the caller stays."""

    class Symmetric(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return (w + w.T).tanh()

    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 3), torch.randn(6, 3), torch.randn(6, 3)
    nn.utils.parametrize.register_parametrization(model, "weight", Symmetric())
    truth = hesscli.compute(model, (x, y), blocks="full", dtype=dtype).matrix()
    assert np.abs(truth[3:, 3:]).max() > 0.1
    with nn.utils.parametrize.cached():
        weight = model.weight
        found = hesscli.compute(model, (x, y), blocks="full", dtype=dtype).matrix()
        assert model.weight is weight
    np.testing.assert_array_equal(found, truth)
    assert model.weight is not model.weight


def test_copies_of_an_operator():
    H = hesscli.operator(nn.Linear(2, 1), (torch.randn(4, 2), torch.randn(4, 1)))
    v = np.arange(3.0, dtype=np.float32)
    for twin in (copy.copy(H), copy.deepcopy(H)):
        np.testing.assert_array_equal(twin @ v, H @ v)
