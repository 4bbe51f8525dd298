"""What is asked of every zip file before a reader gets it: PyTorch's and NumPy's readers do not ask."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from hesscli.errors import FileError, ResourceError
from hesscli.files.inert_pickle import InertPickle
from hesscli.files.resources import available_memory
from hesscli.files.sniff import COPY_AGAIN

_CHUNK = 1 << 20
_UTF8 = 0x800  # the flag of a name in UTF-8


def check_zip(path: Path | str, by_case: bool = False) -> None:
    """Names, sizes and checksums, in this order: nothing is unpacked whose size was not looked at.

    A flipped bit would otherwise be loaded, and the Hessian would be quietly wrong.

    Args:
        by_case: whether names may differ in nothing but case. PyTorch's reader takes any of these for the other.

    Raises:
        FileError: the content is not what was written, or was never meant to be read.
        ResourceError: it unpacks to more than the memory holds.
    """
    name = ""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_names(path, members, by_case)
            _check_sizes(path, members)
            for member in members:
                name = member.filename
                # torch.serialization.set_crc32_options(False) leaves zeros: nothing to compare.
                if member.CRC == 0:
                    continue
                with archive.open(member) as content:
                    while content.read(_CHUNK):
                        pass
    except (FileError, ResourceError):
        raise
    except Exception as error:  # zlib.error, BadZipFile, EOFError, struct.error, ...
        raise FileError(
            f"{path}: damaged: {name or 'its listing'} is not what was written", COPY_AGAIN
        ) from error


def read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """A member's content, compared with its checksum if it was written with one."""
    if member.CRC == 0:
        del member.CRC
    return archive.read(member)


def stored(path: Path | str) -> bool:
    """Whether everything lies in the file as it is, so that it can be mapped."""
    with zipfile.ZipFile(path) as archive:
        return all(m.compress_type == zipfile.ZIP_STORED for m in archive.infolist())


def _check_names(path: Path | str, members: list[zipfile.ZipInfo], by_case: bool) -> None:
    seen: set[bytes] = set()
    for member in members:
        # Nothing is ever unpacked to the disk; but a file that tries is not one to trust.
        parts = member.filename.replace("\\", "/").split("/")
        if ".." in parts or not parts[0] or parts[0][1:] == ":":
            raise FileError(
                f"{path}: holds a file called {member.filename!r}, which points outside it",
                "do not use this file: no program that saves models writes such names",
            )
        # As it is in the file: readers take its bytes for text in different ways.
        stored_name = member.orig_filename
        name = stored_name.encode("utf-8" if member.flag_bits & _UTF8 else "cp437")
        name = name if by_case else name.lower()
        if name in seen:  # readers differ in which of the two they take
            raise FileError(
                f"{path}: damaged: holds two files called {member.filename!r}", COPY_AGAIN
            )
        # Python cuts it, or takes another from a field beside it.
        if member.filename != stored_name:
            raise FileError(f"{path}: damaged: holds a file called {stored_name!r}", COPY_AGAIN)
        seen.add(name)


def _check_sizes(path: Path | str, members: list[zipfile.ZipInfo]) -> None:
    size = os.path.getsize(path)
    packed = sum(member.compress_size for member in members)
    if packed > size:  # members that lie over each other unpack to far more than there is
        raise FileError(
            f"{path}: damaged: its parts claim {packed} bytes, the file has {size}", COPY_AGAIN
        )
    for member in members:
        plain = member.compress_type == zipfile.ZIP_STORED
        if plain and member.compress_size != member.file_size:
            raise FileError(
                f"{path}: damaged: {member.filename!r} claims {member.file_size} bytes, "
                f"{member.compress_size} are there",
                COPY_AGAIN,
            )
    unpacked = sum(m.file_size for m in members if m.compress_type != zipfile.ZIP_STORED)
    free = available_memory()
    if unpacked > free:
        raise ResourceError(
            f"{path}: {size} bytes that unpack to {unpacked}; {free} bytes of memory are free",
            "if you trust it, save it uncompressed, so that it is read in parts: np.savez(...)",
        )


def check_storages(path: Path | str) -> None:
    """Compares the sizes in the pickles of an archive, which are read without running them, with its content.

    PyTorch's readers take a tensor's size from the pickle: of a storage that is too short they go on reading behind its
    end, whatever the memory holds there.

    Raises:
        FileError: a storage is missing or too short, or a pickle is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        for name, member in members.items():
            folder, _, pickled = name.rpartition("/")
            if pickled.lower() not in ("data.pkl", "constants.pkl"):  # any case is PyTorch's
                continue
            place = f"{folder}/{pickled[: -len('.pkl')]}"
            try:
                wanted = InertPickle(read(archive, member)).storages
            except Exception as error:  # the unpickler raises nearly everything
                raise FileError(f"{path}: damaged: {name} is no pickle", COPY_AGAIN) from error
            for key, size in wanted.items():
                stored = members.get(f"{place}/{key}")
                found = None if stored is None else stored.file_size
                if found is None or found < size:
                    raise FileError(
                        f"{path}: damaged: {place}/{key} should hold {size} bytes, "
                        f"{'it is missing' if found is None else f'{found} are there'}",
                        COPY_AGAIN,
                    )
