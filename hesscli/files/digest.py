"""The SHA-256 of a file, which ties a Hessian to the model and the data it came from."""

from __future__ import annotations

import hashlib
import os

from hesscli.errors import FileError

_CHUNK = 1 << 20


def sha256(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256 in hexadecimal, read in chunks so that its size does not matter.

    Raises:
        FileError: the file cannot be read to its end.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
