"""What compressed parts of Arrow data unpack to, from their headers; pyarrow itself tells it when they are unpacked.

Source: https://arrow.apache.org/docs/format/Columnar.html, and Message.fbs for the places of the fields below.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

_HEADER = 2  # of a message
_DATA = 1  # of a dictionary: its numbers
_BUFFERS, _COMPRESSION = 2, 3  # of numbers


def unpacked_size(messages: Iterable[Any]) -> int:
    """Bytes that the compressed buffers of these messages have when they are unpacked."""
    return sum(
        _size(memoryview(message.metadata), message)
        for message in messages
        if message.type in ("record batch", "dictionary")
    )


def _size(header: memoryview, message: Any) -> int:
    table = _table(header, _field(header, _table(header, 0), _HEADER))
    if message.type == "dictionary":
        table = _table(header, _field(header, table, _DATA))
    if not _field(header, table, _COMPRESSION):
        return 0
    buffers = _table(header, _field(header, table, _BUFFERS))
    size = 0
    for index in range(_number("I", header, buffers)):
        start, length = struct.unpack_from("<qq", header, buffers + 4 + 16 * index)
        if length:  # which begins with its size, or with -1 if it is not compressed
            size += max(0, _number("q", message.body, start))
    return size


def _field(data: memoryview, table: int, index: int) -> int:
    """Where a field of a FlatBuffers table lies; 0 if it is left out."""
    places = table - _number("i", data, table)
    at = 4 + 2 * index
    offset = _number("H", data, places + at) if at < _number("H", data, places) else 0
    return table + offset if offset else 0


def _table(data: memoryview, field: int) -> int:
    """What a field points to."""
    return field + _number("I", data, field)


def _number(kind: str, data: Any, at: int) -> int:
    (number,) = struct.unpack_from("<" + kind, data, at)
    return int(number)
