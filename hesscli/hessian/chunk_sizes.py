"""How much is worked on at a time: what a CPU's cache keeps, or what it takes to keep a GPU busy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")


@dataclass(frozen=True)
class ChunkSizes:
    """For one device: numbers, where nothing else is said. The defaults are a CPU's.

    They are fixed, not shares of what is free now, so that the same command sums in the same order and gives the same
    bytes.
    """

    activations: int = 1 << 30  # bytes that those of a batch may take
    # Of a batch at most; a sum over more of them rounds more, and takes longer.
    samples: int = 1 << 15
    rows: int = 128  # that share a pass at most; more gain nothing measurable
    # Bytes of a value that they share, if they are many; larger ones took twice as long, row by row.
    value: int = 1 << 22
    vectors: int = 32  # that share a product at most
    directions: int = 1 << 24  # that one chunk of directions may make
    output: int = 1 << 20  # of the loss's Hessian at the output, that share a pass
    gradients: int = 1 << 19  # of some samples, until they are multiplied
    jacobians: int = 1 << 20  # of some samples
    curvature: int = 1 << 23  # at the pre-activations of some neurons, of all samples
    chain: int = 1 << 26  # the curvature along a chain, of some samples
    # Of a layer's inputs, multiplied with each other, of some samples: of those that go into one product.
    pairs: int = 1 << 26
    # Of such pairs, that are held by each thread, if there are several groups.
    groups: int = 1 << 21
    product: int = 1 << 19  # of matrices, before it is put in its place
    tile: int = 512  # rows and columns that are mirrored together
    stretch: int = 3 << 20  # of a large matrix's rows that are on their way to the disk


def ranges(stop: int, most: int, start: int = 0) -> list[range]:
    """The numbers from `start` to below `stop`, at most so many at a time, but never less than one."""
    step = max(1, most)
    return [range(first, min(first + step, stop)) for first in range(start, stop, step)]


def shared_ranges(rows: range, most: int, threads: int) -> list[range]:
    """Some rows, as many at a time for each of the threads, and at most so many for all of them together."""
    together = max(1, min(most, len(rows)))
    return ranges(rows.stop, -(-together // threads), rows.start)


def grouped(items: Iterable[Item], size: Callable[[Item], int], most: int) -> list[list[Item]]:
    """Items in groups of those that follow each other, of at most so much, but never less than one."""
    groups: list[list[Item]] = []
    held = 0
    for item in items:
        if not groups or held + size(item) > most:
            groups.append([])
            held = 0
        groups[-1].append(item)
        held += size(item)
    return groups


def chunk_sizes(device: torch.device) -> ChunkSizes:
    """The sizes for a device."""
    return _of_gpu(device) if device.type == "cuda" else ChunkSizes()


@cache
def _of_gpu(device: torch.device) -> ChunkSizes:
    """Shares of a GPU's memory: each operator costs the same to start, however little it does."""
    memory = torch.cuda.get_device_properties(device).total_memory
    many = memory >> 8  # 80 GB: 1.2 GB of float32
    return ChunkSizes(
        activations=memory >> 3,
        samples=1 << 20,
        rows=1024,
        value=many,
        vectors=256,
        directions=many,
        output=many,
        gradients=min(1 << 26, many),
        jacobians=many,
        curvature=many,
        chain=many,
        pairs=many,
        groups=many,
        product=min(1 << 25, many),
        tile=4096,
        stretch=1 << 24,
    )
