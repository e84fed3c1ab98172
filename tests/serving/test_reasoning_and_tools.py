"""Reasoning and tool calls over HTTP, whole and streamed."""

from __future__ import annotations

import json

import pytest

from tests.support.chat_forms import backend_of
from tests.support.fake_backend import ASK, PATH, serve, tiny_processor

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "<é>"}}\n</tool_call>'
ARGUMENTS = '{"a": 1, "b": "<é>"}'


def whole(text: str, **fields) -> dict:
    reply = serve(backend_of(text)).post(PATH, json={**ASK, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def streamed(text: str, **fields) -> list[dict]:
    asked = {**ASK, "stream": True, "stream_options": {"include_usage": True}, **fields}
    reply = serve(backend_of(text)).post(PATH, json=asked)
    events = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def joined(chunks: list[dict]) -> dict:
    """A message put together from its chunks, as clients do it."""
    message: dict = {"content": "", "reasoning_content": "", "tool_calls": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            for name in ("content", "reasoning_content"):
                message[name] += delta.get(name, "")
            for call in delta.get("tool_calls", []):
                assert call.pop("index") == len(message["tool_calls"])
                message["tool_calls"].append(call)
    return message


@pytest.mark.usefixtures("thinking")
def test_reasoning_is_given_apart():
    text = "a red thing\nis red\n</think>\n\nred circle"
    body = whole(text, return_token_ids=True, logprobs=True)
    [choice] = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "red circle",
        "reasoning_content": "a red thing\nis red",
        "reasoning": "a red thing\nis red",
    }
    encode = tiny_processor().tokenizer.encode
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"][:-1] == encode(text)
    assert [entry["token_id"] for entry in choice["logprobs"]["content"]] == choice["token_ids"]
    assert body["usage"]["completion_tokens"] == len(choice["token_ids"])
    assert body["usage"]["completion_tokens_details"] == {
        "reasoning_tokens": len(encode("a red thing\nis red\n")),
    }
    *chunks, last = streamed(text, return_token_ids=True)
    found = joined(chunks)
    assert (found["content"], found["reasoning_content"]) == ("red circle", "a red thing\nis red")
    assert [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])] == choice["token_ids"]
    assert last["usage"] == body["usage"]
    kinds = [set(chunk["choices"][0]["delta"]) for chunk in streamed(text)[1:-2]]
    assert kinds == sorted(kinds, key=lambda kind: "content" in kind)  # first what is thought, then what is said
    assert {"reasoning_content", "reasoning"} in kinds
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert all(delta.get("reasoning_content") == delta.get("reasoning") for delta in deltas)


@pytest.mark.usefixtures("thinking")
def test_a_limit_within_reasoning():
    body = whole("a red thing\nis red\n</think>\n\nred", max_tokens=4)
    [choice] = body["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
    assert choice["message"]["reasoning_content"].startswith("a red")
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}


@pytest.mark.usefixtures("thinking")
def test_an_answer_that_is_all_reasoning():
    body = whole("a red thing")
    [choice] = body["choices"]
    told = dict.fromkeys(("reasoning_content", "reasoning"), "a red thing")
    assert choice["message"] == {"role": "assistant", "content": "", **told}
    assert choice["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == body["usage"]["completion_tokens"] - 1


@pytest.mark.usefixtures("thinking")
def test_earlier_reasoning_is_taken_back():
    call = {"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}
    messages = [
        *ASK["messages"],
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I add.",
            "reasoning": "I add.",
            "tool_calls": [call],
        },
        {"role": "tool", "content": "5", "tool_call_id": "call_1"},
    ]
    backend = backend_of("red")
    reply = serve(backend).post(PATH, json={"messages": messages, "tools": [ADD]})
    assert reply.status_code == 200, reply.text
    text = tiny_processor().tokenizer.decode(backend.handles[0].prompt.token_ids)
    assert f"assistant\n<think>\nI add.\n</think>\n\n{CALL}\n" in text
    assert text.endswith("user\n<tool_response>\n5\n</tool_response>\nassistant\n<think>\n")


def test_reasoning_that_the_model_opens_itself():
    assert whole("<think>\nhm\n</think>\n\nred")["choices"][0]["message"]["reasoning_content"] == "hm"
    message = whole("red <think>hm</think>")["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "red <think>hm</think>"}


def test_tool_calls():
    text = f"I add.\n{CALL}\n{CALL}"
    [choice] = whole(text, tools=[ADD])["choices"]
    message = choice["message"]
    assert (message["content"], choice["finish_reason"]) == ("I add.", "tool_calls")
    function = {"name": "add", "arguments": ARGUMENTS}
    assert [call["function"] for call in message["tool_calls"]] == [function] * 2
    assert {call["type"] for call in message["tool_calls"]} == {"function"}
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    *chunks, _ = streamed(text, tools=[ADD])
    found = joined(chunks)
    assert found["content"] == "I add."
    assert [call["function"] for call in found["tool_calls"]] == [function] * 2
    assert all(set(call) == {"id", "type", "function"} for call in found["tool_calls"])
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_alone_has_no_content():
    [choice] = whole(CALL, tools=[ADD])["choices"]
    assert choice["message"]["content"] is None
    assert "reasoning_content" not in choice["message"]


def test_an_answer_may_be_sent_back_as_it_came():
    message = whole(f"I add.\n{CALL}", tools=[ADD])["choices"][0]["message"]
    backend = backend_of("red")
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "2"}
    reply = serve(backend).post(PATH, json={"messages": [*ASK["messages"], message, result], "tools": [ADD]})
    assert reply.status_code == 200, reply.text
    assert f"assistant\nI add.\n{CALL}\n" in tiny_processor().tokenizer.decode(backend.handles[0].prompt.token_ids)


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": [ADD], "tool_choice": "none"}])
def test_without_tools_a_call_is_text(fields):
    backend = backend_of(CALL)
    body = serve(backend).post(PATH, json={**ASK, **fields}).json()
    [choice] = body["choices"]
    assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": CALL}, "stop")
    assert "# Tools" not in tiny_processor().tokenizer.decode(backend.handles[0].prompt.token_ids)


@pytest.mark.parametrize("fields", [{}, {"tool_choice": "auto", "parallel_tool_calls": True}])
def test_tools_are_shown_to_the_model(fields):
    backend = backend_of("red")
    assert serve(backend).post(PATH, json={**ASK, "tools": [ADD], **fields}).status_code == 200
    assert json.dumps(ADD) in tiny_processor().tokenizer.decode(backend.handles[0].prompt.token_ids)


@pytest.mark.parametrize("text", ["<tool_call>\nadd(1)\n</tool_call>", f"{CALL[:-1]} then", "<tool_call>"])
def test_what_is_no_call_is_text(text):
    [choice] = whole(text, tools=[ADD])["choices"]
    assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": text}, "stop")
    assert joined(streamed(text, tools=[ADD]))["content"] == text


@pytest.mark.parametrize(
    ("text", "functions"),
    [
        (CALL.removesuffix("\n</tool_call>"), [("add", ARGUMENTS)]),
        (CALL[:-3], [("add", ARGUMENTS)]),
        ('<tool_call>\n{"name": "add", "arguments": {"a": "x\n\ty"}}\n</tool_call>', [("add", r'{"a": "x\n\ty"}')]),
        ('<tool_call>{"name": "add", "parameters": {"a": 1}}</tool_call>', [("add", '{"a": 1}')]),
        ('<tool_call>{"name": "add"}<tool_call>{"name": "b"}', [("add", "{}"), ("b", "{}")]),
        ('<tool_call>{"name": "add"}\n{"name": "b"}\n</tool_call>', [("add", "{}"), ("b", "{}")]),
        ('<tool_call>{"name": "add", "arguments": {"a": 1e999}}</tool_call>', [("add", '{"a": 1e999}')]),
    ],
)
def test_calls_as_models_write_them(text, functions):
    text = f"I add.\n{text}"
    [choice] = whole(text, tools=[ADD])["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("I add.", "tool_calls")
    *chunks, _ = streamed(text, tools=[ADD])
    found = joined(chunks)
    assert (found["content"], chunks[-1]["choices"][0]["finish_reason"]) == ("I add.", "tool_calls")
    for message in (choice["message"], found):
        assert [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]] == functions


def test_a_limit_within_a_call():
    tokens = tiny_processor().tokenizer.encode(CALL.removesuffix("}\n</tool_call>"))
    [choice] = whole(CALL, tools=[ADD], max_tokens=len(tokens))["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("<tool_call>")
    tokens = tiny_processor().tokenizer.encode(CALL.removesuffix("</tool_call>"))
    [choice] = whole(CALL, tools=[ADD], max_tokens=len(tokens))["choices"]
    assert choice["finish_reason"] == "length"
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["add"]


@pytest.mark.usefixtures("thinking")
@pytest.mark.parametrize("stop", ["\n", "Question:", "</think>", "name", "hm"])
def test_stop_strings_belong_to_the_content(stop):
    text = f"hm\nQuestion: hm\n</think>\n\nred hm\n{CALL}"
    [choice] = whole(text, tools=[ADD], stop=stop)["choices"]
    *chunks, _ = streamed(text, tools=[ADD], stop=stop)
    for message in (choice["message"], joined(chunks)):
        assert message["reasoning_content"] == "hm\nQuestion: hm"
        assert message["content"] == ("red " if stop == "hm" else "red hm")
        assert len(message.get("tool_calls", [])) == (stop != "hm")
    assert choice["finish_reason"] == ("stop" if stop == "hm" else "tool_calls")


def test_a_stop_string_within_a_tag():
    text = "red\n<tool_c!"
    [choice] = whole(text, tools=[ADD], stop="!")["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("red\n<tool_c", "stop")
    assert joined(streamed(text, tools=[ADD], stop="!"))["content"] == "red\n<tool_c"


def test_a_stop_string_after_a_call():
    body = whole(f"{CALL}\nred", tools=[ADD], stop="red")
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    assert body["choices"][0]["message"]["content"] is None
    assert len(body["choices"][0]["message"]["tool_calls"]) == 1
