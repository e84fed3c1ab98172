"""What a process and all that it started use, as the kernel counts it (Linux)."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third one on (state, ppid, ..); empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def family(pid: int) -> set[int]:
    """A process, its children, their children, and so on."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    parents = {child: int(fields[1]) for child in pids if (fields := _stat(child))}
    found, frontier = {pid}, {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier} - found
        found |= frontier
    return found


def cpu_seconds(pids: set[int]) -> float:
    """CPU time that these processes have used so far, all threads, user and system."""
    return sum(int(fields[11]) + int(fields[12]) for pid in pids if (fields := _stat(pid))) / _TICKS


def memory(pids: set[int]) -> dict[str, int]:
    """Bytes: `private` (anonymous memory now) and `peak` (most that was ever resident), summed over processes.

    The peak counts a page of a file as often as it is mapped, so it is an upper bound.
    """
    total = {"private": 0, "peak": 0}
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        sizes = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
        for key, name in (("private", "RssAnon"), ("peak", "VmHWM")):
            total[key] += int(sizes.get(name, "0 kB").split()[0]) * 1024
    return total
