"""Models and losses that see several samples at once: one result, however the data could be split."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch
from oracles import hessian, relative_error
from torch import nn
from torch.nn import functional as F

import hesscli
from hesscli.hessian.aten.watcher import Watcher
from hesscli.job.setup import batches

X = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float64)
Y = X @ np.array([[1.0, 0.5], [0.0, 2.0], [-1.0, 0.0]])

LOSSES = """
def centred(output, target):
    return ((output - output.mean(0) - target) ** 2).sum(1)

def broadcast(output, target):
    return (output - target[None, :, 0]) ** 2 if output.shape[1] == 1 else (output - target) ** 2

def apart(output, target):
    return (output - target).abs() ** 3

def weighted(output, target, w):
    return w * ((output - target) ** 2).sum(1)

def broken(output, target):
    raise ValueError("no idea")

def leaves(output, target):
    raise SystemExit(0)

def detached(output, target):
    return ((output.detach() - target) ** 2).sum(1)
"""


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h - h.mean(0))


class OfSamples(nn.Module):
    """Attention over the batch."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x):
        return torch.softmax(x @ x.mT, 1) @ torch.tanh(self.a(x))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.n = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        return self.b(torch.relu(self.n(self.a(x))))


def saved(net, **arrays):
    torch.manual_seed(0)
    torch.jit.script(net().double().eval()).save("net.pt")
    np.savez("data.npz", **{"x": X, "y": Y, **arrays})
    with open("losses.py", "w") as file:
        file.write(LOSSES)


@pytest.mark.parametrize("command", [("compute", "-b", "full"), ("eigen", "--top", "1")])
@pytest.mark.parametrize("net", [Centred, OfSamples, Normed])
def test_a_model_that_mixes_samples_is_never_split(cli, tmp_path, net, command):
    saved(net)
    name, *words = command
    found = []
    for size in ("40", "1", "7"):
        ran = cli(name, "net.pt", "data.npz", *words, "--batch-size", size, "--json")
        found.append((ran.document["loss"]["value"], ran.document.get("eigenvalues")))
        assert (
            "the model sees several samples at once, so all the data is one batch" in ran.notes
        ) == (size != "40")
    assert found[0] == found[1] == found[2]


class Gate(nn.Module):
    """What it mixes comes through a gate that is closed, not to derivatives."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.gate = nn.Parameter(torch.zeros(4))

    def forward(self, x, group):
        h = torch.tanh(self.a(x))
        return self.b(h + self.gate * h.square().mean(0))


class Groups(nn.Module):
    """Scores less their mean in each group, wherever its members are."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, group):
        z = self.b(torch.tanh(self.a(x)))
        size = torch.zeros(100, dtype=z.dtype).index_add(0, group, torch.ones_like(z[:, 0]))
        mean = torch.zeros(100, 2, dtype=z.dtype).index_add(0, group, z) / size.unsqueeze(1)
        return z - mean[group]


@pytest.mark.parametrize("by", ["compute", "operator"])
@pytest.mark.parametrize(
    ("net", "group"),
    [
        (Gate, np.zeros(100, int)),
        (Groups, np.arange(100) // 8),  # which no half divides
        (Groups, np.arange(100) % 50),  # far apart
    ],
    ids=["gate", "groups", "far-apart"],
)
def test_samples_that_mix_far_apart_or_hidden(tmp_path, monkeypatch, net, group, by):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = net().double()
    x, y = torch.randn(100, 3, dtype=torch.float64), torch.randn(100, 2, dtype=torch.float64)
    group = torch.from_numpy(group)
    truth = hessian(model, F.mse_loss, (x, group), y)
    options = {"inputs": ("x", "group"), "batch_size": 36}
    if by == "compute":
        data = {"x": x, "group": group, "y": y}
        found = hesscli.compute(model, data, blocks="full", framework="torch", **options).matrix()
    else:
        torch.jit.script(model.eval()).save("net.pt")
        np.savez("data.npz", x=x, group=group, y=y)
        found = torch.from_numpy(
            hesscli.operator("net.pt", "data.npz", **options) @ np.eye(len(truth))
        )
    assert relative_error(found, truth) < 1e-9


class Branch(nn.Module):
    """Takes its inputs for pixels where some of them are bright."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        if bool(x.max() > 1):
            x = x / 255
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("by", ["module", "script"])
def test_a_branch_that_goes_by_late_samples(tmp_path, monkeypatch, by):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Branch().double().eval()
    x, y = torch.rand(100, 3, dtype=torch.float64), torch.randn(100, 2, dtype=torch.float64)
    x[90:] *= 255
    truth = hessian(model, F.mse_loss, (x,), y)
    if by == "script":
        torch.jit.script(model).save("net.pt")
        model = "net.pt"
    found = hesscli.compute(
        model, {"x": x, "y": y}, blocks="full", framework="torch", batch_size=36
    )
    assert relative_error(found.matrix(), truth) < 1e-9


class ByPlace(nn.Module):
    """A weight of each sample, which is one: the parameters say of which by its place in the batch alone."""

    def __init__(self):
        super().__init__()
        self.a, self.weights = nn.Linear(3, 2), nn.Parameter(torch.ones(100))

    def forward(self, x):
        return self.a(x) * self.weights[: len(x)].unsqueeze(1)


class Distinct(Branch):
    def forward(self, x):
        scale = 1.0 if len(torch.unique(x[:, 0])) > 90 else 0.5
        return self.b(torch.tanh(self.a(scale * x)))


class Near(Branch):
    def forward(self, x):
        scale = 0.5 if torch.allclose(x[:, :1], x[:1, :1].expand(len(x), 1)) else 1.0
        return self.b(torch.tanh(self.a(scale * x)))


class Renormalised(Branch):
    """Batch renormalisation: the values of running statistics, the derivatives of those of the batch."""

    def forward(self, x):
        h = self.a(x)
        mean, size = h.mean(0), h.std(0)
        batch = (h - mean) / size
        return self.b(torch.tanh(batch * (size / 1.5).detach() + ((mean - 0.1) / 1.5).detach()))


class Adapted(Branch):
    """The same, with one part in ten thousand of its derivatives."""

    def forward(self, x):
        h = self.a(x)
        mean, size = h.mean(0), h.std(0)
        batch = (h - mean) / size * size.detach() + mean.detach()
        return self.b(torch.tanh(h + 1e-4 * (batch - h)))


@pytest.mark.parametrize("net", [ByPlace, Distinct, Near, Renormalised, Adapted])
def test_what_goes_by_the_place_or_the_number_of_samples(net):
    torch.manual_seed(0)
    model = net().double()
    x, y = torch.randn(100, 3, dtype=torch.float64), torch.randn(100, 2, dtype=torch.float64)
    if net is Near:
        x[:72, 0] = 0.5
    truth = hessian(model, F.mse_loss, (x,), y)
    found = hesscli.compute(model, (x, y), blocks="full", framework="torch", batch_size=36)
    assert relative_error(found.matrix(), truth) < 1e-9


def test_mixing_is_found_where_there_is_memory_for_less_than_a_batch(monkeypatch):
    whole = batches.what_mixes

    def tried_with_5(problem, source, bounds, room, note):
        return whole(problem, source, bounds, 5, note)

    monkeypatch.setattr(batches, "what_mixes", tried_with_5)
    torch.manual_seed(0)
    model, x, y = Centred().double(), torch.tensor(X), torch.tensor(Y)
    found = hesscli.compute(model, (x, y), blocks="full", framework="torch", batch_size=8)
    assert relative_error(found.matrix(), hessian(model, F.mse_loss, (x,), y)) < 1e-9


def test_a_loss_of_groups_that_no_half_divides():
    def listwise(output, target, group):
        same = group[:, None] == group[None]
        z = output.squeeze(1)
        return (torch.where(same, z[None], -1e9).logsumexp(1) - z) * target

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y, group = (
        torch.randn(100, 3, dtype=torch.float64),
        torch.rand(100).double(),
        torch.arange(100) // 8,
    )
    found = hesscli.compute(
        model, {"x": x, "y": y}, loss=listwise, loss_arguments={"group": group},
        blocks="full", framework="torch", batch_size=36,
    )  # fmt: skip
    truth = hessian(model, lambda f, y: listwise(f, y, group).mean(), (x,), y)
    assert relative_error(found.matrix(), truth) < 1e-9


@pytest.mark.parametrize("loss", ["centred", "broadcast"])
def test_a_loss_that_mixes_samples_is_never_split(cli, tmp_path, loss):
    saved(lambda: nn.Linear(3, 1 if loss == "broadcast" else 2))
    values = set()
    for size in ("40", "1", "7"):
        ran = cli(
            "compute",
            "net.pt",
            "data.npz",
            "-l",
            f"losses.py:{loss}",
            "--batch-size",
            size,
            "--json",
        )
        values.add(ran.document["loss"]["value"])
    assert len(values) == 1


def test_what_does_not_mix_is_split(cli, tmp_path):
    saved(lambda: nn.Linear(3, 2))
    ran = cli("compute", "net.pt", "data.npz", "-l", "losses.py:apart", "--batch-size", "7")
    assert ran.code == 0
    assert not any("one batch" in note for note in ran.notes)


def test_arrays_go_along_with_the_samples(cli, tmp_path):
    w = np.linspace(0, 1, 40)
    saved(lambda: nn.Linear(3, 2), w=w)
    command = ("compute", "net.pt", "data.npz", "-l", "losses.py:weighted", "--loss-arg", "w=@w")
    for size in ("40", "7"):
        ran = cli(*command, "--samples", "10:30", "--batch-size", size, "-b", "full", "--json")
        # The Hessian of sum_n w_n |A x_n + b - y_n|^2 / 20: the trace is that of 2 outputs, w_n (|x_n|^2 + 1) each.
        part = slice(10, 30)
        trace = 4 * (w[part] * ((X[part] ** 2).sum(1) + 1)).sum() / 20
        assert ran.document["total"]["trace"] == pytest.approx(trace)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ("broken", "no idea"),
        ("leaves", "SystemExit"),
        ("detached", "no gradient"),
        ("weighted", "'w'"),
    ],
)
@pytest.mark.parametrize("command", ["compute", "eigen"])
def test_losses_that_fail(cli, tmp_path, command, loss, said):
    saved(lambda: nn.Linear(3, 2))
    assert said in cli(command, "net.pt", "data.npz", "-l", f"losses.py:{loss}").fails(4)


FAILING = """
from torch import nn

class Net(nn.Module):
    def __init__(self, how="key"):
        super().__init__()
        self.a, self.how = nn.Linear(3, 2), how

    def forward(self, x):
        if self.how == "key":
            return {}["logit"]
        if self.how == "exit":
            raise SystemExit(3)
        raise NotImplementedError("later")
"""


@pytest.mark.parametrize(
    ("how", "said"), [("key", "KeyError: 'logit'"), ("exit", "SystemExit: 3"), ("", "later")]
)
def test_models_that_fail(cli, tmp_path, how, said):
    saved(lambda: nn.Linear(3, 2))
    (tmp_path / "nets.py").write_text(FAILING)
    torch.save({"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2)}, "weights.pt")
    ran = cli(
        "compute", "weights.pt", "data.npz", "--arch", "nets.py:Net", "--arch-arg", f"how={how}"
    )
    assert said in ran.fails(4)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", [1, 4])  # the pass that it comes in
def test_signals_inside_torchscript(cli, tmp_path, sent, first):
    saved(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh()))
    passes = iter(range(1, 1000))

    class Sent(Watcher):
        def call(self, func, args, kwargs):
            if func is torch.ops.aten.tanh.default and next(passes) == first:
                signal.raise_signal(sent)
            return func(*args, **kwargs)

    with Sent():
        assert cli("compute", "net.pt", "data.npz").code == 128 + sent
    assert not (tmp_path / "hessian.safetensors").exists()


def test_torchscript_that_fails(cli, tmp_path):
    saved(lambda: nn.BatchNorm2d(3))
    assert "expected 4D input (got 2D input)" in cli("compute", "net.pt", "data.npz").fails(4)


class OfGraph(nn.Module):
    """Two layers of a graph network, whose nodes see their neighbours."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        torch.manual_seed(1)
        self.register_buffer("edges", (torch.rand(40, 40) > 0.9).to_sparse())

    def forward(self, x):
        edges = self.edges.to(x.dtype)
        return edges @ self.b(torch.tanh(edges @ self.a(x)))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_graph():
    torch.manual_seed(0)
    model = OfGraph().double()
    found = hesscli.compute(model, (X, Y), blocks="full", framework="torch", batch_size=7)
    target = torch.tensor(Y)
    truth = hessian(model, nn.functional.mse_loss, (torch.tensor(X),), target)
    torch.testing.assert_close(found.matrix(), truth)
    assert any("sparse" in note for note in found.metadata["notes"])


@pytest.mark.parametrize("mixes", ["the model", "the loss l.py:loss", ""])
def test_a_model_of_one_batch_size_that_mixes_samples_is_said_to(cli, tmp_path, mixes):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return h - h.mean(0, keepdim=True) if mixes == "the model" else h

    (tmp_path / "l.py").write_text(
        "def loss(f, y): return ((f - y)**2).sum(1)\n" if mixes != "the loss l.py:loss" else
        "def loss(f, y): return ((f - y - (f - y).mean(0))**2).sum(1)\n"
    )  # fmt: skip

    x = torch.randn(12, 3)
    torch.export.save(torch.export.export(Net(), (x[:4],)), tmp_path / "m.pt2")
    np.savez(tmp_path / "d.npz", x=x.numpy(), y=torch.randn(12, 2).numpy())
    ran = cli("compute", "m.pt2", "d.npz", "--loss", "l.py:loss")
    assert ran.code == 0
    said = [note for note in ran.notes if "sees several samples at once" in note]
    how = " sees several samples at once: 4 at a time, as the model accepts them"
    assert said == ([mixes + how] if mixes else [])
    if mixes == "the model":  # it takes no samples one by one
        ran = cli("compute", "m.pt2", "d.npz", "--loss", "l.py:loss", "--curvature", "fisher")
        assert "no sample has a gradient of its own" in ran.fails(4)
        assert ran.hint.endswith("--curvature ggn")


@pytest.mark.parametrize("limits", [{"max": 99}, {"min": 4}])
def test_a_model_of_some_batch_sizes_that_mixes_samples(cli, tmp_path, limits):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.Tanh())
    net, x, y = net.double().eval(), torch.randn(8, 3).double(), torch.randn(8, 2).double()
    axes = {0: torch.export.Dim("batch", **limits)}
    exported = torch.export.export(net, (x,), dynamic_shapes=(axes,))
    torch.export.save(exported, tmp_path / "m.pt2")
    np.savez(tmp_path / "d.npz", x=x.numpy(), y=y.numpy())
    words = ("compute", "m.pt2", "d.npz", "-b", "full")
    ran = cli(*words, "--batch-size", 4)
    assert "the model sees several samples at once, so all the data is one batch" in ran.notes
    found = hesscli.load("hessian.safetensors").matrix()
    assert relative_error(torch.from_numpy(found), hessian(net, F.mse_loss, (x,), y)) < 1e-9


@pytest.mark.parametrize(
    "terms",
    [
        lambda f, y: (f - 3e5 - 5e4 * y) ** 2 + 100 * (f - f.mean(0)) ** 2,
        lambda f, y: 1e9 * (f - y) + (f - f.mean(0)) ** 2,
        lambda f, y: (f - y) ** 2 + 1e-5 * (f - f.mean(0)) ** 2,
    ],
    ids=["far", "linear", "little"],
)
def test_a_loss_whose_mixing_is_little_beside_its_terms(terms):
    """But not beside their second derivatives, of which every digit counts."""

    def loss(output, target):
        return terms(output, target)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(12, 3).double(), torch.randn(12, 1).double()
    whole, split = (
        hesscli.compute(net, (x, y), loss=loss, params="2.*", batch_size=size, framework="torch")
        for size in (12, 4)
    )
    for name in whole.blocks:
        assert torch.equal(whole.block(name), split.block(name)), name


def test_a_loss_that_bends_only_where_all_samples_are_alike():
    """Together it is linear, and some of the samples apart have second derivatives."""

    def loss(z, y):
        error = z - z.detach()
        return z * y + (error.square() if (z > 0).all() else 0 * error)

    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    x = torch.tensor([[1.0], [2.0], [-1.0], [3.0]], dtype=torch.float64)
    found = hesscli.compute(model, (x, x), loss=loss, blocks="full", batch_size=2)
    assert found.block("hessian") == 0


def test_a_sample_that_is_broadcast_to_weights_of_all():
    """The model refuses two of six samples, and of one makes six."""

    class Weighed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)
            self.register_buffer("weights", torch.randn(6, 1))

        def forward(self, x):
            return self.layer(x) * self.weights

    torch.manual_seed(0)
    net, x, y = Weighed().double(), torch.randn(6, 2).double(), torch.randn(6, 3).double()
    for loss in ("mse", lambda f, y: (f - y).square().mean(1)):
        found = hesscli.compute(net, (x, y), loss=loss, blocks="full", batch_size=1)
        matrix = torch.from_numpy(found.matrix())
        assert relative_error(matrix, hessian(net, F.mse_loss, (x,), y)) < 1e-9


def test_mixing_that_rounding_would_hide():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 1), nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x):
            return self.a(x) + self.c(torch.tanh(self.b(x * torch.tensor([1e-3, 1, 1]))).mean(0))

    torch.manual_seed(0)
    net, x, y = Net(), torch.randn(12, 3), torch.randn(12, 1)
    x[:, 0] = 2e4 + 5e3 * x[:, 0]
    whole, split = (
        hesscli.compute(net, (x, y), batch_size=size, framework="torch") for size in (12, 4)
    )
    for name in whole.blocks:
        assert torch.equal(whole.block(name), split.block(name)), name


@pytest.mark.parametrize("seen", [True, False])
def test_a_model_that_takes_no_more_than_a_batch(seen):
    """Where its operators do not show whether samples mix, it is said with how many that was tried."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 3)

        def forward(self, x):
            assert len(x) <= 16
            return torch.tanh(self.a(x)) + (0 if seen else 0 * x.sum())

    torch.manual_seed(0)
    net, x, y = Net().double(), torch.randn(50, 2).double(), torch.randn(50, 3).double()
    found = hesscli.compute(net, (x, y), blocks="full", batch_size=16, framework="torch")
    free = nn.Sequential(net.a, nn.Tanh())
    assert relative_error(found.matrix(), hessian(free, F.mse_loss, (x,), y)) < 1e-9
    said = "whether samples mix was tried with 12 of them; --unbatched takes all at once"
    assert (said in found.metadata["notes"]) is not seen


def late(x, h):
    return h * (torch.arange(len(x)) >= 50)[:, None]


def many(x, h):
    return h * h if len(x) > 64 else h


@pytest.mark.parametrize("last", [late, many])
def test_a_model_that_goes_by_places_or_counts_beyond_a_few(last):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 3)

        def forward(self, x):
            return last(x, torch.tanh(self.a(x)))

    torch.manual_seed(0)
    net, x, y = Net().double(), torch.randn(100, 2).double(), torch.randn(100, 3).double()
    found = hesscli.compute(net, (x, y), blocks="full", batch_size=50, framework="torch")
    assert relative_error(found.matrix(), hessian(net, F.mse_loss, (x,), y)) < 1e-9
    assert any("one batch" in note for note in found.metadata["notes"])
