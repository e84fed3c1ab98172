"""Processes of this machine: who is below whom, what they hold, and signals that cannot hit another. Linux only."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from tools.chaos_parts.growth import Sample


@dataclass(frozen=True)
class Process:
    """`started`: in clock ticks since the machine was: with `pid` it names one process for good."""

    pid: int
    parent: int
    started: int
    is_zombie: bool


def look(pid: int) -> Process | None:
    """None: it has ended."""
    try:
        rest = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return Process(pid, int(rest[1]), int(rest[19]), rest[0] in "ZX")


def descendants(pid: int) -> dict[int, Process]:
    """Every process below `pid`, without those that wait to be reaped."""
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    everybody = {one.pid: one for one in map(look, numbers) if one is not None and not one.is_zombie}
    found: dict[int, Process] = {}
    edge = {pid}
    while edge:
        edge = {one.pid for one in everybody.values() if one.parent in edge} - found.keys()
        found |= {number: everybody[number] for number in edge}
    return found


def is_alive(process: Process) -> bool:
    """The same one, not another with its number."""
    now = look(process.pid)
    return now is not None and now.started == process.started and not now.is_zombie


def send(process: Process, number: signal.Signals) -> bool:
    """Whether it was still there."""
    try:
        handle = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        if not is_alive(process):
            return False
        signal.pidfd_send_signal(handle, number)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def measure(process: Process, name: str, at: float) -> Sample | None:
    """None: it has ended meanwhile."""
    folder = Path(f"/proc/{process.pid}")
    try:
        fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
        anon, threads = int(fields["RssAnon"].split()[0]) * 1024, int(fields["Threads"])
        descriptors = len(os.listdir(folder / "fd"))
    except (OSError, KeyError):
        return None
    return Sample(at, name, process.pid, process.started, anon, descriptors, threads)
