"""How long each stage of the way down may take, counted from the signal."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import time
from dataclasses import dataclass, field

import pytest

from qwen3vl_disagg.cluster import slots
from qwen3vl_disagg.cluster.job_memory import JobMemory
from qwen3vl_disagg.launch import frontend
from qwen3vl_disagg.launch.frontend import CLOSED_S, DRAINED_S, LEFT_S, serve, time_left


@pytest.mark.parametrize(
    ("late", "drain", "close", "leave"),
    [(0.0, 20, 22, 26), (3.5, 16.5, 18.5, 22.5), (19.0, 1, 3, 7), (21.0, 0, 1, 5), (40.0, 0, 0, 0)],
)
def test_what_is_left_is_counted_from_the_signal(late, drain, close, leave):
    left = [time_left(100.0, by_s, 100.0 + late) for by_s in (DRAINED_S, CLOSED_S, LEFT_S)]
    assert left == [drain, close, leave]


def test_there_is_room_behind_every_stage():
    stages = [0.0, DRAINED_S, CLOSED_S, LEFT_S, slots.LEAVE_S, slots.KILL_S]
    assert stages == sorted(stages)
    assert min(b - a for a, b in itertools.pairwise(stages)) >= 2.0
    assert slots.KILL_S == 30.0  # torchrun's own


def test_the_first_signal_counts():
    memory = JobMemory()
    assert memory.stopped_at is None
    before = time.monotonic()
    memory.stop()
    first = memory.stopped_at
    time.sleep(0.01)
    memory.stop()
    assert memory.stopped_at == first
    assert before <= first <= time.monotonic()


def test_a_signal_that_the_slot_heard_is_known_to_its_children():
    memory = JobMemory()
    pid = os.fork()
    if pid == 0:
        memory.stop()
        os._exit(0)
    os.waitpid(pid, 0)
    assert memory.stopped_at is not None


@dataclass
class Stages:
    """Hub and HTTP server in one, which take the time that they are given."""

    limits: dict[str, float] = field(default_factory=dict)
    end_job: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, sock: object) -> asyncio.Future[None]:
        return asyncio.get_running_loop().create_future()

    async def drain(self, limit_s: float) -> None:
        self.limits["drain"] = limit_s
        await asyncio.sleep(0.1)

    async def close(self, limit_s: float) -> None:
        self.limits["close"] = limit_s

    def readiness(self) -> object:
        return type("Readiness", (), {"ready": False})


class Http:
    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    async def serve(self, sock: object) -> None:
        await asyncio.Event().wait()

    def shutdown(self) -> None:
        self._stages.limits["shutdown"] = time.monotonic()


@pytest.mark.parametrize("heard_s", [None, 21.5])
def test_the_stages_get_what_is_left(monkeypatch, heard_s):
    """`heard_s`: how long ago the slot heard the signal; None: another host's."""
    monkeypatch.setattr(frontend, "LEFT_S", 23.0)
    memory = JobMemory()

    async def main() -> dict[str, float]:
        stages = Stages()
        with socket.create_server(("127.0.0.1", 0)) as sock:
            if heard_s is not None:
                with monkeypatch.context() as patch:
                    past = time.monotonic() - heard_s
                    patch.setattr("qwen3vl_disagg.cluster.job_memory.time.monotonic", lambda: past)
                    memory.stop()
                asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGTERM)
            else:
                monkeypatch.setattr(frontend, "CLOSED_S", 0.2)
                stages.end_job.set()
            assert await serve(stages, Http(stages), sock, sock, memory) == 0  # type: ignore[arg-type]
        return stages.limits

    previous = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        limits = asyncio.run(main())
    finally:
        signal.signal(signal.SIGTERM, previous[0])
        signal.signal(signal.SIGINT, previous[1])
    if heard_s is None:
        assert 19.5 < limits["drain"] <= 20.0
        assert 22.0 < limits["close"] < 23.0
    else:
        assert limits["drain"] == 0.0
        assert 0.0 < limits["close"] < 1.1  # what the connections took is not made up for


class Attempt(Stages):
    """Somebody connects to HTTP while the hub waits for the ranks to leave."""

    address: tuple[str, int]
    refused = False

    async def close(self, limit_s: float) -> None:
        try:
            socket.create_connection(self.address, 5).close()
        except ConnectionRefusedError:
            self.refused = True


class Closing(Http):
    """As the real one, it closes its socket when it is told to."""

    async def serve(self, sock: socket.socket) -> None:
        while "shutdown" not in self._stages.limits:
            await asyncio.sleep(0.01)
        sock.close()


def test_who_connects_while_ranks_leave_is_refused_though_the_slot_has_the_socket():
    """The connection would wait, with nobody to take it, until the slot ends."""

    async def main() -> bool:
        stages = Attempt()
        stages.end_job.set()
        with socket.create_server(("127.0.0.1", 0)) as held, socket.create_server(("127.0.0.1", 0)) as hub:
            stages.address = held.getsockname()
            assert await serve(stages, Closing(stages), held.dup(), hub, JobMemory()) == 0  # type: ignore[arg-type]
        return stages.refused

    previous = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        assert asyncio.run(main())
    finally:
        signal.signal(signal.SIGTERM, previous[0])
        signal.signal(signal.SIGINT, previous[1])
