"""How much goes through at once: the samples of a batch, the rows of a chunk, the blocks of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hesscli.hessian.amounts import Amounts
from hesscli.hessian.blocks import Block

PREFERRED_ROWS = 4  # per chunk; more of them gain less than larger batches do
_SMALL = 1 << 22  # numbers that are always kept together
_GRAPHS = 4  # a double backward pass keeps about this many times what a forward pass saves


@dataclass(frozen=True)
class Sizes:
    batch: int
    chunk: int


def choose_sizes(
    samples: int,
    saved_per_sample: int,
    largest_block: int,
    itemsize: int,
    memory: int,
    usual: Amounts,
    rows: int,
) -> Sizes:
    """Samples per batch and rows per chunk that keep within the workspace.

    Args:
        samples: how many there are.
        saved_per_sample: bytes that autograd keeps of one sample's forward pass.
        largest_block: n of the largest block; a chunk of its rows is held next to the activations.
        itemsize: bytes of one number.
        memory: bytes free now.
        usual: the device's amounts.
        rows: per chunk that batches leave room for.
    """
    workspace = min(usual.activations, memory // 4)
    per_sample = max(1, _GRAPHS * saved_per_sample)
    batch = max(1, min(samples, workspace // (per_sample * rows)))
    per_row = per_sample * batch + 3 * largest_block * itemsize
    return Sizes(batch, max(1, min(usual.rows, workspace // per_row)))


def group(blocks: Sequence[Block], diagonal: bool) -> list[list[Block]]:
    """Blocks that are computed together: as many as take little more memory than the largest alone."""

    def cost(block: Block) -> int:
        return block.size if diagonal else block.size**2

    limit = max(int(1.1 * max((cost(block) for block in blocks), default=0)), _SMALL)
    groups: list[list[Block]] = []
    held = 0
    for block in blocks:
        if not groups or held + cost(block) > limit:
            groups.append([])
            held = 0
        groups[-1].append(block)
        held += cost(block)
    return groups


def output_bytes(blocks: Sequence[Block], diagonal: bool, dtype: torch.dtype) -> int:
    return sum(b.size if diagonal else b.size**2 for b in blocks) * dtype.itemsize
