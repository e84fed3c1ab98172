"""`n`: several answers to one prompt over HTTP, on both routes that have it."""

from __future__ import annotations

import gc
import itertools
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from qwen3vl_disagg.cluster.backend import AllDecoded, FinishedEvent, TokenEvent
from qwen3vl_disagg.core.errors import UnavailableError
from qwen3vl_disagg.core.requests import RequestTimings, SamplingParams
from qwen3vl_disagg.processing import Parts
from qwen3vl_disagg.serving import answers, chat_forms, completion_request, sampling_fields
from qwen3vl_disagg.serving.answer import Answer
from qwen3vl_disagg.serving.errors import JSONResponse
from qwen3vl_disagg.serving.stream import typed_sse
from qwen3vl_disagg.serving.types import LogprobEntry
from tests.support.fake_backend import ASK, PATH, FakeBackend, Step, answer_steps, serve, tiny_processor

COMPLETIONS = "/v1/completions"
TEXTS = ["red circle", "blue", "purple square, black circle"]
TOKENIZER = tiny_processor().tokenizer


def backend(texts: list[str] = TEXTS) -> FakeBackend:
    """Which answers them in turn."""
    left = itertools.cycle(texts)
    return FakeBackend(lambda prompt, sampling: answer_steps(next(left), sampling))


def post(path: str, body: dict[str, Any], on: FakeBackend | None = None) -> dict[str, Any]:
    reply = serve(on or backend()).post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def stream(path: str, body: dict[str, Any], on: FakeBackend | None = None) -> list[dict[str, Any]]:
    """Its chunks, which are followed by one [DONE]."""
    reply = serve(on or backend()).post(path, json={**body, "stream": True})
    assert reply.status_code == 200, reply.text
    *lines, done = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert done == "[DONE]"
    return [json.loads(line) for line in lines]


def length(text: str) -> int:
    return len(TOKENIZER.encode(text)) + 1


def test_a_chat_has_a_choice_for_each():
    on = backend()
    body = post(PATH, {**ASK, "n": 3, "logprobs": True, "return_token_ids": True}, on)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in body["choices"]] == TEXTS
    assert [len(choice["logprobs"]["content"]) for choice in body["choices"]] == list(map(length, TEXTS))
    assert [len(choice["token_ids"]) for choice in body["choices"]] == list(map(length, TEXTS))
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(body["prompt_token_ids"])
    assert usage["completion_tokens"] == sum(map(length, TEXTS))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert all(handle.was_cancelled.is_set() for handle in on.handles)


def test_a_streamed_chat_numbers_its_chunks():
    chunks = stream(PATH, {**ASK, "n": 3, "stream_options": {"include_usage": True}})
    *chunks, last = chunks
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == sum(map(length, TEXTS))
    assert all(chunk["usage"] is None for chunk in chunks)
    texts, reasons = ["", "", ""], [[], [], []]
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content") or ""
        reasons[choice["index"]].append(choice["finish_reason"])
    assert texts == TEXTS
    assert [[reason for reason in some if reason] for some in reasons] == [["stop"]] * 3
    assert all(some[-1] for some in reasons), "nothing comes of an answer after its end"
    assert [c["choices"][0]["index"] for c in chunks if c["choices"][0]["delta"].get("role")] == [0, 1, 2]
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


@pytest.mark.parametrize("is_streamed", [False, True])
def test_completions_go_prompt_by_prompt(is_streamed):
    body = {"prompt": ["a red", "a"], "n": 2, "echo": True, "return_token_ids": True}
    on = backend([*TEXTS, "black"])
    if is_streamed:
        chunks = stream(COMPLETIONS, {**body, "stream_options": {"include_usage": True}}, on)
        usage, texts = chunks[-1]["usage"], [""] * 4
        for chunk in chunks[:-1]:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    else:
        answer = post(COMPLETIONS, body, on)
        usage, texts = answer["usage"], [choice["text"] for choice in answer["choices"]]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert texts == ["a red" + TEXTS[0], "a red" + TEXTS[1], "a" + TEXTS[2], "ablack"]
    assert usage["prompt_tokens"] == len(TOKENIZER.encode("a red")) + len(TOKENIZER.encode("a"))
    assert usage["completion_tokens"] == sum(map(length, [*TEXTS, "black"]))


def test_what_is_said_of_the_prompt_is_said_once():
    body = post(PATH, {**ASK, "n": 2, "prompt_logprobs": 1})
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]
    first, second, third = post(COMPLETIONS, {"prompt": ["a red", "a b"], "n": 2, "prompt_logprobs": 0})["choices"][:3]
    assert "prompt_logprobs" in first
    assert "prompt_logprobs" not in second
    assert "prompt_logprobs" in third
    scored = post(COMPLETIONS, {"prompt": "a red", "n": 2, "echo": True, "logprobs": 1, "max_tokens": 0})
    one, other = scored["choices"]
    assert one["logprobs"] == other["logprobs"]
    assert one["logprobs"]["token_logprobs"][1] == -0.125
    assert scored["usage"]["completion_tokens"] == 0


def test_each_answer_has_its_own_calls_reasoning_and_stop_string():
    calls = ['<tool_call>{"name": "f", "arguments": {}}</tool_call>', "no call, stop here"]
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = {**ASK, "n": 2, "tools": tools, "stop": ["stop"]}
    on = backend(calls)
    one, other = post(PATH, body, on)["choices"]
    assert (one["finish_reason"], one["message"]["content"]) == ("tool_calls", None)
    assert (other["finish_reason"], other["message"]["content"]) == ("stop", "no call, ")
    assert not on.handles[1].finished, "its rank is told to end"
    deltas = [chunk["choices"][0] for chunk in stream(PATH, body, backend(calls))]
    assert [choice["index"] for choice in deltas if choice["delta"].get("tool_calls")] == [0]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_goes_wrong_with_one_ends_all_with_one_error(is_streamed):
    scripts = iter([[AllDecoded(), TokenEvent(5), 60.0], [AllDecoded(), 0.05, UnavailableError("gone")]])
    on = FakeBackend(lambda prompt, sampling: next(scripts))
    reply = serve(on).post(PATH, json={**ASK, "n": 2, "stream": is_streamed})
    assert all(handle.was_cancelled.is_set() for handle in on.handles)
    if is_streamed:
        events = [json.loads(line[6:]) for line in reply.text.splitlines() if line]
        assert [event["error"]["message"] for event in events if "error" in event] == ["gone"]
        assert "error" in events[-1]
    else:
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")


def test_all_that_fail_at_once_tell_one_error_and_log_nothing(caplog):
    on = FakeBackend(lambda prompt, sampling: [AllDecoded(), UnavailableError("gone")])
    assert serve(on).post(PATH, json={**ASK, "n": 8}).status_code == 503
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_the_timings_are_those_of_the_answer_that_ended_last():
    first, last = (RequestTimings(decode=ms) for ms in (9.0, 1.0))
    scripts = iter(
        [
            [AllDecoded(), TokenEvent(5), FinishedEvent("stop", first)],
            [AllDecoded(), TokenEvent(5), 0.1, FinishedEvent("stop", last)],
        ]
    )
    assert post(PATH, {**ASK, "n": 2}, FakeBackend(lambda *_: next(scripts)))["timings"]["decode"] == 1.0


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (PATH, {"n": 129}, "n"),
        (PATH, {"n": 2, "best_of": 3}, "best_of"),
        (PATH, {"n": 2, "best_of": 1}, "best_of"),
        (PATH, {"best_of": True}, "best_of"),
        (COMPLETIONS, {"n": 2, "prompt": ["a"] * 65}, "n"),
        (COMPLETIONS, {"n": 64, "echo": True, "logprobs": 20, "prompt": [5] * 200}, "logprobs"),
    ],
)
def test_what_is_refused(path, fields, param):
    reply = serve(backend()).post(path, json={**(ASK if path == PATH else {"prompt": "a"}), **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_best_of_may_say_the_same():
    assert len(post(PATH, {**ASK, "n": 3, "best_of": 3})["choices"]) == 3
    assert len(post(COMPLETIONS, {"prompt": "a", "n": 3, "best_of": 3})["choices"]) == 3


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (PATH, {"n": 2, "logprobs": True, "top_logprobs": 3, "max_tokens": 9}, "top_logprobs"),
        (PATH, {"n": 2, "logprobs": True, "max_tokens": 33}, "logprobs"),
        (COMPLETIONS, {"n": 2, "prompt": ["a", "b"], "logprobs": 3, "max_tokens": 5}, "logprobs"),
        ("/v1/responses", {"input": "a", "top_logprobs": 3, "max_output_tokens": 17}, "top_logprobs"),
    ],
)
def test_log_probabilities_of_all_answers_are_bounded_together(monkeypatch, path, fields, param):
    monkeypatch.setattr(sampling_fields, "MAX_LOGPROBS", 64)
    body = {**(ASK if path == PATH else {"prompt": "a"} if path == COMPLETIONS else {}), **fields}
    reply = serve(backend()).post(path, json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
    name = "max_output_tokens" if "input" in fields else "max_tokens"
    fewer = serve(backend()).post(path, json={**body, name: fields[name] - 1})
    assert fewer.status_code == 200, fewer.text


def test_an_answer_without_a_bound_has_as_many_as_may_be(monkeypatch):
    monkeypatch.setattr(sampling_fields, "MAX_LOGPROBS", 64)
    on = backend()
    post(PATH, {**ASK, "n": 2, "logprobs": True, "top_logprobs": 3}, on)
    assert [(handle.sampling.max_new_tokens, handle.sampling.is_open_ended) for handle in on.handles] == [(8, True)] * 2


@pytest.mark.parametrize(("path", "body"), [(PATH, ASK), (COMPLETIONS, {"prompt": "a"})])
def test_streams_that_tell_each_by_itself_have_no_bound_and_keep_none(monkeypatch, path, body):
    monkeypatch.setattr(sampling_fields, "MAX_LOGPROBS", 2)
    kept = list[int]()
    push = Answer._push

    def noted(self: Answer, event: TokenEvent) -> Parts:
        new = push(self, event)
        kept.append(len(self.logprobs))
        return new

    monkeypatch.setattr(Answer, "_push", noted)
    body = {**body, "logprobs": path == PATH or 0, "max_tokens": 50}
    chunks = stream(path, body)
    told = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert len(told) == len(TOKENIZER.encode(TEXTS[0])) + 1
    assert max(kept) == 1
    assert serve(backend()).post(path, json=body).status_code == 400


@pytest.mark.parametrize("more", [{"echo": True}, {"return_token_ids": True}])
def test_a_prompt_counts_as_often_as_it_is_told(monkeypatch, more):
    monkeypatch.setattr(completion_request, "MAX_PROMPT_TOKENS", 20)
    body = {"prompt": [5] * 11, "n": 2}
    assert serve(backend()).post(COMPLETIONS, json=body).status_code == 200
    assert serve(backend()).post(COMPLETIONS, json={**body, "n": 1, **more}).status_code == 200
    reply = serve(backend()).post(COMPLETIONS, json={**body, **more})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize(
    ("path", "body", "is_aside"),
    [
        (PATH, ASK, False),
        (PATH, {**ASK, "n": 3, "logprobs": True}, True),
        (PATH, {**ASK, "return_token_ids": True}, True),
        (PATH, {**ASK, "prompt_logprobs": 0}, True),
        (COMPLETIONS, {"prompt": "a"}, False),
        (COMPLETIONS, {"prompt": "a", "echo": True}, True),
        (COMPLETIONS, {"prompt": "a", "logprobs": 1}, True),
        ("/v1/responses", {"input": "a"}, False),
        ("/v1/responses", {"input": "a", "top_logprobs": 2}, True),
    ],
)
def test_what_may_be_long_is_written_beside_the_loop(monkeypatch, path, body, is_aside):
    assert is_written_aside(monkeypatch, path, body) == is_aside


@pytest.mark.parametrize(
    ("path", "body"), [(PATH, ASK), (COMPLETIONS, {"prompt": "a"}), ("/v1/responses", {"input": "a"})]
)
def test_a_long_text_is_written_beside_the_loop(monkeypatch, path, body):
    num_tokens = len(TOKENIZER.encode(TEXTS[0])) + 1
    for bound, is_aside in ((num_tokens, False), (num_tokens - 1, True)):
        monkeypatch.setattr(answers, "SMALL_TOKENS", bound)
        assert is_written_aside(monkeypatch, path, body) == is_aside


def is_written_aside(monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]) -> bool:
    written = list[bool]()
    render = JSONResponse.render

    def noted(self: JSONResponse, content: Any) -> bytes:
        written.append(threading.current_thread().name.startswith("asyncio_"))
        return render(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(JSONResponse, "render", noted)
        post(path, body)
    [is_aside] = written
    return is_aside


def test_what_repeats_all_log_probabilities_is_framed_beside_the_loop(monkeypatch):
    framed = framed_events(monkeypatch, answer_steps)
    assert {("delta", False), ("done", True), ("completed", True)} <= framed
    assert ("done", False) not in framed


def test_a_failure_that_repeats_them_is_framed_beside_the_loop(monkeypatch):
    def fail(text: str, sampling: SamplingParams) -> list[Step]:
        return [*answer_steps(text, sampling)[:-1], UnavailableError("down")]

    assert dict(framed_events(monkeypatch, fail))["failed"]


HELD_BACK = "<tool_call>\n" + '{"name": "add", "arguments": "red circle'


def test_log_probabilities_of_what_was_held_back_come_beside_the_loop(monkeypatch):
    """A call that is opened and never closed is text, all of it at the end: its entries are made with its tokens."""
    monkeypatch.setattr(chat_forms, "SMALL_ENTRIES", 8)
    made = list[int]()
    entries = Answer.entries

    def noted(self: Answer, start: int = 0) -> list[LogprobEntry]:
        found = entries(self, start)
        made.append(len(found))
        return found

    monkeypatch.setattr(Answer, "entries", noted)
    framed = framed_events(monkeypatch, lambda _, sampling: answer_steps(HELD_BACK, sampling), tools=[ADD])
    assert ("delta", True) in framed
    assert sum(made) == len(TOKENIZER.encode(HELD_BACK)) + 1
    assert max(made) == 1


ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}}


def framed_events(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[str, SamplingParams], list[Step]], **fields: Any
) -> set[tuple[str, bool]]:
    """Kinds of events of a stream of a response with log probabilities; whether they were made beside the loop."""
    framed = set[tuple[str, bool]]()

    def noted(event: dict[str, Any]) -> bytes:
        framed.add((event["type"].rpartition(".")[2], threading.current_thread().name.startswith("asyncio_")))
        return typed_sse(event)

    monkeypatch.setattr(chat_forms, "typed_sse", noted)
    on = FakeBackend(lambda prompt, sampling: answer(TEXTS[0], sampling))
    reply = serve(on).post("/v1/responses", json={"input": "a", "top_logprobs": 2, "stream": True, **fields})
    assert reply.status_code == 200, reply.text
    return framed
