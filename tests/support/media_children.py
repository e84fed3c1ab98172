"""Decoding children that are counted, and ones that do something else than decode."""

from __future__ import annotations

import os
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest

from qwen3vl_disagg.media import child

_READY = """
import os, signal, sys, time
from qwen3vl_disagg.media.child import *
def say(message): os.write(1, pack(message))
say(Ready())
"""
_JOBS = """
while True:
    head = read_exactly(0, body_length(read_exactly(0, 4)))
    read_exactly(0, msgspec.msgpack.decode(head, type=Job).num_bytes)
"""


def runs(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Children that run this from their start."""
    monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", code))


def once_ready(monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    """Children that say that they are ready and then do this, reading nothing."""
    runs(monkeypatch, _READY + act)


def with_each_job(monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    """Children that read a job and then do something else."""
    runs(monkeypatch, _READY + _JOBS + textwrap.indent(act, "    "))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[child.ChildProcess]:
    """All children from now on."""
    children: list[child.ChildProcess] = []
    real = child.ChildProcess.__init__

    def count(self, stop) -> None:
        children.append(self)
        real(self, stop)

    monkeypatch.setattr(child.ChildProcess, "__init__", count)
    return children


def is_there(pid: int) -> bool:
    """Whether it runs; what has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def open_files() -> set[tuple[str, str]]:
    """Descriptors of this process, each with what it is: those of other tests may be closed by the garbage collector
    at any moment, so that only what is new counts."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found.add((entry, os.readlink(f"/proc/self/fd/{entry}")))
    return found
