"""Hessian files as commands read them: by name or from standard input. Importing this loads no torch."""

from __future__ import annotations

import difflib
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hesscli.errors import ResourceError, UsageError
from hesscli.files.hessians.hessian_file import HessianFile, read_hessian
from hesscli.job.json_form import Document
from hesscli.texts import listed


@contextmanager
def opened_file(source: str, command: str) -> Iterator[HessianFile]:
    """The file of this path, or, of "-", standard input by way of a temporary one: a matrix is read more than once."""
    if source != "-":
        yield read_hessian(Path(source))
        return
    if sys.stdin is None or sys.stdin.isatty():  # None: closed, as `<&-` does
        what = "closed" if sys.stdin is None else "a terminal"
        raise UsageError(f"-: standard input is {what}", f"hesscli {command} hessian.safetensors")
    with tempfile.NamedTemporaryFile(prefix="hesscli.", suffix=".safetensors") as copy:
        try:
            shutil.copyfileobj(sys.stdin.buffer, copy)
            copy.flush()
        except OSError as error:
            with suppress(OSError):  # which would come up again, as what is left is written
                copy.close()
            folder = os.path.dirname(copy.name)
            raise ResourceError(
                f"{folder}: standard input cannot be kept there while it is read: {error.strerror}",
                f"TMPDIR=FOLDER hesscli {command} -",
            ) from error
        yield read_hessian(Path(copy.name), "standard input")


def chosen(document: Document, block: str | None, source: str) -> list[Document]:
    """The facts of all blocks, or of the one that was named."""
    blocks: list[Document] = document["blocks"]
    if block is None:
        return blocks
    found = [facts for facts in blocks if facts["name"] == block]
    if not found:
        names = [facts["name"] for facts in blocks]
        (close, *_) = [*difflib.get_close_matches(block, names, 1), names[0]]
        raise UsageError(
            f"{source}: has no block {block!r}; it has: {listed(names)}",
            f"--block {shlex.quote(close)}",
        )
    return found
