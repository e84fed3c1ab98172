"""Nothing that a client sends stops the event loop, which owes heartbeats to the ranks."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from qwen3vl_disagg.cluster.rendezvous import host_id
from qwen3vl_disagg.protocol.messages import HubMessage, RankHello, Welcome
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.http_turns import SLICE_S, WAKE_S, ParseTurns
from qwen3vl_disagg.transport.control import MAX_HUB_FRAME, Connection
from tests.support import http_attacks as attacks
from tests.support.fake_backend import FakeBackend, tiny_processor
from tests.support.fake_ranks import FINGERPRINT, TOKEN, System, in_loop
from tests.support.http import request
from tests.support.running import RunningApp, wait_for

MAX_LATE_S = 0.25
"""Heartbeats are due every second, and ranks wait for ten. A loop that parses what it has read: 2 to 24 s."""

ATTACKS = {
    "chunks of one byte": [attacks.one_byte_chunks(40_000)] * 60,
    "chunks of 100 bytes": [attacks.small_chunks(500_000, 100)] * 40,
    "chunk extensions": [attacks.chunk_extensions(100)] * 60,
    "trailers": [attacks.trailers(200_000)] * 60,
    "pipelined requests": [attacks.pipelined(100)] * 60,
    "many small headers": [attacks.many_headers(3_000)] * 200,
    "headers behind another request": [attacks.pipelined(1) + attacks.many_headers(3_000)] * 200,
    "bodies that are not read": [attacks.unread_bodies(2_000_000)] * 60,
    "chunks that are not read": [attacks.unread_chunks(40_000)] * 60,
    "not HTTP": [b"\x00" * 300_000] * 60,
}


@pytest.mark.parametrize("name", ["chunks of one byte", "many small headers"])
def test_the_loop_is_never_late(name):
    check_lateness(name, hold_s=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_the_loop_is_never_late_long(name):
    check_lateness(name, hold_s=5.0)


def check_lateness(name: str, hold_s: float) -> None:
    app = create_app(FakeBackend(), tiny_processor(), model_name="tiny")
    with RunningApp(app) as running:
        with running.lateness() as late:
            attacks.send_all(running.port, ATTACKS[name], hold_s=hold_s)
            started = time.monotonic()
            assert request(running.url + "/health").status == 200
            assert time.monotonic() - started < 0.5
        print(f"{name}: late {max(late):.3f} s")
    assert max(late) < MAX_LATE_S


def test_header_bytes_one_by_one():
    """Each comes alone, so each is a turn of its own."""
    app = create_app(FakeBackend(), tiny_processor(), model_name="tiny")
    with RunningApp(app) as running:
        with running.lateness() as late:
            attacks.send_all(running.port, [attacks.many_headers(100)] * 100, hold_s=0.5, step=1)
        assert request(running.url + "/health").status == 200
    assert max(late) < MAX_LATE_S


class _Timed(Connection):
    """A rank's end: when anything arrived, heartbeats included."""

    arrivals: list[float]

    async def _receive_one(self) -> Any:
        message = await super()._receive_one()
        self.arrivals.append(time.monotonic())
        return message


@contextlib.contextmanager
def heartbeats(address: tuple[str, int]) -> Iterator[list[float]]:
    """A rank that is connected to the hub meanwhile; filled with the times between arrivals when the block ends."""
    gaps: list[float] = []
    arrivals: list[float] = []
    errors: list[BaseException] = []
    done, welcome = threading.Event(), threading.Event()

    async def listen() -> None:
        reader, writer = await asyncio.open_connection(*address)
        connection = _Timed(reader, writer, messages=HubMessage, max_frame=MAX_HUB_FRAME)
        connection.arrivals = arrivals
        fields = {"token": TOKEN, "pid": 1, "host": host_id(), "fingerprint": FINGERPRINT}
        await connection.send(RankHello(role="language", rank=1, **fields))
        assert isinstance(await connection.receive(5.0), Welcome)
        connection.keep_alive()
        welcome.set()
        receiving = asyncio.ensure_future(connection.receive())
        while not done.is_set() and not receiving.done():
            await asyncio.sleep(0.01)
        arrivals.append(time.monotonic())
        receiving.cancel()
        await connection.close()

    def run() -> None:
        try:
            asyncio.run(listen())
        except BaseException as error:
            errors.append(error)
            welcome.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert welcome.wait(10)
    yield gaps
    done.set()
    thread.join(10)
    assert not errors
    gaps.extend(after - before for before, after in itertools.pairwise(arrivals))


def test_ranks_hear_of_the_hub_while_clients_do_their_worst():
    """The hub on the loop that serves HTTP, as the frontend has it, and a rank that waits for its heartbeats."""
    system = System(world=2, num_encode=1)

    async def hub() -> None:
        async with system:
            await asyncio.Event().wait()

    app = create_app(system.hub, tiny_processor(), model_name="tiny")
    with RunningApp(app, beside=hub) as running, heartbeats(system.address) as gaps:
        payloads = [payload for attack in ATTACKS.values() for payload in attack[:20]]
        attacks.send_all(running.port, payloads, hold_s=2.5)
    print(f"gaps {max(gaps):.3f} s")
    assert len(gaps) >= 2
    assert max(gaps) < 1.0 + MAX_LATE_S


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_hundreds_that_leave_at_once(how, monkeypatch):
    """In the middle of their bodies, so that a handler is told of each: of so many as a slice has time for, then the
    loop runs everything else."""
    told: Counter[int] = Counter()
    turn = 0

    async def count() -> None:
        nonlocal turn
        while True:
            await asyncio.sleep(0)
            turn += 1

    def connection_lost(self: H11Protocol, error: Exception | None) -> None:
        told[turn] += 1
        tell(self, error)

    tell = H11Protocol.connection_lost
    monkeypatch.setattr(H11Protocol, "connection_lost", connection_lost)
    app = create_app(FakeBackend(), tiny_processor(), model_name="tiny")
    with RunningApp(app, beside=count) as running:
        socks = [running.connect() for _ in range(800)]
        for sock in socks:
            sock.sendall(attacks.HEAD.encode() + b"Content-Length: 1000\r\n\r\n{")
        wait_for(lambda: len(running.server.places) == 800, 10.0)
        time.sleep(0.3)
        for sock in socks:
            if how == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        wait_for(lambda: told.total() == 800, 20.0)
    assert max(told.values()) <= SLICE_S / WAKE_S + 1


def test_health_does_not_stand_behind_hundreds_of_requests():
    app = create_app(FakeBackend(), tiny_processor(), model_name="tiny")
    with RunningApp(app) as running:
        socks = [running.connect() for _ in range(300)]
        request(running.url + "/health")
        for sock in socks:
            sock.sendall(attacks.pipelined(20, "/v1/models"))
        started = time.monotonic()
        assert request(running.url + "/health").status == 200
        took = time.monotonic() - started
        for sock in socks:
            sock.close()
    assert took < 0.5


class _Turn:
    """Takes `num_turns` turns; fails in the last one if it is `broken`."""

    is_urgent, num_wakes, num_pending = False, 0, 1

    def __init__(self, num_turns: int, *, broken: bool = False) -> None:
        self.num_turns, self.broken = num_turns, broken

    def take_turn(self) -> bool:
        self.num_turns -= 1
        if self.broken and not self.num_turns:
            raise OSError
        return self.num_turns > 0


@in_loop
async def test_a_connection_that_fails_holds_nobody_up():
    told = list[dict]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    turns, connections = ParseTurns(), [_Turn(3), _Turn(1, broken=True), _Turn(5), _Turn(2, broken=True), _Turn(1)]
    for connection in connections:
        turns.add(connection)
    async with asyncio.timeout(5):
        while any(connection.num_turns for connection in connections):
            await asyncio.sleep(0.001)
    assert len(told) == 2
