"""How a result is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hesscli.errors import ResourceError
from hesscli.files.hessians.result_names import index_path, keep_mode, shard_paths
from hesscli.files.hessians.result_writer import ResultWriter


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name for what is written inside, which then takes the path's place; nothing is left of what fails.

    Raises:
        ResourceError: the disk is full.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        keep_mode(path, temporary)
        temporary.replace(path)
    except OSError as error:
        raise ResourceError(f"{path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], dtype: str, document: Mapping[str, Any]
) -> None:
    """A safetensors file of these tensors, whole or not at all, with the document in its metadata."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with ResultWriter(path, shapes, dtype, document) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit(document)


def written(path: Path) -> tuple[Path, int]:
    """The file that opens a result, itself or its index, and the bytes of all its files."""
    index = index_path(path)
    if path.exists() or not index.exists():
        return path, path.stat().st_size if path.exists() else 0
    return index, sum(found.stat().st_size for found in (index, *shard_paths(path)))
