"""Small models, each with data and a loss, for which the oracles give the Hessian.

One line is one case: name, model, inputs. The loss is the mean squared error unless said. Targets
are drawn to fit the model's output. All is seeded and float64, yet every number fits float32
exactly, so the same reference serves a float32 copy. Nothing here imports the package under test.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from oracles import hessian, hessian_by_differences
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

KINDS = ("script", "trace", "exported", "state_dict")
SUFFIX = {"script": ".pt", "trace": ".pt", "exported": ".pt2", "state_dict": ".safetensors"}

GOLDEN = Path(__file__).parent / "golden" / "routes.json"
"""How many blocks of each case the fast routes take, and how many they refuse."""

# einsum's steps differ from one PyTorch to the next.
VARYING = {"einsum"}


def of_classes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """PyTorch's loss with the classes along the last axis, if the targets fit that alone."""

    def loss(z: Tensor, y: Tensor, **options: Any) -> Tensor:
        if z.dim() == y.dim() + 1 == 3 and z.shape[1] == y.shape[1] != z.shape[2]:
            return function(z.flatten(0, 1), y.flatten(), **options)
        return function(z, y, **options)

    return loss


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "cross-entropy": of_classes(F.cross_entropy),
    "nll": of_classes(F.nll_loss),
    "bce-with-logits": F.binary_cross_entropy_with_logits,
    "bce": F.binary_cross_entropy,
    "huber": F.huber_loss,
    "smooth-l1": F.smooth_l1_loss,
    "l1": F.l1_loss,
    "poisson-nll": F.poisson_nll_loss,
    # PyTorch announces another meaning for this one's "mean"; today's is over all elements.
    "kl-div": lambda z, y, **options: F.kl_div(z, y, reduction="none", **options).mean(),
    "output": lambda output, target: output.mean(),
}


@dataclass(frozen=True, eq=False)
class Case:
    name: str
    make: Callable[[], nn.Module] = field(repr=False)  # float64, eval mode, same weights each time
    inputs: tuple[Tensor, ...] = field(repr=False)
    target: Tensor | None = field(repr=False)
    loss: str
    loss_arguments: dict[str, Any]
    oracle: str  # "autograd", or "differences" where double backward is wrong or missing
    kinds: tuple[str, ...]  # the files that can hold this model
    output_key: str | int | None  # which of several outputs the loss reads
    fixed_batch: bool  # an exported program then takes exactly this many samples
    tags: frozenset[str]

    def __str__(self) -> str:
        return self.name

    def reference(self, output: Any, target: Tensor | None) -> Tensor:
        """The loss as `torch.nn.functional` defines it, with `reduction="mean"`."""
        output = output if self.output_key is None else output[self.output_key]
        return LOSSES[self.loss](output, target, **self.loss_arguments)

    def arguments(self) -> list[str]:
        """The command line's options for a file written by `save`."""
        words = ["--loss", self.loss]
        for key, value in self.loss_arguments.items():
            words += ["--loss-arg", f"{key}={f'@{key}' if isinstance(value, Tensor) else value}"]
        if self.output_key is not None:
            words += ["--output-key", str(self.output_key)]
        if len(self.inputs) > 1:
            words += [word for i in range(len(self.inputs)) for word in ("--inputs", f"x{i}")]
        return words


@functools.cache
def expected(case: Case) -> Tensor:
    """[P, P], over the parameters that require a gradient."""
    oracle = {"autograd": hessian, "differences": hessian_by_differences}[case.oracle]
    return oracle(case.make(), case.reference, case.inputs, case.target)


def build(case: str) -> nn.Module:
    """The factory behind `--arch architectures.py:build --arch-arg case=NAME`.

    All its numbers are NaN, so that a file which was not loaded cannot go unnoticed.
    """
    module = BY_NAME[case].make()
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.fill_(torch.nan)
    return module


def save(
    case: Case, kind: str, folder: Path, dtype: torch.dtype = torch.float64
) -> tuple[Path, Path]:
    """Write the model as `kind` and its data as .npz (x or x0, x1, ...; y; tensors of the loss)."""
    cast = functools.partial(_cast, dtype=dtype)
    model, inputs = case.make().to(dtype), tuple(map(cast, case.inputs))
    model_path = Path(folder) / f"{case.name}-{kind}{SUFFIX[kind]}"
    data_path = Path(folder) / f"{case.name}.npz"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's and the exporter's talk
        _save_model(case, kind, model, inputs, model_path)

    names = ["x"] if len(inputs) == 1 else [f"x{i}" for i in range(len(inputs))]
    arrays = dict(zip(names, inputs, strict=True))
    arrays |= {} if case.target is None else {"y": cast(case.target)}
    arrays |= {k: cast(v) for k, v in case.loss_arguments.items() if isinstance(v, Tensor)}
    np.savez(data_path, **{key: value.numpy() for key, value in arrays.items()})
    return model_path, data_path


def _save_model(
    case: Case, kind: str, model: nn.Module, inputs: tuple[Tensor, ...], path: Path
) -> None:
    if kind == "script":
        torch.jit.script(model).save(path)
    elif kind == "trace":
        # Without the check, which retraces under no_grad, where attention takes another way.
        loose = isinstance(case.output_key, str)
        torch.jit.trace(model, inputs, strict=not loose, check_trace=False).save(path)
    elif kind == "exported":
        batch = {} if case.fixed_batch else {0: torch.export.Dim("batch")}
        shapes = tuple(batch for _ in inputs)
        torch.export.save(torch.export.export(model, inputs, dynamic_shapes=shapes), path)
    else:
        save_model(model, str(path))  # tied parameters once


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


# Data. The seed goes with the shape, so that a new case leaves the others as they are.


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def positive(*shape: int, seed: int = 0) -> Tensor:
    return (normal(*shape, seed=seed).abs() + 0.25).float().double()


def labels(classes: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def probabilities(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).softmax(1).float().double()


TARGETS: dict[str, Callable[[torch.Size], Tensor | None]] = {
    "cross-entropy": lambda shape: labels(shape[1], shape[0], *shape[2:], seed=9),
    "nll": lambda shape: labels(shape[1], shape[0], *shape[2:], seed=9),
    "bce-with-logits": lambda shape: labels(2, *shape, seed=9).double(),
    "bce": lambda shape: labels(2, *shape, seed=9).double(),
    "poisson-nll": lambda shape: labels(4, *shape, seed=9).double(),
    "kl-div": lambda shape: probabilities(*shape, seed=9),
    "output": lambda shape: None,
}


def case(
    name: str,
    model: Callable[[], nn.Module],
    *inputs: Tensor,
    loss: str = "mse",
    target: Tensor | None = None,
    oracle: str = "autograd",
    lacks: str = "",  # kinds of file that cannot hold it
    output_key: str | int | None = None,
    fixed_batch: bool = False,
    seed: int = 0,  # another one where a kink lies too close
    **loss_arguments: Any,
) -> Case:
    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
            torch.default_generator.manual_seed(seed)  # no GPU's, which would keep the stack
            warnings.simplefilter("ignore", FutureWarning)  # the old weight_norm still has users
            module = model().float()
            for parameter in module.parameters():  # no zero biases, no unit gains
                parameter += 0.2 * torch.randn_like(parameter)
            for key, buffer in module.named_buffers():  # no untrained statistics
                if key.endswith("running_mean"):
                    buffer.normal_()
                elif key.endswith("running_var"):
                    buffer.uniform_(0.5, 2)
            return module.double().eval()

    if target is None:
        with torch.no_grad():
            output = make()(*inputs)
        output = output if output_key is None else output[output_key]
        target = TARGETS.get(loss, lambda shape: normal(*shape, seed=9))(output.shape)
    kinds = tuple(kind for kind in KINDS if kind not in lacks.split())
    return Case(
        name, make, inputs, target, loss, loss_arguments,
        oracle, kinds, output_key, fixed_batch, frozenset(),
    )  # fmt: skip


def tagged(tag: str, *cases: Case) -> list[Case]:
    return [dataclasses.replace(c, tags=c.tags | {tag}) for c in cases]


# Models that are not a chain of ready-made layers. TorchScript has to read them, hence the types.


class Residual(nn.Module):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Twice(nn.Module):
    """One layer, applied two times."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class TiedNames(nn.Module):
    """Two layers, one Parameter: words in, scores of words out."""

    def __init__(self, words: int, width: int):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.hidden = nn.Linear(width, width)
        self.score = nn.Linear(width, words)
        self.score.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.score(torch.tanh(self.hidden(self.embed(x))))


class TiedTranspose(nn.Module):
    """An autoencoder whose decoder is its encoder, transposed."""

    def __init__(self, width: int, code: int):
        super().__init__()
        self.encode = nn.Linear(width, code)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encode(x)), self.encode.weight.t())


class Scale(nn.Module):
    """A bare Parameter, elementwise."""

    def __init__(self, *shape: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


class Gated(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.value = nn.Linear(inputs, outputs)
        self.gate = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * torch.sigmoid(self.gate(x))


class TwoTowers(nn.Module):
    def __init__(self, left: int, right: int, outputs: int):
        super().__init__()
        self.left = nn.Linear(left, 3)
        self.right = nn.Linear(right, 3)
        self.head = nn.Linear(6, outputs)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([torch.tanh(self.left(a)), torch.sigmoid(self.right(b))], 1))


class WordAndFeatures(nn.Module):
    """Integers and floats, side by side."""

    def __init__(self, words: int, features: int, outputs: int):
        super().__init__()
        self.embed = nn.Embedding(words, 3)
        self.head = nn.Linear(3 + features, outputs)

    def forward(self, word: Tensor, x: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.cat([self.embed(word), x], 1)))


class Einsum(nn.Module):
    """A quadratic form per output."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.core = nn.Parameter(torch.zeros(inputs, outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("ni,ioj,nj->no", x, self.core, x))


class Heads(nn.Module):
    """Two layers whose weights have an axis of heads, as attention's may have: [heads, inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, inputs, 3))
        self.bias = nn.Parameter(torch.zeros(2, 3))
        self.out = nn.Parameter(torch.zeros(2, 3, outputs))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.transpose(1, 2).reshape(6, -1)
        h = torch.tanh(F.linear(x, weight, self.bias.view(6)))  # head after head
        h = h.unflatten(-1, (2, 3)).transpose(-1, -2).flatten(-2)  # side by side
        return h @ self.out.transpose(0, 1).reshape(6, -1)


class Experts(nn.Module):
    """Layers that stand side by side, each with the same inputs, and their mean."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, inputs, 2))
        self.bias = nn.Parameter(torch.zeros(3, 1, 2))
        self.out = nn.Parameter(torch.zeros(3, 2, outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(torch.baddbmm(self.bias, x.expand(3, -1, -1), self.weight))
        return torch.bmm(h, self.out).mean(0)


class Masked(nn.Linear):
    """Some of its weights are pruned."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        mask = torch.arange(outputs).unsqueeze(1) + torch.arange(inputs)
        self.register_buffer("mask", (mask % 3 > 0).double())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Distances(nn.Module):
    """A radial basis layer, whose sums PyTorch does not differentiate twice."""

    def __init__(self, inputs: int, centres: int):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(centres, inputs))

    def forward(self, x: Tensor) -> Tensor:
        squares = (x.unsqueeze(1) - self.centres).square().permute(2, 0, 1).flatten(1)
        lengths = torch.tensor([x.shape[1]], device=x.device)
        sums = torch.segment_reduce(squares, "sum", lengths=lengths, axis=0)
        return torch.exp(-sums.view(x.shape[0], -1).sqrt())


class Unused(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.spare = nn.Linear(inputs, 2)
        self.used = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(x))


class NamedOutputs(nn.Module):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"logits": logits, "scores": logits.softmax(1)}


class ManyOutputs(nn.Module):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.body(x)
        return logits.softmax(1), logits


class SampleLoss(nn.Module):
    """Returns the loss of every sample."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.body(x) - y).pow(4).sum(1)


class MeanLoss(nn.Module):
    """Returns the loss, averaged over the batch."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.body(x), y)


class LastStep(nn.Module):
    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0][:, -1]


class Unrolled(nn.Module):
    """A cell in a loop: one affine map, used once per step."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x[:, 0])
        for t in range(1, x.shape[1]):
            h = self.cell(x[:, t], h)
        return h


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x, need_weights=False)[0].mean(1)


class AttentionByHand(nn.Module):
    def __init__(self, width: int, causal: bool = False):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)[:, -1]


class MeanOverTime(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def mlp(
    activation: nn.Module | None = None, inputs: int = 3, hidden: int = 4, outputs: int = 3
) -> nn.Module:
    middle = nn.Tanh() if activation is None else activation
    return chain(nn.Linear(inputs, hidden), middle, nn.Linear(hidden, outputs))


def log_probabilities() -> nn.Module:
    return chain(mlp(), nn.LogSoftmax(1))


def image(layer: nn.Module, features: int, outputs: int = 2) -> nn.Module:
    """A layer that sees the input, then a head on its `features` outputs."""
    return chain(layer, nn.Tanh(), nn.Flatten(), nn.Linear(features, outputs))


def pooled(pool: nn.Module, features: int) -> nn.Module:
    return chain(nn.Conv2d(1, 2, 2), nn.Tanh(), pool, nn.Flatten(), nn.Linear(features, 2))


def between(layer: nn.Module) -> nn.Module:
    """A layer of four features amid curved ones, where its mixed derivatives show."""
    return chain(nn.Linear(3, 4), nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 2))


def channels(norm: nn.Module) -> nn.Module:
    return chain(nn.Conv1d(2, 4, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 2))


def recurrent(cell: nn.Module, width: int) -> nn.Module:
    return chain(LastStep(cell), nn.Linear(width, 2))


def words(embedding: nn.Module) -> nn.Module:
    return chain(embedding, nn.Flatten(), mlp(inputs=6))


def padded(mode: str) -> nn.Module:
    return image(nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode), 18)


def channels_out(conv: Callable[[int, int, int], nn.Module]) -> nn.Module:
    """Scores of three classes at every place."""
    return chain(conv(2, 4, 2), nn.Tanh(), conv(4, 3, 1))


def transformer(activation: str, norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        4, 2, 3, activation=activation, norm_first=norm_first, batch_first=True
    )
    return chain(layer, MeanOverTime(), nn.Linear(4, 2))


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


# The table.

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "celu": lambda: nn.CELU(0.7),
    "elu": lambda: nn.ELU(1.3),
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU("tanh"),
    "hardshrink": lambda: nn.Hardshrink(0.3),
    "hardswish": nn.Hardswish,
    "hardtanh": lambda: nn.Hardtanh(-0.6, 0.8),
    "identity": nn.Identity,
    "leaky-relu": lambda: nn.LeakyReLU(0.1),
    "log-sigmoid": nn.LogSigmoid,
    "log-softmax": lambda: nn.LogSoftmax(1),
    "mish": nn.Mish,
    "prelu": nn.PReLU,
    "prelu-per-feature": lambda: nn.PReLU(4),
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "rrelu": nn.RReLU,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softmax": lambda: nn.Softmax(1),
    "softmin": lambda: nn.Softmin(1),
    "softplus": lambda: nn.Softplus(beta=2, threshold=15),
    "softshrink": lambda: nn.Softshrink(0.3),
    "softsign": nn.Softsign,
    "tanh": nn.Tanh,
    "tanhshrink": nn.Tanhshrink,
    "threshold": lambda: nn.Threshold(0.1, -0.5),
}

ROWS = normal(6, 3)
TABLE = normal(8, 4)
SIGNALS = normal(5, 2, 5)
IMAGES = normal(4, 2, 5, 5)
GRAY = normal(5, 1, 5, 5)
SMALL = normal(4, 1, 3, 3)
CUBES = normal(4, 2, 3, 3, 3)
STEPS = normal(5, 3, 2)
TOKENS = normal(4, 3, 4)
WORDS = labels(7, 8, 2)
CLASSES = torch.tensor([0, 2, 1, 1, 2, 0])
CE = {"loss": "cross-entropy"}

CASES: list[Case] = [
    *tagged(
        "closed-form",
        case("linear", lambda: nn.Linear(4, 3), TABLE),
        case("linear-no-bias", lambda: nn.Linear(4, 3, bias=False), TABLE),
        case("softmax", lambda: nn.Linear(4, 3), TABLE, **CE),
        case("softmax-no-bias", lambda: nn.Linear(4, 3, bias=False), TABLE, **CE),
        case("logistic", lambda: nn.Linear(4, 2), TABLE, loss="bce-with-logits"),
    ),
    *tagged(
        "activation",
        *(
            case(f"mlp-{name}", lambda layer=layer: mlp(layer()), ROWS, **CE)
            for name, layer in ACTIVATIONS.items()
        ),
        case("mlp-hardsigmoid", lambda: mlp(nn.Hardsigmoid()), ROWS, oracle="differences"),
        case("mlp-glu", lambda: chain(nn.Linear(3, 8), nn.GLU(), nn.Linear(4, 2)), ROWS),
        case("mlp-deep", lambda: chain(mlp(), nn.ReLU(), mlp(nn.SiLU())), ROWS),
        case("mlp-dropout", lambda: mlp(chain(nn.Tanh(), nn.Dropout(0.5))), ROWS),
        case("mlp-over-time", mlp, TOKENS[..., :3]),
    ),
    *tagged(
        "convolution",
        case("conv1d", lambda: image(nn.Conv1d(2, 3, 3), 9), SIGNALS),
        case("conv1d-same", lambda: image(nn.Conv1d(2, 3, 3, padding="same"), 15), SIGNALS),
        case("conv1d-depthwise", lambda: image(nn.Conv1d(2, 4, 3, groups=2), 12), SIGNALS),
        case("conv2d", lambda: image(nn.Conv2d(2, 3, 3), 27), IMAGES, **CE),
        case("conv2d-no-bias", lambda: image(nn.Conv2d(2, 3, 3, bias=False), 27), IMAGES),
        case("conv2d-groups", lambda: image(nn.Conv2d(2, 4, 3, groups=2), 36), IMAGES),
        case("conv2d-dilation", lambda: image(nn.Conv2d(1, 3, 2, dilation=2), 27), GRAY),
        case("conv2d-stride", lambda: image(nn.Conv2d(2, 2, (3, 2), (2, 1)), 16), IMAGES),
        case("conv2d-padding", lambda: image(nn.Conv2d(1, 2, 3, padding=1), 50), GRAY),
        case("conv2d-reflect", lambda: padded("reflect"), SMALL),
        case("conv2d-replicate", lambda: padded("replicate"), SMALL),
        case("conv2d-circular", lambda: padded("circular"), SMALL),
        case("conv3d", lambda: image(nn.Conv3d(2, 2, 2), 16), CUBES),
        case("conv3d-groups", lambda: image(nn.Conv3d(2, 2, 2, groups=2), 16), CUBES),
        case("conv-transpose1d", lambda: image(nn.ConvTranspose1d(2, 3, 3), 21), SIGNALS),
        case("conv-transpose2d", lambda: image(nn.ConvTranspose2d(1, 2, 2), 32), SMALL),
        case("conv-transpose2d-groups",
             lambda: image(nn.ConvTranspose2d(2, 2, 3, 2, 1, output_padding=1, groups=2), 32),
             IMAGES[..., :2, :2]),
        case("conv-conv", lambda: pooled(chain(nn.ReLU(), nn.Conv2d(2, 3, 2)), 27), GRAY, **CE,
             seed=1),
    ),
    *tagged(
        "pooling",
        case("max-pool1d", lambda: chain(nn.MaxPool1d(2), image(nn.Conv1d(2, 3, 2), 3)), SIGNALS),
        case("max-pool2d", lambda: pooled(nn.MaxPool2d(2), 8), GRAY, **CE),
        case("max-pool2d-overlap", lambda: pooled(nn.MaxPool2d(3, 1, 1), 32), GRAY, seed=4),
        case("avg-pool1d", lambda: channels(nn.AvgPool1d(3, 1, 1)), SIGNALS),
        case("avg-pool2d", lambda: pooled(nn.AvgPool2d(2), 8), GRAY),
        case("avg-pool2d-edge", lambda: pooled(nn.AvgPool2d(3, 2, 1, False, False), 8), GRAY),
        case("adaptive-avg-pool2d", lambda: pooled(nn.AdaptiveAvgPool2d((3, 2)), 12), GRAY),
        case("adaptive-max-pool2d", lambda: pooled(nn.AdaptiveMaxPool2d(2), 8), GRAY),
        case("lp-pool2d", lambda: pooled(nn.LPPool2d(2, 2), 8), GRAY),
        case("upsample", lambda: pooled(nn.Upsample(None, 2, "bilinear"), 32), SMALL),
        case("pixel-shuffle", lambda: chain(nn.Conv2d(1, 4, 2), image(nn.PixelShuffle(2), 16)),
             SMALL),
    ),
    *tagged(
        "norm",
        case("batch-norm1d", lambda: between(nn.BatchNorm1d(4)), ROWS),
        case("batch-norm2d", lambda: pooled(nn.BatchNorm2d(2), 32), GRAY, **CE),
        case("batch-norm3d", lambda: chain(nn.Conv3d(2, 2, 2), image(nn.BatchNorm3d(2), 16)),
             CUBES),
        case("batch-norm-plain", lambda: between(nn.BatchNorm1d(4, affine=False)), ROWS),
        case("layer-norm", lambda: between(nn.LayerNorm(4)), ROWS),
        case("layer-norm-no-bias", lambda: between(nn.LayerNorm(4, bias=False)), ROWS),
        case("layer-norm-2d", lambda: channels(nn.LayerNorm((4, 4))), SIGNALS),
        case("group-norm", lambda: channels(nn.GroupNorm(2, 4)), SIGNALS, **CE),
        case("instance-norm", lambda: channels(nn.InstanceNorm1d(4, affine=True)), SIGNALS),
        case("instance-norm-2d", lambda: pooled(nn.InstanceNorm2d(2, affine=True), 32), GRAY),
        case("instance-norm-tracked", lambda: channels(nn.InstanceNorm1d(4, 1e-5, 0.1, True, True)),
             SIGNALS),
        case("rms-norm", lambda: between(nn.RMSNorm(4)), ROWS),
        case("local-response-norm", lambda: channels(nn.LocalResponseNorm(2, alpha=0.5)), SIGNALS),
        case("weight-norm", lambda: between(weight_norm(nn.Linear(4, 4))), ROWS,
             oracle="differences", lacks="script"),
        case("weight-norm-conv", lambda: image(weight_norm(nn.Conv1d(2, 3, 2)), 12), SIGNALS,
             oracle="differences", lacks="script"),
        case("weight-norm-old", lambda: between(nn.utils.weight_norm(nn.Linear(4, 4))), ROWS,
             oracle="differences", lacks="script"),
        case("spectral-norm", lambda: between(spectral_norm(nn.Linear(4, 4))), ROWS,
             lacks="script"),
        case("spectral-norm-old", lambda: between(nn.utils.spectral_norm(nn.Linear(4, 4))), ROWS,
             lacks="script"),
    ),
    *tagged(
        "embedding",
        case("embedding", lambda: words(nn.Embedding(7, 3)), WORDS, **CE),
        # The padding word's row is a constant to PyTorch, though the loss depends on it.
        case("embedding-padding", lambda: words(nn.Embedding(7, 3, padding_idx=1)), WORDS),
        case("embedding-bag", lambda: chain(nn.EmbeddingBag(7, 3), mlp()), WORDS,
             oracle="differences"),
        case("embedding-bag-sum", lambda: chain(nn.EmbeddingBag(7, 3, mode="sum"), mlp()), WORDS,
             oracle="differences"),
        case("embedding-and-floats", lambda: WordAndFeatures(5, 2, 3), labels(5, 6), ROWS[:, :2],
             **CE),
    ),
    *tagged(
        "recurrent",
        case("rnn", lambda: recurrent(nn.RNN(2, 3, batch_first=True), 3), STEPS),
        case("rnn-relu", lambda: recurrent(nn.RNN(2, 3, 1, "relu", batch_first=True), 3), STEPS),
        case("gru", lambda: recurrent(nn.GRU(2, 3, batch_first=True), 3), STEPS),
        case("gru-2-layers", lambda: recurrent(nn.GRU(2, 2, 2, batch_first=True), 2), STEPS, **CE),
        case("lstm", lambda: recurrent(nn.LSTM(2, 3, batch_first=True), 3), STEPS),
        case("lstm-2-layers", lambda: recurrent(nn.LSTM(2, 2, 2, batch_first=True), 2), STEPS),
        case("lstm-both-ways",
             lambda: recurrent(nn.LSTM(2, 2, batch_first=True, bidirectional=True), 4), STEPS),
        case("rnn-cell", lambda: Unrolled(nn.RNNCell(2, 3)), STEPS),
        case("gru-cell", lambda: Unrolled(nn.GRUCell(2, 3)), STEPS),
    ),
    *tagged(
        "attention",
        case("multihead-attention", lambda: SelfAttention(4, 2), TOKENS),
        case("attention-by-hand", lambda: AttentionByHand(4), TOKENS),
        case("attention-causal", lambda: AttentionByHand(4, causal=True), TOKENS),
        case("transformer-relu", lambda: transformer("relu", norm_first=False), TOKENS),
        case("transformer-gelu", lambda: transformer("gelu", norm_first=False), TOKENS),
        case("transformer-relu-first", lambda: transformer("relu", norm_first=True), TOKENS),
        case("transformer-gelu-first", lambda: transformer("gelu", norm_first=True), TOKENS, **CE),
    ),
    *tagged(
        "structure",
        case("tied-names", lambda: TiedNames(6, 3), labels(6, 7), **CE),
        case("tied-transpose", lambda: TiedTranspose(4, 3), TABLE),
        case("twice", lambda: Twice(nn.Linear(4, 4)), TABLE),
        case("twice-conv", lambda: Twice(nn.Conv2d(2, 2, 3, padding=1)), IMAGES[..., :3, :3]),
        case("residual", lambda: between(Residual(mlp(nn.ReLU(), 4, 5, 4))), ROWS),
        case("residual-norm",
             lambda: between(Residual(chain(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU()))), ROWS),
        case("bilinear", lambda: nn.Bilinear(3, 2, 4), ROWS, TABLE[:6, :2], **CE),
        case("two-inputs", lambda: TwoTowers(3, 2, 2), ROWS, TABLE[:6, :2]),
        case("einsum", lambda: Einsum(3, 4), ROWS),
        case("heads", lambda: Heads(3, 2), ROWS),
        case("heads-over-time", lambda: Heads(4, 2), TOKENS, **CE),
        case("experts", lambda: Experts(3, 2), ROWS, **CE),
        case("masked", lambda: between(Masked(4, 4)), ROWS),
        case("masked-relu", lambda: chain(Masked(3, 5), nn.ReLU(), Masked(5, 2)), ROWS, **CE),
        case("segments", lambda: chain(Distances(3, 4), nn.Linear(4, 2)), ROWS, oracle="differences",
             fixed_batch=True),
        case("scale", lambda: chain(nn.Linear(3, 4), Scale(4), nn.Tanh(), Scale(1)), ROWS),
        case("gated", lambda: chain(Gated(3, 4), nn.Linear(4, 2)), ROWS),
        case("unused", lambda: Unused(3, 2), ROWS),
        case("frozen", lambda: frozen(mlp(), "0.weight", "2.bias"), ROWS),
        case("dict-output", lambda: NamedOutputs(mlp()), ROWS, output_key="logits", **CE),
        case("tuple-output", lambda: ManyOutputs(mlp()), ROWS, output_key=1, **CE),
        case("one-output", lambda: chain(mlp(outputs=1), nn.Flatten(0)), ROWS),
    ),
    *tagged(
        "loss",
        case("ce-smoothing", mlp, ROWS, **CE, label_smoothing=0.1),
        case("ce-weight", mlp, ROWS, **CE, weight=positive(3)),
        case("ce-ignore", mlp, ROWS, **CE, ignore_index=2, target=CLASSES),
        case("ce-ignore-default", mlp, ROWS, **CE, target=CLASSES.where(CLASSES != 2, -100)),
        case("ce-weight-ignore-smoothing", mlp, ROWS, **CE, target=CLASSES,
             weight=positive(3), ignore_index=0, label_smoothing=0.2),
        case("ce-probabilities", mlp, ROWS, **CE, target=probabilities(6, 3)),
        case("ce-probabilities-weight-smoothing", mlp, ROWS, **CE, target=probabilities(6, 3),
             weight=positive(3), label_smoothing=0.1),
        case("ce-sequence", lambda: channels_out(nn.Conv1d), SIGNALS, **CE),
        case("ce-classes-last", lambda: mlp(inputs=5, outputs=4), SIGNALS, **CE,
             target=labels(4, 5, 2)),
        case("nll-classes-last",
             lambda: chain(mlp(inputs=5, outputs=4), nn.LogSoftmax(-1)), SIGNALS, loss="nll",
             target=labels(4, 5, 2), weight=positive(4), ignore_index=2),
        case("ce-segmentation", lambda: channels_out(nn.Conv2d), IMAGES, **CE),
        case("ce-segmentation-weight-ignore", lambda: channels_out(nn.Conv2d), IMAGES, **CE,
             weight=positive(3), ignore_index=1),
        case("nll", log_probabilities, ROWS, loss="nll"),
        case("nll-weight-ignore", log_probabilities, ROWS, loss="nll", target=CLASSES,
             weight=positive(3), ignore_index=2),
        case("bce-logits", mlp, ROWS, loss="bce-with-logits"),
        case("bce-logits-soft", mlp, ROWS, loss="bce-with-logits", target=probabilities(6, 3)),
        case("bce-logits-weights", mlp, ROWS, loss="bce-with-logits",
             pos_weight=positive(3), weight=positive(3, seed=1)),
        case("bce", lambda: chain(mlp(), nn.Sigmoid()), ROWS, loss="bce"),
        case("bce-weight", lambda: chain(mlp(), nn.Sigmoid()), ROWS, loss="bce",
             weight=positive(3)),
        case("huber", mlp, ROWS, loss="huber"),
        case("huber-delta", mlp, ROWS, loss="huber", delta=0.6),
        case("smooth-l1", mlp, ROWS, loss="smooth-l1"),
        case("smooth-l1-beta", mlp, ROWS, loss="smooth-l1", beta=0.6),
        case("smooth-l1-beta-0", mlp, ROWS, loss="smooth-l1", beta=0.0),
        case("l1", mlp, ROWS, loss="l1"),
        case("l1-of-linear", lambda: nn.Linear(3, 3), ROWS, loss="l1"),  # no curvature at all
        case("poisson", mlp, ROWS, loss="poisson-nll", full=True),
        case("poisson-rates", lambda: chain(mlp(), nn.Softplus()), ROWS, loss="poisson-nll",
             log_input=False, eps=1e-3),
        case("kl-div", log_probabilities, ROWS, loss="kl-div"),
        case("kl-div-log-target", log_probabilities, ROWS, loss="kl-div", log_target=True,
             target=probabilities(6, 3).log().float().double()),
        case("output-samples", lambda: SampleLoss(mlp()), ROWS, TABLE[:6, :3], loss="output"),
        case("output-mean", lambda: MeanLoss(mlp()), ROWS, CLASSES, loss="output"),
    ),
]  # fmt: skip
BY_NAME = {c.name: c for c in CASES}
