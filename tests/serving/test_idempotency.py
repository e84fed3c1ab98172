"""Requests that are sent again: one answer, made once, whoever left meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from contextlib import asynccontextmanager

import httpx
import pytest

from qwen3vl_disagg.cluster import answer_store
from qwen3vl_disagg.cluster.answer_store import AnswerStore
from qwen3vl_disagg.core.errors import UnavailableError
from qwen3vl_disagg.serving import idempotency
from qwen3vl_disagg.serving.access import ApiKeys
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.http_server import HttpServer
from qwen3vl_disagg.serving.limits import Limits
from tests.support.fake_backend import ASK, PATH, FakeBackend, answer_steps, tiny_processor
from tests.support.fake_ranks import in_loop

KEY = {"Idempotency-Key": "order-1"}
"""What a client sends with each of its tries."""


def steps(pause: float, text: str = "red circle at the top"):
    def script(prompt, sampling):
        first, *rest = answer_steps(text, sampling)
        return [first, *(step for event in rest for step in (pause, event))]

    return script


@asynccontextmanager
async def served(backend, **options):
    app = create_app(backend, tiny_processor(), model_name="tiny", **options)
    server, sock = HttpServer(app, graceful_s=2), socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve(sock))
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=20.0, trust_env=False) as client:
            yield client
    finally:
        server.shutdown(now=True)
        await serving


def content(response: httpx.Response) -> str:
    if "event-stream" not in response.headers["content-type"]:
        return response.json()["choices"][0]["message"]["content"]
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    return "".join(c["delta"].get("content") or "" for line in lines for c in json.loads(line)["choices"])


@pytest.mark.parametrize("is_stream", [False, True])
@in_loop
async def test_the_answer_that_was_made_is_given_again(is_stream):
    backend = FakeBackend()
    async with served(backend) as client:
        body = {**ASK, "stream": is_stream}
        first = await client.post(PATH, json=body, headers=KEY)
        again = await client.post(PATH, json=body, headers=KEY)
        other = await client.post(PATH, json=body, headers={"Idempotency-Key": "order-2"})
        without = await client.post(PATH, json=body)
    assert first.content == again.content
    assert first.headers["content-type"] == again.headers["content-type"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert first.headers["x-request-id"] != again.headers["x-request-id"]
    assert other.status_code == without.status_code == 200
    assert len(backend.handles) == 3


@in_loop
async def test_whoever_asks_while_it_is_made_hears_all_of_it():
    backend = FakeBackend(steps(0.1))
    async with served(backend) as client:
        body = {**ASK, "stream": True}
        first = asyncio.create_task(client.post(PATH, json=body, headers=KEY))
        while not backend.handles or backend.handles[0].num_sent < 3:
            await asyncio.sleep(0.01)
        second = await client.post(PATH, json=body, headers=KEY)
        assert (await first).content == second.content
    assert content(second) == "red circle at the top"
    assert len(backend.handles) == 1


@in_loop
async def test_a_client_that_left_finds_its_answer():
    backend = FakeBackend(steps(0.1))
    async with served(backend) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(PATH, json=ASK, headers=KEY, timeout=0.25)
        assert not backend.handles[0].was_cancelled.is_set()
        again = await client.post(PATH, json=ASK, headers=KEY)
    assert content(again) == "red circle at the top"
    assert len(backend.handles) == 1


@in_loop
async def test_nobody_waits_for_ever(monkeypatch):
    """One that nobody comes back for ends; one whose client is back does not."""
    monkeypatch.setattr(idempotency, "ALONE_S", 0.3)
    backend = FakeBackend(steps(0.25))
    async with served(backend) as client:
        for name in ("gone", "back"):
            with pytest.raises(httpx.ReadTimeout):
                await client.post(PATH, json=ASK, headers={"Idempotency-Key": name}, timeout=0.2)
        back = asyncio.create_task(client.post(PATH, json=ASK, headers={"Idempotency-Key": "back"}))
        await asyncio.wait_for(backend.handles[0].was_cancelled.wait(), 5.0)
        assert not backend.handles[0].finished
        assert content(await back) == "red circle at the top"
        assert len(backend.handles) == 2


@in_loop
async def test_what_failed_is_tried_again():
    fails = [True, True]

    def script(prompt, sampling):
        first, *rest = answer_steps("red circle", sampling)
        if not fails:
            return [first, *rest]
        return [UnavailableError("not now")] if len(fails) == 2 else [first, rest[0], UnavailableError("no more")]

    backend = FakeBackend(script)
    async with served(backend) as client:
        body = {**ASK, "stream": True}
        refused = await client.post(PATH, json=body, headers=KEY)
        assert refused.status_code == 503
        fails.pop()
        broken = await client.post(PATH, json=body, headers=KEY)
        assert broken.status_code == 200
        assert "no more" in broken.text
        fails.pop()
        whole = await client.post(PATH, json=body, headers=KEY)
        assert content(whole) == "red circle"
        assert (await client.post(PATH, json=body, headers=KEY)).content == whole.content


@in_loop
async def test_answers_that_are_too_much_together_end_typed_and_are_not_kept(monkeypatch):
    monkeypatch.setattr(idempotency, "MAX_RECORDED_BYTES", 600)
    backend = FakeBackend(steps(0.01, "red circle at the top " * 8))
    async with served(backend) as client:
        body = {**ASK, "stream": True}
        cut = await client.post(PATH, json=body, headers=KEY)
        assert cut.status_code == 200
        assert json.loads(cut.text.rstrip().rpartition("data: ")[2])["error"]["code"] == "unavailable"
        assert backend.handles[0].was_cancelled.is_set()
        monkeypatch.setattr(idempotency, "MAX_RECORDED_BYTES", 2**20)
        whole = await client.post(
            PATH, json=body, headers=KEY
        )  # room again: it was not kept, and nothing is counted on
        assert content(whole).split() == ("red circle at the top " * 8).split()


@in_loop
async def test_another_body_another_caller_and_another_path_are_other_requests():
    backend = FakeBackend()
    async with served(backend, keys=ApiKeys(["alpha-key-1", "beta-key-22"])) as client:
        alice, bob = ({**KEY, "Authorization": f"Bearer {key}"} for key in ("alpha-key-1", "beta-key-22"))
        assert (await client.post(PATH, json=ASK, headers=alice)).status_code == 200
        changed = await client.post(PATH, json={**ASK, "seed": 4}, headers=alice)
        assert changed.status_code == 422
        assert changed.json()["error"]["code"] == "idempotency_key_reused"
        assert (await client.post(PATH, json={**ASK, "seed": 4}, headers=bob)).status_code == 200
        other = await client.post("/v1/completions", json={"prompt": "red"}, headers=alice)
        assert other.status_code == 200
    assert len(backend.handles) == 3


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "käse".encode()])
@in_loop
async def test_a_key_that_is_none(key):
    async with served(FakeBackend()) as client:
        refused = await client.post(PATH, json=ASK, headers=[("Idempotency-Key", key)])
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "Idempotency-Key"


@in_loop
async def test_bodies_that_are_too_large_are_refused_as_ever():
    backend = FakeBackend()
    async with served(backend, limits=Limits(max_body_bytes=2000)) as client:
        assert (await client.post(PATH, json=ASK, headers=KEY)).status_code == 200
        large = await client.post(PATH, content=b"x" * 3000, headers={**KEY, "Content-Type": "application/json"})
        assert large.status_code == 413


@in_loop
async def test_the_next_frontend_has_the_answers_and_ranks_their_names():
    """What is submitted has a name that follows from key and body; the store is found by whoever comes next."""
    store, names = AnswerStore(), []

    class Noting(FakeBackend):
        def submit(self, prompts, timeout_s):
            names.append([call.keep_as for call in prompts])
            return super().submit(prompts, timeout_s)

    async with served(Noting(), store=store) as client:
        first = await client.post(PATH, json=ASK, headers=KEY)
        await client.post(PATH, json={**ASK, "seed": 1}, headers={"Idempotency-Key": "order-2"})
        await client.post(PATH, json=ASK)
        await client.post("/v1/completions", json={"prompt": ["red", "blue"]}, headers=KEY)
    assert len(names[0]) == 1
    assert len(names[0][0]) > 32
    assert names[1] != names[0]
    assert names[2] == [""]
    assert len(set(names[3])) == 2
    again_store = AnswerStore()
    again_store.__dict__.update({k: v for k, v in store.__dict__.items() if k != "_places"}, _places={})
    backend = Noting()
    async with served(backend, store=again_store) as client:
        again = await client.post(PATH, json=ASK, headers=KEY)
        assert again.content == first.content
        assert not backend.handles
        await client.post(PATH, json=ASK, headers={"Idempotency-Key": "order-3"})
        await client.post(PATH, json=ASK, headers={"Idempotency-Key": "order-3"})
    assert len(backend.handles) == 1


def test_the_store_is_a_ring_that_forgets_the_oldest(monkeypatch):
    store = AnswerStore(1000)
    for i in range(50):
        value = bytes([i]) * (60 + i % 7)
        assert store.put(i.to_bytes(32, "big"), value)
        store.read_all()
        kept = [k for k in range(i + 1) if store.get(k.to_bytes(32, "big")) is not None]
        assert kept == list(range(kept[0], i + 1))
        assert all(store.get(k.to_bytes(32, "big")) == bytes([k]) * (60 + k % 7) for k in kept)
        assert len(kept) >= min(i + 1, 8)
    assert not store.put(b"k" * 32, bytes(300))
    assert store.put((49).to_bytes(32, "big"), b"new")
    store.read_all()
    assert store.get((49).to_bytes(32, "big")) == b"new"
    monkeypatch.setattr(answer_store, "STORE_S", -1.0)
    assert store.get((49).to_bytes(32, "big")) is None


def test_a_process_that_dies_while_it_writes_leaves_what_was_whole():
    store = AnswerStore(1000)
    for i in range(12):
        store.put(bytes([i]) * 32, bytes([i]) * 100)
    if (pid := os.fork()) == 0:
        real = store._write

        def half(at, data):
            real(at, data[: len(data) // 2])
            os._exit(0)

        store._write = half
        store.put(b"z" * 32, b"z" * 100)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    store.read_all()
    assert store.get(b"z" * 32) is None
    assert store.get(bytes([11]) * 32) == bytes([11]) * 100
    assert store.get(bytes([10]) * 32) == bytes([10]) * 100
