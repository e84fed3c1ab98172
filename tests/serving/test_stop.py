"""Stop strings over HTTP, whole and streamed: text, token ids, usage, timings, and the request's end at its rank."""

from __future__ import annotations

import asyncio
import json

import pytest

from qwen3vl_disagg.cluster.backend import AllDecoded, TokenEvent
from qwen3vl_disagg.serving.app import create_app
from tests.support.asgi import Exchange
from tests.support.fake_backend import ASK, PATH, FakeBackend, answer_of, answer_steps, serve, timings, tiny_processor

TEXT = "red circle, blue square"
ALL = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True}


def encode(text: str) -> list[int]:
    return tiny_processor().tokenizer.encode(text)


def steps(text: str, sampling):
    """As a rank: the first token comes with timings."""
    first, token, *rest = answer_steps(text, sampling)
    return [first, TokenEvent(token.token_id, token.logprob, timings()), *rest]


def backend_of(text: str = TEXT) -> FakeBackend:
    return FakeBackend(lambda prompt, sampling: steps(text, sampling))


def whole(backend: FakeBackend, **fields) -> dict:
    reply = serve(backend).post(PATH, json={**ASK, **ALL, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def streamed(backend: FakeBackend, **fields) -> list:
    fields = {**ALL, "stream_options": {"include_usage": True}, **fields}
    reply = serve(backend).post(PATH, json={**ASK, **fields, "stream": True})
    events = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def count_until(stop: str) -> int:
    token_ids = encode(TEXT)
    return next(n for n in range(len(token_ids)) if stop in tiny_processor().tokenizer.decode(token_ids[:n]))


@pytest.mark.parametrize("stop", [",", "e, b", ["zzz", "le, bl"], TEXT])
def test_the_answer_ends_before_the_stop_string(stop):
    found = next(s for s in ([stop] if isinstance(stop, str) else stop) if s in TEXT)
    count = count_until(found) if found != TEXT else len(encode(TEXT))
    backend = backend_of()
    body = whole(backend, stop=stop)
    [choice] = body["choices"]
    assert choice["message"]["content"] == TEXT[: TEXT.index(found)]
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"] == encode(TEXT)[:count]
    assert [entry["token_id"] for entry in choice["logprobs"]["content"]] == choice["token_ids"]
    assert body["usage"]["completion_tokens"] == count
    assert body["timings"]["prefill"] == 4  # as the rank told with the first token
    assert body["timings"]["items"][0]["rows"] == 5
    assert body["timings"]["decode"] != 5
    assert backend.handles[0].was_cancelled.is_set()
    assert not backend.handles[0].finished

    backend = backend_of()
    *chunks, last = streamed(backend, stop=stop)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(c["delta"].get("content", "") for c in choices) == choice["message"]["content"]
    assert choices[-1]["finish_reason"] == "stop"
    assert [i for c in choices for i in c.get("token_ids", [])] == choice["token_ids"]
    assert [e["token_id"] for c in choices if c["logprobs"] for e in c["logprobs"]["content"]] == choice["token_ids"]
    assert last["usage"] == body["usage"]
    assert last["timings"]["prefill"] == 4
    assert backend.handles[0].was_cancelled.is_set()
    assert not backend.handles[0].finished


def test_text_that_turns_out_to_be_no_stop_string_is_sent():
    stop = "square and more"
    assert whole(backend_of(), stop=stop)["choices"][0]["message"]["content"] == TEXT
    *chunks, last = streamed(backend_of(), stop=stop)
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == TEXT
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"  # the end token
    assert last["timings"]["decode"] == 5  # the rank's own


def test_a_stop_string_too_early_is_text():
    red, *_ = encode(TEXT)
    body = whole(backend_of(), stop=["red", ","], min_tokens=2)
    assert body["choices"][0]["message"]["content"] == "red circle"
    assert body["choices"][0]["token_ids"][0] == red


def test_a_character_that_stays_unfinished_may_be_the_stop_string():
    token_ids = [*encode("red"), encode("\u00e9")[0]]
    backend = FakeBackend(lambda prompt, sampling: answer_of([*token_ids, token_ids[0]], sampling))
    fields = {"stop": "\ufffd", "max_tokens": len(token_ids)}
    [choice] = whole(backend, **fields)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("red", "stop")
    *chunks, _ = streamed(backend, **fields)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_rank_is_told_before_the_client_has_read_the_end():
    async def main() -> None:
        backend = FakeBackend(lambda p, sampling: [AllDecoded(), *(TokenEvent(i) for i in encode("red\n")), 60.0])
        app = create_app(backend, tiny_processor(), model_name="tiny")
        exchange = Exchange(app, PATH, [json.dumps({**ASK, "stream": True, "stop": "\n"}).encode()])
        send = exchange._send

        async def slow(message) -> None:
            if b'"finish_reason":"stop"' in message.get("body", b""):
                assert backend.handles[0].was_cancelled.is_set()
            await send(message)

        exchange._send = slow  # type: ignore[method-assign]
        await asyncio.wait_for(exchange.run(), 5)
        assert exchange.body.endswith(b"data: [DONE]\n\n")
        assert b'"content":"red"' in exchange.body

    asyncio.run(main())
