"""The multilayer perceptron that a state dict describes: `--arch mlp`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn

from hesscli.errors import MismatchError, UsageError

_HINT = "--arch mlp --arch-arg activation=tanh"
_FACTORY_HINT = "name the architecture: --arch FILE.py:FACTORY"
# Without these: they have weights of their own, need arguments, or do not act element by element.
_NOT_ELEMENTWISE = {
    *("MultiheadAttention", "PReLU", "RReLU", "GLU", "Threshold"),
    *("Softmin", "Softmax", "Softmax2d", "LogSoftmax"),
}
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    name.lower(): getattr(nn, name)
    for name in nn.modules.activation.__all__
    if name not in _NOT_ELEMENTWISE
} | {"identity": nn.Identity, "none": nn.Identity}


class MLP(nn.Module):
    """Linear layers under the dotted names of a state dict, an activation between each two."""

    def __init__(self, layers: Mapping[str, nn.Linear], activation: nn.Module) -> None:
        super().__init__()
        self._order = tuple(layers)
        # Not registered: it has no weights, and its name could clash with a layer's.
        self.__dict__["_activation"] = activation
        for path, layer in layers.items():
            owner: nn.Module = self
            *parents, last = path.split(".")
            for name in parents:
                if name not in owner._modules:
                    owner.add_module(name, nn.Module())
                owner = owner.get_submodule(name)
            owner.add_module(last, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, name in enumerate(self._order):
            if index:
                x = self.__dict__["_activation"](x)
            x = self.get_submodule(name)(x)
        return x

    def __str__(self) -> str:
        layers = (self.get_submodule(name) for name in self._order)
        return ", ".join(
            f"{n} ({m.in_features} -> {m.out_features})"
            for n, m in zip(self._order, layers, strict=True)
        )


def build_mlp(state_dict: Mapping[str, torch.Tensor], arguments: Mapping[str, object]) -> nn.Module:
    """An MLP with the widths of the 2-D weights in the state dict, and its names.

    Raises:
        UsageError: the activation is missing or unknown, or there is another argument.
        MismatchError: the weights are not those of linear layers that follow one another.
    """
    unknown = [name for name in arguments if name != "activation"]
    if unknown:
        raise UsageError(
            f"--arch mlp: no argument is called {unknown[0]}; there is: activation", _HINT
        )
    layers = _layers(state_dict)
    if len(layers) > 1 and "activation" not in arguments:
        raise UsageError(
            f"--arch mlp: the weights of {len(layers)} layers do not tell the activation "
            "between them",
            _HINT,
        )
    activation = _activation(arguments.get("activation"))
    if list(layers) == [""]:  # the state dict of a bare nn.Linear
        return layers[""]
    return MLP(layers, activation)


def _activation(name: object) -> nn.Module:
    found = _ACTIVATIONS.get("none" if name is None else str(name).lower())
    if found is None:
        raise UsageError(
            f"--arch mlp: no activation is called {name}; there are: {', '.join(_ACTIVATIONS)}",
            _HINT,
        )
    return found()


def _layers(state_dict: Mapping[str, torch.Tensor]) -> dict[str, nn.Linear]:
    """The linear layers by name, in the order they are applied."""
    weights = {
        key.rpartition(".")[0]: value
        for key, value in state_dict.items()
        if key.rpartition(".")[2] == "weight" and value.dim() == 2
    }
    known = [path for path in weights if path or len(weights) == 1]  # without a name only alone
    owned = {_join(path, kind) for path in known for kind in ("weight", "bias")}
    others = [key for key in state_dict if key not in owned]
    if others:
        raise MismatchError(
            "--arch mlp: knows linear layers only (2-D weights and their biases), not "
            f"{others[0]} {list(state_dict[others[0]].shape)}",
            _FACTORY_HINT,
        )
    for path, weight in weights.items():
        bias = state_dict.get(_join(path, "bias"))
        if bias is not None and bias.shape != weight.shape[:1]:
            raise MismatchError(
                f"--arch mlp: {_join(path, 'bias')} {list(bias.shape)} does not belong to "
                f"{_join(path, 'weight')} {list(weight.shape)}",
                _FACTORY_HINT,
            )
    layers: dict[str, nn.Linear] = {}
    for path in _order(weights):
        outputs, inputs = weights[path].shape
        layers[path] = nn.Linear(inputs, outputs, bias=_join(path, "bias") in state_dict)
    return layers


def _order(weights: Mapping[str, torch.Tensor]) -> Sequence[str]:
    """The layers in the order they are applied: by name (fc2 before fc10), if the widths chain.

    Names that differ in more than a number (encoder, head) may not sort in their order. Then the
    file's own order counts too, which is the order of definition where torch.save wrote it.
    """
    by_name = sorted(weights, key=_natural)
    by_file = list(weights)
    chained = [order for order in (by_name, by_file) if _chains(order, weights)]
    if not chained:
        widths = ", ".join(
            f"{p or 'weight'} {weights[p].shape[1]} -> {len(weights[p])}" for p in by_name
        )
        raise MismatchError(f"--arch mlp: the widths do not chain: {widths}", _FACTORY_HINT)
    numbered = len({re.sub(r"\d+", "0", path) for path in weights}) == 1
    if len(chained) == 2 and by_name != by_file and not numbered:
        raise MismatchError(
            "--arch mlp: names and widths do not tell the order of the layers: "
            f"{', '.join(by_name)} or {', '.join(by_file)}",
            _FACTORY_HINT,
        )
    return chained[0]


def _chains(order: Sequence[str], weights: Mapping[str, torch.Tensor]) -> bool:
    return all(weights[a].shape[0] == weights[b].shape[1] for a, b in pairwise(order))


def _natural(name: str) -> list[str | int]:
    """Text and numbers in turn, text first."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _join(path: str, kind: str) -> str:
    return f"{path}.{kind}" if path else kind
