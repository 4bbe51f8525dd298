"""Losses with all that users do to them: arguments of every kind, and losses of their own that do more than compare."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import read
from oracles import hessian, relative_error
from torch import Tensor, nn

import hesscli
from hesscli.errors import UsageError

G = torch.Generator().manual_seed(0)
X, Y = (torch.randn(8, n, generator=G, dtype=torch.float64) for n in (3, 4))
CLASSES = torch.tensor([0, 1, 1, 0, 1, 2, 3, 2])
W = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)


def net(outputs: int = 4) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def computed(model, data, **options):
    options.setdefault("blocks", "full")
    return hesscli.compute(model, data, framework="torch", **options)


def close(found, truth, tolerance=1e-9):
    assert relative_error(found.matrix().double(), truth) < tolerance


# --- built-in ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "argument", "value", "wanted"),
    [
        ("poisson-nll", "log_input", "no", "true or false"),
        ("poisson-nll", "full", torch.ones(2), "true or false"),
        ("kl-div", "log_target", 1, "true or false"),
        ("huber", "delta", torch.ones(4), "a number"),
        ("smooth-l1", "beta", "@b", "a number"),
        ("cross-entropy", "label_smoothing", True, "a number"),
        ("cross-entropy", "ignore_index", 2**70, "a whole number"),
        ("cross-entropy", "ignore_index", 1.5, "a whole number"),
    ],
)
def test_arguments_of_the_wrong_kind(loss, argument, value, wanted):
    with pytest.raises(
        hesscli.HesscliError, match=f"{argument} is .*, expected {wanted}"
    ) as refused:
        computed(net(), (X, Y), loss=loss, loss_arguments={argument: value})
    assert refused.value.exit_code == 2


def test_arguments_of_one_sample():
    found = computed(net(), (X[0], Y[0]), loss="mse", loss_arguments={"weight": W}, unbatched=True)
    close(found, hessian(net(), lambda f, y: F.mse_loss(f, y, weight=W), (X[0],), Y[0]))


def test_classes_in_eight_bits():
    y = torch.tensor([156, 3, 7, 156] * 2, dtype=torch.uint8)  # -100, to who counts in eight bits
    arguments = {"label_smoothing": 0.2}
    found = computed(net(200), (X, y), loss="cross-entropy", loss_arguments=arguments)
    close(found, hessian(net(200), lambda f, y: F.cross_entropy(f, y, **arguments), (X,), y.long()))


@pytest.mark.parametrize("batch_size", [None, 4])
def test_one_distribution_over_all_samples(batch_size):
    model, p = nn.Sequential(net(1), nn.Flatten(0)), Y[:, 0].softmax(0)
    found = computed(model, (X, p), loss="cross-entropy", batch_size=batch_size)
    close(found, hessian(model, F.cross_entropy, (X,), p))


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_weight_that_fits_a_batch_alone(batch_size):
    arguments = {"weight": torch.ones(4, 4)}
    with pytest.raises(hesscli.HesscliError, match=r"weight has shape .*does not fit targets"):
        computed(net(), (X, Y), loss="mse", loss_arguments=arguments, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_pos_weight_of_each_sample(batch_size):
    model, y, p = nn.Sequential(net(1), nn.Flatten(0)), Y[:, 0].sigmoid(), Y[:, 1].exp()
    found = computed(
        model,
        (X, y),
        loss="bce-with-logits",
        loss_arguments={"pos_weight": p},
        batch_size=batch_size,
    )
    bce = F.binary_cross_entropy_with_logits
    close(found, hessian(model, lambda f, y: bce(f, y, pos_weight=p), (X,), y))


def test_huber_without_end(cli):
    found = computed(net(), (X, Y), loss="huber", loss_arguments={"delta": float("inf")})
    close(found, hessian(net(), lambda f, y: F.mse_loss(f, y) / 2, (X,), Y))


def test_log_probabilities_with_classes_last():
    model = nn.Sequential(net(), nn.LogSoftmax(-1))
    x, y = X.repeat(4, 1).view(4, 2, 4, 3), CLASSES.repeat(4).view(4, 2, 4)
    found = computed(model, (x, y), loss="nll")
    close(found, hessian(model, lambda f, y: F.nll_loss(f.movedim(-1, 1).contiguous(), y), (x,), y))


def test_classes_along_either_axis():
    """As many positions as classes: PyTorch's axis, and a note."""
    scores = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4)).double()
    words = torch.arange(20).reshape(5, 4) % 4
    found = computed(scores, (words, words))
    assert any("along the second axis" in note for note in found.metadata["notes"])
    truth = F.cross_entropy(scores(words), words)
    assert found.metadata["loss"]["value"] == pytest.approx(truth.item())


def test_ignored_classes_of_probabilities():
    arguments = {"ignore_index": 1}
    with pytest.raises(hesscli.HesscliError, match="the targets are probabilities"):
        computed(net(), (X, Y.softmax(1)), loss="cross-entropy", loss_arguments=arguments)


@pytest.mark.parametrize(
    ("outputs", "y", "hint"),
    [
        (4, F.one_hot(CLASSES, 4), "store the class numbers: y.argmax(1)"),
        (5, F.one_hot(CLASSES, 4), "store the class numbers: y.argmax(1)"),
        (5, 2 * F.one_hot(CLASSES, 4), None),
        (4, F.one_hot(CLASSES, 4) + F.one_hot(3 - CLASSES, 4), "--loss bce-with-logits"),
        (4, 3 * F.one_hot(CLASSES, 4), "--loss mse"),
        (4, CLASSES[:, None], "store the class numbers without that axis: y.squeeze(1)"),
    ],
)
@pytest.mark.parametrize("loss", ["cross-entropy", "nll"])
def test_a_column_for_each_class(outputs, y, hint, loss):
    with pytest.raises(hesscli.HesscliError, match="class targets have shape") as refused:
        computed(net(outputs), (X, y), loss=loss)
    assert refused.value.hint == hint


@pytest.mark.parametrize(
    ("y", "hint"),
    [
        (CLASSES % 4 + 1, "classes are counted from 0: y - 1"),
        (CLASSES % 4 - 1, "--loss-arg ignore_index=-1"),
        (CLASSES % 4 + 2, None),
        (CLASSES % 4 - 2, None),
    ],
)
def test_classes_out_of_range(y, hint):
    with pytest.raises(hesscli.HesscliError, match="class targets range from") as refused:
        computed(net(4), (X, y), loss="cross-entropy")
    assert refused.value.hint == hint


@pytest.mark.parametrize(
    ("y", "hint"), [(CLASSES.float(), "store the class numbers as int64"), (Y[:, 0], None)]
)
def test_class_numbers_stored_as_floats(y, hint):
    """To them the loss is the squared error, which compares element by element."""
    with pytest.raises(hesscli.HesscliError, match="element by element") as refused:
        computed(net(4), (X, y))
    assert refused.value.hint == hint


def test_a_column_of_numbers_is_not_of_classes():
    with pytest.raises(hesscli.HesscliError, match="class targets have shape") as refused:
        computed(net(1), (X, Y[:, :1]), loss="nll")
    assert refused.value.hint == "--loss mse"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("cross_entropy", "cross-entropy"),
        ("torch.nn.functional.mse_loss", "mse"),
        ("CE", "cross-entropy"),
        ("mae", "l1"),
        ("gaussian-nll", None),  # is no Poisson
    ],
)
def test_other_names_of_losses(cli, tmp_path, name, near):
    torch.jit.script(net()).save(str(tmp_path / "m.pt"))
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    ran = cli("compute", "m.pt", "d.npz", "--loss", name)
    assert "no loss is called" in ran.fails(2)
    assert "hint: " not in ran.stderr if near is None else ran.hint.endswith(f"--loss {near}")


def test_a_word_is_a_word(cli, tmp_path):
    torch.jit.script(net()).save(str(tmp_path / "m.pt"))
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    asked = ("compute", "m.pt", "d.npz", "--loss", "torch.nn.functional:mse_loss", "--json")
    ran = cli(*asked, "--loss-arg", "reduction=none")
    assert ran.code == 0, ran.stderr
    assert ran.document["loss"]["arguments"] == {"reduction": "none"}


def test_a_column_of_weights(cli, tmp_path):
    torch.jit.script(net(1)).save(str(tmp_path / "m.pt"))
    table = torch.cat([X, Y[:, :1].exp(), Y[:, 1:2]], 1).tolist()
    lines = ["a,b,c,w,y", *(",".join(map(repr, row)) for row in table)]
    (tmp_path / "d.csv").write_text("\n".join(lines))
    inputs = [word for name in "abc" for word in ("--inputs", name)]
    ran = cli(
        "compute",
        "m.pt",
        "d.csv",
        *inputs,
        "--loss",
        "mse",
        "--loss-arg",
        "weight=@w",
        "-b",
        "full",
    )
    assert ran.code == 0, ran.stderr
    _, tensors = read(tmp_path / "hessian.safetensors")
    truth = hessian(net(1), lambda f, y: F.mse_loss(f, y, weight=Y[:, :1].exp()), (X,), Y[:, 1:2])
    assert relative_error(tensors["hessian"], truth) < 1e-9


def test_a_weight_of_outputs_or_of_samples():
    """One number for each output, the same for all samples; and the other way round."""
    for w in (W[None], W.repeat(2)[:, None]):
        found = computed(net(), (X, Y), loss="mse", loss_arguments={"weight": w})
        close(found, hessian(net(), partial(F.mse_loss, weight=w.expand_as(Y)), (X,), Y))


def test_a_weight_that_is_not_there():
    said = "data: holds no array 'none' for the loss argument weight; it holds: x, y"
    with pytest.raises(hesscli.HesscliError) as refused:
        computed(net(), (X, Y), loss_arguments={"weight": "@none"})
    assert refused.value.message == said


# --- of the user's own ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_a_loss_in_fewer_digits(dtype, narrow):
    def loss(f, y):
        return F.cross_entropy(f.to(narrow), y, reduction="none")

    found = computed(net().float(), (X, CLASSES), loss=loss, dtype=dtype)
    close(found, hessian(net(), F.cross_entropy, (X,), CLASSES), 1e-6)


def test_a_loss_that_depends_on_other_weights():
    other = net()

    def loss(f, y):
        return F.mse_loss(f, y) + 0.1 * sum(p.square().sum() for p in other.parameters())

    found = computed(net(), (X, Y), loss=loss)
    assert [
        n
        for n in found.metadata["notes"]
        if "depends on parameters besides the model's output" in n
    ]
    close(found, hessian(net(), F.mse_loss, (X,), Y))


class Penalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x, y=None):
        output = self.net(x)
        return output if y is None else self.loss(output, y)

    def loss(self, output, y):
        return F.mse_loss(output, y) + 0.1 * sum(p.square().sum() for p in self.parameters())


@pytest.mark.parametrize("function", [hesscli.compute, hesscli.operator])
def test_a_loss_that_depends_on_the_weights_is_taken_from_forward_alone(function):
    """Of the copy that is differentiated it knows nothing: what it makes of the weights would be a constant."""
    model = Penalised()
    for loss in (model.loss, lambda f, y: model.loss(f, y)):
        with pytest.raises(hesscli.HesscliError, match="depends on the model's parameters") as e:
            function(model, (X, Y), loss=loss)
        assert 'loss="output"' in e.value.hint
    found = computed(model, (X, Y), loss="output")
    truth = hessian(net(), F.mse_loss, (X,), Y)
    close(found, truth + 0.2 * torch.eye(len(truth)).double())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_loss_with_buffers(dtype):
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.tensor([1.0, 2, 3, 4]))

        def forward(self, f, y):
            result = F.cross_entropy(f, y, weight=self.weight, reduction="none")
            self.weight = 1.5 * self.weight
            return result

    loss = Weighted()
    found = computed(net().float(), (X, CLASSES), loss=loss, dtype=dtype)
    truth = hessian(
        net(), lambda f, y: F.cross_entropy(f, y, weight=W, reduction="none").mean(), (X,), CLASSES
    )
    close(found, truth, 1e-6 if dtype == "float32" else 1e-9)
    assert loss.weight.tolist() == [1.0, 2, 3, 4]


def test_a_loss_that_counts_its_calls():
    class Warming:
        calls = 0

        def __call__(self, f, y):
            self.calls += 1
            return ((f - y) ** 4).sum(1) * min(1, self.calls / 100)

    loss = Warming()
    truth = hessian(net(), lambda f, y: ((f - y) ** 4).sum(1).mean() / 100, (X,), Y)
    close(computed(net(), (X, Y), loss=loss), truth)
    assert loss.calls == 0


def test_a_loss_that_draws_random_numbers():
    def noisy(f, y):
        return ((f - y) ** 4).sum(1) * torch.rand(())

    with pytest.raises(hesscli.HesscliError, match="the same output two values"):
        computed(net(), (X, Y), loss=noisy)


@pytest.mark.parametrize("blocks", ["full", "elements"])
@pytest.mark.parametrize("whole", [True, False])
def test_targets_that_are_missing(whole, blocks):
    y = Y.clone()
    y[2], y[5, 1] = torch.nan, torch.inf

    def loss(f, y):
        known = y.isfinite()
        terms = torch.where(known, f - y.where(known, 0), 0) ** 2
        return terms[known].mean() if whole else terms.sum(1)

    found = computed(net(), (X, y), loss=loss, blocks=blocks)
    truth = hessian(net(), lambda f, y: loss(f, y).mean(), (X,), y)
    assert relative_error(found.matrix().diagonal(), truth.diagonal()) < 1e-9
    for careless in ("mse", lambda f, y: ((f - y) ** 2).sum(1)):
        with pytest.raises(hesscli.HesscliError, match=r"y .* holds NaN or infinity in 5 places"):
            computed(net(), {"x": X, "y": y}, loss=careless)


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_a_loss_that_writes_to_the_output(curvature):
    found = computed(
        net(), (X, Y), loss=lambda f, y: f.sub_(y).square().sum(1), curvature=curvature
    )
    plain = computed(net(), (X, Y), loss=lambda f, y: (f - y).square().sum(1), curvature=curvature)
    close(found, plain.matrix())


@pytest.mark.parametrize("blocks", ["full", "elements"])
def test_losses_that_want_all_samples(blocks):
    w = Y[:, 0].exp()
    for loss in (
        lambda f, y: w * F.cross_entropy(f, y, reduction="none"),
        lambda f, y: f.view(-1, 4, 4).var(1).sum(1),
    ):
        found = computed(net(), (X, CLASSES), loss=loss, blocks=blocks, batch_size=4)
        truth = hessian(net(), lambda f, y, loss=loss: loss(f, y).mean(), (X,), CLASSES)
        assert relative_error(found.matrix().diagonal(), truth.diagonal()) < 1e-9


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("of_classes", [True, False])
def test_as_many_classes_as_samples(of_classes, batch_size):
    w = torch.linspace(0.1, 8, 8, dtype=torch.float64) ** 2
    y = CLASSES.flip(0)

    def loss(f, y, w):
        return F.cross_entropy(f, y, reduction="none") * (w[y] if of_classes else w)

    data = {"x": X, "y": y, "w": w}
    found = computed(net(8), data, loss=loss, loss_arguments={"w": "@w"}, batch_size=batch_size)
    close(found, hessian(net(8), lambda f, y: loss(f, y, w).mean(), (X,), y))
    said = [note for note in found.metadata["notes"] if "the same for all samples: w" in note]
    assert bool(said) == of_classes


FIXED = {
    "terms": lambda f, y, w: (w * f.square()).sum(1) + f[:, 0] * y,
    "one number": lambda f, y, w: (
        (w[y] * F.cross_entropy(f, y, reduction="none")).sum() / w[y].sum()
    ),
    "flat": lambda f, y, w: (w * f.square()).flatten(),
}


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("samples", [None, (3, 4), (2, 5), (0, 7)])
@pytest.mark.parametrize("name", FIXED)
def test_what_is_the_same_for_all_samples_is_not_cut_with_them(name, samples, curvature):
    loss, w = FIXED[name], torch.linspace(0.1, 8, 8, dtype=torch.float64) ** 2
    y, mine = CLASSES.flip(0), slice(*(samples or (0, 8)))
    data, options = {"x": X, "y": y, "w": w}, {"loss": loss, "loss_arguments": {"w": "@w"}}
    found = computed(net(8), data, samples=samples, curvature=curvature, check=False, **options)
    if curvature == "hessian":
        close(found, hessian(net(8), lambda f, y: loss(f, y, w).mean(), (X[mine],), y[mine]))
    else:
        options["loss"] = lambda f, y: loss(f, y, w)
        alone = {"loss": options["loss"], "curvature": curvature, "check": False}
        close(found, computed(net(8), (X[mine], y[mine]), **alone).matrix())


@pytest.mark.parametrize("samples", [(3, 4), (2, 5)])
def test_what_has_an_entry_for_each_sample_is_cut_with_them(samples):
    def loss(f, y, w):
        return (w * F.cross_entropy(f, y, reduction="none")).sum()

    w, y, mine = torch.linspace(0.1, 8, 8, dtype=torch.float64), CLASSES.flip(0), slice(*samples)
    data = {"x": X, "y": y, "w": w}
    found = computed(net(8), data, loss=loss, loss_arguments={"w": "@w"}, samples=samples)
    close(found, hessian(net(8), lambda f, y: loss(f, y, w[mine]), (X[mine],), y[mine]))


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_a_loss_with_a_detached_factor(curvature):
    def focal(f, y):
        p = f.softmax(1).gather(1, y[:, None])[:, 0]
        return (1 - p).detach() ** 2 * F.cross_entropy(f, y, reduction="none")

    found = computed(net(), (X, CLASSES), loss=focal, curvature=curvature)
    assert not [note for note in found.metadata["notes"] if "instead" in note]


@pytest.mark.parametrize("fill", [float("-inf"), -1e9])
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_outputs_that_are_masked(curvature, fill):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x).masked_fill(torch.arange(4) == 3, fill)

    y = CLASSES.clamp(max=2)
    found = computed(Masked(), (X, y), curvature=curvature)
    without = net()
    without[2] = nn.Linear(4, 3).double()
    with torch.no_grad():
        without[2].weight.copy_(net()[2].weight[:3])
        without[2].bias.copy_(net()[2].bias[:3])
    plain = computed(without, (X, y), curvature=curvature).matrix()
    kept = [i for i in range(36) if not (28 <= i < 32 or i == 35)]
    assert relative_error(found.matrix()[kept][:, kept], plain) < 1e-9


# --- of the model's own, and what it calls its inputs ------------------------------------------


class Masking(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net(3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return ((self.net(x if mask is None else x * mask) - x) ** 2).mean(1)


class TargetFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net(3)

    def forward(self, target: Tensor, x: Tensor) -> Tensor:
        return ((self.net(x) - target) ** 2).mean(1)


def own(f, y):
    return f.mean()


def test_what_a_model_can_do_without_are_not_the_targets():
    found = computed(Masking(), (X, Y[:, :3]), loss="output")
    close(found, hessian(Masking(), own, (X,), None))


def test_a_model_that_can_make_its_own_loss_is_said_to():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, labels=None):
            f = self.net(x)
            return f if labels is None else F.mse_loss(f, labels, reduction="none").sum(1)

    data, note = {"x": X, "labels": Y}, "the model takes labels too; --loss output is the loss"
    found, own = computed(Net(), data), computed(Net(), data, loss="output")
    assert [text for text in found.metadata["notes"] if text.startswith(note)]
    assert not [text for text in own.metadata["notes"] if text.startswith(note)]
    close(own, 4 * found.matrix())


class Language(nn.Module):
    """Compares with the next labels, as those of Hugging Face do, unless `places` says otherwise."""

    def __init__(self, places: int = 1) -> None:
        super().__init__()
        self.net, self.places = net(), places

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        f = self.net(x)
        if labels is None:
            return {"logits": f}
        said, meant = f[:, : f.shape[1] - self.places], labels[:, self.places :]
        return {"loss": F.cross_entropy(said.flatten(0, 1), meant.flatten()), "logits": f}


def test_a_loss_is_not_inferred_where_the_model_makes_another():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (5, 6), generator=generator)
    data = {"x": x, "labels": labels}
    with pytest.raises(hesscli.HesscliError, match="name the one that is meant") as refused:
        computed(Language(), data)
    assert (refused.value.exit_code, refused.value.hint) == (4, "--loss output")

    def truth(said: Tensor, meant: Tensor) -> Tensor:
        inputs = (said.flatten(0, 1),)
        return hessian(net(), F.cross_entropy, inputs, meant.flatten())

    close(computed(Language(), data, loss="output"), truth(x[:, :-1], labels[:, 1:]))
    close(computed(Language(), data, loss="cross-entropy"), truth(x, labels))
    close(computed(Language(places=0), data), truth(x, labels))
    model = Language()
    model.forward = lambda x, labels=None: (*Language.forward(model, x, labels).values(),)[::-1]
    with pytest.raises(hesscli.HesscliError, match="name the one that is meant"):
        computed(model, data)
    with pytest.raises(hesscli.HesscliError, match="returns more than one tensor") as refused:
        computed(model, data, loss="output")
    assert refused.value.hint == "--output-key 1"
    model.forward = lambda x, labels=None: Language.forward(model, x, labels) | {"aux": x.mean()}
    with pytest.raises(hesscli.HesscliError, match="name the one that is meant"):
        computed(model, data, output_key="logits")
    model.forward = lambda x, labels=None: next(iter(Language.forward(model, x, labels).values()))
    with pytest.raises(hesscli.HesscliError, match="name the one that is meant"):
        computed(model, data)
    model.forward = lambda x, labels=None: Language.forward(model, F.dropout(x), labels)
    with pytest.raises(hesscli.HesscliError, match="dropout left on"):
        computed(model, data)


@pytest.mark.parametrize("weight", ["abc", [[1], [2, 3]], [1j, 1, 1], [10**400, 1, 1]])
def test_weights_that_are_no_numbers(weight):
    with pytest.raises(UsageError, match="the loss argument weight is "):
        computed(net(), (X, CLASSES), loss_arguments={"weight": weight})


class Placed(nn.Module):
    """Calls its inputs as no data does."""

    def __init__(self):
        super().__init__()
        self.net = net(3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return ((self.net(first) - second) ** 2).mean(1)


class OptionallyPlaced(Placed):
    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        return super().forward(first, first if second is None else second)


class OptionallyLabelled(Placed):
    def forward(self, first: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(first, first if labels is None else labels)


class Taught(Placed):
    def forward(self, teacher: Tensor, x: Tensor) -> Tensor:
        return super().forward(x, teacher)


def test_targets_by_their_place():
    found = computed(Placed(), (X, Y[:, :3]), loss="output")
    close(found, hessian(Placed(), own, (X, Y[:, :3]), None))
    found = computed(OptionallyPlaced(), (X, Y[:, :3]), loss="output")
    close(found, hessian(Placed(), own, (X, X), None))
    for model in (OptionallyLabelled(), Taught()):
        found = computed(model, (X, Y[:, :3]), loss="output")
        close(found, hessian(Placed(), own, (X, Y[:, :3]), None))


def test_targets_by_what_the_model_calls_them():
    found = computed(TargetFirst(), (X, Y[:, :3]), loss="output")
    close(found, hessian(TargetFirst(), own, (Y[:, :3], X), None))


def test_inputs_by_what_the_model_calls_them():
    mask = (Y[:, :3] > 0).double()
    found = computed(Masking(), {"x": X, "mask": mask, "y": Y}, loss="output")
    close(found, hessian(Masking(), own, (X, mask), None))


def test_a_dataclass_as_output():
    @dataclass
    class Output:
        loss: Tensor
        logits: Tensor

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            f = self.net(x)
            return Output(f.square().mean(), f)

    close(computed(Net(), (X, CLASSES)), hessian(net(), F.cross_entropy, (X,), CLASSES))


@pytest.mark.parametrize("batch_size", [None, 7])
def test_a_model_that_squeezes(batch_size):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(1)

        def forward(self, x):
            return self.net(x).squeeze()

    found = computed(Net(), (X, Y[:, 0]), batch_size=batch_size)
    close(found, hessian(Net(), F.mse_loss, (X,), Y[:, 0]))


@pytest.mark.parametrize("batch_size", [None, 1, 2])
@pytest.mark.parametrize("of_classes", [True, False])
def test_some_samples_with_an_argument_as_long_as_all(of_classes, batch_size):
    """Eight samples and eight classes: what has eight numbers is cut like the samples, or not at all."""
    y, w = torch.tensor([7, 6, 5, 0, 1, 2, 3, 4]), torch.linspace(0.5, 3, 8, dtype=torch.float64)

    def loss(f, y, w):
        return F.cross_entropy(f, y, reduction="none") * (w[y] if of_classes else w)

    used = {"samples": (2, 6), "batch_size": batch_size}
    found = computed(net(8), (X, y), loss=loss, loss_arguments={"w": w}, **used)
    mine = w if of_classes else w[2:6]
    close(found, hessian(net(8), lambda f, y: loss(f, y, mine).mean(), (X[2:6],), y[2:6]))


@pytest.mark.parametrize("batch_size", [None, 1])
def test_two_samples_and_two_classes(batch_size):
    y, w = torch.tensor([1, 0]), torch.tensor([1.0, 3.0], dtype=torch.float64)

    def loss(f, y, w):
        return F.cross_entropy(f, y, reduction="none") * w[y]

    options = {"loss": loss, "loss_arguments": {"w": w}, "batch_size": batch_size}
    found = computed(net(2), (X[:2], y), **options)
    close(found, hessian(net(2), lambda f, y: loss(f, y, w).mean(), (X[:2],), y))


def backwards(output, target):
    F.mse_loss(output, target).backward()


@pytest.mark.parametrize(
    ("loss", "said", "hint"),
    [
        (lambda f, y: F.mse_loss(f, y).item(), "returned a float; expected", "without .item()"),
        (lambda f, y: (f - y).square().detach().numpy(), "returned a ndarray", "with torch"),
        (lambda f, y: np.mean(f.detach().numpy()), "returned a float64", "without .item()"),
        (lambda f, y: (F.mse_loss(f, y), f), "returned a tuple", "return loss, not"),
        (lambda f, y: {"loss": F.mse_loss(f, y)}, "returned a dict", "losses['loss']"),
        (lambda f, y: list((f - y).square()), "returned a list", "torch.stack(terms)"),
        (lambda f, y: None, "returned nothing; expected a tensor", "end it with: return loss"),
        (lambda f, y: F.mse_loss(f, y).detach(), "has no gradient", "take out .item()"),
        (
            lambda f, y: torch.tensor(F.mse_loss(f, y).item(), requires_grad=True),
            "has no gradient: it detaches, rounds, returns a new tensor",
            "torch.tensor(...)",
        ),
        (backwards, "does not require grad", "leave out loss.backward()"),
        (lambda f, y: f[:0], "has no terms: the mean divides by 0", ""),
    ],
)
def test_what_is_no_loss(loss, said, hint):
    with pytest.raises(hesscli.HesscliError) as caught:
        computed(net(), (X, Y), loss=loss)
    assert caught.value.exit_code == 4
    assert said in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_a_loss_of_nothing_is_a_new_zero(curvature):
    """As losses return it for a batch without what they look at."""

    def loss(f, y):
        kept = y[:, 0] > 100
        return F.mse_loss(f[kept], y[kept]) if kept.any() else torch.zeros((), requires_grad=True)

    assert not computed(net(), (X, Y), loss=loss, curvature=curvature).matrix().any()
    data = {"x": X.numpy(), "y": Y.numpy()}
    assert not (hesscli.operator(net(), data, loss=loss, curvature=curvature) @ np.ones(36)).any()


def test_arguments_that_a_loss_misses():
    def loss(f, y, alpha, *, beta):
        return alpha * F.cross_entropy(f, y, reduction="none") ** beta

    with pytest.raises(hesscli.HesscliError, match=r"missing 1 required .*: 'alpha'") as refused:
        computed(net(3), (X, Y), loss=loss)
    assert refused.value.hint == "--loss-arg alpha=VALUE"
    with pytest.raises(hesscli.HesscliError, match=r"missing 1 required .*: 'beta'") as refused:
        computed(net(3), (X, Y), loss=loss, loss_arguments={"alpha": 2.0})
    assert refused.value.hint == "--loss-arg beta=VALUE"


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, "torch.nn:CrossEntropyLoss"])
def test_a_class_is_no_loss(loss):
    with pytest.raises(hesscli.HesscliError, match="CrossEntropyLoss is a class, not a") as refused:
        computed(net(3), (X, Y), loss=loss)
    assert refused.value.exit_code == 2
    assert refused.value.hint == "write loss = CrossEntropyLoss() into FILE.py: --loss FILE.py:loss"


@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_weight_of_samples_beside_one_of_as_many_classes(batch_size):
    def loss(f, y, w, v):
        return w * v[y] * F.cross_entropy(f, y, reduction="none")

    generator = torch.Generator().manual_seed(3)
    w, v = torch.rand(2, len(X), generator=generator, dtype=torch.float64)
    for y in (torch.arange(len(X)).flip(0), torch.ones(len(X), dtype=torch.int64)):
        options = {"loss": loss, "loss_arguments": {"w": w, "v": v}, "batch_size": batch_size}
        found = computed(net(len(X)), (X, y), **options)
        close(found, hessian(net(len(X)), lambda f, y: loss(f, y, w, v).mean(), (X,), y))
        said = "loss arguments as long as the data, but the same for all samples: v"
        assert said in found.metadata["notes"]


# --- one number -------------------------------------------------------------------------------


def dice(f: Tensor, y: Tensor) -> Tensor:
    return 1 - 2 * (f.sigmoid() * y).sum() / (f.sigmoid() + y).sum()


def focal_mean(f: Tensor, y: Tensor) -> Tensor:
    terms = F.cross_entropy(f, y, reduction="none")
    return ((1 - torch.exp(-terms)) ** 2 * terms).mean()


P = Y.sigmoid()
OF_SAMPLES = {
    "a function": (F.cross_entropy, CLASSES),
    "smoothed": (lambda f, y: F.cross_entropy(f, y, label_smoothing=0.1), CLASSES),
    "focal": (focal_mean, CLASSES),
    "squares": (nn.MSELoss(), Y),
    "huber": (nn.HuberLoss(delta=0.3), Y),
    "logits": (nn.BCEWithLogitsLoss(), P),
    "probabilities": (lambda f, y: F.binary_cross_entropy(f.softmax(1), y), P),
    "divergence": (lambda f, y: F.kl_div(f.log_softmax(1), y, reduction="batchmean"), P),
    "over their number": (lambda f, y: ((f - y) ** 2).sum() / len(f), Y),
    "two means": (lambda f, y: F.mse_loss(f, y) - 0.1 * F.softplus(f).mean(1).mean(), Y),
    "norms": (lambda f, y: (f - y).norm(dim=1).mean(), Y),
}
SUMS = {
    "a module": (nn.MSELoss(reduction="sum"), Y),
    "half": (lambda f, y: 0.5 * (f - y).square().sum(), Y),
    "a product": (lambda f, y: ((f - y) ** 4).sum(1)[None] @ torch.ones(len(f), 1).double(), Y),
    "log-likelihood": (lambda f, y: -f.log_softmax(1)[torch.arange(len(y)), y].sum(), CLASSES),
}
NUMBERS = [(each, "mean") for each in OF_SAMPLES] + [(each, "sum") for each in SUMS]


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize(("name", "kind"), NUMBERS)
def test_one_number_that_is_of_each_sample(name, kind, batch_size):
    loss, y = (OF_SAMPLES if kind == "mean" else SUMS)[name]
    options = {"loss": loss, "batch_size": batch_size, "method": "preactivation"}
    found = computed(net(), (X, y), **options)
    close(found, hessian(net(), loss, (X,), y))
    assert any(f"one number, the {kind} over the samples" in n for n in found.metadata["notes"])
    assert found.metadata["loss"]["reduction"] == kind
    value = loss(net()(X), y).item()
    assert found.metadata["loss"]["value"] == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("name", "kind"), NUMBERS)
def test_fisher_of_one_number(name, kind):
    loss, y = (OF_SAMPLES if kind == "mean" else SUMS)[name]
    model, truth = net(), 0
    for i in range(len(X)):
        grads = torch.autograd.grad(loss(model(X[i : i + 1]), y[i : i + 1]), [*model.parameters()])
        g = torch.cat([grad.flatten() for grad in grads])
        truth = truth + torch.outer(g, g) / (len(X) if kind == "mean" else 1)
    close(computed(model, (X, y), loss=loss, curvature="fisher", batch_size=3), truth)


MODULES = {
    "cross-entropy": (nn.CrossEntropyLoss(), {}),
    "weighed": (nn.CrossEntropyLoss(weight=W), {"weight"}),
    "ignored": (nn.CrossEntropyLoss(ignore_index=2), {"ignore_index"}),
    "smoothed": (nn.CrossEntropyLoss(W, label_smoothing=0.1), {"weight", "label_smoothing"}),
    "summed": (nn.CrossEntropyLoss(W, reduction="sum"), {"weight"}),
    "nll": (nn.NLLLoss(W, ignore_index=2), {"weight", "ignore_index"}),
}


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(W)])
def test_a_mean_stays_a_mean(loss):
    idle = "--reduction sum has no effect"
    for reduction in ("mean", "sum"):
        found = computed(net(), (X, CLASSES), loss=loss, reduction=reduction)
        close(found, hessian(net(), loss, (X,), CLASSES))
        assert any(idle in note for note in found.metadata["notes"]) == (reduction == "sum")
        assert found.metadata["loss"]["reduction"] == "mean"
    found = computed(net(), (X, Y), loss=nn.MSELoss(reduction="sum"), reduction="sum")
    assert not any(idle in note for note in found.metadata["notes"])


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("name", MODULES)
def test_modules_whose_mean_may_be_weighed(name, batch_size):
    loss, arguments = MODULES[name]
    found = computed(net(), (X, CLASSES), loss=loss, batch_size=batch_size, method="preactivation")
    close(found, hessian(net(), loss, (X,), CLASSES))
    said = found.metadata["loss"]
    assert said["name"] == ("nll" if name == "nll" else "cross-entropy")
    assert said["arguments"].keys() == set(arguments)
    assert said["reduction"] == loss.reduction
    assert said["value"] == pytest.approx(loss(net()(X), CLASSES).item(), rel=1e-12)


OF_ALL_AT_ONCE = {
    "weighed": (lambda f, y: F.cross_entropy(f, y, weight=W), CLASSES),
    "ignored": (lambda f, y: F.cross_entropy(f, y, ignore_index=2), CLASSES),
    "the last ignored": (F.cross_entropy, torch.cat([CLASSES[:-1], torch.tensor([-100])])),
    "unbiased": (lambda f, y: ((f - y) ** 2).sum() / (len(f) - 1), Y),
    "all targets": (lambda f, y: F.cross_entropy(f @ y.T, torch.arange(len(f))), Y),
}
MIXING = {
    "a root": (lambda f, y: F.mse_loss(f, y).sqrt(), Y),
    "a ratio": (dice, P),
    "contrasts": (lambda f, y: F.cross_entropy(f @ f.T, torch.arange(len(f))), Y),
    "differences": (lambda f, y: (f - f.mean(0) - y).square().mean(), Y),
    "neighbours": (lambda f, y: F.mse_loss(f, y) + 1e-3 * (f[1:] * f[:-1]).sum(), Y),
    "the largest": (lambda f, y: (f - y).square().mean(1).amax(), Y),
}


class Lossy(nn.Module):
    """A model that returns its loss."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net(), loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.net(x), y)


def posed(by: str, loss: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> tuple[Any, Any, Any]:
    """A model, its data, and its loss: a function's, or what the model returns."""
    if by == "function":
        return net(), (X, y), loss
    return Lossy(loss), {"x": X, "y": y}, "output"


@pytest.mark.parametrize("by", ["function", "model"])
@pytest.mark.parametrize("name", OF_ALL_AT_ONCE)
def test_one_number_that_is_a_sum_over_the_samples_all_at_once(name, by):
    """They cannot be split into batches, but no term is of two samples."""
    loss, y = OF_ALL_AT_ONCE[name]
    model, data, own = posed(by, loss, y)
    found = computed(model, data, loss=own, batch_size=3, method="preactivation")
    close(found, hessian(net(), loss, (X,), y))
    assert any("one number for all data" in note for note in found.metadata["notes"])


@pytest.mark.parametrize("by", ["function", "model"])
@pytest.mark.parametrize("name", MIXING)
def test_one_number_that_mixes_samples(name, by):
    loss, y = MIXING[name]
    model, data, own = posed(by, loss, y)
    found = computed(model, data, loss=own, batch_size=3)
    close(found, hessian(net(), loss, (X,), y))
    assert any("one number for all data" in note for note in found.metadata["notes"])
    with pytest.raises(hesscli.HesscliError, match=r"may mix samples|no sample axis"):
        computed(model, data, loss=own, method="preactivation")


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize(("name", "kind"), NUMBERS)
def test_a_model_that_returns_a_mean_or_a_sum(name, kind, batch_size):
    loss, y = (OF_SAMPLES if kind == "mean" else SUMS)[name]
    options = {"loss": "output", "batch_size": batch_size, "method": "preactivation"}
    found = computed(Lossy(loss), {"x": X, "y": y}, **options)
    close(found, hessian(net(), loss, (X,), y))
    assert any(f"one number, the {kind} over the samples" in n for n in found.metadata["notes"])
    assert found.metadata["loss"]["reduction"] == kind
    value = loss(net()(X), y).item()
    assert found.metadata["loss"]["value"] == pytest.approx(value, rel=1e-12)


def test_one_label_of_many_that_does_not_count():
    """In float32, what it weighs would be rounding."""
    n = 20_000
    x, y = torch.randn(n, 3, generator=G), torch.arange(n) % 4
    y[-1] = -100
    model = Lossy(F.cross_entropy).float()
    found = computed(model, {"x": x, "y": y}, loss="output", blocks="elements", batch_size=n // 3)
    assert any("one number for all data" in note for note in found.metadata["notes"])
    assert found.metadata["loss"]["value"] == pytest.approx(model(x, y).item(), rel=1e-6)


@pytest.mark.parametrize("free", [0, 1 << 30])
def test_what_a_model_returns_is_tried_where_there_is_memory(free, monkeypatch):
    monkeypatch.setattr("hesscli.job.setup.batches.available_memory", lambda: free)
    found = computed(Lossy(F.mse_loss), {"x": X, "y": Y}, loss="output")
    close(found, hessian(net(), F.mse_loss, (X,), Y))
    said = "the mean over the samples" if free else "one number for all data"
    assert any(said in note for note in found.metadata["notes"])


def test_own_blocks_of_a_model_that_returns_its_loss_go_by_its_last_layer():
    """The loss behind it bends, and nothing before it does."""
    layers = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    for reduction in ("mean", "sum", "none"):
        model = Lossy(partial(F.cross_entropy, reduction=reduction))
        model.net = layers
        options = {"loss": "output", "method": "gauss-newton", "blocks": "diag"}
        found = computed(model, {"x": X, "y": CLASSES}, **options)
        kind = "mean" if reduction == "none" else reduction
        truth = hessian(layers, partial(F.cross_entropy, reduction=kind), (X,), CLASSES)
        assert torch.allclose(found.block("net.0.weight"), truth[:15, :15], atol=1e-12)
        assert torch.allclose(found.block("net.2.bias"), truth[-4:, -4:], atol=1e-12)


class Behind(nn.Module):
    """Loses what is not of its last layer alone: a penalty of weights, of what is hidden, or a scale of the loss."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.s = nn.Linear(3, 5), nn.Linear(5, 4), nn.Parameter(torch.tensor(0.7))
        self.how = how

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        terms = (self.b(h) - y).square().mean(1)
        if self.how == "weights":
            return terms.mean() + 0.1 * self.a.weight.square().sum()
        if self.how == "hidden":
            return terms.mean() + 0.1 * h.abs().mean()
        if self.how == "scaled":
            return (terms * self.s).mean() + self.s**2
        return (terms / self.s).mean()


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("how", ["weights", "hidden", "scaled", "over"])
def test_a_loss_that_is_not_of_the_last_layer_alone(how, batch_size):
    model = Behind(how).double()
    truth = hessian(model, lambda f, _: f, (X, Y), None)
    found = computed(model, {"x": X, "y": Y}, loss="output", batch_size=batch_size)
    close(found, truth)


class Outputs(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Returned:
    first: Tensor
    second: Tensor


class Two(nn.Module):
    """Returns what two layers make, in one form or another."""

    def __init__(self, form: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.form = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(5, 4), form

    def forward(self, x: Tensor) -> object:
        h = torch.tanh(self.a(x))
        return self.form(self.b(h), self.c(h))


def gaussian(first: Tensor, second: Tensor, y: Tensor) -> Tensor:
    """-log p of a mean and a log variance, without its constant."""
    return ((first - y).square() * torch.exp(-second) + second).mean(1)


FORMS = {
    "tuple": (lambda a, b: (a, b), lambda f, y: gaussian(f[0], f[1], y)),
    "list": (lambda a, b: [a, b], lambda f, y: gaussian(f[0], f[1], y).mean()),
    "dict": (lambda a, b: {"m": a, "s": b}, lambda f, y: gaussian(f["m"], f["s"], y).sum()),
    "named": (Outputs, lambda f, y: gaussian(f.first, f.second, y)),
    "dataclass": (Returned, lambda f, y: gaussian(f.first, f.second, y).mean()),
    "nested": (lambda a, b: {"m": (a, b), "n": None}, lambda f, y: gaussian(*f["m"], y)),
    # It clamps the variance where gradients are off.
    "pytorch's": (
        lambda a, b: (a, b.exp()),
        lambda f, y: nn.functional.gaussian_nll_loss(f[0], y, f[1]),
    ),
}


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("name", FORMS)
def test_a_loss_of_all_that_a_model_returns(name, batch_size):
    form, loss = FORMS[name]
    model = Two(form).double()
    truth = hessian(model, lambda f, y: loss(f, y).mean(), (X,), Y)
    found = computed(model, (X, Y), loss=loss, method="preactivation", batch_size=batch_size)
    close(found, truth)
    assert any("takes all of it" in note for note in found.metadata["notes"])


def test_what_keeps_a_loss_of_all_that_a_model_returns_from_fast_routes_is_not_put_down_to_the_model():
    def loss(f, y):
        second = f[1].clone()
        with torch.no_grad():
            second[:, 0].mul_(1)
        return gaussian(f[0], second, y)

    found = computed(Two(lambda a, b: (a, b)).double(), (X, Y), loss=loss)
    (note,) = (n for n in found.metadata["notes"] if n.startswith("no fast route: "))
    assert note.startswith("no fast route: the model, or the loss, ")


def test_arguments_of_a_loss_of_all_that_a_model_returns():
    model, w = Two(lambda a, b: (a, b)).double(), torch.rand(8, generator=G, dtype=torch.float64)

    def loss(f, y, w, c):
        return gaussian(*f, y) * w + (f[1] * c).square().mean(1)

    given = {"loss": loss, "loss_arguments": {"w": w, "c": W}, "batch_size": 3}
    truth = hessian(model, lambda f, y: loss(f, y, w, W).mean(), (X,), Y)
    close(computed(model, (X, Y), **given), truth)


def test_a_matrix_that_a_loss_of_all_that_a_float32_model_returns_takes():
    """What the number is of is tried in float64, the matrix too."""
    model, turn = Two(lambda a, b: (a, b)), torch.randn(4, 4, generator=G)

    def loss(f, y, turn):
        return (f[0] @ turn - y * f[1]).square().mean()

    given = {"loss": loss, "loss_arguments": {"turn": turn}, "batch_size": 3}
    found = computed(model, (X.float(), Y.float()), **given)
    assert any("one number, the mean over the samples" in n for n in found.metadata["notes"])
    truth = hessian(
        model.double(),
        lambda f, y: loss(f, y, turn.double()),
        (X.float().double(),),
        Y.float().double(),
    )
    close(found, truth, 1e-5)


def test_one_output_of_several_for_a_loss_of_ones_own():
    model = Two(lambda a, b: (a, b)).double()
    truth = hessian(model, lambda f, y: F.mse_loss(f[1], y), (X,), Y)
    for key in ("1", "-1"):
        close(computed(model, (X, Y), loss=F.mse_loss, output_key=key), truth)


def ranked(f: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """A partial likelihood: what each of some samples is, among those that come after it."""
    order = f.detach()[:, 0].argsort()
    after = f[order, 1].logcumsumexp(0)
    return ((after - f[order, 0]) * w[order]).sum() / w[order].sum()


INDEXED = {
    "terms": lambda f, y, w: w[torch.arange(len(f))] * F.cross_entropy(f, y, reduction="none"),
    "one number": lambda f, y, w: (w[: len(f)] * F.cross_entropy(f, y, reduction="none")).mean(),
    "loop": lambda f, y, w: sum(w[i] * F.cross_entropy(f[i], y[i]) for i in range(len(f))),
    "ranked": ranked,
}


@pytest.mark.parametrize("samples", [None, (3, 8), (0, 7)])
@pytest.mark.parametrize("name", INDEXED)
def test_entries_of_the_samples_that_are_taken_by_their_places(name, samples):
    """All of them have the places, too, but not these samples' entries there."""
    loss, w = INDEXED[name], torch.linspace(0.1, 8, 8, dtype=torch.float64) ** 2
    y, mine = CLASSES.flip(0), slice(*(samples or (0, 8)))
    data, options = {"x": X, "y": y, "w": w}, {"loss": loss, "loss_arguments": {"w": "@w"}}
    found = computed(net(8), data, samples=samples, batch_size=2, **options)
    truth = hessian(net(8), lambda f, y: loss(f, y, w[mine]).mean(), (X[mine],), y[mine])
    close(found, truth)
    notes = " ".join(found.metadata["notes"])
    assert "same for all samples" not in notes
    assert ("is not split into batches" in notes) == (name == "ranked")
    assert "all the data is one batch" not in notes


def test_what_a_loss_warns_of_where_it_is_tried_is_not_said():
    def loss(f, y, w):
        return F.cross_entropy(f, y) + F.mse_loss(f[:, 0], w) + f.detach().std(0).sum()

    options = {"loss": loss, "loss_arguments": {"w": "@w"}}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        computed(net(), {"x": X, "y": CLASSES, "w": Y[:, 0]}, **options)
    assert not [str(each.message) for each in said if "size" in str(each.message)]


def fisher_of_terms(
    terms: Callable[[int], Tensor], model: nn.Module, terms_each: int = 1
) -> Tensor:
    """1/D sum over i of g_i g_i^T, from the gradient g_i of each sample's terms."""
    total = torch.zeros(())
    for i in range(len(X)):
        grads = torch.autograd.grad(terms(i).sum(), [*model.parameters()])
        g = torch.cat([grad.flatten() for grad in grads])
        total = total + torch.outer(g, g)
    return total / (len(X) * terms_each)


@pytest.mark.parametrize(("method", "taken"), [("auto", "gauss-newton"), ("hvp", "hvp")])
def test_fisher_of_terms_that_a_model_returns(method, taken):
    options = {"curvature": "fisher", "method": method, "batch_size": 3}
    model = Lossy(lambda f, y: (f - y).pow(4))
    found = computed(model, {"x": X, "y": Y}, loss="output", **options)
    assert [block["method"] for block in found.metadata["blocks"]] == [taken]
    close(found, fisher_of_terms(lambda i: model(X[i : i + 1], Y[i : i + 1]), model, 4))
    several, loss = Two(Outputs).double(), FORMS["named"][1]
    found = computed(several, (X, Y), loss=loss, **options)
    assert [block["method"] for block in found.metadata["blocks"]] == [taken]
    close(found, fisher_of_terms(lambda i: loss(several(X[i : i + 1]), Y[i : i + 1]), several))


@pytest.mark.parametrize("method", ["auto", "gauss-newton", "hvp"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fisher_of_one_number_that_a_model_returns(method, reduction):
    options = {"curvature": "fisher", "method": method}
    model = Lossy(partial(F.mse_loss, reduction=reduction)).double()
    truth = fisher_of_terms(lambda i: model(X[i : i + 1], Y[i : i + 1]), model)
    truth = truth * (1 if reduction == "mean" else len(X))
    with pytest.raises(hesscli.HesscliError, match="as one number, so it has no output") as refused:
        computed(model, {"x": X, "y": Y}, loss="output", **options)
    assert refused.value.hint == "--batch-size 1"
    close(computed(model, {"x": X, "y": Y}, loss="output", batch_size=1, **options), truth)
    several, loss = Two(Outputs).double(), FORMS["named"][1]
    if reduction == "mean":
        whole = computed(
            several, (X, Y), loss=lambda f, y: loss(f, y).mean(), batch_size=1, **options
        )
        close(
            whole,
            fisher_of_terms(lambda i: loss(several(X[i : i + 1]), Y[i : i + 1]).mean(), several),
        )


def test_a_loss_that_does_not_take_all_that_a_model_returns():
    model = Two(Outputs).double()
    with pytest.raises(hesscli.HesscliError, match="accept output first, second and") as refused:
        computed(model, (X, Y), loss=nn.MSELoss())
    assert (refused.value.exit_code, refused.value.hint) == (4, "--output-key first")
    with pytest.raises(hesscli.HesscliError, match="no output to take its ggn at"):
        computed(model, (X, Y), loss=FORMS["named"][1], curvature="ggn")


def test_a_scripted_model_that_returns_several(cli):
    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.a(x)
            return z, torch.tanh(z)

    model = Scripted().double()
    torch.jit.script(model).save("two.pt")
    np.savez("d.npz", x=X, y=Y)
    Path("loss.py").write_text("def both(f, y):\n    return ((f[0] - y) * f[1]).square().mean()\n")
    ran = cli("compute", "two.pt", "d.npz", "--loss", "loss.py:both", "--blocks", "full")
    assert ran.code == 0
    assert "takes all of it" in ran.stderr
    truth = hessian(model, lambda f, y: ((f[0] - y) * f[1]).square().mean(), (X,), Y)
    assert relative_error(read(Path("hessian.safetensors"))[1]["hessian"].double(), truth) < 1e-9


EPS = torch.randn(8, 2, generator=G, dtype=torch.float64)


class Several(nn.Module):
    """Has a loss of what several layers make: heads, a code and its decoder, or of parts of what one does."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(5, 3)
        self.d = nn.Linear(2, 4)
        if how != "heads":
            del self.c
        if how not in ("code", "divergence"):
            del self.d

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if self.how == "heads":
            return F.mse_loss(self.b(h), y) - self.c(h).view(-1, 3, 1).log_softmax(1).mean()
        if self.how == "halves":
            mean, spread = self.b(h).chunk(2, 1)
            return (spread.exp() * (mean - y[:, :2]).square() - spread).mean()
        if self.how == "residual":
            return F.mse_loss(y + h[:, :4] + torch.tanh(self.b(h)), torch.ones_like(y))
        mean, spread = self.b(h)[:, :2], self.b(h)[:, 2:]
        code = mean + EPS * spread.exp()
        if self.how == "code":
            made = self.d(code)
        divergence = (mean**2 + spread.exp() - spread).sum(1).mean()
        if self.how == "divergence":
            made = self.d(code)
        return F.mse_loss(made, y) + divergence


@pytest.mark.parametrize("how", ["heads", "halves", "residual", "code", "divergence"])
def test_a_loss_of_what_several_layers_make(how):
    model = Several(how).double()
    truth = hessian(model, lambda f, _: f, (X, Y), None)
    found = computed(model, {"x": X, "y": Y}, loss="output", method="preactivation")
    close(found, truth)
    own = computed(model, {"x": X, "y": Y}, loss="output", blocks="diag")
    start = 0
    for name, parameter in model.named_parameters():
        part = truth[start : start + parameter.numel(), start : start + parameter.numel()]
        assert relative_error(own.block(name), part) < 1e-9
        start += parameter.numel()
    if how == "heads":
        assert {block["method"] for block in own.metadata["blocks"]} == {
            "preactivation",
            "gauss-newton",
        }


class Shaped(nn.Module):
    """Its output is one number, as long as the samples' largest entry, or complex."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = net(), how

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        if self.how == "one number":
            return h.square().mean()
        if self.how == "ragged":
            return h[:, : 1 + int(x[0, 0] > 0)]
        return (
            torch.complex(h, h.tanh()) if self.how == "complex" else h.flatten()[: 4 * len(h) - 1]
        )


@pytest.mark.parametrize("how", ["one number", "ragged", "complex", "one less"])
def test_one_number_of_outputs_of_other_shapes(how, monkeypatch):
    monkeypatch.setattr("hesscli.job.setup.reduction._MOST", 3)
    model, loss = Shaped(how).double(), lambda f, y: f.abs().square().mean()
    found = computed(model, (X, Y), loss=loss)
    close(found, hessian(model, loss, (X,), Y))


@pytest.mark.parametrize("free", [0, 1 << 30])
def test_one_number_is_tried_where_there_is_memory(free, monkeypatch):
    monkeypatch.setattr("hesscli.job.setup.reduction.available_memory", lambda: free)
    found = computed(net(), (X, Y), loss=nn.MSELoss())
    close(found, hessian(net(), F.mse_loss, (X,), Y))
    said = "the mean over the samples" if free else "one number for all data"
    assert any(said in note for note in found.metadata["notes"])


def test_one_number_in_few_passes(monkeypatch):
    monkeypatch.setattr("hesscli.job.setup.reduction._MOST", 3)
    found = computed(net(), (X, Y), loss=nn.MSELoss(), method="preactivation")
    close(found, hessian(net(), F.mse_loss, (X,), Y))


@pytest.mark.parametrize(
    "loss",
    [F.mse_loss, nn.L1Loss(), nn.SmoothL1Loss(reduction="none"), lambda f, y: F.huber_loss(y, f)],
)
def test_a_loss_that_would_broadcast_is_refused(loss):
    with pytest.raises(hesscli.HesscliError, match="due to broadcasting") as refused:
        computed(net(1), (X, Y[:, 0]), loss=loss)
    assert refused.value.exit_code == 4
    assert refused.value.hint == "store the targets with shape [8, 1]; broadcasting would be wrong"


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_loss_that_broadcasts_what_it_made():
    """All samples are compared with their mean: PyTorch warns, in vain."""

    def loss(f, y):
        return F.mse_loss(y - f, (y - f).mean(0, keepdim=True))

    found = computed(net(), (X, Y), loss=loss)
    close(found, hessian(net(), loss, (X,), Y))


def squared_error(f, y):
    return ((f - y) ** 2).mean()


def flat(f, y):
    return (torch.sigmoid(f.squeeze(1)) - y) ** 2


def counts(f, y):
    return F.poisson_nll_loss(f, y.abs())


def off_centre(f, y):
    return (f - (y - y.mean())).square().mean()


class SquaredError(nn.Module):
    def forward(self, f, y):
        return (f - y).square().mean(1)


@pytest.mark.parametrize(
    ("loss", "y", "said", "hint"),
    [
        (squared_error, Y[:, 0], "output [N, 1] and target [N]", "target[:, None]; or target[None]"),
        (SquaredError(), Y[:, 0], "output [N, 1] and target [N]", "target[:, None]"),
        (counts, Y[:, 0], "output [N, 1] and target [N]", "target[:, None]"),
        (off_centre, Y[:, 0], "output [N, 1] and target [N]", "target[:, None]"),
        (flat, Y[:, :1], "target [N, 1] and output [N]", "output[:, None]; or output[None]"),
        (squared_error, Y[:, :1, None], "target [N, 1, 1] and output [N, 1]", "output[:, None]; "),
    ],
)  # fmt: skip
def test_a_loss_that_pairs_samples_by_broadcasting_is_refused(loss, y, said, hint):
    with pytest.raises(hesscli.HesscliError) as refused:
        computed(net(1), (X, y), loss=loss)
    assert refused.value.exit_code == 4
    assert f"broadcasts {said}, which pairs" in str(refused.value)
    assert refused.value.hint.startswith(f"write {hint}")


def test_an_argument_that_pairs_samples_by_broadcasting_is_refused():
    def weighted(f, y, w):
        return w * (f - y) ** 2

    w = Y[:, :1].abs()
    with pytest.raises(hesscli.HesscliError, match=r"output, target \[N, 1\] and w \[N\]"):
        computed(net(1), (X, Y[:, :1]), loss=weighted, loss_arguments={"w": w[:, 0]})
    found = computed(net(1), (X, Y[:, :1]), loss=weighted, loss_arguments={"w": w})
    close(found, hessian(net(1), lambda f, y: weighted(f, y, w).mean(), (X,), Y[:, :1]))


@pytest.mark.parametrize(
    "loss",
    [
        lambda f, y: (f - y[None]) ** 2,
        lambda f, y: F.softplus((f - f.squeeze(1)) * (y - y[:, None])).mean(),
        lambda f, y: ((f.squeeze(1) - y) / y.std()) ** 2,
    ],
)
def test_a_loss_that_pairs_samples_on_purpose(loss):
    found = computed(net(1), (X, Y[:, 0]), loss=loss)
    close(found, hessian(net(1), lambda f, y: loss(f, y).mean(), (X,), Y[:, 0]))


class Returning(nn.Module):
    """A model that returns what `error` makes of it."""

    def __init__(self, error):
        super().__init__()
        self.net, self.error = net(1), error

    def forward(self, x, y):
        return self.error(self.net(x), y)


@pytest.mark.parametrize(
    ("error", "y", "said", "hint"),
    [
        (squared_error, Y[:, 0], "what it makes of x [N, 1] and y [N]", "y[:, None]; or y[None]"),
        (F.mse_loss, Y[:, 0], "what it makes of x [N, 1] and y [N]", "y[:, None]"),
        (counts, Y[:, 0], "what it makes of x [N, 1] and what it makes of y [N]", "(what it"),
        (off_centre, Y[:, 0], "what it makes of x [N, 1] and what it makes of y [N]", "(what it"),
        (flat, Y[:, :1], "y [N, 1] and what it makes of x [N]", "(what it makes of x)[:, None]"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_model_that_pairs_samples_by_broadcasting_is_refused(error, y, said, hint):
    with pytest.raises(hesscli.HesscliError) as refused:
        computed(Returning(error), (X, y), loss="output")
    assert refused.value.exit_code == 4
    assert f"the model broadcasts {said}, which pairs" in str(refused.value)
    assert refused.value.hint.startswith(f"write {hint}")


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("form", [torch.jit.script, torch.jit.trace])
def test_a_script_that_pairs_samples_by_broadcasting_is_refused(cli, form):
    class Script(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(1).float()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.mse_loss(self.net(x), y)

    given = X.float(), Y[:, 0].float()
    (form(Script()) if form is torch.jit.script else form(Script(), given)).save("m.pt")
    np.savez("d.npz", x=given[0], y=given[1])
    ran = cli("compute", "m.pt", "d.npz", "--loss", "output")
    assert ran.code == 4
    assert "broadcasts what it makes of x [N, 1] and y [N]" in ran.stderr


def pairs(f, y):
    """Of each two samples, which is put before the other."""
    return F.softplus((f - f.squeeze(1)) * (y - y[:, None])).mean()


def centred(f, y):
    return ((f.squeeze(1) - y) / y.std()).square()


@pytest.mark.parametrize("error", [pairs, centred, lambda f, y: (f - y[None]).square()])
def test_a_model_that_pairs_samples_on_purpose(error):
    model = Returning(error)
    found = computed(model, (X, Y[:, 0]), loss="output")
    truth = hessian(model, lambda f, y: f.mean(), (X, Y[:, 0]), Y)
    close(found, truth)


def test_a_loss_of_all_that_pairs_samples_by_broadcasting_is_refused():
    model = Two(lambda a, b: (a, b)).double()
    with pytest.raises(hesscli.HesscliError, match=r"broadcasts what it makes of x \[N, .* target"):
        computed(model, (X, Y[:, 0]), loss=lambda f, y: (f[0][:, :1] - y + f[1][:, :1]).square())


class OfSparse(nn.Module):
    """Returns its loss, and has a sparse buffer, which lies in no one place."""

    def __init__(self):
        super().__init__()
        self.net = net(1)
        self.register_buffer("mix", torch.eye(3, dtype=torch.float64).to_sparse())

    def forward(self, x, y):
        return (self.net(torch.sparse.mm(self.mix, x.T).T) - y).square().mean()


def test_a_sparse_model_that_returns_its_loss():
    found = computed(OfSparse(), (X, Y[:, :1]), loss="output")
    close(found, hessian(net(1), F.mse_loss, (X,), Y[:, :1]))


class OnGrid(nn.Module):
    """The squared gap of a surface at each place and each time, of which there may be as many."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.3, 0.7], dtype=torch.float64))

    def forward(self, place, time):
        return (torch.sin(self.a[0] * place + self.a[1] * time) - place * time).square().mean()


def test_a_grid_of_places_and_times():
    data = {"place": torch.rand(5, 1, generator=G).double(), "time": torch.rand(5).double()}
    truth = hessian(OnGrid(), lambda f, y: f, tuple(data.values()), data["time"])
    for unbatched in (True, False):
        found = computed(OnGrid(), data, inputs=tuple(data), loss="output", unbatched=unbatched)
        close(found, truth)


class Apart(nn.Module):
    """How far what it makes of each of some samples is from each of others."""

    def __init__(self):
        super().__init__()
        self.one, self.other = net(2), net(2)

    def forward(self, x, z):
        x, z = self.one(x), self.other(z)
        squares = x.square().sum(1, keepdim=True) + z.square().sum(1) - 2 * x @ z.T
        return (-squares).exp().mean()


def test_distances_of_all_pairs():
    data = {"x": X, "z": X.flip(0) + 1}
    found = computed(Apart(), data, inputs=("x", "z"), loss="output")
    truth = hessian(Apart(), lambda f, y: f, tuple(data.values()), X)
    close(found, truth)
    found = computed(Apart(), data, inputs=("x", "z"), loss="output", params="one.*")
    close(found, truth[: len(truth) // 2, : len(truth) // 2])
