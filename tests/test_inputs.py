"""How models take their inputs: by name only, in a dict, beside constants, or no more than so many samples at once."""

from __future__ import annotations

import shlex
from collections import OrderedDict
from functools import partial
from typing import List  # noqa: UP035

import numpy as np
import pytest
import torch
from conftest import read
from oracles import hessian, relative_error
from torch import Tensor, nn
from torch.export import Dim

import hesscli
from hesscli.job.options import Listener, ProblemOptions
from hesscli.job.setup.opening import open_problem
from hesscli.job.setup.processes import Processes

GENERATOR = torch.Generator().manual_seed(0)
X, Z, Y = (torch.randn(12, n, generator=GENERATOR, dtype=torch.float64) for n in (3, 4, 2))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) * z)


class ByName(Net):
    def forward(self, x: Tensor, *, z: Tensor | None = None, unused: float = 1.0) -> Tensor:
        return super().forward(x, torch.ones(4, dtype=x.dtype) if z is None else z)


class Nested(Net):
    """Takes a dict, and what is no tensor."""

    def forward(self, flag: bool, both: dict[str, Tensor], *, how: str = "no") -> Tensor:
        found = super().forward(both["x"], both["z"])
        return found.sin() if flag and how == "sin" else found


class Remembers(Net):
    """Saves more than tensors."""

    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def get_extra_state(self) -> dict[str, float]:
        return {"scale": self.scale}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.scale = state["scale"]

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.scale * super().forward(x, z)


class Alone(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, torch.ones(4, dtype=x.dtype))


class Four(Alone):
    """Was traced with four samples, and takes no other number."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(4, 2)


class Overwrites(Alone):
    """Centres its input where it lies."""

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return super().forward(x)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "d.npz", x=X.numpy(), z=Z.numpy(), y=Y.numpy())
    return "d.npz"


def truth(model: nn.Module, *inputs: Tensor) -> Tensor:
    return hessian(model, nn.functional.mse_loss, inputs, Y)


@pytest.mark.parametrize("named", [True, False])
def test_inputs_by_name_only(named):
    model = ByName().double()
    arrays = {"x": X, "y": Y} | ({"z": Z} if named else {})
    inputs = ("z", "x") if named else ("x",)
    found = hesscli.compute(model, arrays, inputs=inputs, blocks="full", framework="torch")
    model.forward = lambda x: ByName.forward(model, x, z=Z if named else None)
    assert relative_error(found.matrix(), truth(model, X)) < 1e-9


@pytest.mark.parametrize("second", [True, False])
def test_inputs_by_whatever_names(second):
    """As a model has them that passes them on."""

    class Passes(Net):
        def forward(self, **inputs: Tensor) -> Tensor:
            return Net.forward(self, inputs["x"], inputs.get("z", torch.ones(4).double()))

    model = Passes().double()
    arrays = {"x": X, "y": Y} | ({"z": Z} if second else {})
    inputs = ("z", "x") if second else ()
    found = hesscli.compute(model, arrays, inputs=inputs, blocks="full", framework="torch")
    model.forward = lambda x: Net.forward(model, x, Z if second else torch.ones(4).double())
    assert relative_error(found.matrix(), truth(model, X)) < 1e-9


@pytest.mark.parametrize("blocks", ["full", "elements"])
@pytest.mark.parametrize("scripted", [False, True])
def test_an_input_that_is_written_to(blocks, scripted, tmp_path):
    model, arrays = Overwrites().double(), {"x": X.clone(), "y": Y}
    saved = model
    if scripted:
        saved = tmp_path / "m.pt"
        torch.jit.trace(model, (X.clone(),)).save(str(saved))
    made = hesscli.compute(saved, arrays, blocks=blocks, framework="torch", batch_size=5)
    assert not [note for note in made.metadata["notes"] if "no fast route" in note]
    found = made.matrix()
    assert torch.equal(arrays["x"], X)
    model.forward = lambda x: Alone.forward(model, x - 0.5)
    expected = truth(model, X)
    if blocks == "elements":
        found, expected = found.diagonal(), expected.diagonal()
    assert relative_error(found, expected) < 1e-9


def test_a_program_that_takes_a_dict_and_constants(cli, data, tmp_path):
    model, batch = Nested().double(), Dim("batch")
    program = torch.export.export(
        model, (True, {"x": X, "z": Z}), {"how": "sin"},
        dynamic_shapes={"flag": None, "both": {"x": {0: batch}, "z": {0: batch}}, "how": None},
    )  # fmt: skip
    torch.export.save(program, tmp_path / "m.pt2")
    ran = cli("compute", "m.pt2", data, "-b", "full", "--inputs", "x", "--inputs", "z")
    assert ran.code == 0, ran.stderr
    _, tensors = read(tmp_path / "hessian.safetensors")
    model.forward = lambda x, z: Nested.forward(model, True, {"x": x, "z": z}, how="sin")
    assert relative_error(tensors["hessian"], truth(model, X, Z)) < 1e-9
    said = cli("compute", "m.pt2", data, "--inputs", "x").fails(4)
    assert said.endswith("takes both_x, both_z; 1 were given")


def test_inputs_in_the_order_of_a_program_by_their_names(cli, data, tmp_path):
    model, batch = Net().double(), Dim("batch")
    shapes = {"x": {0: batch}, "z": {0: batch}}
    torch.export.save(torch.export.export(model, (X, Z), dynamic_shapes=shapes), tmp_path / "m.pt2")
    ran = cli("compute", "m.pt2", data, "-b", "full", "--inputs", "z", "--inputs", "x")
    assert ran.code == 0, ran.stderr
    assert "inputs are passed by name: z, x" in ran.notes


def test_a_number_that_varies(cli, data, tmp_path):
    class Scaled(Alone):
        def forward(self, x: Tensor, n: int) -> Tensor:
            return super().forward(x) * n

    shapes = {"x": {0: Dim("batch")}, "n": Dim.DYNAMIC}
    program = torch.export.export(Scaled().double(), (X, 3), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "m.pt2")
    assert "a number as an input that varies (n)" in cli("compute", "m.pt2", data).fails(3)


def test_a_state_of_more_than_tensors(cli, data, tmp_path):
    model = Remembers().double()
    model.scale = 2.0
    torch.save(model.state_dict(), tmp_path / "m.pt")
    words = ("--inputs", "x", "--inputs", "z", "-b", "full", "--arch", f"{__name__}:Remembers")
    ran = cli("compute", "m.pt", data, *words)
    assert ran.code == 0, ran.stderr
    _, tensors = read(tmp_path / "hessian.safetensors")
    assert relative_error(tensors["hessian"], truth(model, X, Z)) < 1e-9


@pytest.mark.parametrize(
    ("limits", "asked", "batches"),
    [
        ({"max": 8}, None, 2),
        ({"max": 8}, 3, 4),
        ({"min": 4, "max": 6}, None, 2),
        ({"min": 4, "max": 6}, 2, 3),
        ({"min": 5}, None, 1),
        ({"min": 5}, 5, 2),
        ({"min": 1}, 1, 12),
        ({}, 1, 12),
    ],
)
def test_batches_that_a_program_accepts(cli, data, tmp_path, limits, asked, batches):
    model, shapes = Alone().double(), ({0: Dim("batch", **limits)},)
    program = torch.export.export(model, (X[:5],), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "m.pt2")
    words = [] if asked is None else ["--batch-size", asked]
    ran = cli("compute", "m.pt2", data, "-b", "full", *words)
    assert ran.code == 0, ran.stderr
    _, tensors = read(tmp_path / "hessian.safetensors")
    assert relative_error(tensors["hessian"], truth(model, X)) < 1e-9
    options = ProblemOptions(tmp_path / "m.pt2", tmp_path / data, batch_size=asked)
    assert len(open_problem(options, Listener()).problem.batches) == batches


class Wide(nn.Module):
    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.first, self.last, self.centred = nn.Linear(2, 4096), nn.Linear(4096, 1), centred

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(h - h.mean(0) if self.centred else h)


@pytest.mark.parametrize(
    ("batch_size", "centred", "batches"), [(None, False, 6), (300, False, 10), (None, True, 1)]
)
def test_gradients_of_the_check_are_taken_in_the_same_batches(
    tmp_path, monkeypatch, batch_size, centred, batches
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    torch.jit.script(Wide(centred)).save(tmp_path / "m.pt")
    x, y = torch.randn(3000, 2), torch.randn(3000, 1)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    options = ProblemOptions(tmp_path / "m.pt", tmp_path / "d.npz", batch_size=batch_size)
    opened = open_problem(options, Listener(), Processes(side_by_side=True))
    assert opened.double is not None
    assert opened.double.original is not None
    every = opened.problem, opened.double, opened.double.original
    assert [len(each.batches) for each in every] == [batches] * 3
    assert {sum(map(len, each.batches)) for each in every} == {3000}
    assert all(each.batches[0] is each.batches[0] for each in every)


def test_batches_that_no_program_accepts(cli, data, tmp_path):
    torch.export.save(torch.export.export(Alone().double(), (X[:5],)), tmp_path / "m.pt2")
    ran = cli("compute", "m.pt2", data)
    assert "accepts batches of exactly 5 samples, the data has 12" in ran.fails(4)
    assert cli(*shlex.split(ran.hint)[1:]).code == 0


def test_a_trace_of_so_many_samples(cli, data, tmp_path):
    model = Four().double()
    torch.jit.trace(model, (X[:4],)).save(str(tmp_path / "m.pt"))
    assert "shape '[4, 2]' is invalid" in cli("compute", "m.pt", data).fails(4)
    assert cli("compute", "m.pt", data, "--batch-size", 4, "-b", "full").code == 0
    _, tensors = read(tmp_path / "hessian.safetensors")
    model.forward = lambda x: Alone.forward(model, x)
    assert relative_error(tensors["hessian"], truth(model, X)) < 1e-9


@pytest.mark.parametrize("floats", ["float32", "float64"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
@pytest.mark.parametrize("first", [nn.Linear(3, 4), nn.LayerNorm(3), nn.PReLU(), nn.Softmax(1)])
def test_integers_for_a_model_of_floats(cli, tmp_path, first, dtype, floats):
    width = 4 if isinstance(first, nn.Linear) else 3
    torch.jit.script(nn.Sequential(first, nn.Linear(width, 2))).save(str(tmp_path / "m.pt"))
    x = X.round().to(dtype)
    for name, array in (("integers", x), ("floats", x.float())):
        np.savez(tmp_path / f"{name}.npz", x=array.numpy(), y=Y.float().numpy())
    ran = cli("compute", "m.pt", "integers.npz", "-b", "full", "--dtype", floats)
    assert f"does not accept the inputs {str(dtype).removeprefix('torch.')} [12, 3]" in ran.fails(4)
    assert ran.hint.endswith("--scale 1")
    assert cli(*shlex.split(ran.hint)[1:], "-o", "a").code == 0
    words = ("-b", "full", "--dtype", floats)
    assert cli("compute", "m.pt", "floats.npz", *words, "-o", "b").code == 0
    assert torch.equal(*(read(tmp_path / name)[1]["hessian"] for name in "ab"))


class Words(nn.Module):
    def __init__(self, wrong: bool = False):
        super().__init__()
        self.table, self.last = nn.Embedding(3, 4), nn.Linear(3 if wrong else 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.table(x).mean(1))


@pytest.mark.parametrize(
    ("wrong", "dtype", "highest", "hint"),
    [
        (False, torch.int64, 3, None),
        (True, torch.int64, 2, None),
        (False, torch.int8, 2, "store indices as int64: x.astype(np.int64)"),
    ],
)
def test_integers_that_are_indices(wrong, dtype, highest, hint):
    words = torch.full((12, 3), highest, dtype=dtype)
    with pytest.raises(hesscli.HesscliError, match="does not accept the inputs") as refused:
        hesscli.compute(Words(wrong), (words, Y.float()), framework="torch")
    assert refused.value.hint == hint


class Named(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        output = torch.tanh(self.a(x))
        return {"features": x, "logits": output, "loss": output.sum(1)}


@pytest.mark.parametrize(("loss", "name"), [("mse", "logits"), ("output", "loss")])
def test_a_part_of_the_output_that_is_taken_for_its_name_is_said(loss, name):
    for key in (None, name):
        found = hesscli.compute(Named(), (X, Z), loss=loss, output_key=key)
        assert (f"output: {name}, inferred from its name" in found.metadata["notes"]) is (not key)


class OfDict(Net):
    """Takes all its inputs in one dict, as recommenders and potentials do."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.b(torch.tanh(self.a(batch["x"])) * batch["z"])


class Ordered(Net):
    def forward(self, batch):
        return super().forward(batch["x"], batch["z"])


Ordered.forward.__annotations__["batch"] = OrderedDict[str, Tensor]  # no text, as elsewhere here


class Untold(Net):
    def forward(self, batch, scale=1.0):
        return scale * super().forward(batch["x"], batch["z"])


class OfTuple(Net):
    """Takes all its inputs in one tuple, as operator networks do."""

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        z, x = batch
        return self.b(torch.tanh(self.a(x)) * z)


class OfList(Net):
    def forward(self, batch: List[Tensor]) -> Tensor:  # noqa: UP006 - as many have it
        return self.b(torch.tanh(self.a(batch[1])) * batch[0])


class Unpacked(Net):
    def forward(self, batch):
        z, x = batch
        return super().forward(x, z)


@pytest.mark.parametrize(
    ("net", "container", "kind"),
    [
        (OfDict, dict, "memory"),
        (OfDict, dict, "script"),
        (Ordered, dict, "memory"),
        (Untold, dict, "memory"),
        (OfTuple, tuple, "memory"),
        (OfTuple, tuple, "script"),
        (OfList, list, "memory"),
        (OfList, list, "script"),
        (Unpacked, tuple, "memory"),
    ],
)
@pytest.mark.parametrize("blocks", ["full", "diag"])
def test_inputs_in_one(net, container, kind, blocks, tmp_path):
    model = net().double()
    given = {"z": Z, "x": X} if container is dict else container([Z, X])
    expected = hessian(model, nn.functional.mse_loss, (given,), Y, ["b.weight", "b.bias"])
    if kind == "script":
        torch.jit.script(model).save(tmp_path / "net.pt")
        model = tmp_path / "net.pt"
    options = {"inputs": ("z", "x"), "params": ("b.*",), "batch_size": 5, "framework": "torch"}
    found = hesscli.compute(model, {"x": X, "z": Z, "y": Y}, blocks=blocks, **options)
    assert f"inputs are passed in one {container.__name__}: z, x" in found.metadata["notes"]
    if blocks == "diag":
        assert [block["method"] for block in found.metadata["blocks"]] == ["gauss-newton"] * 2
        expected = torch.block_diag(expected[:8, :8], expected[8:, 8:])
    assert relative_error(found.matrix(), expected) < 1e-9


class Optional(Net):
    def forward(self, first, second=None):
        return super().forward(first, second)


class AnyNumber(Net):
    def forward(self, first, *others):
        return super().forward(first, *others)


@pytest.mark.parametrize("net", [Optional, AnyNumber])
def test_inputs_called_otherwise_go_in_by_position_where_no_container_does(net):
    model = net().double()
    options = {"inputs": ("x", "z"), "blocks": "full", "framework": "torch"}
    found = hesscli.compute(model, {"z": Z, "x": X, "y": Y}, **options)
    assert relative_error(found.matrix(), hessian(model, nn.functional.mse_loss, (X, Z), Y)) < 1e-9


def test_modules_of_pytorch_take_no_dict():
    with pytest.raises(hesscli.HesscliError, match="takes 2 positional arguments but 3") as refused:
        hesscli.compute(nn.Sequential(nn.Linear(3, 2)), {"a": X, "b": X, "y": Y}, inputs=("a", "b"))
    assert refused.value.exit_code == 4


class Autoencoder(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x)) @ self.a.weight


@pytest.mark.parametrize("inputs", [(), ("x",)])
def test_the_targets_of_an_autoencoder_are_its_inputs(inputs):
    model, options = Autoencoder().double(), {"params": ("a.*",), "framework": "torch"}
    found = hesscli.compute(model, {"x": X}, targets="x", inputs=inputs, blocks="full", **options)
    expected = hessian(model, nn.functional.mse_loss, (X,), X, ["a.weight", "a.bias"])
    assert relative_error(found.matrix(), expected) < 1e-9
    notes = ["loss: mse, inferred from float64 targets"]
    if not inputs:
        notes.insert(0, "inputs: x (float64 [12, 3]), inferred as the only array: the targets too")
    assert found.metadata["notes"] == notes


class Forecast(Net):
    """Takes the series that it forecasts, by what it is called; and a number, or does without."""

    def forward(self, z: Tensor, x: Tensor, times: float = 1.0) -> Tensor:
        return times * super().forward(x, z) @ torch.ones(2, 4, dtype=x.dtype)


class ItsOwnLoss(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (torch.tanh(self.a(x)) @ self.b.weight.T - y).square().mean(1)


@pytest.mark.parametrize(
    ("net", "target", "hint"),
    [(Forecast, "z", "--inputs z --inputs x"), (ItsOwnLoss, None, "--loss output")],
)
def test_a_model_that_takes_the_targets_too(net, target, hint):
    data = {"x": X, (target or "y"): Z if target else Y}
    wanted = "the model takes (z, x|x, y); the inputs are x"
    with pytest.raises(hesscli.HesscliError, match=wanted) as refused:
        hesscli.compute(net().double(), data, targets=target)
    assert refused.value.exit_code == 4
    assert refused.value.hint == hint


def test_a_parameter_called_as_the_targets_may_be_what_the_input_goes_to():
    class State(Alone):
        def forward(self, y: Tensor) -> Tensor:
            return super().forward(y)

    found = hesscli.compute(State().double(), {"x": X, "y": Y})
    assert not any("takes y too" in note for note in found.metadata["notes"])


class Imputing(nn.Module):
    """Knows what is missing by NaN."""

    def __init__(self, first: bool = True):
        super().__init__()
        self.first, self.a, self.b = first, nn.Linear(3, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        known = ~x.isnan()
        h = self.a(x.nan_to_num(0)) if self.first else self.a(x).where(known.all(1, True), 0)
        return self.b(torch.cat([torch.tanh(h), known.to(x.dtype)], 1))


@pytest.mark.parametrize("blocks", ["full", "elements"])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_inputs_that_are_missing(blocks, batch_size):
    x = X.clone()
    x[1, 0], x[7] = torch.nan, torch.nan
    torch.manual_seed(0)
    model = Imputing().double()
    found = hesscli.compute(model, (x, Y), blocks=blocks, batch_size=batch_size, framework="torch")
    truth = hessian(model, nn.functional.mse_loss, (x,), Y)
    assert relative_error(found.matrix().diagonal(), truth.diagonal()) < 1e-9
    said = "array x (float64 [12, 3]) holds NaN or infinity in 4 places, the first at [1, 0]"
    assert f"{said}; the model makes numbers of it" in found.metadata["notes"]
    assert not any("NaN" in n for n in hesscli.compute(model, (X, Y)).metadata["notes"])


@pytest.mark.parametrize("job", [hesscli.compute, hesscli.operator])
def test_inputs_that_are_missing_behind_a_weight(job):
    """Zero times NaN is the gradient of what is not taken."""
    x = X.clone()
    x[1, 0] = torch.nan
    with pytest.raises(hesscli.HesscliError, match="gradient's norm is nan") as refused:
        job(Imputing(first=False).double(), (x, Y))
    assert refused.value.hint.endswith("before they meet a weight: x.nan_to_num(0, 0, 0)")


def test_an_input_that_is_infinite():
    """A number behind tanh, and none in the gradient, where zero times infinity is added up."""
    x = X.clone()
    x[1, 0] = torch.inf
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    with pytest.raises(hesscli.HesscliError, match="gradient's norm is nan") as refused:
        hesscli.compute(model, (x, Y))
    assert refused.value.hint.endswith("before they meet a weight: x.nan_to_num(0, 0, 0)")


class Demanding(Imputing):
    """Takes three columns."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError("three columns are wanted")
        return super().forward(x)


class Strict(Imputing):
    """Takes nothing that is missing."""

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ValueError("something is wrong with x")
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "columns", "loss", "said"),
    [
        (Demanding, 4, "mse", "three columns are wanted"),
        (Imputing, 3, "nll", "class targets have shape"),
        (Imputing, 3, lambda f, y: (f.reshape(-1) - y[:, 0]) ** 2, "must match the size"),
        (Strict, 3, "mse", "wrong with x; array x .* holds NaN or infinity in 1 place"),
        (partial(nn.Linear, 3, 2), 3, "mse", "array x .* holds NaN or infinity in 1 place"),
    ],
)
def test_a_refusal_says_what_is_missing_too(model, columns, loss, said):
    x = torch.cat([X, X], 1)[:, :columns].clone()
    x[1, 0] = torch.nan
    torch.manual_seed(0)
    with pytest.raises(hesscli.HesscliError, match=said) as refused:
        hesscli.compute(model().double(), (x, Y), loss=loss)
    assert "array x (float64" in str(refused.value)


class AnyNumber(nn.Module):
    """Returns its loss, and does not say what it takes."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, *x: Tensor) -> Tensor:
        return (torch.tanh(self.a(x[0])) - x[1]) ** 2


def test_a_model_that_takes_any_number_of_inputs_may_be_given_the_targets(tmp_path, cli):
    (tmp_path / "nets.py").write_text("from test_inputs import AnyNumber\n")
    torch.manual_seed(0)
    model = AnyNumber().double()
    torch.save(model.state_dict(), "net.pt")
    np.savez("data.npz", x=X, y=Y)
    words = ("compute", "net.pt", "data.npz", "--arch", "nets.py:AnyNumber", "-l", "output")
    ran = cli(*words, "-b", "full")
    given = "--inputs x --inputs y"
    assert f"the model takes any number of inputs: {given} gives it the targets too" in ran.notes
    assert "does not accept the inputs float64 [12, 3]" in ran.fails(4)
    assert cli(*words, "-b", "full", *given.split()).code == 0
    truth = hessian(model, lambda out, y: out.mean(), (X, Y), Y)
    assert relative_error(read("hessian.safetensors")[1]["hessian"], truth) < 1e-9
