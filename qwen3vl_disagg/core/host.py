"""What this process may have of its host: memory, also within its control groups, and file descriptors."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BYTES, _KEPT_BLOCK_BYTES, _KEPT_BYTES = 1 << 20, 64 << 20, 256 << 20
ENOUGH = 1 << 16
"""File descriptors: more is never needed, and some systems have a hard limit of a thousand million."""


def available_bytes(root: Path = Path("/")) -> int:
    """What can be had without pushing anything out. 0 where the system does not tell."""
    found = []
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    groups = _text(root / "proc/self/cgroup").splitlines()
    top = root / "sys/fs/cgroup"
    names = [line.split(":", 2) for line in groups if line.count(":") >= 2]
    group = next((path for number, kinds, path in names if (number, kinds) == ("0", "")), "/")
    old_group = next((path for _, kinds, path in names if "memory" in kinds.split(",")), "/")
    found += _left(top, group, "memory.max", "memory.current", "inactive_file")
    found += _left(top / "memory", old_group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return min(found, default=0)


def give_large_blocks_back() -> None:
    """From now on, memory of a megabyte and more goes back to the system as soon as it is freed. By itself glibc stops
    doing that for sizes that have been freed before (mallopt(3), M_MMAP_THRESHOLD). Elsewhere nothing happens."""
    _mallopt((_M_MMAP_THRESHOLD, _LARGE_BYTES))


def keep_freed_memory() -> None:
    """From now on blocks of up to 64 MiB that are freed stay with this process, 256 MiB at the end of its heap: what a
    forward pass needs between its layers is had once, and not from the system, zeroed, in each pass. Elsewhere than
    with glibc nothing happens."""
    _mallopt((_M_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES))


def _mallopt(*settings: tuple[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for name, value in settings:
        if not mallopt(name, value):
            return  # an older one; by itself it is better off than with a part of it


def trim_heap() -> None:
    """Give free pages within the heap back to the system (malloc_trim(3)): buffers of many connections that came and
    went leave holes. Milliseconds. Where there is no glibc nothing happens."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def raise_descriptor_limit() -> int:
    """Raise the soft limit of this process, and of its children, towards the hard one. The limit now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # some sandboxes forbid it: then the limit is what it was
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return descriptor_limit()


def descriptor_limit() -> int:
    """How many descriptors this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ENOUGH if soft == resource.RLIM_INFINITY else soft


def process_started(pid: int) -> float:
    """When a process of this host began, by `time.monotonic`; now, where the system does not tell."""
    now = time.monotonic()
    try:
        ticks = int(_text(Path(f"/proc/{pid}/stat")).rsplit(")", 1)[1].split()[19])
    except (IndexError, ValueError):
        return now
    return now - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def _left(top: Path, group: str, limit_name: str, used_name: str, cache_name: str) -> Iterator[int]:
    """Bytes that a group and each one above it leave, of those with a limit: all of them hold. In a container a group
    may have no folder of its name, but be the top itself."""
    folder = top / group.strip("/")
    for place in (folder, *folder.parents):
        limit, used = _text(place / limit_name).strip(), _text(place / used_name).strip()
        if limit.isdecimal() and used.isdecimal():
            counts = dict(line.split() for line in _text(place / "memory.stat").splitlines() if line.count(" ") == 1)
            yield max(0, int(limit) - int(used) + int(counts.get(cache_name, 0)))
        if place == top:
            return


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
