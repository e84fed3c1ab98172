"""A client that leaves: the request is cancelled at once, at whatever stage it is, and the next one is served."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from qwen3vl_disagg.cluster.backend import AllDecoded, TokenEvent
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.limits import Limits
from tests.support.asgi import Exchange
from tests.support.fake_backend import ASK, PATH, FakeBackend, answer_steps, tiny_processor

STAGES = {
    "before decoded": [60.0],
    "before the first token": [AllDecoded(), 60.0],
    "between tokens": [AllDecoded(), TokenEvent(40), TokenEvent(41), 60.0],
}


def body(**fields) -> list[bytes]:
    return [json.dumps({**ASK, **fields}).encode()]


async def submitted(backend: FakeBackend, num_sent: int) -> None:
    async with asyncio.timeout(5):
        while not backend.handles or backend.handles[0].num_sent < num_sent:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("path", "asked"),
    [(PATH, ASK), ("/v1/responses", {"input": "what is it?"}), ("/v1/messages", {**ASK, "max_tokens": 9})],
)
def test_leaving_cancels(path, asked, stage, stream):
    async def main() -> None:
        scripts = [STAGES[stage]]
        backend = FakeBackend(lambda p, sampling: scripts.pop() if scripts else answer_steps("red", sampling))
        app = create_app(backend, tiny_processor(), model_name="tiny")
        exchange = Exchange(app, path, [json.dumps({**asked, "stream": stream}).encode()])
        task = asyncio.create_task(exchange.run())
        await submitted(backend, len(STAGES[stage]) - 1)
        assert not backend.handles[0].was_cancelled.is_set()
        exchange.leave()
        await asyncio.wait_for(backend.handles[0].was_cancelled.wait(), 0.5)
        await asyncio.wait_for(task, 0.5)
        metrics = Exchange(app, "/metrics", [], method="GET")
        await asyncio.wait_for(metrics.run(), 5)
        status = 499 if not stream or stage == "before decoded" else 200
        assert f'http_requests_total{{path="{path}",status="{status}"}} 1.0' in metrics.body.decode()
        assert 'q3vl_request_failure_total{code="left"} 1.0' in metrics.body.decode()
        after = Exchange(app, PATH, body())
        await asyncio.wait_for(after.run(), 5)
        assert after.json["choices"][0]["message"]["content"] == "red"

    asyncio.run(main())


def test_leaving_while_the_prompt_is_made(monkeypatch):
    entered, go = threading.Event(), threading.Event()
    prepare = tiny_processor().prepare

    def slow(messages, **options):
        entered.set()
        go.wait(10)
        return prepare(messages, **options)

    monkeypatch.setattr(tiny_processor(), "prepare", slow)

    async def main() -> None:
        backend = FakeBackend()
        app = create_app(backend, tiny_processor(), model_name="tiny")
        exchange = Exchange(app, PATH, body())
        task = asyncio.create_task(exchange.run())
        await asyncio.to_thread(entered.wait, 5)
        exchange.leave()
        try:
            await asyncio.wait_for(task, 0.5)  # does not wait for the thread
        finally:
            go.set()
        assert backend.handles == []
        assert exchange.status is None
        after = Exchange(app, PATH, body())
        await asyncio.wait_for(after.run(), 5)
        assert after.status == 200

    asyncio.run(main())


def test_leaving_while_the_body_comes():
    async def main() -> None:
        backend = FakeBackend()
        app = create_app(backend, tiny_processor(), model_name="tiny")
        exchange = Exchange(app, PATH, [b'{"messages": [', b""])
        exchange._inbox.get_nowait()
        exchange._inbox.get_nowait()
        exchange._inbox.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
        exchange.leave()
        await asyncio.wait_for(exchange.run(), 1)
        assert backend.handles == []
        assert exchange.sent == []

    asyncio.run(main())


def test_a_client_that_stops_reading_is_cut_off():
    async def main() -> None:
        backend = FakeBackend(lambda p, sampling: [AllDecoded(), TokenEvent(40), TokenEvent(41), 60.0])
        app = create_app(backend, tiny_processor(), model_name="tiny", limits=Limits(send_timeout_s=0.1))
        exchange = Exchange(app, PATH, body(stream=True))

        async def stuck(message) -> None:
            await asyncio.sleep(60)

        exchange._send = stuck  # type: ignore[method-assign]
        await asyncio.wait_for(exchange.run(), 2)
        assert backend.handles[0].was_cancelled.is_set()

    asyncio.run(main())


def test_requests_over_the_limit_are_refused_and_leaving_makes_room():
    async def main() -> None:
        backend = FakeBackend(lambda p, sampling: [60.0])
        app = create_app(backend, tiny_processor(), model_name="tiny", limits=Limits(max_requests=1))
        first = Exchange(app, PATH, body())
        task = asyncio.create_task(first.run())
        await submitted(backend, 0)
        second = Exchange(app, PATH, body())
        await asyncio.wait_for(second.run(), 1)
        assert second.status == 429
        assert int(second.headers["retry-after"]) >= 1
        assert second.json["error"]["code"] == "overloaded"
        first.leave()
        await asyncio.wait_for(task, 1)
        backend.script = lambda p, sampling: answer_steps("red", sampling)
        third = Exchange(app, PATH, body())
        await asyncio.wait_for(third.run(), 5)
        assert third.status == 200

    asyncio.run(main())
