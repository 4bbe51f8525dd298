"""Modules whose functions name the module, or its parameters: a copy of one computes with its own."""

from __future__ import annotations

import copy
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import numpy as np
import pytest
import torch
from oracles import hessian, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import hesscli
from hesscli.hessian.objective.copies import copied

X, Y = (
    torch.randn(7, 3, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1)
)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


class Lambda(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.act = lambda z: torch.tanh(z * self.scale)


class Default(Scaled):
    def __init__(self) -> None:
        super().__init__()

        def act(z: Tensor, *, scale: Tensor = self.scale) -> Tensor:
            return torch.tanh(z * scale)

        self.act = act


class Hook(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()
        self.a.register_forward_hook(lambda module, inputs, z: z * self.scale)


class Bound(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()
        scale = self.scale

        def forward(layer: nn.Linear, x: Tensor) -> Tensor:
            return F.linear(x, layer.weight, layer.bias) * scale

        self.a.forward = MethodType(forward, self.a)


class Derivative(Scaled):
    """Of what `torch.func` made of one of its methods."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.func.vmap(torch.func.jacrev(self.energy))

    def energy(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x) * self.scale)).square().sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.slope(x)


def made(kind: type[Scaled]) -> Scaled:
    torch.manual_seed(0)
    return kind().double()


KINDS = [Lambda, Default, Hook, Bound, Derivative]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_computes_with_its_own(kind: type[Scaled]) -> None:
    model = made(kind)
    copy = copied(model)
    before = model(X)
    with torch.no_grad():
        copy.scale.zero_()
    assert not torch.equal(copy(X), before)
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_in_memory(kind: type[Scaled]) -> None:
    # The same, whose parameters can be swapped.
    plain = made(kind if kind is Derivative else Lambda)
    truth = hessian(plain, F.mse_loss, (X,), Y)
    found = hesscli.compute(made(kind), (X, Y), blocks="full", framework="torch")
    assert relative_error(found.matrix(), truth) < 1e-9
    assert not [note for note in found.metadata["notes"] if "instead" in note or "unused" in note]


ARCH = """
import weakref
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 4))
        {act}

    def forward(self, x):
        return self.b(self.act(self.a(x)))
"""
ACTS = {
    "lambda": "self.act = lambda z: torch.tanh(z * self.scale)",
    "weak": "of = weakref.ref(self); self.act = lambda z: torch.tanh(z * of().scale)",
}


@pytest.mark.parametrize("act", ACTS)
def test_the_check_is_of_the_model(cli, tmp_path, act: str) -> None:
    """Which is in float32, and checked by a copy in float64: or by itself, where the copy would name the original."""
    model = made(Lambda)
    truth = hessian(model, F.mse_loss, (X,), Y)
    (tmp_path / "net.py").write_text(ARCH.format(act=ACTS[act]))
    torch.save(model.float().state_dict(), tmp_path / "net.pt")
    np.savez(tmp_path / "data.npz", x=X.float(), y=Y.float())
    ran = cli("compute", "net.pt", "data.npz", "--arch", "net.py:Net", "-b", "full", "-o", "h.st")
    assert ran.code == 0, ran.stderr
    assert "instead" not in ran.notes
    found = torch.from_numpy(hesscli.load(tmp_path / "h.st").matrix())
    assert relative_error(found.double(), truth) < 1e-4


HEAD = nn.Linear(3, 3).double()


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = HEAD

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(HEAD(x))


class ByClass(nn.Module):
    shared = nn.Parameter(torch.ones(3).double())

    def __init__(self) -> None:
        super().__init__()
        self.head, self.scale = nn.Linear(3, 3).double(), ByClass.shared

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * ByClass.shared


class ByReference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, me = nn.Linear(3, 3).double(), weakref.ref(self)
        self.act = lambda x: torch.tanh(me().head(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


@pytest.mark.parametrize("kind", [ByName, ByClass, ByReference])
def test_a_module_that_does_not_find_its_parameters_by_self(kind: type[nn.Module]) -> None:
    """Its copy would compute with those of the original, which are constants to it."""
    module = kind()
    for function in (hesscli.compute, hesscli.operator):
        with pytest.raises(hesscli.HesscliError, match="by a global name or a weak reference"):
            function(module, (X, Y))
    assert all(parameter.grad is None for parameter in module.parameters())


class Alone(nn.Linear):
    """There is one, which everyone shares."""

    def __deepcopy__(self, memo: object) -> Alone:
        return self


@pytest.mark.parametrize("frozen", [True, False])
def test_a_part_that_is_its_own_copy(frozen: bool) -> None:
    """It would be in eval mode afterwards, and in float64."""
    alone = Alone(3, 3).requires_grad_(not frozen)
    module = nn.Sequential(alone, nn.Linear(3, 3))
    for function in (hesscli.compute, hesscli.operator):
        with pytest.raises(
            hesscli.HesscliError, match="cannot be copied: the copy of 0 is 0 itself"
        ):
            function(module, (X.float(), Y.float()))
    assert alone.training
    assert alone.weight.dtype is torch.float32


class Forgetful(nn.Linear):
    """It is copied, or pickled, without what it computes with."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class NewWeights(Forgetful):
    def __deepcopy__(self, memo: object) -> NewWeights:
        return type(self)()


class LostFactor(Forgetful):
    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "factor"}


@pytest.mark.parametrize(("kind", "other"), [(NewWeights, "weight"), (LostFactor, "factor")])
def test_a_copy_that_is_another_model(kind: type[nn.Module], other: str) -> None:
    """Its Hessian is not that of the module, and the check would not see it."""
    module = nn.Sequential(kind(), nn.Tanh())
    for function in (hesscli.compute, hesscli.operator):
        with pytest.raises(
            hesscli.HesscliError, match=f"cannot be copied: the copy has another 0.{other}"
        ):
            function(module, (X.float(), Y.float()))


def test_what_is_not_a_number_is_copied() -> None:
    module = nn.Linear(3, 3).double()
    module.register_buffer("unknown", torch.full((3,), float("nan")))
    module.limit = float("nan")
    hesscli.compute(module, (X, Y))


def test_what_cannot_be_copied_is_shared() -> None:
    numbers = (i for i in range(3))
    function = copied(lambda: numbers)
    assert function() is numbers


def test_a_function_that_names_itself() -> None:
    def factorial(n: int) -> int:
        return n * factorial(n - 1) if n else 1

    assert copied(factorial) is not factorial
    assert copied(factorial)(5) == 120
    assert copied(weakref.ref) is weakref.ref


def test_to_everyone_else_functions_are_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "_atomic_types", {int, type(made)}, raising=False)  # of Python 3.14
    model = made(Lambda)
    assert copied(model).act is not model.act
    assert copy.deepcopy(model).act is model.act
    assert copy._atomic_types == {int, type(made)}


def test_to_other_threads_functions_are_constants_meanwhile() -> None:
    function = made(Lambda).act

    class Waiting:
        def __deepcopy__(self, memo: object) -> list[object]:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(copy.deepcopy, [function]).result()

    inside, here = copied([Waiting(), function])
    assert inside[0] is function
    assert here is not function


class Locked(nn.Linear):
    """Holds what cannot be copied, at several depths, and uses some of it."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.lock = threading.Lock()
        self.file = open(os.devnull)  # noqa: SIM115
        self.events = {"done": [threading.Event()], "all": (threading.local(),)}
        self.itself = [self.events]
        self.itself.append(self.itself)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return torch.tanh(super().forward(x))


def test_what_no_copy_is_made_of_is_shared() -> None:
    module = Locked().double()
    for dtype in ("float64", "float32"):
        found = hesscli.compute(module, (X, Y), blocks="full", framework="torch", dtype=dtype)
        assert found.metadata["check"]["dtype"] == "float64"
        plain = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
        plain[0].load_state_dict(module.state_dict())
        whole = hessian(plain, F.mse_loss, (X,), Y)
        assert relative_error(found.matrix(), whole) < (1e-10 if dtype == "float64" else 1e-5)


class Friend:
    """Cannot be copied, and knows a part of the module."""

    def __init__(self, part: nn.Module) -> None:
        self.lock, self.calls = threading.Lock(), [lambda x: part(x)]


def test_what_cannot_be_copied_and_knows_the_module_is_not_shared() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    module.friend = Friend(module[0])
    with pytest.raises(hesscli.HesscliError, match="cannot be copied: cannot pickle") as refused:
        hesscli.compute(module, (X.float(), Y.float()))
    assert refused.value.exit_code == 4


class Remembering(nn.Module):
    """A loss that keeps what it was last, and a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self.history: list[Tensor] = []
        self.lock = threading.Lock()

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        with self.lock:
            self.last = (f - y).square().mean()
            self.history.append(self.last)
            return self.last


def test_losses_that_keep_what_they_were() -> None:
    module, loss = nn.Linear(3, 3).double(), Remembering()
    loss(module(X), Y)
    last = loss(module(X), Y)
    with pytest.raises(hesscli.HesscliError, match="the loss Remembering cannot be copied: Only"):
        hesscli.compute(module, (X, Y), loss=loss)
    loss.history.clear()
    found = hesscli.compute(module, (X, Y), loss=loss, blocks="full", framework="torch")
    assert relative_error(found.matrix(), hessian(module, F.mse_loss, (X,), Y)) < 1e-10
    assert loss.last is last
    assert not loss.history
