"""How much goes through at once: the samples of a batch, and the rows of a chunk."""

from __future__ import annotations

from dataclasses import dataclass

from hesscli.hessian.chunk_sizes import ChunkSizes

PREFERRED_ROWS = 4  # per chunk; more of them gain less than larger batches do
_GRAPHS = 4  # a double backward pass keeps about this many times what a forward pass saves
_CHECKED = 8  # a check's pass keeps this part of the workspace at most
_WIDE = 8  # bytes of a number in float64
_ROWS = 16  # per chunk, however large they are


@dataclass(frozen=True)
class Sizes:
    """How much goes through the model in one pass."""

    batch: int  # samples
    checked: int  # samples, where a gradient in float64 is all that is taken
    chunk: int  # rows of a matrix


def choose_sizes(
    samples: int,
    saved_per_sample: int,
    largest_saved: int,
    largest_block: int,
    itemsize: int,
    memory: int,
    usual: ChunkSizes,
    rows: int,
) -> Sizes:
    """Samples per batch and rows per chunk that keep within the workspace.

    Args:
        samples: how many there are.
        saved_per_sample: bytes that autograd keeps of one sample's forward pass.
        largest_saved: those of one tensor at most; operators take the rows of a chunk one tensor after the other.
        largest_block: n of the largest block; a chunk of its rows is held next to the activations.
        itemsize: bytes of one number.
        memory: bytes free now.
        usual: the device's chunk sizes.
        rows: per chunk that batches leave room for.
    """
    workspace = min(usual.activations, memory // 4)
    per_sample = max(1, _GRAPHS * saved_per_sample)
    batch = max(1, min(samples, usual.samples, workspace // (per_sample * rows)))
    wide = max(1, saved_per_sample * _WIDE // itemsize)
    checked = max(1, min(samples, usual.samples, workspace // (_CHECKED * wide)))
    per_row = per_sample * batch + 3 * largest_block * itemsize
    cached = max(_ROWS, usual.value // max(1, largest_saved * batch))
    return Sizes(batch, checked, max(1, min(usual.rows, cached, workspace // per_row)))
