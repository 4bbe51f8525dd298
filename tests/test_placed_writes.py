"""Bytes end up where they were put, past the page cache or through it."""

import errno
import fcntl
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from hesscli.files.hessians import placed_writes
from hesscli.files.hessians.placed_writes import PlacedFile

LENGTH = 40 << 20


def write(path: Path, pieces: list[tuple[int, int]], refuse_direct: bool, shift: int = 1) -> bytes:
    """Writes pieces of memory that begins so many bytes after a page."""
    data = np.frombuffer(mmap.mmap(-1, LENGTH + shift), np.uint8)[shift:]
    data[:] = np.random.default_rng(0).integers(0, 256, LENGTH, np.uint8)
    file = PlacedFile(os.open(path, os.O_CREAT | os.O_RDWR), path, LENGTH)
    if refuse_direct and file.direct is not None:
        os.close(file.direct)
        file.direct = None
    for start, stop in pieces:
        file.write(start, data[start:stop].data)
    file.sync()
    file.close()
    assert path.stat().st_size == LENGTH
    for start, stop in pieces:
        assert path.read_bytes()[start:stop] == data[start:stop].tobytes()
    return path.read_bytes()


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("refuse_direct", [False, True])
@pytest.mark.parametrize(
    "pieces",
    [
        [(0, LENGTH)],
        [(12_288, LENGTH), (0, 12_288)],
        [(5, 20_000_001), (20_000_001, LENGTH - 3)],
        [(4095, 4097), (10_000_000, 30_000_000)],
        [(7, 7 + (8 << 20))],
    ],
    ids=str,
)
def test_bytes_are_where_they_were_put(
    tmp_path: Path, pieces: list[tuple[int, int]], refuse_direct: bool, shift: int
) -> None:
    write(tmp_path / "file", pieces, refuse_direct, shift)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("answer", ["refused", "interrupted"])
def test_what_is_not_written_directly_goes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, shift: int
) -> None:
    real, directly = os.pwrite, []

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            return real(descriptor, data, offset)
        directly.append(offset)
        if answer == "refused":
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, data[:4096], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    pieces = [(3, 20_000_000), (20_000_000, LENGTH - 1)]
    write(tmp_path / "file", pieces, refuse_direct=False, shift=shift)
    assert directly in ([4096], [])  # not tried again; nor at all where files have no direct writes


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("refuse_direct", [False, True])
def test_more_than_one_call_writes_or_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse_direct: bool, shift: int
) -> None:
    monkeypatch.setattr(placed_writes, "_LARGEST", 5 << 20)
    path = tmp_path / "file"
    content = write(path, [(0, LENGTH)], refuse_direct, shift)
    file = PlacedFile(os.open(path, os.O_RDWR), path, LENGTH, reserve=False)
    found = bytearray(23_000_000)
    file.read(7, memoryview(found))
    assert found == content[7:23_000_007]
    with pytest.raises(OSError, match="shorter than it was"):
        file.read(LENGTH - 5, memoryview(found))
    file.close()


def test_room_is_reserved_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    file = PlacedFile(os.open(path, os.O_CREAT | os.O_RDWR), path, LENGTH)
    file.close()
    assert path.stat().st_size == LENGTH
