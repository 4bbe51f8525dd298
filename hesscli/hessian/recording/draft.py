"""A tape while it is recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hesscli.hessian.recording.tape import Call, Ref, Tape

_TELLING = frozenset(
    "_local_scalar_dense equal allclose is_nonzero nonzero masked_select "
    "_unique2 unique_dim unique_consecutive".split()
)


class Draft:
    """All calls of a pass, whether its output needs them or not, and the values that they are of: as of the tape, but
    `given` is not yet detached.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.given: dict[int, Tensor] = {}
        self.shapes: list[torch.Size] = []
        self.complex: set[int] = set()
        self.default = torch.get_default_dtype()
        self.refusal = ""

    def refuse(self, reason: str) -> None:
        """Keeps the first reason. What is recorded still tells how much work a pass is."""
        self.refusal = self.refusal or reason

    def value(self, like: Tensor, shape: Sequence[int] | None = None) -> int:
        """A new value: a tensor, or one of its kind of numbers in another shape."""
        if like.layout is not torch.strided:
            self.refuse("sparse tensors may mix samples")
        number = len(self.shapes)
        own = like.values().shape if like.layout is torch.jagged else like.shape
        self.shapes.append(own if shape is None else torch.Size(shape))
        if like.is_complex():
            self.complex.add(number)
        return number

    def made(
        self,
        like: Tensor,
        operator: Any,
        arguments: tuple[Any, ...],
        shape: Sequence[int],
        keywords: Mapping[str, Any] = MappingProxyType({}),
    ) -> Ref:
        """The result of an operator that the pass itself does not call; of another tensor's kind of numbers."""
        number = self.value(like, shape)
        self.calls.append(Call(operator, arguments, keywords, (number,)))
        return Ref(number)

    def constant(self, numbers: list[int], device: torch.device) -> Ref:
        """A vector of whole numbers, of none perhaps."""
        vector = torch.tensor(numbers, dtype=torch.long, device=device)
        number = self.value(vector)
        self.given[number] = vector
        return Ref(number)

    def tape(self, output: int, inputs: Sequence[int], parameters: Mapping[str, Tensor]) -> Tape:
        """The calls that the output needs, by the numbers of values; `inputs` are those that the pass has met."""
        needed = {output}
        if self.refusal:  # what writes into another's memory is not seen to be needed
            needed.update(range(len(self.shapes)))
        calls = []
        for call in reversed(self.calls):
            outputs = tuple(n if n in needed else None for n in call.outputs)
            if any(n is not None for n in outputs):
                calls.append(Call(call.operator, call.arguments, call.keywords, outputs))
                needed.update(call.reads)
        given = {n: tensor for n, tensor in self.given.items() if n in needed}
        numbers = {id(tensor): n for n, tensor in given.items()}
        return Tape(
            calls=tuple(reversed(calls)),
            given={n: tensor.detach() for n, tensor in given.items()},
            shapes={n: self.shapes[n] for n in needed},
            parameters={name: numbers[id(p)] for name, p in parameters.items() if id(p) in numbers},
            inputs=tuple(n for n in inputs if n in needed),
            output=output,
            complex=frozenset(self.complex & needed),
            default=self.default,
            decided=self._decided(inputs),
            refusal=self.refusal,
        )

    def _decided(self, inputs: Sequence[int]) -> bool:
        """Whether Python, or TorchScript, was told a number that depends on the inputs."""
        reached = set(inputs)
        for call in self.calls:
            if not reached.isdisjoint(call.reads):
                if call.name in _TELLING:
                    return True
                reached.update(call.makes)
        return False
