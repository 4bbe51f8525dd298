"""Models whose second derivatives are missing or wrong: that is seen before rows are made, and the dry run knows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import hessian_by_differences, relative_error
from torch import nn

import hesscli
from hesscli.hessian.routes.hvp import HessianVectorProducts
from hesscli.job.matrix import wrong_routes

NET = """
import torch

class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.slope = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        {backward}

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.b({sine}(self.a(x)))
"""
MISSING = """
        if torch.is_grad_enabled() and gradient.requires_grad:
            raise RuntimeError("derivative for sine_backward is not implemented")
        return gradient * ctx.slope"""
BACKWARD = {
    "differs": "return gradient * ctx.slope",
    "no second derivative": MISSING,
}


@pytest.fixture
def net(tmp_path):
    """Writes the model with this sine, and says what the command needs of it."""

    def written(backward: str, sine: str = "Sine.apply") -> list[str]:
        (tmp_path / "net.py").write_text(NET.format(backward=backward.strip(), sine=sine))
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        state = zip(("a.weight", "a.bias", "b.weight", "b.bias"), net.parameters(), strict=True)
        torch.save(dict(state), tmp_path / "w.pt")
        x = np.random.default_rng(0).normal(size=(20, 3))
        np.savez(tmp_path / "d.npz", x=x, y=np.sin(x).sum(1, keepdims=True))
        return ["w.pt", "d.npz", "--arch", "net.py:Net", "--dtype", "float64"]

    return written


@pytest.fixture
def tried(monkeypatch):
    """The blocks whose rows are made by hvp."""
    found, add = [], HessianVectorProducts.add

    def noted(self, batch, parts):
        found.extend(part.block.name for part in parts)
        add(self, batch, parts)

    monkeypatch.setattr(HessianVectorProducts, "add", noted)
    return found


@pytest.mark.parametrize("words", [("compute",), ("compute", "-b", "elements"), ("trace",)])
@pytest.mark.parametrize("what", BACKWARD)
def test_a_wrong_second_derivative_is_seen_before_its_rows(
    cli, net, tried, monkeypatch, words, what
):
    command, *options = words
    words = (command, *net(BACKWARD[what]), *options, "--json")
    if command == "compute":
        late = cli(*words).document
        assert {"a.weight", "a.bias"} <= {*tried}
        tried.clear()
    monkeypatch.setattr(wrong_routes, "SOON", 0.0)
    ran = cli(*words)
    assert ran.code == 0, ran.stderr
    assert {*tried} <= {"b.weight", "b.bias"}
    (said,) = (note for note in ran.notes if "a.weight" in note)
    assert said.startswith("a.weight: ")
    assert said.endswith("; finite-difference instead")
    assert what in said
    if command == "trace":
        assert ran.document["exact"]
        return
    methods = {block["name"]: block["method"] for block in ran.document["blocks"]}
    assert methods == {block["name"]: block["method"] for block in late["blocks"]}
    assert methods["a.weight"] == methods["a.bias"] == "finite-difference"
    plan = cli(*words, "--dry-run").document
    assert methods == {block["name"]: block["method"] for block in plan["blocks"]}
    assert what in plan["blocks"][0]["reason"]
    model = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 1)).double()
    for p, value in zip(model.parameters(), torch.load("w.pt").values(), strict=True):
        p.data = value.double()
    model[1].forward = torch.sin
    data = np.load("d.npz")
    truth = hessian_by_differences(
        model, F.mse_loss, (torch.tensor(data["x"]),), torch.tensor(data["y"])
    )
    found = hesscli.load("hessian.safetensors", "torch").block("a.weight")
    expected = truth[:12, :12].diagonal().reshape(4, 3) if options else truth[:12, :12]
    assert relative_error(found, expected) < 1e-6


def test_only_what_is_wrong_is_left_out(cli, net, tried, monkeypatch):
    """Nothing is where the model has its second derivatives; nor where the check or another method is not to be."""
    monkeypatch.setattr(wrong_routes, "SOON", 0.0)
    right = net("return gradient * ctx.slope", "torch.sin")
    looked_at = cli("compute", *right, "--json").document
    assert "finite-difference" not in looked_at["method"]
    monkeypatch.setattr(wrong_routes, "SOON", np.inf)
    late = cli("compute", *right, "--json").document
    assert [b["method"] for b in looked_at["blocks"]] == [b["method"] for b in late["blocks"]]
    monkeypatch.setattr(wrong_routes, "SOON", 0.0)
    wrong = net(BACKWARD["differs"])
    assert "hvp differs" in cli("compute", *wrong, "--method", "hvp").fails(5)
    tried.clear()
    assert cli("compute", *wrong, "--no-check").code == 0
    assert "a.weight" in tried


def test_the_dry_run_counts_the_gradients_of_differences(cli, net, monkeypatch):
    from hesscli.job.matrix import dry_run

    given = []

    def noted(choices, rates, check, sizes, size):
        given.append((check, [choice.method for choice in choices]))
        return 1.0

    monkeypatch.setattr(dry_run, "estimate", noted)
    monkeypatch.setattr(dry_run, "seconds", lambda run, device, repeats: 1.0)
    monkeypatch.setattr(dry_run, "measure_rates", lambda device, dtype: None)
    words = ("compute", *net("return gradient * ctx.slope", "torch.sin"), "--dry-run")
    assert cli(*words, "--method", "finite-difference").code == 0
    assert cli(*words, "--method", "finite-difference", "--no-check").code == 0
    assert cli(*words, "--method", "hvp", "--no-check").code == 0
    rows, check = 4 * 3 + 4 + 4 + 1, 2 * 4
    assert given == [(4 * rows + check, []), (4 * rows, []), (0, ["hvp"] * 4)]


def test_the_memory_asked_for_is_that_of_the_routes_that_are_left(cli, net, monkeypatch):
    """Graphs that are differentiated twice are not kept where differences are taken: with what these need it runs."""
    words = ("compute", *net(BACKWARD["differs"]), "--params", "a.*")
    needed = {}
    for method in ("hvp", "finite-difference"):
        planned = cli(*words, "--method", method, "--dry-run", "--json")
        needed[method] = planned.document["total"]["memory"]
    assert needed["finite-difference"] < needed["hvp"]
    monkeypatch.setattr(wrong_routes, "SOON", 0.0)
    words = (*words, "--memory", str(needed["finite-difference"]))
    within = cli(*words, "--dry-run", "--json").document["total"]["memory"]
    assert within <= needed["finite-difference"]  # less: the data is not kept
    assert cli(*words).code == 0
