"""How much memory there is to use."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from hesscli.files import resources


@pytest.mark.parametrize(
    ("membership", "group", "limit", "used", "stat", "room"),
    [
        ("0::/jobs/mine\n", "jobs/mine", "memory.max", "memory.current", "", 600),
        ("0::/jobs/mine\n", "jobs", "memory.max", "memory.current", "", 600),
        ("0::/elsewhere\n", "", "memory.max", "memory.current", "inactive_file 50\n", 650),
        (
            "9:cpu:/x\n4:memory:/a\n", "memory/a", "memory.limit_in_bytes", "memory.usage_in_bytes",
            "total_inactive_file 100\n", 700,
        ),
    ],
)  # fmt: skip
def test_the_room_of_every_cgroup_counts(
    membership, group, limit, used, stat, room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "membership").write_text(membership)
    folder = tmp_path / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit).write_text("1000\n")
    (folder / used).write_text("400\n")
    (folder / "memory.stat").write_text(stat)
    monkeypatch.setattr(resources, "_CGROUP", tmp_path)
    monkeypatch.setattr(resources, "_MEMBERSHIP", tmp_path / "membership")
    assert resources.available_memory() == room


def test_no_cgroup_and_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resources, "_CGROUP", tmp_path)
    monkeypatch.setattr(resources, "_MEMBERSHIP", tmp_path / "membership")
    free = resources.available_memory()
    (tmp_path / "membership").write_text("0::/a\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert resources.available_memory() == pytest.approx(free, rel=0.2)


_FREED = """
import os
from pathlib import Path
from hesscli.files import malloc
import torch

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

malloc.{policy}
before = resident()
piece = torch.ones(16 << 20)
del piece
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize(
    ("policy", "kept"), [("keep_freed_memory()", 64), ("release_at_once(1 << 20)", 0)]
)
def test_freed_memory_is_kept_for_the_next_tensor_or_goes_back_at_once(policy, kept):
    code = _FREED.format(policy=policy)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == pytest.approx(kept, abs=8)
