"""What clients hear of a server that is killed: a typed end where one fits, and never a byte that does not."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwen3vl_disagg.cluster import last_words
from qwen3vl_disagg.cluster.last_words import AGAIN_S, LINGER_S, LastWords, counts_bytes, words_door
from tests.support.server import REPO

WAIT_S = 20.0
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"


@dataclass
class Worded:
    process: subprocess.Popen[str]
    port: int
    keeper: int
    pid: int

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def again(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.pid = int(self.process.stdout.readline())

    def keeper_again(self) -> None:
        os.kill(self.keeper, signal.SIGKILL)
        self.process.stdin.write("keeper\n")
        self.process.stdin.flush()
        self.keeper = int(self.process.stdout.readline())

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)

    def ask(self, path: str, text: str = "what is it?", *, version: str = "1.1", **fields: object) -> socket.socket:
        body = {"model": "tiny", "max_tokens": 400, "messages": [{"role": "user", "content": text}], **fields}
        if path == RESPONSES:
            body = {"model": "tiny", "max_output_tokens": 400, "input": text, **fields}
        data = json.dumps(body).encode()
        sock = self.connect()
        head = [f"POST {path} HTTP/{version}", "Host: a", "Content-Type: application/json"]
        sock.sendall("\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data)
        return sock


@contextmanager
def worded(keeper_status: int = 0) -> Iterator[Worded]:
    command = [sys.executable, "-m", "tests.support.worded_server"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        port, keeper, pid = map(int, process.stdout.readline().removeprefix("ready: ").split())
        yield Worded(process, port, keeper, pid)
        process.stdin.close()
        assert process.wait(WAIT_S) == keeper_status
    finally:
        process.kill()
        process.wait(WAIT_S)


@pytest.fixture(scope="module")
def server() -> Iterator[Worded]:
    with worded() as one:
        yield one


def until(sock: socket.socket, pattern: bytes) -> bytes:
    data = b""
    while not re.search(pattern, data):
        chunk = sock.recv(4096)
        assert chunk, data
        data += chunk
    return data


def rest(sock: socket.socket) -> bytes:
    data = b""
    with sock:
        while chunk := sock.recv(65536):
            data += chunk
    return data


def events(raw: bytes) -> list[dict[str, object]]:
    """Of a whole chunked stream: AssertionError for framing that does not end, or a line that is no JSON."""
    head, _, data = raw.partition(b"\r\n\r\n")
    assert b"chunked" in head.lower(), head
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        if int(size, 16) == 0:
            assert data == b"\r\n"
            break
        chunk, data = data[: int(size, 16)], data[int(size, 16) :]
        assert data.startswith(b"\r\n")
        body, data = body + chunk, data[2:]
    return [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: ") and b"[DONE]" not in line]


def test_every_form_of_stream_has_a_typed_end_and_what_waits_a_503(server):
    streams = {path: server.ask(path, stream=True) for path in (CHAT, MESSAGES, RESPONSES)}
    seen = {path: until(sock, rb"red.*\n\n") for path, sock in streams.items()}
    waiting = {path: server.ask(path, "wait") for path in (CHAT, MESSAGES)}
    whole = server.ask(CHAT)
    idle = server.connect()
    time.sleep(0.5)
    server.kill()
    last = {path: events(seen[path] + rest(sock))[-1] for path, sock in streams.items()}
    assert (last[CHAT]["error"]["type"], last[CHAT]["error"]["code"]) == ("service_unavailable_error", "interrupted")
    assert (last[MESSAGES]["type"], last[MESSAGES]["error"]["type"]) == ("error", "overloaded_error")
    assert (last[RESPONSES]["type"], last[RESPONSES]["code"]) == ("error", "interrupted")
    for path, sock in {**waiting, "whole": whole}.items():
        head, _, body = rest(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 "), (path, head)
        assert re.search(rb"(?im)^retry-after: \d", head)
        assert int(re.search(rb"(?im)^content-length: (\d+)", head)[1]) == len(body)
        error = json.loads(body)["error"]
        assert error["code"] == "interrupted"
        assert error["type"] == ("overloaded_error" if path == MESSAGES else "service_unavailable_error")
    assert rest(idle) == b""
    server.again()
    with server.ask(CHAT, stream=True) as sock:
        until(sock, rb"red")


def send_for(sock: socket.socket, seconds: float) -> None:
    ended = time.monotonic() + seconds
    while time.monotonic() < ended:
        sock.sendall(b" " * 100)
        time.sleep(0.05)


def test_who_still_sends_its_request_hears_it_too(server):
    """Bytes that nobody reads would make the kernel drop what was said; who sends for ever is not waited for."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9000000\r\n\r\n"
    ending, endless = server.connect(), server.connect()
    for sock in (ending, endless):
        sock.sendall(head.encode())
        sock.sendall(b" " * 300_000)
    time.sleep(0.3)
    server.kill()
    for _ in range(20):
        ending.sendall(b" " * 20_000)
        time.sleep(0.02)
    ending.shutdown(socket.SHUT_WR)
    answer = rest(ending)
    assert answer.startswith(b"HTTP/1.1 503 "), answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "interrupted"
    server.again()
    with server.ask(CHAT, stream=True) as sock:
        until(sock, rb"red")
    with endless, pytest.raises(ConnectionError):
        send_for(endless, LINGER_S + 2)


def test_who_still_sends_hears_it_where_the_job_ends_as_well():
    with worded() as one:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9000000\r\n\r\n"
        sending = one.connect()
        sending.sendall(head.encode() + b" " * 300_000)
        time.sleep(0.3)
        os.kill(one.keeper, signal.SIGTERM)
        one.kill()
        for _ in range(20):
            sending.sendall(b" " * 20_000)
            time.sleep(0.02)
        sending.shutdown(socket.SHUT_WR)
        assert rest(sending).startswith(b"HTTP/1.1 503 ")


def test_an_old_client_gets_the_event_alone(server):
    with server.ask(CHAT, version="1.0", stream=True) as sock:
        data = until(sock, rb"red.*\n\n")
        time.sleep(0.02)  # the write that brought this has returned
        server.kill()
        data += rest(sock)
    assert b"chunked" not in data.lower()
    assert json.loads(data.rstrip().rpartition(b"data: ")[2])["error"]["code"] == "interrupted"
    server.again()


def test_nothing_is_said_in_the_middle_of_a_write_or_after_the_end(server):
    """A client that does not read fills both sockets' buffers: what follows would stand inside another event."""
    slow = server.ask(CHAT, "flood", stream=True, logprobs=True, top_logprobs=20, n=32)
    done = server.connect()
    done.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    until(done, rb"\}")
    time.sleep(2.0)
    server.kill()
    assert rest(done) == b""
    data = rest(slow)
    assert len(data) > 100_000
    assert b"interrupted" not in data
    with pytest.raises((AssertionError, ValueError)):  # it is cut, and can be seen to be
        events(data)
    server.again()


def test_a_connection_ends_when_the_server_ends_it_and_the_keeper_keeps_nothing(server):
    with server.ask(CHAT, stream=True) as sock:
        until(sock, rb"red")
        before = len(list(Path(f"/proc/{server.keeper}/fd").iterdir()))
    for _ in range(200):
        sock = server.connect()
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        started = time.monotonic()
        assert b'"ok"' in rest(sock)
        assert time.monotonic() - started < 2.0
    end = time.monotonic() + WAIT_S
    while len(list(Path(f"/proc/{server.keeper}/fd").iterdir())) > before and time.monotonic() < end:
        time.sleep(0.05)
    assert len(list(Path(f"/proc/{server.keeper}/fd").iterdir())) <= before


def test_without_a_keeper_everything_goes_on():
    with worded(keeper_status=256 - signal.SIGKILL) as one:
        stream = one.ask(CHAT, stream=True)
        until(stream, rb"red")
        os.kill(one.keeper, signal.SIGKILL)
        time.sleep(0.1)
        until(stream, rb"(?s)red.*\n\n.*red")
        with one.ask(CHAT, stream=True) as other:
            until(other, rb"red")
        one.kill()
        assert b"interrupted" not in rest(stream)


def test_a_new_keeper_is_found_by_the_connections_that_come_then():
    with worded() as one:
        before = one.ask(CHAT, stream=True)
        until(before, rb"red")
        one.keeper_again()
        time.sleep(AGAIN_S)
        with one.ask(CHAT, stream=True) as sent:  # tells the frontend that its line is lost
            until(sent, rb"red")
        time.sleep(AGAIN_S)
        after = one.ask(CHAT, stream=True)
        seen = until(after, rb"red.*\n\n")
        one.kill()
        assert events(seen + rest(after))[-1]["error"]["code"] == "interrupted"
        assert b"interrupted" not in rest(before)


def test_whenever_a_writer_is_killed_the_words_fit_behind_what_it_wrote():
    command = [sys.executable, "-m", "tests.support.words_storm", "40"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == {"ends": {"right": 40}, "keeper": 0}, done.stderr


def test_what_has_no_room_for_a_moment_does_not_end_the_line(monkeypatch):
    """To close it would tell the keeper that this process is dead, and all its clients with it."""
    door, _keepers_end = words_door()
    listener = socket.create_server(("127.0.0.1", 0))
    near = socket.create_connection(listener.getsockname())
    words, send_fds = LastWords(door), socket.send_fds

    def no_room(*_: object) -> int:
        raise OSError(errno.ETOOMANYREFS, "too many references")

    monkeypatch.setattr(socket, "send_fds", no_room)
    assert words.hold(near) is None
    monkeypatch.setattr(socket, "send_fds", send_fds)
    assert words.hold(near) is not None


def test_where_the_kernel_does_not_count_nothing_is_said(monkeypatch, caplog):
    assert counts_bytes()
    monkeypatch.setattr(last_words, "_acked", lambda sock: 0)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        assert LastWords(words_door()[0]).hold(near) is None
    assert "does not count" in caplog.text
