"""What cannot be served is refused from the headers: no body is read, and the answer can still be read."""

from __future__ import annotations

import asyncio
import http.client
import json
import time

import pytest

from qwen3vl_disagg.cluster.backend import Readiness
from qwen3vl_disagg.core.errors import InputError, OverloadedError, UnavailableError
from qwen3vl_disagg.core.settings import HttpOptions
from qwen3vl_disagg.protocol.messages import Submit, Tokens
from qwen3vl_disagg.protocol.routing import RouterLimits
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.limits import MIB
from tests.support.asgi import Exchange
from tests.support.fake_backend import ASK, PATH, FakeBackend, tiny_processor
from tests.support.fake_ranks import System, in_loop
from tests.support.http import post_json
from tests.support.running import Running, read_all, wait_for

HEAD = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
LARGE = 60_000_000


def refusing(why: str) -> FakeBackend:
    backend = FakeBackend()
    if why == "not ready":
        backend.state = Readiness(ready=False, reasons=["language rank 1 is missing"])
    else:
        backend.refused = OverloadedError("full", retry_after=7.0) if why == "full" else UnavailableError("going down")
    return backend


@pytest.mark.parametrize("framing", [f"Content-Length: {LARGE}\r\n", "Transfer-Encoding: chunked\r\n"])
@pytest.mark.parametrize(("why", "status"), [("full", 429), ("not ready", 503), ("draining", 503)])
def test_the_answer_comes_before_the_body(why, status, framing):
    with Running(refusing(why)) as running, running.connect() as sock:
        sock.sendall((HEAD + framing + "\r\n").encode())
        received = sock.recv(65536)
        assert received.startswith(f"HTTP/1.1 {status} ".encode())
        assert b"retry-after: " in received.lower()


def test_clients_that_send_everything_first_read_the_answer():
    """Urllib, requests and their like; the connection serves the next request."""
    with Running(refusing("full")) as running:
        reply = post_json(running.url + PATH, b" " * LARGE)
        assert reply.status == 429
        assert 7 <= int(reply.headers["retry-after"]) <= 9
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
        for data, status in [(b" " * 3_000_000, 429)] * 2 + [(json.dumps(ASK).encode(), 200)]:
            if status == 200:
                running.backend.refused = None
            connection.request("POST", PATH, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == status
            response.read()
        connection.close()


def test_who_asks_before_sending_is_not_waited_for():
    with Running(refusing("full")) as running, running.connect() as sock:
        sock.sendall((HEAD + f"Content-Length: {LARGE}\r\nExpect: 100-continue\r\n\r\n").encode())
        received = read_all(sock)
        assert received.startswith(b"HTTP/1.1 429 ")
        assert b"connection: close" in received.lower()


def test_a_body_for_which_there_is_no_room_is_not_read():
    with Running(FakeBackend(), max_body_memory=2 * MIB) as running, running.connect() as sock:
        sock.sendall((HEAD + f"Content-Length: {3 * MIB}\r\n\r\n").encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 429 ")


def test_nothing_is_prepared_for_a_request_that_is_refused(monkeypatch):
    monkeypatch.setattr(tiny_processor(), "prepare", lambda *_, **__: pytest.fail("prepared"))
    with Running(refusing("full")) as running:
        assert post_json(running.url + PATH, ASK).status == 429


def test_what_fills_up_while_a_body_comes_is_noticed_before_it_is_decoded():
    with Running(FakeBackend()) as running, running.connect() as sock:
        sock.sendall((HEAD + "Content-Length: 9\r\n\r\n").encode())
        time.sleep(0.1)
        running.backend.refused = OverloadedError("full")
        sock.sendall(b"[[[[[[[[[")
        assert sock.recv(65536).startswith(b"HTTP/1.1 429 ")


@in_loop
async def test_the_queue_of_the_hub():
    """Two requests wait; the third is refused at its headers."""
    async with System(world=2, num_encode=1, limits=RouterLimits(max_waiting=2)) as system:
        _, language = await system.join_all()
        app = create_app(system.hub, tiny_processor(), model_name="tiny")
        body = [json.dumps(ASK).encode()]
        first, second = (asyncio.create_task(Exchange(app, PATH, body).run()) for _ in range(2))
        submit = await language[1].expect(Submit)
        await language[1].expect(Submit)
        third = Exchange(app, PATH, [b"never read"])
        await third.run()
        assert (third.status, third.num_received) == (429, 0)
        assert third.json["error"]["code"] == "overloaded"
        await language[1].tell(Tokens(request_id=submit.request_id, index=0, token_ids=[5]))
        await system.until(lambda: system.hub.refusal() is None)
        assert system.hub.refusal(num_coming=1) is not None
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)


@in_loop
async def test_the_prompts_of_one_request_do_not_stand_in_each_others_way():
    """They are taken together where nothing waits, though there are more of them than may wait; then they wait."""
    async with System(world=2, num_encode=1, limits=RouterLimits(max_waiting=2, max_waiting_tokens=100)) as system:
        _, language = await system.join_all()
        app = create_app(system.hub, tiny_processor(), model_name="tiny")
        body = [json.dumps({"prompt": [[7] * 60] * 5, "max_tokens": 3}).encode()]
        first = asyncio.create_task(Exchange(app, "/v1/completions", body).run())
        submits = [await language[1].expect(Submit) for _ in range(5)]
        assert len({submit.request_id for submit in submits}) == 5
        other = Exchange(app, "/v1/completions", body)
        await other.run()
        assert other.json["error"]["code"] == "overloaded"
        # Of six that wait, five go; for all of another request there is no room yet.
        for submit in submits[1:]:
            await language[1].tell(Tokens(request_id=submit.request_id, index=0, token_ids=[5]))
        await system.until(lambda: system.hub.refusal() is None)
        for prompts, is_taken in (([[7] * 10] * 5, False), ([[7] * 10], True)):
            body = [json.dumps({"prompt": prompts, "max_tokens": 3}).encode()]
            other = Exchange(app, "/v1/completions", body)
            task = asyncio.create_task(other.run())
            if is_taken:
                await language[1].expect(Submit)
            else:
                await task
                assert other.json["error"]["code"] == "overloaded"
        for running in (first, task):
            running.cancel()
        await asyncio.gather(first, task, return_exceptions=True)


def test_a_hundred_questions_at_once_are_no_overload():
    backend = FakeBackend(lambda prompt, sampling: [0.2, *FakeBackend().script(prompt, sampling)])
    with Running(backend) as running:
        data = json.dumps(ASK).encode()
        socks = [running.connect() for _ in range(300)]
        for sock in socks:
            sock.sendall(f"{HEAD}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        assert {sock.recv(65536)[:13] for sock in socks} == {b"HTTP/1.1 200 "}
        for sock in socks:
            sock.close()
        wait_for(lambda: not len(running.server.places))


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"max_waiting": 0}, "max-waiting"),
        ({"max_waiting": -1}, "max-waiting"),
        ({"request_timeout": 0.0}, "request-timeout"),
        ({"request_timeout": float("nan")}, "request-timeout"),
        ({"request_timeout": float("inf")}, "request-timeout"),
        ({"first_token_target_ms": 0.0}, "first-token-target-ms"),
        ({"first_token_target_ms": 86_400_001.0}, "first-token-target-ms"),
        ({"first_token_target_ms": float("nan")}, "first-token-target-ms"),
        ({"first_token_target_ms": "on"}, "first-token-target-ms"),
    ],
)
def test_options_out_of_range(values, param):
    HttpOptions().check()
    HttpOptions(first_token_target_ms="off").check()
    with pytest.raises(InputError) as caught:
        HttpOptions(**values).check()
    assert caught.value.param == param
