"""Slots with trivial bodies. Each process writes lines `name pid event` to the file `log`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qwen3vl_disagg.cluster import slots as slots_module
from qwen3vl_disagg.cluster.job_memory import JobMemory, Use
from qwen3vl_disagg.cluster.slots import Child, Slot, die_with_parent
from qwen3vl_disagg.core.errors import DeviceLost, Dismissed, HandshakeError, HubGone, InputError
from qwen3vl_disagg.core.logs import start_logging

LOG = Path()


def note(name: str, event: str) -> None:
    with LOG.open("a") as file:
        file.write(f"{name} {os.getpid()} {event}\n")


def sleeper(name: str) -> int:
    """Runs until it is killed; tells when a signal got through."""
    note(name, "up")
    time.sleep(60)
    return 9


def leaver(name: str) -> int:
    """Leaves well when told, as a rank on Stop."""
    note(name, "up")
    while not Path(f"{LOG}.stop").exists():
        time.sleep(0.01)
    note(name, "left")
    return 0


def frontend(name: str) -> int:
    """Unblocks the signals, and tells the ranks to stop when one comes."""
    note(name, "up")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    time.sleep(0.2)
    Path(f"{LOG}.stop").touch()
    note(name, "left")
    return 0


def told(name: str) -> int:
    """A frontend that another node told to end."""
    Path(f"{LOG}.stop").touch()
    note(name, "left")
    return 0


def raising(error: BaseException, name: str) -> int:
    note(name, "up")
    raise error


def crashing(name: str) -> int:
    note(name, "up")
    return 5


def useful(name: str) -> int:
    """Dies at once, but was of use before, the first four times."""
    number = LOG.read_text().count(name)
    note(name, "up")
    if number < 4:
        use.mark()
    return 5


def lost(name: str) -> int:
    """Its GPU is gone, the first time."""
    number = LOG.read_text().count(name)
    note(name, "up")
    if number == 0:
        raise DeviceLost("the GPU is lost to this process: CUDA error: an illegal memory access")
    return 0


def vanished(name: str) -> int:
    """Lives well, then finds no checkpoint twice, then lives again."""
    number = LOG.read_text().count(name)
    note(name, "up")
    if number in (1, 2):
        raise InputError("no checkpoint here")
    time.sleep(0.5 if number == 0 else 60)
    return 1


memory, use = JobMemory(), Use()


def child(name: str, body: Callable[[str], int], **options: Any) -> Child:
    return Child(name, partial(body, name), is_vital=options.pop("is_vital", False), **options)


def stopping(name: str) -> int:
    """Beats, and stands still the first time that it lives for a second."""
    is_first = name not in LOG.read_text()
    note(name, "up")
    for turn in range(200):
        memory.beat()
        time.sleep(0.05)
        if is_first and turn == 20:
            os.kill(os.getpid(), signal.SIGSTOP)
    return 0


def slots() -> dict[str, Slot]:
    def hub_is_gone() -> bool:
        return Path(f"{LOG}.gone").exists()

    rank = child("language", leaver, is_vital=True)

    def refused(error: Exception) -> Slot:
        return Slot([child("encode", partial(raising, error))], on_lost=lambda: note("slot", "lost"))

    return {
        "encode": Slot([child("encode", sleeper)]),
        "language": Slot([child("language", sleeper, is_vital=True)]),
        "first": Slot([child("frontend", frontend, takes_signals=True), child("encode", leaver)]),
        "both": Slot([child("frontend", frontend, takes_signals=True), rank], on_told=lambda: note("slot", "told")),
        "stubborn": Slot([child("language", sleeper, is_vital=True)], leave_s=0.5),
        "orphan": Slot([child("language", sleeper, is_vital=True)], is_hub_gone=hub_is_gone, orphan_s=0.5),
        "refused": refused(HandshakeError("dtype", "a", "b")),
        "input": refused(InputError("no such thing")),
        "gone": refused(HubGone("no hub within 30 s")),
        "dismissed": refused(Dismissed("the job is going down")),
        "lost": Slot([child("encode", lost)]),
        "told": Slot([child("frontend", told, takes_signals=True), rank], on_told=lambda: note("slot", "told")),
        "alone": Slot([child("frontend", told, takes_signals=True), child("encode", sleeper)], leave_s=0.5),
        "far": Slot([rank], on_stop=lambda: Path(f"{LOG}.stop").touch()),
        "crashing": Slot([child("encode", crashing)]),
        "useful": Slot([child("encode", useful, on_fork=use.begin, was_of_use=use.__bool__)]),
        "vanished": Slot([child("encode", vanished)]),
        "stuck": Slot(
            [child("frontend", stopping, is_stuck=lambda: memory.silent_s > 1.0, on_fork=memory.expect_no_beat)]
        ),
    }


def run_scenario(name: str, log: Path, errors: Path, has_agent: bool) -> None:
    """The whole life of a slot, in a session of its own as torchrun starts its workers.

    `has_agent` puts a parent between the caller and the slot, whose death the slot is not to survive.
    """
    global LOG
    LOG = log
    os.setsid()
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    if has_agent:
        agent = os.getpid()
        note("agent", "up")
        if os.fork():
            time.sleep(60)
            sys.exit(0)
        die_with_parent(agent)
    start_logging()
    note("slot", "up")
    if name == "vanished":
        slots_module._LONG_LIFE_S = 0.3
    sys.exit(slots()[name].run())
