"""Models that keep something from pass to pass: every pass is the first."""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import oracles
import pytest
import torch
from oracles import hessian, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import hesscli

X, Y = (
    torch.randn(6, size, generator=torch.Generator().manual_seed(size)).double() for size in (3, 2)
)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.out = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 2)

    def square(self) -> Tensor:
        return self.w @ self.w.T

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x @ self.square()))


class Attribute(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def square(self) -> Tensor:
        if self.kept is None:
            self.kept = super().square()
        return self.kept


class Made(Plain):
    def square(self) -> Tensor:
        if not hasattr(self, "kept"):
            self.kept = super().square()
        return self.kept


class Property(Plain):
    @functools.cached_property
    def kept(self) -> Tensor:
        return super().square()

    def square(self) -> Tensor:
        return self.kept


class Buffer(Attribute):
    def __init__(self) -> None:
        super().__init__()
        del self.kept
        self.register_buffer("kept", None)


class MadeBuffer(Made):
    def square(self) -> Tensor:
        if not hasattr(self, "kept"):
            self.register_buffer("kept", Plain.square(self))
        return self.kept


class NewBuffer(Buffer):
    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(0)

    def square(self) -> Tensor:
        if not self.kept.numel():
            self.kept = Plain.square(self)
        return self.kept


class Steps(Plain):
    """Its first pass alone is as the others are."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(x) * self.steps


class Stored(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[dict[str, Tensor]] = [{}]

    def square(self) -> Tensor:
        return self.kept[0].setdefault("square", super().square())


def holder(name: str, make: Callable[[], Any], keep: Callable[[Any], dict[str, Tensor]]) -> type:
    """A model that keeps its square in a dict that an attribute of another kind holds."""

    class Holder(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.held = make()

        def square(self) -> Tensor:
            return keep(self.held).setdefault("square", super().square())

    Holder.__name__ = name
    return Holder


@dataclass
class Notes:
    kept: dict[str, Tensor] = field(default_factory=dict)

    def noted(self) -> dict[str, Tensor]:
        return self.kept


class Pair(NamedTuple):
    kept: dict[str, Tensor]


class Marked(dict):
    """A dict with an attribute."""

    def __init__(self) -> None:
        super().__init__(some=1)
        self.kept: dict[str, Tensor] = {}


HOLDERS = [
    holder("defaultdict", lambda: defaultdict(dict), lambda held: held),
    holder("dataclass", Notes, lambda held: held.kept),
    holder("attribute", SimpleNamespace, lambda held: vars(held)),
    holder("tuple", lambda: ({},), lambda held: held[0]),
    holder("namedtuple", lambda: Pair({}), lambda held: held.kept),
    holder("deque", lambda: deque([{}]), lambda held: held[0]),
    holder("partial", lambda: functools.partial(dict, {}), lambda held: held.args[0]),
    holder("method", lambda: Notes().noted, lambda held: held()),
    holder("closure", lambda: (lambda kept: lambda: kept)({}), lambda held: held()),
    holder("slot", lambda: FilledSlots({}), lambda held: held.kept),
    holder("attribute-of-a-dict", Marked, lambda held: held.kept),
]


class Queued(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.kept: deque[Tensor] = deque(maxlen=1)

    def square(self) -> Tensor:
        if not self.kept:
            self.kept.append(super().square())
        return self.kept[0]


class OfTheClass(Plain):
    kept: ClassVar[dict[str, Tensor]] = {}

    def square(self) -> Tensor:
        return self.kept.setdefault("square", super().square())


class Lazy(OrderedDict[str, Any]):
    """Made of more than its items, and asks for none before it is told to, as a registry of classes."""

    def __init__(self, source: str, items: dict[str, Any]) -> None:
        super().__init__()
        for name, item in items.items():
            OrderedDict.__setitem__(self, name, item)

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("asked for its items")

    def __len__(self) -> int:
        raise AssertionError("asked how many there are")


class Recent(deque[Any]):
    def __init__(self, source: str, items: list[Any]) -> None:
        super().__init__(items)


class InARegistry(Plain):
    kept: ClassVar[Lazy] = Lazy("", {"squares": {}})

    def square(self) -> Tensor:
        return self.kept["squares"].setdefault("square", super().square())


class InAQueue(Plain):
    kept: ClassVar[Recent] = Recent("", [{}])

    def square(self) -> Tensor:
        return self.kept[0].setdefault("square", super().square())


class Assigned(Plain):
    kept: ClassVar[Tensor | None] = None

    def square(self) -> Tensor:
        kind = type(self)
        if kind.kept is None:
            kind.kept = super().square()
        return kind.kept


class AssignedAnew(Plain):
    """Its class has the attribute from the first pass on."""

    def square(self) -> Tensor:
        if not hasattr(type(self), "kept"):
            type(self).kept = super().square()
        return type(self).kept


KEPT: dict[str, Tensor] = {}


class OfTheFile(Plain):
    def square(self) -> Tensor:
        return KEPT.setdefault("square", super().square())


def kept_square(w: Tensor) -> Tensor:
    return KEPT.setdefault("square", w @ w.T)


class ByAFunction(Plain):
    def square(self) -> Tensor:
        return kept_square(self.w)


SQUARE: Tensor | None = None
PASSES = 0


class Bound(Plain):
    def square(self) -> Tensor:
        global SQUARE
        if SQUARE is None:
            SQUARE = super().square()
        return SQUARE


class NewlyBound(Plain):
    def square(self) -> Tensor:
        global NEW_SQUARE
        if "NEW_SQUARE" not in globals():
            NEW_SQUARE = super().square()
        return NEW_SQUARE


class Counted(Plain):
    def forward(self, x: Tensor) -> Tensor:
        global PASSES
        PASSES += 1
        return super().forward(x) * PASSES


class CachedMethod(Plain):
    @functools.lru_cache  # noqa: B019
    def square(self) -> Tensor:
        return super().square()


@functools.cache
def cached_square(w: Tensor) -> Tensor:
    return w @ w.T


class CachedFunction(Plain):
    def square(self) -> Tensor:
        return cached_square(self.w)


class ByDefault(Plain):
    def square(self, kept: dict[str, Tensor] = {}) -> Tensor:  # noqa: B006
        return kept.setdefault("square", super().square())


def marked_square(w: Tensor) -> Tensor:
    if not hasattr(marked_square, "kept"):
        marked_square.kept = w @ w.T
    return marked_square.kept


class OfTheFunction(Plain):
    def square(self) -> Tensor:
        return marked_square(self.w)


def closure() -> Callable[[Tensor], Tensor]:
    kept = None

    def square(w: Tensor) -> Tensor:
        nonlocal kept
        if kept is None:
            kept = w @ w.T
        return kept

    return square


class InAClosure(Plain):
    closure = staticmethod(closure())

    def square(self) -> Tensor:
        return self.closure(self.w)


class InAnEmptyCell(Plain):
    """Its closure has the name from the first pass on."""

    def __init__(self) -> None:
        super().__init__()

        def square(w: Tensor) -> Tensor:
            nonlocal kept
            try:
                return kept
            except NameError:
                kept = w @ w.T
                return kept

        self.closure = square
        kept = None
        del kept

    def square(self) -> Tensor:
        return self.closure(self.w)


class Slots:
    __slots__ = ("kept",)


@dataclass(slots=True)
class FilledSlots:
    kept: Any = None


class InSlots(Plain):
    slots = Slots

    def __init__(self) -> None:
        super().__init__()
        self.held = self.slots()

    def square(self) -> Tensor:
        if getattr(self.held, "kept", None) is None:
            self.held.kept = super().square()
        return self.held.kept


class InFilledSlots(InSlots):
    slots = FilledSlots


class Attributes(dict):  # as many libraries have it
    __getattr__ = dict.get
    __setattr__ = dict.__setitem__

    def update(self, *_: object) -> None:
        raise TypeError("is not to be used")


class InAttributes(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.held = Attributes()

    def square(self) -> Tensor:
        if self.held.kept is None:
            self.held.kept = super().square()
        return self.held.kept


class Kind(Enum):
    SQUARE = 1


class InAnEnum(Plain):
    def square(self) -> Tensor:
        if not hasattr(Kind.SQUARE, "kept"):
            Kind.SQUARE.kept = super().square()
        return Kind.SQUARE.kept


@functools.singledispatch
def dispatched(model: object) -> Tensor:
    raise TypeError


@dispatched.register
def _(model: nn.Module) -> Tensor:
    return kept_square(model.w)


class Dispatched(Plain):
    def square(self) -> Tensor:
        return dispatched(self)


class InAnotherFile(Plain):
    def square(self) -> Tensor:
        if not hasattr(oracles, "kept"):
            oracles.kept = super().square()
        return oracles.kept


class ByTensors(Plain):
    """A dict whose keys have no truth when they are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[Tensor, Tensor] = {torch.zeros(2): torch.zeros(2)}
        self.seen: set[Tensor] = {torch.zeros(2)}

    def square(self) -> Tensor:
        (key,) = self.kept
        self.kept = {}
        self.seen.clear()
        self.seen.add(torch.zeros(2))
        self.kept[torch.zeros(2)] = key
        return super().square()


class Frozen(type):
    def __setattr__(cls, name: str, value: object) -> None:
        raise TypeError("is frozen")


class Settings(metaclass=Frozen):
    pass


class InAFrozenClass(Plain):
    settings = Settings

    def square(self) -> Tensor:
        if not hasattr(Settings, "kept"):
            type.__setattr__(Settings, "kept", super().square())
        return Settings.kept


VARIABLE: ContextVar[Tensor | None] = ContextVar("VARIABLE", default=None)


class InAContext(Plain):
    """Keeps it where nothing looks for it."""

    def square(self) -> Tensor:
        if VARIABLE.get() is None:
            VARIABLE.set(super().square())
        return VARIABLE.get()


class HalfPutBack(Plain):
    """Whether the attribute is there is written to a tensor that is no buffer, and so not put back."""

    def __init__(self) -> None:
        super().__init__()
        self.ready, self.scale = torch.zeros(()), 1.0

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.scale = float(x.std())
            self.ready += 1
        return super().forward(x) * self.scale


class Hooked(Plain):
    """Registers a hook on its first call, as transformers does to collect hidden states."""

    hooked = False

    def forward(self, x: Tensor) -> Tensor:
        self.collected: list[Tensor] = []
        if not self.hooked:
            self.out.register_forward_hook(lambda module, x, y: self.collected.append(y))
            self.hooked = True
        super().forward(x)
        return torch.stack(self.collected).sum(0)


class HookedBehindMuch(Hooked):
    """The same, with more in its class and its settings than is looked at."""

    many: ClassVar = [[index] for index in range(5000)]

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(many=[[index] for index in range(5000)])
        self.out = nn.Sequential(nn.Sequential(self.out))

    def forward(self, x: Tensor) -> Tensor:
        self.collected: list[Tensor] = []
        if not self.hooked:
            self.out[0][0].register_forward_hook(lambda module, x, y: self.collected.append(y))
            self.hooked = True
        Plain.forward(self, x)
        return torch.stack(self.collected).sum(0)


class Unwilling:
    """Answers no questions, as the validators of pydantic before their class is finished."""

    __slots__ = ("kept",)

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(name)


class InASlot:
    __slots__ = ("value",)


class Shadowed(InASlot):
    @property
    def value(self) -> object:  # type: ignore[override]
        return object()


class Proxy:
    @property
    def __class__(self) -> type:  # type: ignore[override]
        raise RuntimeError("for nothing yet")


class Unmeasured(tuple):
    """A pair that is not to be taken for one, as an irreducible representation of e3nn."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Any:
        raise NotImplementedError


class AmongStrangers(Attribute):
    strangers: ClassVar[list[object]] = [Unwilling(), Shadowed(), Proxy(), Unmeasured((1, 2))]


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize(
    "kind",
    [
        *(
            Attribute,
            Made,
            Property,
            Buffer,
            MadeBuffer,
            Steps,
            Stored,
            Queued,
            OfTheClass,
            InAQueue,
        ),
        *(InARegistry, Hooked, HookedBehindMuch, *HOLDERS),
        *(Assigned, AssignedAnew, OfTheFile, ByAFunction, Bound, NewlyBound, Counted, CachedMethod),
        *(
            CachedFunction,
            ByDefault,
            OfTheFunction,
            InAClosure,
            InAnEmptyCell,
            InSlots,
            InFilledSlots,
        ),
        *(InAttributes, InAnEnum, Dispatched, InAnotherFile, ByTensors, InAFrozenClass),
        AmongStrangers,
    ],
)
def test_every_pass_is_the_first(kind: type[Plain], curvature: str) -> None:
    options = {"blocks": "full", "framework": "torch", "curvature": curvature}
    found = hesscli.compute(kind().double(), (X, Y), **options)
    truth = hesscli.compute(Plain().double(), (X, Y), **options)
    assert relative_error(found.matrix(), truth.matrix()) < 1e-12
    assert found.metadata["notes"] == truth.metadata["notes"]
    if curvature == "hessian":
        assert relative_error(found.matrix(), hessian(Plain().double(), F.mse_loss, (X,), Y)) < 1e-9


@pytest.mark.parametrize("kind", [MadeBuffer, NewBuffer])
def test_buffers_are_found_behind_any_number_of_objects(kind: type[Plain]) -> None:
    model = nn.Sequential(nn.Sequential(kind().double()))
    model.memory = [torch.zeros(1) for _ in range(2000)]
    found = hesscli.compute(model, (X, Y), blocks="full", framework="torch")
    truth = hesscli.compute(Plain().double(), (X, Y), blocks="full", framework="torch")
    assert relative_error(found.matrix(), truth.matrix()) < 1e-12


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(InAContext, "keeps what it computes"), (HalfPutBack, "two passes of the same data")],
)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_what_cannot_be_put_back_is_refused(
    kind: type[Plain], reason: str, batch_size: int | None
) -> None:
    def compute() -> None:
        with pytest.raises(hesscli.HesscliError, match=reason) as refused:
            hesscli.compute(kind().double(), (X, Y), batch_size=batch_size)
        assert refused.value.exit_code == 4

    copy_context().run(compute)


class Sampling(Plain):
    """A variational autoencoder's noise, which `eval` does not turn off."""

    def square(self) -> Tensor:
        return super().square() + torch.randn_like(self.w @ self.w.T)


def test_noise_in_eval_mode() -> None:
    with pytest.raises(hesscli.HesscliError, match="it draws random numbers") as refused:
        hesscli.compute(Sampling().double(), (X, Y))
    assert "can be one of its inputs" in str(refused.value.hint)


def test_the_module_is_as_it_was() -> None:
    model = Attribute().double()
    hesscli.compute(model, (X, Y))
    assert model.kept is None


@functools.cache
def settings() -> dict[str, float]:
    return {"factor": 1.0}


class Configured(Plain):
    def square(self) -> Tensor:
        return super().square() * settings()["factor"]


@pytest.mark.parametrize("of_the_loss", [True, False])
def test_a_cache_that_was_there_stays(of_the_loss: bool) -> None:
    """What was computed once for all of a program may have changed since."""
    model = Plain().double() if of_the_loss else Configured().double()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        factor = settings()["factor"] if of_the_loss else 1.0
        return factor * F.mse_loss(output, target, reduction="none")

    settings.cache_clear()
    kept = settings()
    kept["factor"] = 3.0
    found = hesscli.compute(model, (X, Y), loss=loss, blocks="full", framework="torch")
    assert settings() is kept
    truth = hessian(model, lambda output, target: loss(output, target).mean(), (X,), Y)
    assert relative_error(found.matrix(), truth) < 1e-9
