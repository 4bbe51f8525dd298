"""What a stream can show: its characters, and its colours."""

from __future__ import annotations

import os
from typing import IO

_COLOURS = {"error": "1;31", "hint": "1;36", "note": "2", "wrote": "2", "header": "1"}


def encodable(text: str, stream: IO[str]) -> bool:
    """Whether a stream can show the text as it is. In the C locale, which promises ASCII alone, Python writes UTF-8."""
    locale = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_CTYPE", "LANG"))), "")
    if locale in ("C", "POSIX") and not os.environ.get("PYTHONIOENCODING"):
        return text.isascii()
    return clean(text, stream) == text


def clean(text: str, stream: IO[str]) -> str:
    """Text that the stream can show, and that cannot steer a terminal: names come from files."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def colour_wanted(stream: IO[str]) -> bool:
    """Whether a stream takes colours: a terminal does, and what `FORCE_COLOR` says; `NO_COLOR` comes first."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def coloured(text: str, kind: str, stream: IO[str]) -> str:
    return f"\033[{_COLOURS[kind]}m{text}\033[0m" if colour_wanted(stream) else text


def silence(stream: IO[str]) -> None:
    """Drops what a stream still holds for a reader who has gone; else Python complains at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
