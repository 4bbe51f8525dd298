"""Whether the numbers that a PyTorch archive speaks of are in it.

PyTorch's readers take a tensor's size from the pickle and do not compare it with what is stored: of a storage that is
too short they go on reading behind its end, whatever the memory holds there.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from hesscli.errors import FileError
from hesscli.files.inert_pickle import InertPickle
from hesscli.files.sniff import COPY_AGAIN
from hesscli.files.zip_files import read


def check_storages(path: Path | str) -> None:
    """Compares the sizes in the pickles of an archive, which are read without running them, with its content.

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
