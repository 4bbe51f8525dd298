"""The files of one result while it is written: one, or several with an index, and how they get their names.

Either way `.NAME.partial` is there until the result is: the file itself, or room for the index. Who writes holds its
lock.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from hesscli.errors import FileError
from hesscli.files.hessians.hessian_index import SHARD_SCHEMA
from hesscli.files.hessians.placed_writes import PlacedFile
from hesscli.files.hessians.result_names import index_path, keep_mode, partial_path, shard_path
from hesscli.files.hessians.tensor_file import TensorFile, sync_folder

_OPEN = 64  # files at a time

Shapes = Mapping[str, Sequence[int]]


class ResultFiles:
    """The one file of a result, which has the document in its metadata; and what several files do in the same way."""

    def __init__(self, partial: Path, descriptor: int, files: Sequence[TensorFile]) -> None:
        self.partial, self.descriptor, self.files = partial, descriptor, files
        self.homes = {name: file for file in files for name in file.entries}
        self.in_use: list[TensorFile] = []

    def reserve(self, begun: bool) -> None:
        """Takes the room on the disk; `begun`: an earlier run, or another process, has done so already.

        Raises:
            OSError: of the file system; ENOSPC when there is no room.
            FileError: what was begun is gone.
        """
        self.files[0].reserve(self.descriptor)

    def finish(self, text: str, checksum: str) -> None:
        """Writes the document, and all that goes around tensors; all is on the disk then."""
        self.files[0].finish({"hesscli": text})

    def rename(self, path: Path) -> None:
        """Gives every file its name, in an order in which no reader takes half of a result for one."""
        keep_mode(path, self.partial)
        os.replace(self.partial, path)
        sync_folder(path.parent)

    def names(self, path: Path) -> list[Path]:
        """The names that the files get."""
        return [path]

    def discard(self) -> None:
        """Removes what has no name yet."""
        for path in (self.partial, *(file.path for file in self.files)):
            path.unlink(missing_ok=True)

    def opened(self, name: str) -> PlacedFile:
        """The file that holds a tensor, to write to and to read from."""
        return self._use(self.homes[name])

    def _use(self, file: TensorFile) -> PlacedFile:
        """A file, opened; perhaps another one is closed for it."""
        if self.in_use[-1:] != [file]:
            if file in self.in_use:
                self.in_use.remove(file)
            self.in_use.append(file)
            if len(self.in_use) > _OPEN:
                oldest = self.in_use.pop(0)
                oldest.opened().sync()
                oldest.close()
        return file.opened()

    def sync(self) -> None:
        """Waits until everything that was written is on the disk."""
        for file in self.in_use:
            file.opened().sync()

    def close(self) -> None:
        for file in self.files:
            file.close()


class SeveralFiles(ResultFiles):
    """The document is in the metadata of the index; each file says which part it is, of a document of what checksum."""

    def __init__(
        self,
        path: Path,
        partial: Path,
        descriptor: int,
        groups: Sequence[Shapes],
        dtype: str,
        text: str,
        spare: int,
    ) -> None:
        count = len(groups)
        self.paths = [shard_path(path, number, count) for number in range(1, count + 1)]
        files = [
            TensorFile(partial_path(shard), shapes, dtype, _part(number, count, "0" * 8))
            for number, (shard, shapes) in enumerate(zip(self.paths, groups, strict=True), 1)
        ]
        super().__init__(partial, descriptor, files)
        self.index: PlacedFile | None = None
        self.room = len(self._index(text)) + spare

    def reserve(self, begun: bool) -> None:
        self.index = PlacedFile(self.descriptor, self.partial, self.room)
        for file in self.files:
            if begun and not file.path.exists():
                raise FileError(f"{file.path}: is gone, only its journal is left", "--force")
            file.reserve()
            self._use(file)

    def finish(self, text: str, checksum: str) -> None:
        for number, file in enumerate(self.files, 1):
            self._use(file)
            file.finish(_part(number, len(self.files), checksum))
        index = self._index(text)
        assert self.index is not None
        self.index.write(0, memoryview(index))
        os.ftruncate(self.descriptor, len(index))
        self.index.sync()

    def rename(self, path: Path) -> None:
        index = index_path(path)
        keep_mode(index, self.partial)
        if any(final.exists() for final in self.paths):
            index.unlink(missing_ok=True)  # an earlier one: what it says is about to change
        for file, final in zip(self.files, self.paths, strict=True):
            keep_mode(final, file.path)
            _name_too(file.path, final)
        sync_folder(path.parent)
        os.replace(self.partial, index)
        sync_folder(path.parent)
        for old in (path, *(file.path for file in self.files)):
            old.unlink(missing_ok=True)

    def names(self, path: Path) -> list[Path]:
        return [index_path(path), *self.paths]

    def close(self) -> None:
        super().close()
        if self.index is None:
            os.close(self.descriptor)
        else:
            self.index.close()

    def _index(self, text: str) -> bytes:
        total = sum(file.length - file.start for file in self.files)
        places = {
            name: path.name
            for file, path in zip(self.files, self.paths, strict=True)
            for name in file.entries
        }
        index = {"metadata": {"total_size": total, "hesscli": text}, "weight_map": places}
        return (json.dumps(index, indent=2) + "\n").encode()


def _part(number: int, count: int, checksum: str) -> dict[str, str]:
    facts = {"schema": SHARD_SCHEMA, "number": number, "count": count, "of": checksum}
    return {"hesscli": json.dumps(facts, separators=(",", ":"))}


def _name_too(partial: Path, final: Path) -> None:
    """Gives a file its name. Where there are links, it keeps the other one too: a run that ends now can go on."""
    link = partial.with_suffix(".new")
    link.unlink(missing_ok=True)
    try:
        os.link(partial, link)
    except OSError:  # not on every file system
        os.replace(partial, final)
        return
    os.replace(link, final)
    link.unlink(missing_ok=True)  # it is still there if both were one file already
