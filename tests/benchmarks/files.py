"""Jobs on files, in processes of their own that need no torch."""

from __future__ import annotations

import math
import os
import time

from safetensors.numpy import load_file


def compare(ours: str, theirs: str) -> dict[str, float]:
    """The relative Frobenius distance, over what `theirs` holds: perhaps only the first rows."""
    reference, other = load_file(ours), load_file(theirs)
    if reference.keys() != other.keys():
        raise ValueError(f"tensors differ: {sorted(reference)} and {sorted(other)}")
    squares = errors = 0.0
    for name, tensor in other.items():
        expected = reference.pop(name).reshape(-1)[: tensor.size].copy()
        squares += float(expected @ expected)
        expected -= tensor.reshape(-1)
        errors += float(expected @ expected)
    return {"error": math.sqrt(errors / squares)}


def write(size: int, output: str) -> dict[str, float]:
    """A plain write of so many bytes, with fsync."""
    block = bytes(range(256)) * 32768
    started = time.perf_counter()
    with open(output, "wb", buffering=0) as file:
        for start in range(0, size, len(block)):
            file.write(memoryview(block)[: size - start])
        os.fsync(file.fileno())
    return {"seconds": time.perf_counter() - started}
