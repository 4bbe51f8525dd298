"""How much memory and disk there is to use, limits of the container included."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hesscli.files.malloc import release_memory

_CGROUP = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes that this process may still take: the least of free memory, cgroup limits and address-space limit."""
    release_memory()  # what was freed and kept counts as free
    limits = [_free_memory(), *_cgroup_room()]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        with suppress(OSError):  # not Linux
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limits.append(max(soft - pages * os.sysconf("SC_PAGE_SIZE"), 0))
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
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Not Linux: half of what is installed.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _cgroup_room() -> Iterator[int]:
    """What each cgroup that this process is in, from its own up to the root, still allows."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            root, limit, used = _CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        elif controllers == "":
            root, limit, used = _CGROUP, "memory.max", "memory.current"
        else:
            continue
        own = root / path.lstrip("/")  # in a container, the mounted root may be the process's own
        for group in (own, *own.parents):
            total, current = _number(group / limit), _number(group / used)
            if total is not None and current is not None:
                yield max(total - current + _cached(group), 0)
            if group == root:
                break


def _cached(group: Path) -> int:
    """Bytes of the page cache in a cgroup's usage: they are given back when they are needed."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    found = dict(line.split() for line in lines)
    return int(found.get("total_inactive_file", found.get("inactive_file", "0")))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such cgroup, or "max"
        return None
