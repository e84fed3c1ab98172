"""What every benchmark reports beside its figures: the machine, its load, and how much of it the run and single
processes got, as the kernel counts it (Linux).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

_TICKS = os.sysconf("SC_CLK_TCK")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine_facts() -> dict[str, Any]:
    """Hardware, versions, date and load, as they are now."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """The facts, for people."""
    name = f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}"
    return f"{name}, load {machine['load']}"


def conclude(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print a benchmark's tables, unless JSON alone is asked for, and the result as one line of JSON."""
    if not as_json:
        print(text + "\n")
    print(json.dumps(result))


def busy_seconds() -> float:
    """CPU time that all processes of this machine have used since it started; 0 where the kernel does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq = map(int, stat.read_text().split("\n", 1)[0].split()[1:8])
    return (user + nice + system + irq + softirq) / _TICKS


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


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
