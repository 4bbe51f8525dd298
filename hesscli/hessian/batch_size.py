"""How much goes through at once: the samples of a batch, the rows of a chunk, the graphs that threads have."""

from __future__ import annotations

from dataclasses import dataclass

from hesscli.hessian.chunk_sizes import ChunkSizes
from hesscli.hessian.workers import ABREAST

PREFERRED_ROWS = 4  # per chunk; more of them gain less than larger batches do
CUTS = 1 << 29  # bytes that are kept of all samples where a deep model is cut, at most
_GRAPHS = 4  # a double backward pass keeps about this many times what a forward pass saves, and each row takes as much
_ROWS = 16  # per chunk, however large they are


@dataclass(frozen=True)
class Passes:
    """What is held of a batch for its second derivatives."""

    rows: int  # of a matrix, that go through at once, by all threads together
    graphs: int = ABREAST  # that threads may have, one each
    saved: int = 0  # bytes that autograd keeps of a forward pass
    cuts: int = CUTS  # bytes that may be kept of all samples where a deep model is cut

    @property
    def bytes(self) -> int:
        """Of the graphs, and of the rows that go through them."""
        return _GRAPHS * (self.graphs + self.rows) * self.saved


def choose_batch(
    samples: int,
    sample: int,
    saved_per_sample: int,
    memory: int,
    usual: ChunkSizes,
    rows: int,
) -> int:
    """Samples per batch that keep within the workspace.

    Args:
        samples: how many there are.
        sample: bytes of one, which a batch holds.
        saved_per_sample: bytes that autograd keeps of one sample's forward pass.
        memory: bytes free now.
        usual: the device's chunk sizes.
        rows: per chunk that batches leave room for.
    """
    per_sample = max(1, _GRAPHS * saved_per_sample * rows + sample)
    return max(1, min(samples, usual.samples, _workspace(memory, usual) // per_sample))


def choose_passes(
    saved: int,
    largest_saved: int,
    largest_block: int,
    itemsize: int,
    memory: int,
    usual: ChunkSizes,
    graphs: int,
) -> Passes:
    """Rows per chunk that keep within the workspace, and as many graphs as fit beside.

    Args:
        saved: bytes that autograd keeps of a batch's forward pass.
        largest_saved: those of one tensor at most; operators take the rows of a chunk one tensor after the other.
        largest_block: n of the largest block; a chunk of its rows is held next to the activations.
        itemsize: bytes of one number.
        memory: bytes free now.
        usual: the device's chunk sizes.
        graphs: that threads are worth.
    """
    workspace, graph = _workspace(memory, usual), max(1, _GRAPHS * saved)
    cached = max(_ROWS, usual.value // max(1, largest_saved))
    rows = workspace // (graph + 3 * largest_block * itemsize)
    fitting = max(1, memory // 4 // graph)
    rows = max(1, min(usual.rows, cached, rows))
    return Passes(rows, min(graphs, fitting), saved, min(CUTS, memory // 8))


def _workspace(memory: int, usual: ChunkSizes) -> int:
    """Bytes that activations may take."""
    return min(usual.activations, memory // 4)
