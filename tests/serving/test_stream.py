"""Streamed answers: the exact order and shape of the chunks, the status line, errors on the way."""

from __future__ import annotations

import asyncio
import json

import pytest

from qwen3vl_disagg.cluster.backend import AllDecoded, TokenEvent
from qwen3vl_disagg.core.errors import InputError, OverloadedError, TransferError, UnavailableError
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.limits import Limits
from tests.support.asgi import Exchange
from tests.support.fake_backend import ASK, PATH, FakeBackend, answer_of, answer_steps, serve, tiny_processor


def parse(text: str) -> list:
    """The data of all events: one line each, and a blank one behind it."""
    lines = text.splitlines()
    assert text.endswith("\n\n")
    assert all(line.startswith("data: ") for line in lines[::2]), text
    assert not any(lines[1::2]), text
    data = [line[6:] for line in lines if line.startswith("data: ")]
    return [entry if entry == "[DONE]" else json.loads(entry) for entry in data]


def stream(backend: FakeBackend, **fields) -> list:
    reply = serve(backend).post(PATH, json={**ASK, "stream": True, **fields})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    return parse(reply.text)


def without_frame(chunk: dict) -> dict:
    return {name: chunk[name] for name in chunk if name not in ("id", "object", "created", "model")}


def test_the_chunks_of_an_answer():
    *chunks, done = stream(FakeBackend())
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {(chunk["object"], chunk["model"]) for chunk in chunks} == {("chat.completion.chunk", "tiny")}
    first, *middle, last = map(without_frame, chunks)
    empty = {"index": 0, "logprobs": None, "finish_reason": None}
    assert first == {"choices": [{**empty, "delta": {"role": "assistant", "content": ""}}]}
    assert all(set(chunk) == {"choices"} for chunk in middle)
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in middle)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == "red circle"
    assert last["choices"] == [{**empty, "delta": {}, "finish_reason": "stop"}]
    assert set(last) == {"choices", "timings"}
    assert last["timings"]["transfer"] == 3


def test_usage_comes_in_a_chunk_of_its_own_with_the_timings():
    *chunks, done = stream(FakeBackend(), stream_options={"include_usage": True})
    assert done == "[DONE]"
    finish, last = chunks[-2:]
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert "timings" not in finish
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(tiny_processor().tokenizer.encode("red circle")) + 1
    assert "timings" in last
    assert {chunk["usage"] for chunk in chunks[:-1]} == {None}


def test_continuous_usage_counts_up():
    *chunks, _ = stream(FakeBackend(), stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == len(tiny_processor().tokenizer.encode("red circle")) + 1


def test_characters_are_never_split():
    tokenizer = tiny_processor().tokenizer
    text = "\u00e9 \u20ac \U0001f600"
    *chunks, _ = stream(FakeBackend(lambda prompt, sampling: answer_steps(text, sampling)))
    pieces = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(tokenizer.encode(text)) > 5, "the test needs characters of several tokens"


def test_an_unfinished_character_comes_at_the_end():
    token_id = tiny_processor().tokenizer.encode("\u20ac")[0]

    def script(prompt, sampling):
        return answer_of([token_id] * 2, sampling)

    *chunks, _ = stream(FakeBackend(script), max_tokens=1)
    assert chunks[-2]["choices"][0]["delta"] == {"content": "\ufffd"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_each_token_brings_its_id_and_logprob():
    backend = FakeBackend()
    *chunks, _ = stream(backend, logprobs=True, top_logprobs=1, return_token_ids=True)
    expected = [*tiny_processor().tokenizer.encode("red circle"), tiny_processor().tokenizer.token_id("<|im_end|>")]
    assert chunks[0]["prompt_token_ids"] == backend.handles[0].prompt.token_ids
    choices = [chunk["choices"][0] for chunk in chunks[1:-1]]
    assert [choice["token_ids"] for choice in choices] == [[token_id] for token_id in expected]
    assert [choice["logprobs"]["content"][0]["token_id"] for choice in choices] == expected


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("the image cannot be decoded", param="messages[0].content[0]"), 400),
        (InputError("too large", status=413), 413),
        (OverloadedError("full", retry_after=2.2), 429),
        (UnavailableError("going down"), 503),
        (TransferError("10.0.0.1: reset"), 503),
        (RuntimeError("secret"), 500),
    ],
)
@pytest.mark.parametrize("when", ["submit", "before decoded"])
def test_errors_before_the_images_are_decoded_have_a_status(error, status, when):
    steps = [error] if when == "submit" else [0.0, error]
    reply = serve(FakeBackend(lambda prompt, sampling: list(steps))).post(PATH, json={**ASK, "stream": True})
    assert reply.status_code == status
    body = reply.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert "secret" not in body["message"]
    assert "10.0.0.1" not in body["message"]
    assert body["param"] == getattr(error, "param", None)
    if status in (429, 503):
        assert reply.headers["retry-after"] in (("3", "4") if status == 429 else ("1", "2"))


@pytest.mark.parametrize("error", [TransferError("10.0.0.1: reset"), RuntimeError("secret"), UnavailableError("down")])
def test_later_errors_are_an_event_and_the_end(error):

    def script(prompt, sampling):
        return [AllDecoded(), TokenEvent(40), error]

    events = stream(FakeBackend(script))
    body = events[-1]["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert "10.0.0.1" not in body["message"]
    assert "secret" not in body["message"]
    assert [set(event) & {"error"} for event in events[:-1]] == [set()] * (len(events) - 1)


def test_a_backend_that_just_ends_is_an_error_event():
    events = stream(FakeBackend(lambda prompt, sampling: [AllDecoded(), TokenEvent(40)]))
    assert events[-1]["error"]["code"] == "internal_error"


def test_the_status_waits_for_decoded():
    async def main() -> None:
        backend = FakeBackend(lambda prompt, sampling: [0.3, *answer_steps("red", sampling)])
        exchange = Exchange(
            create_app(backend, tiny_processor(), model_name="tiny"),
            PATH,
            [json.dumps({**ASK, "stream": True}).encode()],
        )
        task = asyncio.create_task(exchange.run())
        await asyncio.sleep(0.15)
        assert backend.handles
        assert exchange.status is None
        await asyncio.wait_for(task, 5)
        assert exchange.status == 200

    asyncio.run(main())


def test_silence_is_filled_with_chunks_that_say_nothing_and_the_stream_goes_on():

    def script(prompt, sampling):
        return [AllDecoded(), 0.5, *answer_steps("red", sampling)[1:]]

    asked = {**ASK, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    reply = serve(FakeBackend(script), limits=Limits(ping_s=0.05)).post(PATH, json=asked)
    *chunks, done = parse(reply.text)
    assert done == "[DONE]"
    empty = {"index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": None}
    pings = [chunk for chunk in chunks if chunk["choices"] == [empty]]
    assert 2 <= len(pings) <= 10
    assert {frozenset(chunk) for chunk in pings} == {frozenset(chunks[0])}
    assert {chunk["usage"]["completion_tokens"] for chunk in pings} == {0}


BREAKS = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i\r\nj\rk\n\nl\\\u2028m"


def test_no_reader_of_lines_cuts_an_event():

    def script(prompt, sampling):
        return answer_steps(BREAKS, sampling)

    reply = serve(FakeBackend(script)).post(PATH, json={**ASK, "stream": True, "logprobs": True, "top_logprobs": 1})
    *chunks, _ = parse(reply.text)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == BREAKS
    assert not set(reply.text) & set(BREAKS) - set("abcdefghijklm\\\n")
    call = json.dumps({"name": BREAKS, "arguments": {"a": BREAKS}}, ensure_ascii=False)
    tools = [{"type": "function", "function": {"name": "f"}}]

    def script(prompt, sampling):
        return answer_steps(f"<tool_call>{call}</tool_call>", sampling)

    *chunks, _ = stream(FakeBackend(script), tools=tools, max_tokens=999)
    [delta] = [c["choices"][0]["delta"] for c in chunks if "tool_calls" in c["choices"][0]["delta"]]
    assert json.loads(delta["tool_calls"][0]["function"]["arguments"]) == {"a": BREAKS}
    assert delta["tool_calls"][0]["function"]["name"] == BREAKS


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_ends(stream):
    limits = Limits(request_timeout_s=0.01)
    backend = FakeBackend(lambda prompt, sampling: [60.0])
    reply = serve(backend, limits=limits).post(PATH, json={**ASK, "stream": stream})
    assert reply.status_code == 504
    assert reply.json()["error"]["code"] == "deadline_exceeded"
    assert all(handle.was_cancelled.is_set() for handle in backend.handles)


def test_each_chunk_is_sent_before_the_next_token_is_there():
    async def main() -> None:

        def script(prompt, sampling):
            return [AllDecoded(), *answer_steps("red", sampling)[1:2], 60.0]

        app = create_app(FakeBackend(script), tiny_processor(), model_name="tiny")
        exchange = Exchange(app, PATH, [json.dumps({**ASK, "stream": True, "return_token_ids": True}).encode()])
        task = asyncio.create_task(exchange.run())
        await exchange.until(b'"token_ids":[')
        exchange.leave()
        await asyncio.wait_for(task, 5)

    asyncio.run(main())
