"""A Hessian file as a Python object. Importing this loads no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import numpy as np

from hesscli.errors import UsageError
from hesscli.files.hessians.hessian_file import HessianFile, read_hessian
from hesscli.hessian.blocks import partition
from hesscli.texts import listed

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array")
Framework = Literal["numpy", "torch"]


class Hessian(Generic[Array]):
    """A Hessian that hesscli wrote, read from its file as it is used.

    Arrays of numpy are read-only views of the file; tensors of torch can be written, which does not change it.

    >>> hessian = hesscli.load("hessian.safetensors")
    >>> list(hessian.blocks)
    ['fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias']
    >>> hessian.block("fc2.bias").shape
    (10, 10)
    >>> hessian.blocks["fc2.bias"]["eig_max"]
    0.0184
    """

    def __init__(
        self, file: HessianFile, convert: Callable[[np.ndarray], Array], owned: object = None
    ) -> None:
        self._file = file
        self._convert = convert
        self._owned = owned  # kept as long as this is: the folder of a file that nobody else knows

    @property
    def path(self) -> Path:
        """The file, or the index of several."""
        return self._file.path

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The document in the file: loss, structure, method, check and all that `hesscli show --json` prints."""
        return self._file.document

    @property
    def structure(self) -> str:
        """block_diagonal, module, full or elements."""
        return str(self.metadata["structure"])

    @property
    def blocks(self) -> Mapping[str, Mapping[str, Any]]:
        """What is known of each block (`trace`, `eig_max`, ...), by its name, in the model's order."""
        return MappingProxyType({facts["name"]: facts for facts in self.metadata["blocks"]})

    @property
    def parameters(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each parameter by its name, in the order of the matrix's rows."""
        return MappingProxyType({name: tuple(shape) for name, shape in self._file.shapes.items()})

    def block(self, name: str) -> Array:
        """A block by its name.

        Returns:
            [n, n], symmetric, with the rows of its parameters one after the other, each row-major; for
            `elements` the parameter's own shape.

        Raises:
            UsageError: there is no such block.
        """
        if name not in self.blocks:
            raise UsageError(f"{self.path}: has no block {name!r}; it has: {listed(self.blocks)}")
        return self._convert(self._file.tensor(name))

    def gradient(self, parameter: str) -> Array:
        """The gradient by a parameter, in its shape.

        Raises:
            UsageError: the file was written without `--gradient`, or there is no such parameter.
        """
        if parameter not in self.parameters:
            raise UsageError(
                f"{self.path}: has no parameter {parameter!r}; it has: {listed(self.parameters)}"
            )
        key = f"gradient.{parameter}"
        if key not in self._file.entries:
            raise UsageError(
                f"{self.path}: holds no gradient by {parameter!r}; --gradient writes them"
            )
        return self._convert(self._file.tensor(key))

    def matrix(self) -> Array:
        """The whole matrix [P, P] in the order of `parameters`; what was not computed is zero.

        It is made in memory, P^2 numbers, unless the file holds it whole.
        """
        if self.structure == "full":
            return self.block("hessian")
        (whole,) = partition(self.parameters, "full")
        rows_of = {name: np.arange(r.start, r.stop) for name, r in whole.rows.items()}
        matrix = np.zeros((whole.size, whole.size), self.metadata["dtype"])
        for block in partition(self.parameters, self.structure):
            rows = np.concatenate([rows_of[name] for name in block.parameters])
            values = self._file.tensor(block.name)
            if self.structure == "elements":
                matrix[rows, rows] = values.reshape(-1)
            else:
                matrix[np.ix_(rows, rows)] = values
        return self._convert(matrix)

    def verify(self) -> None:
        """Compares all that is in the file with its checksums, which reads it whole.

        Raises:
            FileError: something is not as it was written.
        """
        for name in self._file.entries:
            self._file.verified(name)

    def __repr__(self) -> str:
        loss, total = self.metadata["loss"], self.metadata["total"]
        return (
            f"Hessian({self.structure} of {loss['name']}, {len(self.blocks)} blocks, "
            f"{total['size']} rows, {self.metadata['dtype']}, {str(self.path)!r})"
        )


@overload
def load(
    path: str | os.PathLike[str], framework: Literal["numpy"] = "numpy"
) -> Hessian[np.ndarray]: ...
@overload
def load(path: str | os.PathLike[str], framework: Literal["torch"]) -> Hessian[torch.Tensor]: ...
def load(path: str | os.PathLike[str], framework: Framework = "numpy") -> Hessian[Any]:
    """Opens a Hessian file; its blocks are read when they are asked for.

    Args:
        path: the file, or the index of several.
        framework: "numpy" or "torch", whose arrays `block` and `matrix` return.

    Raises:
        UsageError: there is no such file.
        FileError: it is not a Hessian file, or one that was cut short.
    """
    return Hessian(read_hessian(Path(path)), converter(framework))


def converter(framework: Framework) -> Callable[[np.ndarray], Any]:
    """From an array of numpy to one of the framework."""
    if framework not in ("numpy", "torch"):
        raise UsageError(f"no framework is called {framework!r}; there are: numpy, torch")
    return _tensor if framework == "torch" else np.asanyarray


def _tensor(array: np.ndarray) -> torch.Tensor:
    import torch

    if isinstance(array, np.memmap) and array.filename:
        # torch has no read-only tensors: of a page that is written a private copy is made.
        array = np.memmap(
            array.filename, array.dtype, mode="c", offset=array.offset, shape=array.shape
        )
    return torch.from_numpy(array if array.flags.writeable else array.copy())
