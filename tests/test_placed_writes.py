"""Bytes end up where they were put, past the page cache or through it."""

import os
from pathlib import Path

import numpy as np
import pytest

from hesscli.files.hessians import placed_writes
from hesscli.files.hessians.placed_writes import PlacedFile

LENGTH = 40 << 20


def write(path: Path, pieces: list[tuple[int, int]], refuse_direct: bool) -> bytes:
    data = np.random.default_rng(0).integers(0, 256, LENGTH, np.uint8)
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
    tmp_path: Path, pieces: list[tuple[int, int]], refuse_direct: bool
) -> None:
    write(tmp_path / "file", pieces, refuse_direct)


def test_a_file_system_that_refuses_direct_writes_gets_cached_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: PlacedFile, offset: int, data: memoryview) -> bool:
        self.direct = None
        return False

    monkeypatch.setattr(placed_writes.PlacedFile, "_directly", refuse)
    write(tmp_path / "file", [(3, LENGTH - 1)], refuse_direct=False)


def test_room_is_reserved_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    file = PlacedFile(os.open(path, os.O_CREAT | os.O_RDWR), path, LENGTH)
    file.close()
    assert path.stat().st_size == LENGTH
