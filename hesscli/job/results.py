"""Where a result may go, which names it may have, and how it is written."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hesscli.errors import ResourceError, UsageError
from hesscli.files.hessians.hessian_file import is_part_of
from hesscli.files.hessians.result_names import (
    followed,
    index_of_shard,
    index_path,
    is_index,
    journals,
    keep_mode,
    result_paths,
    shard_paths,
)
from hesscli.files.hessians.result_writer import ResultWriter

# How each kind of picture says who made it.
_SAID = {
    ".png": b"Software\0hesscli",
    ".svg": b"<dc:title>hesscli</dc:title>",
    ".pdf": b"/Creator (hesscli)",
}
PICTURES = tuple(_SAID)
_STANDARD_OUTPUT = (Path("/dev/stdout"), Path("/dev/fd/1"), Path("/proc/self/fd/1"))


def writable(
    path: Path,
    force: bool,
    inputs: Sequence[Path],
    option: str = "-o",
    resumable: bool = False,
    name: str = "hessian",
) -> Path:
    """Refuses to write over anything but an earlier result, or where nothing can be written.

    Args:
        inputs: the files that the command reads; they are never replaced.
        option: which one named the path, for hints.
        resumable: the command goes on with what an interrupted one has left there.
        name: of a file that would do, for hints.

    Returns:
        the path; or the file that it is a symbolic link to, which stays one.

    Raises:
        UsageError: with the way out.
    """
    suffix = path.suffix if path.suffix.lower() in PICTURES else ".safetensors"
    usual = f"{name}{suffix}"

    def instead(other: Path | str) -> str:
        return f"{option} {shlex.quote(str(other))}"

    def refused(why: str, hint: str | None) -> UsageError:
        return UsageError(f"{path}: {why}", hint)

    if path in _STANDARD_OUTPUT:
        raise refused("is standard output", instead("-" if resumable else usual))
    if path == Path("-"):
        why = "is no file's name, and only compute writes to standard output"
        raise refused(why, instead(f"out{suffix}"))
    if _is_too_long(path):
        raise refused("a longer name than can be written here", instead(path.parent / usual))
    if path.exists() and not (path.is_file() or path.is_dir()):  # or a link to a pipe
        raise refused("is not a regular file; not replaced", instead(usual))
    target = followed(path)
    said, there = path.suffix.lower(), target.suffix.lower()
    if said != there and not {said, there}.isdisjoint((".json", *PICTURES)):
        why = f"leads to {target}, whose name does not say the same format"
        raise refused(why, instead(path.with_stem("other")))
    path = target
    folder = path.parent
    if not folder.is_dir():
        above = next(part for part in (folder, *folder.parents) if part.exists())
        if not above.is_dir():
            raise refused(f"{above} is no folder", instead(above.parent / usual))
        raise refused("no such folder", f"mkdir -p {shlex.quote(str(folder))}")
    if path.is_dir():
        raise refused("is a folder", instead(path / usual))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise refused(f"the folder {folder} may not be written to", None)
    if is_index(path):
        whole = path.with_name(path.name.removesuffix(".index.json"))
        raise refused("is the name of an index", instead(whole))
    other = instead(path.with_name(f"other{suffix}"))
    if not resumable and not force and journals(path):
        raise refused("holds the finished parts of an interrupted compute", other)
    _refuse_replacing(path, force, inputs, other)
    return path


def _is_too_long(path: Path) -> bool:
    """Whether a file, or the index of several, cannot have this name in its folder."""
    longest = len(os.fsencode(index_path(path).name)) if path.name else 0
    return path.parent.is_dir() and longest > os.pathconf(path.parent, "PC_NAME_MAX")


def _refuse_replacing(path: Path, force: bool, inputs: Sequence[Path], other: str) -> None:
    """Refuses to replace inputs, and what hesscli did not write, in one file or in several of this name."""
    used = [source if source.exists() else index_path(source) for source in inputs]
    for found in result_paths(path):
        if not found.is_file():
            raise UsageError(f"{found}: is not a regular file; not replaced", other)
        ours = is_part_of(found, path)
        if any(source.exists() and _is_input(found, source, ours) for source in used):
            raise UsageError(f"{found}: is an input of this command", other)
        if not force and not (ours or _says_hesscli(found)):
            why = "is a part of a Hessian" if _is_part(found) else "hesscli did not write it"
            raise UsageError(f"{found}: exists, and {why}; not replaced", "--force")


def _is_input(path: Path, source: Path, ours: bool) -> bool:
    """Whether a file is an input; and if it is not ours, whether its folder or its index is one."""
    same = path.samefile(source)
    if same or ours:
        return same
    index = index_of_shard(path)
    listed = index is not None and index.exists() and index.samefile(source)
    return listed or (source.is_dir() and path.parent.samefile(source))


def _is_part(path: Path) -> bool:
    index = index_of_shard(path)
    return index is not None and is_part_of(path, index.with_suffix("").with_suffix(""))


def _says_hesscli(path: Path) -> bool:
    """Whether a JSON document or a picture names hesscli as its maker."""
    if path.suffix.lower() not in (".json", *PICTURES):
        return False
    said = _SAID.get(path.suffix.lower())
    with path.open("rb") as file:
        if said is not None:
            return said in file.read(1 << 20)
        try:
            document = json.load(file)
        except (ValueError, RecursionError):
            return False
    schema = document.get("schema") if isinstance(document, dict) else None
    return isinstance(schema, str) and schema.startswith("hesscli.")


def demand_names(results: Iterable[str], parameters: Iterable[str], gradient: bool) -> None:
    """Refuses names that a file cannot hold: of the results and, if wanted, of the gradient by each parameter."""
    taken = {"__metadata__": "the metadata"}
    if gradient:
        taken |= {f"gradient.{name}": f"the gradient by {name}" for name in parameters}
    for name in results:
        if name in taken:
            raise UsageError(
                f"{name}: a file keeps this name for {taken[name]}",
                f"--params {shlex.quote(f'!{name}*')}",
            )
        taken[name] = "another block"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name for what is written inside, which then takes the path's place, or goes; ResourceError on a full disk."""
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
