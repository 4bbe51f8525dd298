"""What the files of a result are called: one file, or several with an index, as Hugging Face's models are.

A result `NAME.safetensors` in several files is `NAME-00001-of-00003.safetensors` and so on, and
`NAME.safetensors.index.json`, which says which tensor is where. Importing this loads neither torch nor numpy.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from hesscli.errors import UsageError

_NUMBERS = r"-\d{5,}-of-\d{5,}"


def followed(path: Path) -> Path:
    """The file that a symbolic link leads to, there or not, or the path itself; UsageError where it leads to itself."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise UsageError(f"{path}: a symbolic link that leads to itself")
    return target


def keep_mode(path: Path, successor: Path) -> None:
    """Gives what will replace a file that file's permissions."""
    with suppress(OSError):
        os.chmod(successor, stat.S_IMODE(path.stat().st_mode))


def partial_path(path: Path) -> Path:
    """What a file is called until it is finished; a result, in whatever files, is being written while it is there."""
    return path.with_name(f".{path.name}.partial")


def index_path(path: Path) -> Path:
    """The index of a result in several files."""
    return path.with_name(f"{path.name}.index.json")


def is_index(path: Path) -> bool:
    """Whether a file is an index, by its name."""
    return path.name.endswith(".index.json")


def index_of_shard(shard: Path) -> Path | None:
    """The index that goes with one of several files, by its name."""
    name, count = re.subn(f"{_NUMBERS}(\\.[^.]*)?$", r"\1", shard.name)
    return index_path(shard.with_name(name)) if count else None


def shard_path(path: Path, number: int, count: int) -> Path:
    """The file of that number, from 1, of a result in several files."""
    return path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}")


def shard_paths(path: Path) -> list[Path]:
    """The files here that are called as those of a result in several files, of whatever number."""
    return _numbered(path.parent, path.stem, path.suffix)


def result_paths(path: Path) -> list[Path]:
    """All files here that are called as those of this result, in one file or several."""
    single = [found for found in (path, index_path(path)) if found.exists()]
    return single + shard_paths(path)


def partial_paths(path: Path) -> list[Path]:
    """The files of a result that is not finished: the one that is always there, and those of several."""
    numbered = _numbered(path.parent, f".{path.stem}", f"{path.suffix}.partial")
    return [partial_path(path), *numbered]


def _numbered(folder: Path, before: str, after: str) -> list[Path]:
    pattern = re.compile(re.escape(before) + _NUMBERS + re.escape(after))
    near = folder.glob(f"{glob.escape(before)}-*-of-*{glob.escape(after)}")
    return sorted(found for found in near if pattern.fullmatch(found.name))


def into_files(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Which tensors go into one file of no more bytes than the limit, as huggingface_hub divides them; all if None.

    A tensor is never cut: one that is larger has a file of its own.
    """
    if limit is None:
        return [list(sizes)]
    files: list[list[str]] = []
    current: list[str] = []
    room = limit
    for name, size in sizes.items():
        if size > limit:
            files.append([name])
            continue
        if size > room:
            files.append(current)
            current, room = [], limit
        current.append(name)
        room -= size
    return [*files, current] if current else files


def journal_path(path: Path, writer: str = "") -> Path:
    """Where a journal of an unfinished file lies; each of several processes that write it has its own."""
    return path.with_name(f".{path.name}.journal{writer and '.'}{writer}")


def journals(path: Path) -> list[Path]:
    """All journals of an unfinished file."""
    first = journal_path(path)
    others = path.parent.glob(f"{glob.escape(first.name)}.*")
    return [*([first] if first.exists() else []), *sorted(others)]
