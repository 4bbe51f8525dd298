"""How much memory and disk there is to use, limits of the container included."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that this process may still take: the least of free memory, cgroup limit and address-space limit."""
    limits = [_free_memory()]
    for limit, used in (
        (_CGROUP / "memory.max", _CGROUP / "memory.current"),
        (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
    ):
        total, current = _number(limit), _number(used)
        if total is not None and current is not None:
            limits.append(max(total - current, 0))
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limits.append(max(soft - pages * os.sysconf("SC_PAGE_SIZE"), 0))
    except (ImportError, OSError, ValueError):
        pass
    return min(limits)


def free_disk(folder: Path) -> int:
    """Bytes free for this user on the folder's file system."""
    return shutil.disk_usage(folder).free


def disk_used(path: Path) -> int:
    """Bytes of disk that a file takes; 0 if there is none."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def _free_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:  # not Linux: half of what is installed
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):
        return 4 << 30


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such cgroup, or "max"
        return None
