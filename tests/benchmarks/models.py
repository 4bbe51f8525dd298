"""The tasks' models and data, seeded. All are classifiers under the mean cross-entropy."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.tasks import BY_NAME


@dataclass(frozen=True)
class Problem:
    """What every peer gets: the Hessian of `loss(module(inputs), target)` is wanted."""

    module: nn.Module
    inputs: Tensor
    target: Tensor
    loss: nn.Module


def build(task: str, toy: bool) -> Problem:
    """The task's problem; the same numbers each time."""
    described = BY_NAME[task]
    torch.manual_seed(0)
    module, inputs = BUILDERS[described.model](**(described.toy if toy else described.sizes))
    module.eval()
    with torch.no_grad():
        _, classes, *places = module(inputs[:2]).shape
    target = torch.randint(classes, (len(inputs), *places))
    return Problem(module, inputs, target, nn.CrossEntropyLoss())


def save(problem: Problem, model: Path, data: Path) -> None:
    """Writes the model as traced TorchScript and the data as .npz."""
    torch.jit.trace(problem.module, problem.inputs, check_trace=False).save(model)
    np.savez(data, x=problem.inputs.numpy(), y=problem.target.numpy())


def load(task: str, toy: bool, model: Path, data: Path) -> Problem:
    """Reads the files into an `nn.Module`: most peers cannot work on TorchScript."""
    blank = build(task, toy)
    blank.module.load_state_dict(torch.jit.load(model).state_dict())
    with np.load(data) as arrays:
        inputs, target = torch.tensor(arrays["x"]), torch.tensor(arrays["y"])
    return Problem(blank.module, inputs, target, blank.loss)


Built = tuple[nn.Module, Tensor]


def mlp(samples: int, widths: tuple[int, ...]) -> Built:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]), torch.randn(samples, widths[0])


class ByPlace(nn.Module):
    """Class scores at every place of a sequence, [B, places, classes], as PyTorch's loss wants them."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mT


def points(samples: int, places: int, widths: tuple[int, ...]) -> Built:
    body, _ = mlp(1, widths)
    return ByPlace(body), torch.randn(samples, places, widths[0])


class Standardised(nn.Conv2d):
    """A convolution by kernels of mean zero and variance one."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) * torch.rsqrt(variance + 1e-5)
        return F.conv2d(x, weight / self.weight[0].numel() ** 0.5, self.bias, padding=self.padding)


def cnn(
    samples: int, channels: tuple[int, int], activation: str, standardised: bool = False
) -> Built:
    act, convolution = getattr(nn, activation), Standardised if standardised else nn.Conv2d
    few, many = channels
    module = nn.Sequential(
        OrderedDict(
            conv1=convolution(1, few, 3, padding=1),
            act1=act(),
            conv2=convolution(few, many, 3, padding=1),
            act2=act(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            head=nn.Linear(many * 16, 10),
        )
    )
    return module, torch.randn(samples, 1, 8, 8)


class Residual(nn.Module):
    """x + body(x)"""

    def __init__(self, **body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(OrderedDict(body))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def feed_forward(width: int, hidden: int) -> Residual:
    return Residual(
        norm=nn.LayerNorm(width),
        up=nn.Linear(width, hidden),
        act=nn.GELU(),
        down=nn.Linear(hidden, width),
    )


def residual(samples: int, features: int, width: int, layers: int) -> Built:
    module = nn.Sequential(
        nn.Linear(features, width),
        *(feed_forward(width, width) for _ in range(layers)),
        nn.LayerNorm(width),
        nn.Linear(width, 10),
    )
    return module, torch.randn(samples, features)


class Attention(nn.Module):
    """Self-attention with two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Classifies sequences of tokens by their mean, or each of them."""

    def __init__(
        self, vocabulary: int, length: int, width: int, layers: int, each: bool = False
    ) -> None:
        super().__init__()
        self.each = each
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))
        self.layers = nn.Sequential(
            *itertools.chain.from_iterable(
                (
                    Residual(norm=nn.LayerNorm(width), attention=Attention(width)),
                    feed_forward(width, 2 * width),
                )
                for _ in range(layers)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.tokens(x) + self.positions)
        x = self.norm(x)
        return self.head(x if self.each else x.mean(1))


def transformer(
    samples: int, vocabulary: int, length: int, each: bool = False, **sizes: int
) -> Built:
    inputs = torch.randint(vocabulary, (samples, length))
    return Transformer(vocabulary, length, each=each, **sizes), inputs


def words(**sizes: int) -> Built:
    body, inputs = transformer(each=True, **sizes)
    return ByPlace(body), inputs


class Tied(nn.Module):
    """One layer, used several times."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.shared = nn.Linear(width, width)
        self.head = nn.Linear(width, 10)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.shared(x))
        return self.head(x)


def tied(samples: int, width: int, times: int) -> Built:
    return Tied(width, times), torch.randn(samples, width)


BUILDERS: dict[str, Callable[..., Built]] = {
    "mlp": mlp,
    "cnn": cnn,
    "residual": residual,
    "transformer": transformer,
    "points": points,
    "words": words,
    "tied": tied,
}
