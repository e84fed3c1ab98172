"""The other routes, the envelope on every path, request ids, and the limits on bodies."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from qwen3vl_disagg.cluster.backend import Readiness
from qwen3vl_disagg.core.errors import DeadlineError, HandshakeError, ServerError
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.limits import Limits
from tests.support.asgi import Exchange
from tests.support.fake_backend import ASK, PATH, FakeBackend, serve, tiny_processor


def app(backend: FakeBackend | None = None, **options):
    return create_app(backend or FakeBackend(), tiny_processor(), model_name="tiny", **options)


def test_models():
    body = serve(FakeBackend()).get("/v1/models").json()
    assert body["object"] == "list"
    [model] = body["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert model["max_model_len"] == tiny_processor().config.text.max_position_embeddings


def test_health_says_nothing_of_the_ranks():
    backend = FakeBackend()
    backend.state = Readiness(ready=False, reasons=["no language rank"])
    assert serve(backend).get("/health").status_code == 200


def test_ready_names_what_is_missing():
    backend = FakeBackend()
    client = serve(backend)
    backend.state = Readiness(ready=False, reasons=["no language rank", "no link"])
    reply = client.get("/ready")
    assert reply.status_code == 503
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.json()["reasons"] == ["no language rank", "no link"]
    assert "no language rank" in reply.json()["error"]["message"]
    backend.state = Readiness(ready=True, degraded=True, reasons=["no encode rank"])
    reply = client.get("/ready")
    assert reply.status_code == 200
    assert (reply.json()["status"], reply.json()["reasons"]) == ("degraded", ["no encode rank"])
    backend.state = Readiness(ready=True)
    assert client.get("/ready").json() == {"status": "ready", "ready": True, "degraded": False, "reasons": []}


def test_requests_are_refused_until_ready():
    backend = FakeBackend()
    backend.state = Readiness(ready=False, reasons=["no language rank"])
    reply = serve(backend).post(PATH, json=ASK)
    assert reply.status_code == 503
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.json()["error"]["code"] == "unavailable"
    assert backend.handles == []


def test_processes_only_with_debug():
    assert serve(FakeBackend()).get("/debug/processes").status_code == 404
    body = serve(FakeBackend(), debug=True).get("/debug/processes").json()
    assert body == {"processes": [{"pid": 1, "role": "encode", "rank": 0}]}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/other", 404),
        ("POST", "/version", 405),
        ("POST", "/metrics", 405),
        ("POST", "/ui", 405),
        ("GET", "/ui/", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", "/v1/chat/completions", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("FOO", "/ready", 405),
    ],
)
def test_the_envelope_on_every_path(method, path, status):
    reply = serve(FakeBackend()).request(method, path, follow_redirects=False)
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert "x-request-id" in reply.headers
    assert "access-control-allow-origin" not in reply.headers
    if status == 405:
        assert reply.headers["allow"]


def test_head():
    reply = serve(FakeBackend()).head("/health")
    assert reply.status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (DeadlineError("queue"), 504, "deadline_exceeded"),
        (HandshakeError("hidden_size", 1, "secret"), 503, "transfer_failed"),
        (ServerError("the language model failed", code="engine_error"), 500, "engine_error"),
        (ZeroDivisionError("secret"), 500, "internal_error"),
        (KeyError("secret"), 500, "internal_error"),
    ],
)
def test_errors_of_the_backend(error, status, code):
    reply = serve(FakeBackend(lambda prompt, sampling: [0.0, error])).post(PATH, json=ASK)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert "secret" not in reply.text
    assert "x-request-id" in reply.headers


def test_request_ids():
    client = serve(FakeBackend())
    assert client.get("/health", headers={"X-Request-ID": "a-B_c.9"}).headers["x-request-id"] == "a-B_c.9"
    for bad in ("a b", "a" * 129, "<script>", "", "a\tb", b"\xff"):
        given = client.get("/health", headers={"X-Request-ID": bad}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", given)
    ids = {client.post(PATH, json=ASK).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


def post(chunks: list[bytes], limits: Limits, headers: dict[str, str] | None = None) -> Exchange:
    async def main() -> Exchange:
        exchange = Exchange(app(limits=limits), PATH, chunks, headers)
        await asyncio.wait_for(exchange.run(), 5)
        return exchange

    return asyncio.run(main())


SMALL = Limits(max_body_bytes=1000, max_body_memory=1500)


def test_a_body_that_declares_too_much():
    exchange = post([b"x" * 10, b""], SMALL, {"content-length": "1001"})
    assert exchange.status == 413
    assert exchange.json["error"]["code"] == "request_too_large"


def test_a_body_that_turns_out_too_large_is_not_kept():
    exchange = post([b"x" * 100] * 100, SMALL)
    assert exchange.status == 413
    # What comes after the limit is thrown away, but not for ever.
    assert 1000 < exchange.num_received <= 6000


def test_a_body_up_to_the_limit_is_read():
    text = json.dumps({**ASK, "user": ""}).encode()
    exact = json.dumps({**ASK, "user": "x" * (1000 - len(text))}).encode()
    assert len(exact) == 1000
    assert post([exact[:500], exact[500:]], SMALL).status == 200
    assert post([exact + b" "], SMALL).status == 413


def test_bodies_share_a_budget_that_is_given_back():
    async def main() -> None:
        served = app(limits=SMALL)
        first = Exchange(served, PATH, [b"x" * 900, b"unreached"])
        first._inbox.get_nowait()
        first._inbox.get_nowait()
        first._inbox.put_nowait({"type": "http.request", "body": b"x" * 900, "more_body": True})
        task = asyncio.create_task(first.run())
        await asyncio.sleep(0.05)
        body = json.dumps({**ASK, "user": "x" * 700}).encode()
        second = Exchange(served, PATH, [body])
        await asyncio.wait_for(second.run(), 5)
        assert second.status == 429
        first.leave()
        await asyncio.wait_for(task, 1)
        for _ in range(5):  # also after requests that failed or were answered
            third = Exchange(served, PATH, [body])
            await asyncio.wait_for(third.run(), 5)
            assert third.status == 200

    asyncio.run(main())


def test_a_running_request_holds_no_body():
    async def main() -> None:
        backend = FakeBackend(lambda prompt, sampling: [60.0])
        served = app(backend, limits=SMALL)
        body = json.dumps({**ASK, "user": "x" * 800}).encode()
        running = [Exchange(served, PATH, [body]) for _ in range(3)]
        tasks = []
        for n, exchange in enumerate(running):
            tasks.append(asyncio.create_task(exchange.run()))
            async with asyncio.timeout(5):
                while len(backend.handles) == n:
                    await asyncio.sleep(0.005)
                    assert exchange.status is None
        for exchange in running:
            exchange.leave()
        await asyncio.wait_for(asyncio.gather(*tasks), 5)

    asyncio.run(main())


def test_a_body_that_does_not_come():
    async def main() -> None:
        exchange = Exchange(app(limits=Limits(body_timeout_s=0.1)), PATH, [b"{", b"never"])
        exchange._inbox.get_nowait()
        exchange._inbox.get_nowait()
        await asyncio.wait_for(exchange.run(), 5)
        assert exchange.status == 408

    asyncio.run(main())
