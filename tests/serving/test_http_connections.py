"""Connections: each phase has an end, and those that wait for nothing keep nobody out."""

from __future__ import annotations

import contextlib
import gc
import json
import socket
import time

import pytest

from qwen3vl_disagg.cluster.backend import AllDecoded, FinishedEvent, TokenEvent
from qwen3vl_disagg.serving import http_connection, http_places, http_server
from qwen3vl_disagg.serving.http_connection import PHASES, HttpConnection, Patience
from qwen3vl_disagg.serving.http_places import PlaceLimits
from tests.support import http_attacks as attacks
from tests.support.fake_backend import ASK, PATH, FakeBackend, timings
from tests.support.http import post_json, request
from tests.support.running import Running, wait_for

HEAD = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
DATA = json.dumps(ASK).encode()
GOOD = f"{HEAD}Content-Length: {len(DATA)}\r\n\r\n".encode() + DATA


@pytest.fixture
def quick(monkeypatch):
    """Limits of 0.4 s, looked at every 0.1 s."""
    monkeypatch.setattr(http_server, "LOOK_TICKS", 1)
    for name, patience in PHASES.items():
        if name != "request":
            monkeypatch.setitem(PHASES, name, Patience(0.4, min(patience.yields_s, 0.2)))


def long_stream() -> FakeBackend:
    """Answers until the client has had 20 MB."""
    return FakeBackend(lambda prompt, sampling: [AllDecoded(), *[TokenEvent(40)] * 100_000])


STREAM = json.dumps({**ASK, "stream": True, "continuous_usage": True, "return_token_ids": True}).encode()
STREAM_REQUEST = f"{HEAD}Content-Length: {len(STREAM)}\r\n\r\n".encode() + STREAM

SILENT = {
    "nothing": b"",
    "half a line": b"GET / HT",
    "half the headers": b"GET /health HTTP/1.1\r\nHost: a\r\n",
    "half the headers of a second request": attacks.pipelined(1) + b"GET",
    "idle after an answer": attacks.pipelined(1),
    "answered, body never read": b"POST /nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\nx",
    "answered chunks, never ended": attacks.unread_chunks(3),
    "refused, body never sent": HEAD.encode().replace(b"/json", b"/x") + b"Content-Length: 9\r\n\r\n",
    "refused and closed": f"{HEAD}Connection: close\r\nContent-Length: {1 << 40}\r\n\r\n".encode(),
    "a body that stops": f"{HEAD}Content-Length: 900\r\n\r\n{{".encode(),
    "chunks that stop": attacks.CHUNKED + b"5\r\nab",
    "a size of a chunk that stops": attacks.CHUNKED + b"5;abc",
    "trailers that stop": attacks.CHUNKED + b"0\r\na: b\r\n",
    "not HTTP": b"nonsense\r\n\r\n",
    "asks whether to send, and does not": f"{HEAD}Content-Length: 9\r\nExpect: 100-continue\r\n\r\n".encode(),
}


@pytest.mark.parametrize("dribbles", [False, True])
def test_every_silence_ends(quick, dribbles):
    """Also if one more byte comes now and then, and if the client closes its own side only."""
    with Running(FakeBackend()) as running:
        socks = {}
        for name, data in SILENT.items():
            socks[name] = running.connect()
            socks[name].sendall(data)
        end = time.monotonic() + 2.5
        waiting = dict(socks)
        while waiting and time.monotonic() < end:
            time.sleep(0.1)
            for name, sock in list(waiting.items()):
                if not is_open(sock):
                    del waiting[name]
                elif dribbles and name != "idle after an answer":
                    with contextlib.suppress(OSError):
                        sock.send(b"x")
        assert not waiting
        wait_for(lambda: not len(running.server.places))
        assert post_json(running.url + PATH, ASK).status == 200
        for sock in socks.values():
            sock.close()


def is_open(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        while sock.recv(65536):
            pass
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@pytest.mark.parametrize("start", ["nothing", "half a line", "half the headers of a second request"])
def test_slow_headers_are_told(quick, start):
    with Running(FakeBackend()) as running:
        assert b"HTTP/1.1 408 " in running.raw(SILENT[start])


@pytest.mark.parametrize(
    "data",
    [STREAM_REQUEST, attacks.pipelined(2_000)],
    ids=["stream", "pipelined"],
)
def test_a_client_that_never_reads(quick, data):
    with Running(long_stream(), send_timeout_s=60.0) as running, running.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while data:
                data = data[sock.send(data) :]
        wait_for(lambda: len(running.server.places) == 0, 30.0)
        assert request(running.url + "/health").status == 200


def test_a_client_that_reads_slowly_is_no_such_client(quick):
    """What it gets takes longer than any limit."""
    backend = FakeBackend(lambda prompt, sampling: [AllDecoded(), *[TokenEvent(40)] * 3000])
    with Running(backend) as running, running.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(STREAM_REQUEST)
        received, started = 0, time.monotonic()
        while time.monotonic() - started < 1.0:
            received += len(sock.recv(40_000))
            time.sleep(0.05)
        assert is_open(sock)
        assert received > 30_000


def test_a_connection_serves_many_requests(monkeypatch):
    """Also after the deadline of its headers, and with other requests between those that are looked at."""
    monkeypatch.setattr(http_server, "LOOK_TICKS", 1)
    monkeypatch.setitem(PHASES, "headers", Patience(0.2, 0.1))
    with Running(FakeBackend()) as running, running.connect() as sock:
        for pause in (0.05, 0.3, *[0.02] * 20):
            sock.sendall(GOOD)
            received = b""
            while b'"timings"' not in received or not received.endswith(b"}}"):
                chunk = sock.recv(65536)
                assert chunk
                received += chunk
            assert received.startswith(b"HTTP/1.1 200 ")
            time.sleep(pause)


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
def test_an_answer_that_comes_before_the_body_can_be_read(close):
    """A client that sends everything first: no reset takes the answer away."""
    head = b"POST /nothing HTTP/1.1\r\nHost: a\r\n" + close + b"Content-Length: 8000000\r\n\r\n"
    with Running(FakeBackend()) as running, running.connect() as sock:
        sock.sendall(head)
        time.sleep(0.2)  # the answer is on its way
        for _ in range(80):
            sock.sendall(b"x" * 100_000)
        assert sock.recv(65536).startswith(b"HTTP/1.1 404 ")
        if not close:
            sock.sendall(attacks.pipelined(1))
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("attack", [attacks.one_byte_chunks(400_000), attacks.chunk_extensions(1000)])
def test_framing_out_of_proportion(attack):
    with Running(FakeBackend()) as running:
        raw = running.raw(attack, 10.0)
        assert raw.startswith(b"HTTP/1.1 400 ")
        assert b'"wasteful_framing"' in raw


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_chunks_of_ordinary_clients(size):
    """Lines of base64 and pieces of JSON, as some clients send them."""
    data = json.dumps({**ASK, "user": "x" * (3000 if size < 50 else 300_000)}).encode()
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    chunks = b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces) + b"0\r\n\r\n"
    with Running(FakeBackend()) as running:
        assert running.raw(attacks.CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + chunks).startswith(
            b"HTTP/1.1 200 "
        )


# ---- places ----

FEW = {"places": PlaceLimits(max_connections=4, reserved=2)}


def hold(running: Running, count: int, data: bytes) -> list[socket.socket]:
    socks = [running.connect() for _ in range(count)]
    for sock in socks:
        sock.sendall(data)
    return socks


def test_who_waits_for_nothing_keeps_nobody_out(monkeypatch):
    """One of each kind has a place, long before its time is over; as many requests get in, in place of each."""
    for phase in ("headers", "idle", "body", "unread body", "closing", "blocked"):
        monkeypatch.setitem(PHASES, phase, Patience(60.0, 0.2))
    monkeypatch.setattr(http_server, "LOOK_TICKS", 1)
    backend, count = FakeBackend(lambda prompt, sampling: [60.0]), len(SILENT)
    with Running(backend, options={"places": PlaceLimits(max_connections=count, reserved=2)}) as running:
        socks = [sock for data in SILENT.values() for sock in hold(running, 1, data)]
        wait_for(lambda: len(running.server.places) == count)
        assert request(running.url + "/health").status == 200
        assert request(running.url + "/ready").status == 200
        time.sleep(0.5)
        for number in range(count):
            socks += hold(running, 1, GOOD)
            wait_for(lambda number=number: len(backend.handles) > number)
        assert [is_open(sock) for sock in socks] == [False] * count + [True] * count
        assert request(running.url + "/health").status == 200
        for sock in socks:
            sock.close()


def test_requests_that_run_keep_their_places():
    backend = FakeBackend(lambda prompt, sampling: [60.0])
    with Running(backend, options=FEW) as running:
        socks = hold(running, 4, GOOD)
        wait_for(lambda: len(backend.handles) == 4)
        time.sleep(0.5)
        refused = post_json(running.url + PATH, ASK)
        assert (refused.status, refused.json["error"]["code"]) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        for path in ("/health", "/ready"):
            reply = request(running.url + path)
            assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert request(running.url + "/v1/models").status == 503
        silent = hold(running, 20, b"")
        assert request(running.url + "/health").status == 200
        assert not any(handle.was_cancelled.is_set() for handle in backend.handles)
        for sock in [*socks, *silent]:
            sock.close()
        wait_for(lambda: not len(running.server.places))
        assert request(running.url + "/v1/models").status == 200


def test_a_body_that_comes_slowly_makes_room_and_one_that_comes_fast_does_not(monkeypatch):
    monkeypatch.setitem(PHASES, "body", Patience(60.0, 0.2))
    monkeypatch.setattr(http_connection, "SLOW_BODY", 10_000)
    monkeypatch.setattr(http_server, "LOOK_TICKS", 1)
    head = f"{HEAD}Content-Length: 900000\r\n\r\n".encode()
    with Running(FakeBackend(), options=FEW) as running:
        socks = hold(running, 4, head)
        for _ in range(10):
            for sock in socks[:3]:
                sock.sendall(b" " * 10_000)
            time.sleep(0.05)
        assert request(running.url + "/v1/models").status == 200
        assert [is_open(sock) for sock in socks] == [True, True, True, False]
        for sock in socks:
            sock.close()


@pytest.mark.parametrize(("limit", "total"), [(1 << 16, 1088), (1024, 512), (256, 128), (64, 32)])
def test_places_stay_below_what_the_process_may_open(monkeypatch, limit, total):
    monkeypatch.setattr(http_places, "descriptor_limit", lambda: limit)
    places = PlaceLimits.of_process()
    assert places.max_connections + places.reserved == total
    assert places.reserved >= total // 17


def test_nobody_is_dropped_because_the_server_had_no_time():
    """Its loop stands still for longer than a place is kept: what came meanwhile has not been read."""
    with Running(FakeBackend(), options={"places": PlaceLimits(max_connections=1, reserved=1)}) as running:
        loop = running.loop
        loop.call_soon_threadsafe(time.sleep, 0.6)
        time.sleep(0.05)
        with running.connect() as first:
            first.sendall(attacks.pipelined(1))
            loop.call_soon_threadsafe(time.sleep, 0.6)
            with running.connect():
                assert first.recv(100).startswith(b"HTTP/1.1 200 ")


ENDED = {
    **SILENT,
    "answers": GOOD * 3,
    "many headers": attacks.many_headers(3_000),
    "trailers": attacks.trailers(200_000),
    "wasteful chunks": attacks.one_byte_chunks(250_000),
    "a body that nobody reads": attacks.unread_bodies(1_000_000),
    "a stream": STREAM_REQUEST,
}


def test_what_has_ended_is_freed_at_once(quick):
    """Nothing waits for the garbage collector: before that looks, thousands may come, each with full buffers."""
    steps = [AllDecoded(), 0.3, *[TokenEvent(40)] * 30, FinishedEvent("stop", timings())]
    with Running(FakeBackend(lambda prompt, sampling: list(steps))) as running:
        gc.collect()
        gc.disable()
        try:
            attacks.send_all(running.port, [*ENDED.values()] * 3, hold_s=1.0)
            wait_for(lambda: not running.server.num_connections, 30.0)
            wait_for(lambda: not [one for one in gc.get_objects() if type(one) is HttpConnection], 30.0)
        finally:
            gc.enable()
