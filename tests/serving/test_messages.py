"""`/v1/messages`: Anthropic's form of a chat, its events, its errors, and what is refused."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from qwen3vl_disagg.cluster.backend import AllDecoded, TokenEvent
from qwen3vl_disagg.core.errors import DeadlineError, OverloadedError
from qwen3vl_disagg.serving.access import ApiKeys
from tests.support.chat_forms import backend_of, check_means, typed_events
from tests.support.fake_backend import PATH as CHAT
from tests.support.fake_backend import FakeBackend, serve, tiny_processor
from tests.support.images import png, uri

PATH = "/v1/messages"
USER = {"role": "user", "content": "what is it?"}
ASK = {"messages": [USER], "max_tokens": 50}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ADD = {"name": "add", "description": "adds", "input_schema": SCHEMA}
CHAT_ADD = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": SCHEMA}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
IMAGE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png()).decode()},
}


def whole(text: str = "red circle", /, **fields: Any) -> dict[str, Any]:
    reply = serve(backend_of(text)).post(PATH, json={**ASK, **fields}, headers={"anthropic-version": "2023-06-01"})
    assert reply.status_code == 200, reply.text
    return reply.json()


def streamed(text: str = "red circle", /, **fields: Any) -> list[dict[str, Any]]:
    return typed_events(serve(backend_of(text)).post(PATH, json={**ASK, "stream": True, **fields}))


def means(body: dict[str, Any], chat: dict[str, Any]) -> None:
    check_means(PATH, {**ASK, **body}, {"max_tokens": 50, **chat})


@pytest.fixture(scope="module")
def client():
    backend = FakeBackend()
    return serve(backend), backend


def test_an_answer():
    body = whole()
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "tiny")
    assert body["content"] == [{"type": "text", "text": "red circle"}]
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    usage = body["usage"]
    assert usage["output_tokens"] == len(tiny_processor().tokenizer.encode("red circle")) + 1
    assert usage["input_tokens"] > 0
    assert usage["cache_read_input_tokens"] == 0
    assert body["timings"]["language_rank"] == 0
    counted = serve(FakeBackend()).post(f"{PATH}/count_tokens", json={"messages": [USER]})
    assert counted.json() == {"input_tokens": usage["input_tokens"]}


def test_what_it_means_as_a_chat():
    system = {"role": "system", "content": "be brief"}
    means({"system": "be brief"}, {"messages": [system, USER]})
    blocks = [
        {"type": "text", "text": "be "},
        {"type": "text", "text": "brief", "cache_control": {"type": "ephemeral"}},
    ]
    means({"system": blocks}, {"messages": [system, USER]})
    text = {"type": "text", "text": "what?"}
    url = {"type": "image", "source": {"type": "url", "url": uri(png())}}
    seen = {"role": "user", "content": [text, {"type": "image_url", "image_url": {"url": uri(png())}}]}
    for image in (IMAGE, url):
        means({"messages": [{"role": "user", "content": [text, image]}]}, {"messages": [seen]})
    means(
        {"temperature": 0.5, "top_p": 0.5, "top_k": 3, "stop_sequences": ["a", "b"]},
        {"messages": [USER], "temperature": 0.5, "top_p": 0.5, "top_k": 3, "stop": ["a", "b"]},
    )
    start = {"role": "assistant", "content": "It is"}
    means({"messages": [USER, start]}, {"messages": [USER, start], "continue_final_message": True})


@pytest.mark.usefixtures("thinking")
def test_tool_results_are_turns_of_their_own():
    use = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}}
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    said = {"type": "text", "text": "I add."}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "2"}
    pictured = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "see"}, IMAGE]}
    now = {"type": "text", "text": "and now?"}
    call = {"id": "t1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    picture = {"type": "image_url", "image_url": {"url": uri(png())}}
    means(
        {
            "messages": [
                *(USER, {"role": "assistant", "content": [thought, said, use, use]}),
                {"role": "user", "content": [result, pictured, now]},
            ],
            "tools": [ADD],
        },
        {
            "messages": [
                USER,
                {"role": "assistant", "reasoning_content": "hm", "content": [said], "tool_calls": [call, call]},
                {"role": "tool", "content": "2"},
                {"role": "tool", "content": [{"type": "text", "text": "see"}, picture]},
                {"role": "user", "content": [now]},
            ],
            "tools": [CHAT_ADD],
        },
    )


@pytest.mark.parametrize(
    ("fields", "chat"),
    [
        ({"tool_choice": {"type": "any"}}, {"tool_choice": "required"}),
        ({"tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
        ({"tool_choice": {"type": "tool", "name": "add"}}, {"tool_choice": {"type": "function", "name": "add"}}),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, {"parallel_tool_calls": False}),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        ),
    ],
)
def test_tools_and_formats_become_the_same_grammar(client, fields, chat):
    client, backend = client
    assert client.post(PATH, json={**ASK, "tools": [ADD], **fields}).status_code == 200
    client.post(CHAT, json={"messages": [USER], "tools": [CHAT_ADD], **chat})
    first, second = (handle.sampling.grammar for handle in backend.handles[-2:])
    assert (first and (first.kind, first.text, first.tools, first.max_calls)) == (
        second and (second.kind, second.text, second.tools, second.max_calls)
    )
    assert backend.handles[-2].prompt.token_ids == backend.handles[-1].prompt.token_ids


@pytest.mark.usefixtures("thinking")
def test_thinking_text_and_calls_are_blocks():
    text = "a red thing\n</think>\n\nI add.\n" + CALL
    body = whole(text, tools=[ADD], thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=100)
    assert body["content"][:2] == [
        {"type": "thinking", "thinking": "a red thing", "signature": ""},
        {"type": "text", "text": "I add."},
    ]
    call = body["content"][2]
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "add", {"a": 1})
    assert body["stop_reason"] == "tool_use"
    found = streamed(text, tools=[ADD], max_tokens=100)
    assert [event["type"] for event in found[:2]] == ["message_start", "ping"]
    assert [event["type"] for event in found[-2:]] == ["message_delta", "message_stop"]
    assert found[0]["message"]["content"] == []
    assert (found[-2]["delta"], found[-2]["usage"]) == (
        {"stop_reason": "tool_use", "stop_sequence": None},
        body["usage"],
    )
    for index, block in enumerate(body["content"]):
        own = [event for event in found if event.get("index") == index]
        assert own[0]["type"] == "content_block_start"
        assert own[0]["content_block"]["type"] == block["type"]
        assert own[-1]["type"] == "content_block_stop"
        name = {"thinking": "thinking", "text": "text", "tool_use": "partial_json"}[block["type"]]
        text = "".join(event["delta"].get(name, "") for event in own[1:-1])
        assert (json.loads(text) if block["type"] == "tool_use" else text) == block.get(name, block.get("input"))


def test_why_it_ended():
    cut = whole("red circle here", max_tokens=2)
    assert cut["stop_reason"] == "max_tokens"
    ended = whole("red circle here", stop_sequences=["here", "circle"])
    assert (ended["stop_reason"], ended["stop_sequence"]) == ("stop_sequence", "circle")
    assert ended["content"] == [{"type": "text", "text": "red "}]
    assert whole("")["content"] == []


def test_errors_have_anthropics_envelope():
    client = serve(FakeBackend(), keys=ApiKeys(["k"]))
    key = {"x-api-key": "k"}
    for reply, status, kind in (
        (client.post(PATH, json=ASK), 401, "authentication_error"),
        (client.post(PATH, json={**ASK, "model": "x"}, headers=key), 404, "not_found_error"),
        (client.post(PATH, json={**ASK, "top_p": 7}, headers=key), 400, "invalid_request_error"),
        (client.get(PATH, headers=key), 405, "invalid_request_error"),
        (client.post(f"{PATH}/count_tokens", json={}, headers=key), 400, "invalid_request_error"),
    ):
        assert reply.status_code == status, reply.text
        body = reply.json()
        assert (body["type"], body["error"]["type"]) == ("error", kind)
        assert body["error"]["message"]
    assert "type" not in client.post(CHAT, json=ASK).json()
    busy = FakeBackend()
    busy.refused = OverloadedError("full")
    reply = serve(busy).post(PATH, json=ASK)
    assert (reply.status_code, reply.json()["error"]["type"]) == (429, "rate_limit_error")
    assert "retry-after" in reply.headers


def test_a_failure_in_a_stream_is_its_last_event():
    steps = [AllDecoded(), TokenEvent(40), DeadlineError("too late")]
    client = serve(FakeBackend(lambda prompt, sampling: steps))
    *_, last = typed_events(client.post(PATH, json={**ASK, "stream": True}))
    assert (last["type"], last["error"]["type"], last["error"]["message"]) == ("error", "timeout_error", "too late")


def of_user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*blocks]}]}


def of_assistant(*blocks: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "content": [*blocks]}, USER]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [7]}, "messages[0]"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        (of_user(7), "messages[0].content[0]"),
        (of_user({"type": "text", "text": 7}), "messages[0].content[0].text"),
        (of_user({"type": "text", "text": "a"}, {"type": "document"}), "messages[0].content[1].type"),
        (of_user({"type": "image"}), "messages[0].content[0].source.type"),
        (of_user({"type": "image", "source": {"type": "file", "file_id": "x"}}), "messages[0].content[0].source.type"),
        (of_user({"type": "image", "source": {"type": "base64", "data": "x"}}), "messages[0].content[0]"),
        (of_user({"type": "image", "source": {"type": "url", "url": "http://a/b"}}), "messages[0].content[0]"),
        (of_user({"type": "tool_result", "content": [{"type": "x"}]}), "messages[0].content[0].content[0].type"),
        (of_user({"type": "tool_result", "content": 7}), "messages[0].content[0].content"),
        (of_user({"type": "tool_use"}), "messages[0].content[0].type"),
        (of_assistant({"type": "tool_use", "name": "a", "input": 7}), "messages[1].content[0]"),
        (of_assistant({"type": "thinking"}), "messages[1].content[0].thinking"),
        (of_assistant({"type": "redacted_thinking", "data": "x"}), "messages[1].content[0].type"),
        (of_assistant(IMAGE), "messages[1].content[0]"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "tool_use", "name": "a", "input": {}}]}]},
            "messages[1]",
        ),
        ({"system": 7}, "system"),
        ({"system": [{"type": "image"}]}, "system"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": 7}, "tools"),
        ({"tool_choice": {"type": "x"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": "x"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"thinking": {"budget_tokens": 5}}, "thinking.type"),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking.display"),
        ({"output_config": {"effort": "x"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"output_config": {"task_budget": 5}}, "output_config.task_budget"),
        ({"stop_sequences": [7]}, "stop_sequences"),
        ({"stop": "a"}, "stop"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"container": "x"}, "container"),
        ({"n": 2}, "n"),
    ],
)
def test_what_is_refused_is_named(fields, param):
    reply = serve(FakeBackend()).post(PATH, json={**ASK, **fields})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


def test_what_asks_for_nothing_is_taken():
    nothing = {"metadata": {"user_id": "u"}, "service_tier": "auto", "mcp_servers": [], "container": None}
    whole(**nothing, thinking={"type": "disabled"}, tool_choice={"type": "auto"}, cache_control={"type": "ephemeral"})
    whole(thinking={"type": "adaptive"}, output_config={}, system=[])


def test_a_large_one_is_made_in_a_child():
    body = json.dumps(ASK).encode() + b" " * 2**20
    reply = serve(backend_of()).post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert reply.json()["content"] == [{"type": "text", "text": "red circle"}]
