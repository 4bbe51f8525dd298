"""A Hessian file in the blocks of a finer structure, which lie in its own. Importing this loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hesscli.files.hessians.hessian_file import HessianFile
from hesscli.hessian.blocks import partition
from hesscli.job.json_form import Document
from hesscli.job.stored import values_of

if TYPE_CHECKING:
    import numpy as np

_FROM_FINEST = ("elements", "block_diagonal", "module", "full")


def finest(*files: HessianFile) -> str:
    """The structure that all of them have the blocks of: each lies in a block of every coarser one."""
    return min((file.document["structure"] for file in files), key=_FROM_FINEST.index)


class Finer:
    """The blocks that a file has of a structure: its own, or a finer one.

    Attributes:
        blocks: what is known of each, by its name: all that the file says, or no more than its shape and size.
    """

    def __init__(self, file: HessianFile, structure: str) -> None:
        self.file, self.structure = file, structure
        document = file.document
        self.blocks: dict[str, Document] = {facts["name"]: facts for facts in document["blocks"]}
        self._within: dict[str, tuple[str, list[int]]] = {}
        if structure != document["structure"]:
            self._take_apart()

    def _take_apart(self) -> None:
        """Finds each block's rows in the block that it lies in."""
        shapes = {facts["name"]: facts["shape"] for facts in self.file.document["parameters"]}
        places = {
            name: (block.name, rows)
            for block in partition(shapes, self.file.document["structure"])
            for name, rows in block.rows.items()
        }
        self.blocks = {}
        for block in partition(shapes, self.structure):
            shape = shapes.get(block.name, [block.size])
            self.blocks[block.name] = {"name": block.name, "shape": shape, "size": block.size}
            rows = [row for name in block.parameters for row in places[name][1]]
            self._within[block.name] = (places[block.parameters[0]][0], rows)

    def values(self, name: str) -> np.ndarray:
        """A block's values, compared with their checksum: [n, n], or [n] for a diagonal one."""
        import numpy as np

        if name not in self._within:
            return values_of(self.file, name)
        whole, rows = self._within[name]
        values = values_of(self.file, whole)
        if self.structure == "elements":
            return values.diagonal()[rows]
        if rows and rows[-1] - rows[0] + 1 == len(rows):  # read as it is used
            piece = slice(rows[0], rows[-1] + 1)
            return values[piece, piece]
        return values[np.ix_(rows, rows)]
