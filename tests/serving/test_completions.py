"""`/v1/completions`: prompts in all forms, what is echoed and told of them, streams, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from qwen3vl_disagg.cluster.backend import AllDecoded, FinishedEvent, TokenEvent
from qwen3vl_disagg.core.errors import OverloadedError
from qwen3vl_disagg.core.requests import TokenLogprob
from qwen3vl_disagg.processing.tokenizer import TextStream, Tokenizer
from qwen3vl_disagg.serving import completion_request, prompt_scores
from tests.support.asgi import is_on_a_loop
from tests.support.fake_backend import FakeBackend, answer_of, serve, timings, tiny_processor

PATH = "/v1/completions"
TOKENIZER = tiny_processor().tokenizer
TEXT = "a red circle"
IDS = TOKENIZER.encode(TEXT)
ANSWER = TOKENIZER.encode(" is there")
END = TOKENIZER.token_id("<|im_end|>")


def backend(ids: list[int] | None = None) -> FakeBackend:
    return FakeBackend(lambda prompt, sampling: answer_of([*(ANSWER if ids is None else ids), END], sampling))


def post(body: dict[str, Any], on: FakeBackend | None = None, **options: Any) -> Any:
    return serve(on or backend(), **options).post(PATH, json=body)


def ok(body: dict[str, Any], on: FakeBackend | None = None) -> Any:
    reply = post(body, on)
    assert reply.status_code == 200, reply.text
    return reply.json()


def events(body: dict[str, Any], on: FakeBackend | None = None) -> list[Any]:
    reply = post({**body, "stream": True}, on)
    assert reply.status_code == 200, reply.text
    lines = [line[6:] for line in reply.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_an_answer():
    on = backend()
    body = ok({"prompt": TEXT, "model": "tiny"}, on)
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    [choice] = body["choices"]
    assert (choice["index"], choice["text"], choice["finish_reason"]) == (0, " is there", "stop")
    assert choice["logprobs"] is None
    assert choice["timings"]["language_rank"] == 0
    num = len(ANSWER) + 1
    usage = {"prompt_tokens": len(IDS), "completion_tokens": num, "total_tokens": len(IDS) + num}
    assert body["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}
    assert on.handles[0].prompt.token_ids == IDS
    assert on.handles[0].sampling.max_new_tokens == 16
    assert not on.handles[0].sampling.is_open_ended


@pytest.mark.parametrize("prompt", [TEXT, [TEXT], IDS, [IDS], [TEXT, IDS, "red"]])
def test_prompts_in_all_forms(prompt):
    on = backend()
    body = ok({"prompt": prompt, "max_tokens": 2, "return_token_ids": True}, on)
    count = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    assert [choice["index"] for choice in body["choices"]] == list(range(count))
    assert len(on.handles) == count
    for choice, handle in zip(body["choices"], on.handles, strict=True):
        assert choice["prompt_token_ids"] == handle.prompt.token_ids
        assert choice["token_ids"] == ANSWER[:2]
        assert choice["finish_reason"] == "length"
    assert body["choices"][0]["prompt_token_ids"] == IDS
    assert body["usage"]["completion_tokens"] == 2 * count


def test_text_never_becomes_a_special_token():
    on = backend()
    ok({"prompt": "<|im_start|>user\n<|image_pad|>"}, on)
    assert not set(TOKENIZER.special_ids.values()) & set(on.handles[0].prompt.token_ids)
    ok({"prompt": [TOKENIZER.token_id("<|im_start|>"), *IDS]}, on)
    assert on.handles[1].prompt.token_ids[0] == TOKENIZER.token_id("<|im_start|>")


def test_what_is_thought_or_called_is_text():
    text = "<think>\nhm\n</think>\n<tool_call>\n{}\n</tool_call>"
    ids = TOKENIZER.encode(text)
    body = ok({"prompt": "<think>", "max_tokens": 99}, backend(ids))
    assert body["choices"][0]["text"] == text


def test_echo_and_logprobs():
    """As a harness scores: token t of a prompt has -t / 8, each token of the answer -0.5."""
    body = ok(
        {"prompt": [IDS, TOKENIZER.encode("red")], "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    )
    for choice, ids, text in zip(body["choices"], (IDS, TOKENIZER.encode("red")), (TEXT, "red"), strict=True):
        first = TOKENIZER.decode(ANSWER[:1])
        assert choice["text"] == text + first
        told = choice["logprobs"]
        assert told["tokens"] == [TOKENIZER.decode([i]) for i in ids] + [first]
        assert told["token_logprobs"] == [None, *(-t / 8 for t in range(1, len(ids))), -0.5]
        assert told["top_logprobs"][0] is None
        most_likely = TOKENIZER.token_bytes(1).decode()
        for token, logprob, top in zip(
            told["tokens"][1:-1], told["token_logprobs"][1:-1], told["top_logprobs"][1:-1], strict=True
        ):
            assert top == {most_likely: -1 / 16, token: logprob}
        lengths = [len(token) for token in told["tokens"]]
        assert told["text_offset"] == [sum(lengths[:n]) for n in range(len(lengths))]
        assert "".join(told["tokens"]) == choice["text"]


def test_nothing_but_the_prompt():
    on = backend()
    body = ok({"prompt": TEXT, "max_tokens": 0, "echo": True, "logprobs": 2, "return_token_ids": True}, on)
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == (TEXT, "length", [])
    assert len(choice["logprobs"]["tokens"]) == len(IDS)
    assert body["usage"]["completion_tokens"] == 0
    assert (on.handles[0].sampling.max_new_tokens, on.handles[0].sampling.prompt_logprobs) == (1, 2)
    reply = post({"prompt": TEXT, "max_tokens": 0})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "max_tokens")


def test_logprobs_of_the_answer_alone():
    on = backend()
    [choice] = ok({"prompt": TEXT, "max_tokens": 3, "logprobs": 0}, on)["choices"]
    assert on.handles[0].sampling.prompt_logprobs is None
    told = choice["logprobs"]
    assert told["token_logprobs"] == [-0.5] * 3
    assert told["top_logprobs"] == [{token: -0.5} for token in told["tokens"]]
    assert told["text_offset"][0] == 0


def test_a_token_that_is_a_part_of_a_character_is_named_by_its_bytes():
    ids = TOKENIZER.encode("é", at_most=9)
    parts = [i for i in range(300) if len(raw := TOKENIZER.token_bytes(i)) == 1 and raw[0] >= 0x80][:2]
    assert parts, ids
    steps = [
        AllDecoded(),
        *(TokenEvent(i, TokenLogprob(i, -1.0, [])) for i in parts),
        FinishedEvent("length", timings()),
    ]
    on = FakeBackend(lambda prompt, sampling: list(steps))
    told = ok({"prompt": TEXT, "logprobs": 0}, on)["choices"][0]["logprobs"]
    assert told["tokens"] == [f"bytes:\\x{TOKENIZER.token_bytes(i)[0]:02x}" for i in parts]


def test_prompt_logprobs_as_vllm_has_them():
    [choice] = ok({"prompt": TEXT, "prompt_logprobs": 1})["choices"]
    assert choice["text"] == " is there"
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][2][str(IDS[2])]["logprob"] == -2 / 8


def test_stop_and_stream():
    whole = ok({"prompt": TEXT, "stop": "the", "logprobs": 1})
    assert (whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]) == (" is ", "stop")
    chunks = events({"prompt": TEXT, "stop": "the", "logprobs": 1, "stream_options": {"include_usage": True}})
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert "".join(c["text"] for chunk in chunks for c in chunk["choices"]) == " is "
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-2]["choices"][0]["timings"]
    told = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
    assert [token for one in told for token in one["tokens"]] == whole["choices"][0]["logprobs"]["tokens"]


def test_a_stream_of_several_prompts():
    chunks = events({"prompt": [TEXT, "red", IDS], "echo": True, "max_tokens": 2})
    texts, reasons = {}, {}
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    end = TOKENIZER.decode(ANSWER[:2])
    assert texts == {0: TEXT + end, 1: "red" + end, 2: TEXT + end}
    assert reasons == dict.fromkeys(range(3), "length")


def test_a_failure_ends_all(monkeypatch):
    on = FakeBackend(
        lambda prompt, sampling: [AllDecoded(), 0.01, *([ZeroDivisionError()] if len(on.handles) else [30.0])]
    )
    assert post({"prompt": [TEXT, TEXT]}, on).status_code == 500
    assert all(handle.was_cancelled.is_set() for handle in on.handles)
    refusing = FakeBackend()
    refusing.script = lambda prompt, sampling: [OverloadedError("full")] if refusing.handles else [30.0]
    reply = post({"prompt": [TEXT, TEXT]}, refusing)
    assert reply.status_code == 429
    assert not refusing.handles, "none of it is started"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [TEXT, ""]}, "prompt[1]"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {"text": TEXT}}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [1, TEXT]}, "prompt"),
        ({"prompt": [TEXT, 1]}, "prompt[1]"),
        ({"prompt": [[1], [[1]]]}, "prompt[1]"),
        ({"prompt": [TEXT] * 129}, "prompt"),
        ({"prompt": [1, TOKENIZER.token_id("<|image_pad|>")]}, "prompt"),
        ({"prompt": [[1], [TOKENIZER.token_id("<|video_pad|>")]]}, "prompt[1]"),
        ({"prompt": [1] * 5000}, "prompt"),
        ({"prompt": "red circle " * 9000}, "prompt"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"echo": True, "logprobs": 1, "stream": True}, "logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"n": 129}, "n"),
        ({"suffix": "x"}, "suffix"),
        ({"messages": [{}]}, "messages"),
        ({"images": ["x"]}, "images"),
        ({"image_url": "x"}, "image_url"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"guided_regex": "a+", "choice": ["a"]}, "choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"mm_processor_kwargs": {"fps": 1}}, "mm_processor_kwargs"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"stream_options": 5}, "stream_options"),
        ({"logit_bias": {"100000000": 1}}, "logit_bias"),
        ({"cache_salt": ""}, "cache_salt"),
    ],
)
def test_what_is_refused(fields, param):
    reply = post({"prompt": TEXT, **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 1},
        {"n": 1},
        {"suffix": None},
        {"suffix": ""},
        {"user": "u"},
        {"tools": []},
        {"response_format": {"type": "text"}},
    ],
)
def test_what_asks_for_nothing(fields):
    ok({"prompt": TEXT, **fields})


@pytest.mark.parametrize("stream", [False, True])
def test_the_text_of_a_long_prompt_is_not_put_together_on_the_loop(stream, monkeypatch):
    pushed, push = Counter[bool](), TextStream.push

    def noted(self: TextStream, token_id: int) -> str:
        pushed[is_on_a_loop()] += 1
        return push(self, token_id)

    monkeypatch.setattr(TextStream, "push", noted)
    body = {"prompt": IDS * 100, "echo": True, "max_tokens": 1}
    text = events(body)[0]["choices"][0]["text"] if stream else ok(body)["choices"][0]["text"]
    assert text.startswith(TEXT * 100)
    assert pushed[False] >= 100 * len(IDS) > 10 * pushed[True]


def test_other_models_and_salts():
    assert post({"prompt": TEXT, "model": "other"}).status_code == 404
    on = backend()
    for salt in ("a", "b", None):
        ok({"prompt": TEXT, "cache_salt": salt}, on)
    assert len({handle.sampling.cache_salt for handle in on.handles}) == 3


def test_numbers_of_all_prompts_count_together(monkeypatch):
    monkeypatch.setattr(prompt_scores, "MAX_SCORES", 4 * len(IDS))
    assert post({"prompt": [IDS, IDS], "logprobs": 1, "echo": True}).status_code == 200
    reply = post({"prompt": [IDS, IDS], "logprobs": 2, "echo": True})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "logprobs")


def test_tokens_of_all_prompts_are_bounded_together(monkeypatch):
    monkeypatch.setattr(completion_request, "MAX_PROMPT_TOKENS", 2 * len(IDS))
    for prompt in (IDS * 3, [IDS, IDS], [IDS * 3]):
        assert post({"prompt": prompt}).status_code == 200
    reply = post({"prompt": [TEXT, IDS, IDS[:1]]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt[2]")


def test_a_large_body_is_prepared_in_a_child():
    on = backend()
    body = {"prompt": [IDS * 10 for _ in range(100)], "max_tokens": 2, "cache_salt": "s", "logit_bias": {"3": 1}}
    assert sum(len(ids) for ids in body["prompt"]) > 2**13 // 10
    body["x"] = [0] * 2**13  # more values than this process parses
    reply = post(body, on)
    assert reply.status_code == 200, reply.text
    assert [handle.prompt.token_ids for handle in on.handles] == body["prompt"]
    assert {handle.sampling.cache_salt for handle in on.handles} != {""}
    assert on.handles[99].sampling.logit_bias == {3: 1.0}


def test_bad_words_are_tokenized_once_for_all_prompts(monkeypatch):
    encoded, encode = Counter(), Tokenizer.encode

    def counting(self, text, *args, **options):
        encoded[text] += 1
        return encode(self, text, *args, **options)

    monkeypatch.setattr(Tokenizer, "encode", counting)
    on = backend()
    ok({"prompt": ["a", "b", "c"], "bad_words": ["purple"]}, on)
    assert (encoded["purple"], encoded[" purple"]) == (1, 1)
    assert all(handle.sampling.bad_words for handle in on.handles)
