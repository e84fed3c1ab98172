"""The whole surface behind real sockets: uvicorn, the command-line client, and what TCP lets a client do."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest

from qwen3vl_disagg.cluster.backend import AllDecoded, TokenEvent
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.http_server import HttpServer
from qwen3vl_disagg.serving.limits import MIB
from tests.support.fake_backend import ASK, PATH, FakeBackend, answer_steps, tiny_processor
from tests.support.http import post_json, request, sse_events, sse_lines
from tests.support.images import png, uri
from tests.support.running import Running, wait_for


@pytest.fixture(scope="module")
def running():
    with Running(FakeBackend()) as running:
        yield running


def envelope_of(raw: bytes) -> dict:
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"application/json" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_plain_and_streamed_over_a_socket(running):
    url = running.url + PATH
    reply = post_json(url, ASK, headers={"X-Request-ID": "abc"})
    assert (reply.status, reply.headers["x-request-id"]) == (200, "abc")
    assert "server" not in reply.headers
    assert reply.json["choices"][0]["message"]["content"] == "red circle"
    *chunks, done = sse_events(url, {**ASK, "stream": True})
    assert done == "[DONE]"
    pieces = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
    assert "".join(pieces) == "red circle"
    assert post_json(url, {**ASK, "top_p": 7}).json["error"]["param"] == "top_p"
    assert request(running.url + "/nothing").status == 404


def test_tokens_come_one_by_one_and_leaving_cancels():
    steps = [AllDecoded(), TokenEvent(40), TokenEvent(41), 60.0]
    with Running(FakeBackend(lambda prompt, sampling: steps)) as running:
        lines = sse_lines(running.url + PATH, {**ASK, "stream": True, "return_token_ids": True})
        seen = 0
        for line in lines:
            seen += '"token_ids":[4' in line
            if seen == 2:
                break
        [handle] = running.backend.handles
        assert not handle.was_cancelled.is_set()
        lines.close()
        wait_for(handle.was_cancelled.is_set)


def test_leaving_cancels_a_plain_request():
    with Running(FakeBackend(lambda prompt, sampling: [60.0])) as running:
        with pytest.raises(TimeoutError):
            post_json(running.url + PATH, ASK, deadline_s=0.5)
        wait_for(running.backend.handles[0].was_cancelled.is_set)


@pytest.mark.parametrize("declared", [True, False])
def test_a_large_body_is_refused_and_the_client_learns_why(declared):
    with Running(FakeBackend(), max_body_bytes=MIB) as running:
        data = b'{"user": "' + b"x" * 2 * MIB + b'"}'
        head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
        if declared:
            raw = running.raw(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        else:
            chunk = f"{len(data):x}\r\n".encode() + data + b"\r\n0\r\n\r\n"
            raw = running.raw(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk)
        assert raw.startswith(b"HTTP/1.1 413 ")
        assert post_json(running.url + PATH, ASK).status == 200


def test_a_client_that_asks_before_sending_is_told_at_once():
    with Running(FakeBackend(), max_body_bytes=MIB) as running:
        head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {9 * MIB}\r\n"
        raw = running.raw(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert raw.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 2**20,
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /caf\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_not_http_gets_an_envelope(running, data):
    raw = running.raw(data)
    assert raw.startswith(b"HTTP/1.1 400 ")
    assert envelope_of(raw)["code"] == "invalid_http"
    assert post_json(running.url + PATH, ASK).status == 200


def test_large_headers_in_one_piece(running):
    raw = running.raw(b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 17_000 + b"\r\n\r\n")
    assert raw.startswith(b"HTTP/1.1 431 ")
    assert envelope_of(raw)["code"] == "headers_too_large"


def test_signals_are_left_alone():
    """In the main thread, where uvicorn would take them."""

    def handlers():
        return (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))

    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))

    async def main() -> None:
        server = HttpServer(create_app(FakeBackend(), tiny_processor(), model_name="tiny"))
        serving = asyncio.create_task(server.serve(sock))
        async with asyncio.timeout(5):
            while not server.started:
                await asyncio.sleep(0.01)
        during = handlers()
        server.shutdown()
        await asyncio.wait_for(serving, 5)
        assert during == before

    with asyncio.Runner() as runner:
        # Runner installs its own SIGINT handler while a coroutine runs in the main thread.
        signal.signal(signal.SIGINT, lambda *_: None)
        try:
            before = handlers()
            runner.run(main())
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def test_shutdown_finishes_what_runs():

    def script(prompt, sampling):
        return [AllDecoded(), 0.5, *answer_steps("red", sampling)[1:]]

    running = Running(FakeBackend(script))
    replies: list = []
    with running:
        asking = threading.Thread(target=lambda: replies.append(post_json(running.url + PATH, ASK)))
        asking.start()
        wait_for(lambda: running.backend.handles)
    asking.join(5)
    assert [reply.status for reply in replies] == [200]
    with pytest.raises(ConnectionError):
        post_json(running.url + PATH, ASK)


def client_module():
    path = Path(__file__).parent.parent.parent / "tools" / "http_client.py"
    spec = importlib.util.spec_from_file_location("http_client", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("option", "base", "flags"), [("--url", "", []), ("--base-url", "/v1", []), ("--base-url", "/v1/", ["--stream"])]
)
def test_the_command_line_client(running, tmp_path, capsys, monkeypatch, option, base, flags):
    (tmp_path / "a.png").write_bytes(png())
    arguments = [
        "http_client.py",
        option,
        running.url + base,
        "--image",
        str(tmp_path / "a.png"),
        "--prompt",
        "?",
        *flags,
    ]
    monkeypatch.setattr("sys.argv", [*arguments, "--timings"])
    assert client_module().main() == 0
    out, err = capsys.readouterr()
    assert out == "red circle\n"
    assert json.loads(err)["transfer"] == 3
    [media] = running.backend.handles[-1].prompt.media
    assert media == png()


@pytest.mark.parametrize("flags", [[], ["--stream"]])
def test_the_command_line_client_draws_where_the_time_went(running, capsys, monkeypatch, flags):
    monkeypatch.setattr("sys.argv", ["http_client.py", "--base-url", running.url + "/v1", "--prompt", "?", *flags])
    module = client_module()
    assert module.main() == 0
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr("sys.argv", [*sys.argv, "--waterfall"])
    assert module.main() == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("|")[0].strip() for line in lines] == list(module.STAGES)


def test_the_waterfall_fits_a_terminal_and_each_stage_begins_where_the_last_one_ended():
    timings = {
        "queue": 0,
        "preprocess": 30.0,
        "encode": 20.0,
        "transfer": 1e-6,
        "prefill": 10.0,
        "decode": 40.0,
        "items": [{"rows": 20}],
        "encode_ranks": list(range(40)),
        "transfer_bytes": 41_300,
        "language_rank": 6,
    }
    text = client_module().waterfall(timings)
    lines = text.splitlines()
    assert max(map(len, lines)) < 80
    bars = [line.split("|")[1] for line in lines]
    assert len({len(bar) for bar in bars}) == 1
    assert bars[0].strip() == ""
    size = len(bars[0])
    ends = [(len(bar) - len(bar.lstrip()), len(bar.rstrip())) for bar in bars[1:]]
    for (start, stop), share in zip(ends, [(0, 0.3), (0.3, 0.5), (0.5, 0.5), (0.5, 0.6), (0.6, 1)], strict=True):
        assert abs(start - share[0] * size) <= 1
        assert abs(stop - share[1] * size) <= 1
    assert len(bars[3].strip()) == 1  # what took time is seen
    assert "20 rows" in lines[2]
    assert "41.3 kB" in lines[3]
    assert "language rank 6" in lines[4]


@pytest.mark.parametrize("timings", [{}, {"decode": 0.0}, {"decode": 1e9, "items": None}])
def test_a_waterfall_of_little_or_much(timings):
    lines = client_module().waterfall(timings).splitlines()
    assert len(lines) == 6
    assert max(map(len, lines)) < 80


def test_the_command_line_client_shows_errors(running, capsys, monkeypatch):
    arguments = ["http_client.py", "--url", running.url, "--prompt", "?", "--max-tokens", "0"]
    monkeypatch.setattr("sys.argv", arguments)
    assert client_module().main() == 1
    assert "max_tokens" in capsys.readouterr().err


def test_a_broken_image_is_a_status_also_when_streamed(running):
    content = [{"type": "image_url", "image_url": {"url": uri(b"broken")}}]
    reply = post_json(running.url + PATH, {"messages": [{"role": "user", "content": content}], "stream": True})
    assert reply.status == 400
    assert reply.json["error"]["param"] == "messages[0].content[0]"
