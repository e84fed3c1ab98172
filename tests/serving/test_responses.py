"""`/v1/responses`: items in and out, typed events, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen3vl_disagg.cluster.backend import AllDecoded, TokenEvent
from qwen3vl_disagg.core.errors import DeadlineError, InputError
from qwen3vl_disagg.serving.limits import Limits
from tests.support.chat_forms import backend_of, check_means, typed_events
from tests.support.fake_backend import PATH as CHAT
from tests.support.fake_backend import FakeBackend, answer_steps, serve, tiny_processor
from tests.support.images import png, uri

PATH = "/v1/responses"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ADD = {"type": "function", "name": "add", "description": "adds", "parameters": SCHEMA}
CHAT_ADD = {"type": "function", "function": {name: ADD[name] for name in ("name", "description", "parameters")}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
THOUGHT = "a red thing\n</think>\n\n"


def whole(text: str = "red circle", /, **fields: Any) -> dict[str, Any]:
    reply = serve(backend_of(text)).post(PATH, json={"input": "what is it?", **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def events_of(reply: Any) -> list[dict[str, Any]]:
    found = typed_events(reply)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def streamed(text: str = "red circle", /, **fields: Any) -> list[dict[str, Any]]:
    return events_of(serve(backend_of(text)).post(PATH, json={"input": "what is it?", "stream": True, **fields}))


def refusal(**fields: Any) -> tuple[str, str]:
    reply = serve(FakeBackend()).post(PATH, json={"input": "?", **fields})
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]["param"], reply.json()["error"]["code"]


def means(body: dict[str, Any], chat: dict[str, Any]) -> None:
    check_means(PATH, body, chat)


@pytest.fixture(scope="module")
def client():
    backend = FakeBackend()
    return serve(backend), backend


def test_an_answer():
    body = whole(metadata={"a": "b"}, instructions="be brief", temperature=0.5, max_output_tokens=50, store=True)
    [item] = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": "red circle", "annotations": [], "logprobs": []}]
    assert (body["object"], body["status"], body["error"], body["incomplete_details"]) == (
        *("response", "completed", None, None),
    )
    assert body["id"].startswith("resp_")
    repeated = {"metadata": {"a": "b"}, "instructions": "be brief", "temperature": 0.5, "max_output_tokens": 50}
    usual = {"store": False, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "truncation": "disabled"}
    for name, value in {**repeated, **usual, "text": {"format": {"type": "text"}}, "background": False}.items():
        assert body[name] == value, name
    usage = body["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_tokens_details"]["cached_tokens"] == usage["output_tokens_details"]["reasoning_tokens"] == 0
    assert body["timings"]["language_rank"] == 0


def test_what_it_means_as_a_chat():
    text, image = {"type": "input_text", "text": "what?"}, {"type": "input_image", "image_url": uri(png())}
    user = {"role": "user", "content": [{"type": "text", "text": "what?"}]}
    asked = [{"role": "user", "content": "what?"}]
    means({"input": "what?"}, {"messages": asked})
    means({"input": [{"type": "message", "role": "user", "content": [text]}]}, {"messages": [user]})
    with_image = [{"role": "user", "content": [text, {"type": "image_url", "image_url": {"url": uri(png())}}]}]
    means({"input": [{"role": "user", "content": [text, {**image, "detail": "auto"}]}]}, {"messages": with_image})
    system = {"role": "system", "content": "be brief"}
    means({"input": "what?", "instructions": "be brief"}, {"messages": [system, *asked]})
    means({"input": [{"role": "developer", "content": "be brief"}, *asked]}, {"messages": [system, *asked]})
    both = {"role": "system", "content": "be brief\n\nand kind"}
    means(
        {"input": [{"role": "developer", "content": "and kind"}, *asked], "instructions": "be brief"},
        {"messages": [both, *asked]},
    )
    means(
        {"input": "what?", "max_output_tokens": 7, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "seed": 1},
        {"messages": asked, "max_tokens": 7, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "seed": 1},
    )


@pytest.mark.usefixtures("thinking")
def test_items_of_an_answer_are_one_turn_again():
    asked = {"role": "user", "content": "what?"}
    calls = [
        {"type": "function_call", "call_id": f"c{i}", "id": f"fc{i}", "name": "add", "arguments": f'{{"a": {i}}}'}
        for i in range(2)
    ]
    chat_calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "add", "arguments": f'{{"a": {i}}}'}} for i in range(2)
    ]
    thought = {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    said = {"type": "message", "role": "assistant", "id": "m", "status": "completed"}
    said["content"] = [{"type": "output_text", "text": "I add.", "annotations": []}]
    outputs = [{"type": "function_call_output", "call_id": f"c{i}", "output": f"{i}"} for i in range(2)]
    summed = {"type": "reasoning", "id": "rs2", "summary": [{"type": "summary_text", "text": "so"}]}
    items = [asked, thought, said, *calls, *outputs, summed, calls[0], outputs[0]]
    turn = {"role": "assistant", "reasoning_content": "hm", "content": [{"type": "text", "text": "I add."}]}
    messages = [
        asked,
        {**turn, "tool_calls": chat_calls},
        *({"role": "tool", "tool_call_id": f"c{i}", "content": f"{i}"} for i in range(2)),
        {"role": "assistant", "reasoning_content": "so", "tool_calls": chat_calls[:1]},
        {"role": "tool", "content": "0"},
    ]
    means({"input": items, "tools": [ADD]}, {"messages": messages, "tools": [CHAT_ADD]})
    # An output may be parts, images among them. Two answers are two turns.
    image = {"type": "input_image", "image_url": uri(png())}
    seen = {"type": "function_call_output", "call_id": "c0", "output": [image]}
    one = {"role": "assistant", "content": "one"}
    means(
        {"input": [asked, one, one, calls[0], seen]},
        {
            "messages": [
                *(asked, one, {**one, "tool_calls": chat_calls[:1]}),
                {"role": "tool", "content": [{"type": "image_url", "image_url": uri(png())}]},
            ]
        },
    )


@pytest.mark.parametrize(
    ("fields", "chat"),
    [
        ({"tool_choice": "required"}, {"tool_choice": "required"}),
        ({"tool_choice": "none"}, {"tool_choice": "none"}),
        (
            {"tool_choice": {"type": "function", "name": "add"}},
            {"tool_choice": {"type": "function", "function": {"name": "add"}}},
        ),
        ({"parallel_tool_calls": False}, {"parallel_tool_calls": False}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        ),
    ],
)
def test_tools_and_formats_become_the_same_grammar(client, fields, chat):
    client, backend = client
    body = client.post(PATH, json={"input": "?", "tools": [ADD], **fields}).json()
    client.post(CHAT, json={"messages": [{"role": "user", "content": "?"}], "tools": [CHAT_ADD], **chat})
    first, second = (handle.sampling.grammar for handle in backend.handles[-2:])
    assert (first and (first.kind, first.text, first.tools, first.max_calls)) == (
        second and (second.kind, second.text, second.tools, second.max_calls)
    )
    assert backend.handles[-2].prompt.token_ids == backend.handles[-1].prompt.token_ids
    for name, value in fields.items():
        assert body[name] == value
    shown = [] if fields.get("tool_choice") == "none" else [{**ADD, "strict": None}]
    assert body["tools"] == shown


@pytest.mark.usefixtures("thinking")
def test_reasoning_text_and_calls_are_items():
    text = THOUGHT + "I add.\n" + CALL
    body = whole(text, tools=[ADD])
    thought, said, called = body["output"]
    assert (thought["type"], thought["summary"]) == ("reasoning", [])
    assert thought["content"] == [{"type": "reasoning_text", "text": "a red thing"}]
    assert said["content"][0]["text"] == "I add."
    assert (called["type"], called["name"], called["arguments"]) == ("function_call", "add", '{"a": 1}')
    assert called["call_id"].startswith("call_")
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    kinds = [event["type"].removeprefix("response.") for event in streamed(text, tools=[ADD])]
    deltas = ("reasoning_text.delta", "output_text.delta")
    once = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if not (kind in deltas and kind == before)]
    assert once == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]


@pytest.mark.usefixtures("thinking")
def test_events_add_up_to_the_answer():
    found = streamed(THOUGHT + "I add.\n" + CALL, tools=[ADD], include=["message.output_text.logprobs"])
    last = found[-1]["response"]
    for index, item in enumerate(last["output"]):
        own = [event for event in found if event.get("output_index") == index]
        assert own[0]["item"]["id"] == own[-1]["item"]["id"] == item["id"]
        assert (own[0]["item"]["status"], own[-1]["item"]) == ("in_progress", item)
        text = "".join(event.get("delta", "") for event in own)
        assert text == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        assert all(event["item_id"] == item["id"] for event in own[1:-1])
    entries = last["output"][1]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in entries).strip() == "I add."
    assert entries == [e for event in found if event["type"] == "response.output_text.delta" for e in event["logprobs"]]
    assert found[0]["response"]["status"] == "in_progress"
    assert found[0]["response"]["output"] == []


def test_logprobs_are_asked_for():
    [item] = whole(top_logprobs=1)["output"]
    assert len(item["content"][0]["logprobs"][0]["top_logprobs"]) == 1
    [item] = whole(include=["message.output_text.logprobs"])["output"]
    assert item["content"][0]["logprobs"][0]["logprob"] == -0.5
    assert whole(top_logprobs=0)["output"][0]["content"][0]["logprobs"] == []


@pytest.mark.parametrize("thought", ["", "hm\n"])
def test_log_probabilities_of_reasoning_that_opens_late_are_not_the_texts(thought):
    body = whole(f" \n<think>\n{thought}</think>\n\nred circle", top_logprobs=1)
    entries = body["output"][-1]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in entries) == "\n\nred circle"


def test_an_answer_that_is_cut():
    body = whole("red circle here", max_output_tokens=2)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"
    assert streamed("red circle here", max_output_tokens=2)[-1]["type"] == "response.incomplete"


def test_an_empty_answer_is_an_empty_message():
    [item] = whole("")["output"]
    assert item["content"][0]["text"] == ""
    assert streamed("")[-1]["response"]["output"][0]["content"][0]["text"] == ""


def test_a_failure_in_a_stream_is_its_last_event():
    steps = [AllDecoded(), TokenEvent(40), DeadlineError("too late")]
    client = serve(FakeBackend(lambda prompt, sampling: steps))
    *_, last = events_of(client.post(PATH, json={"input": "?", "stream": True}))
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "too late"}
    assert client.post(PATH, json={"input": "?"}).status_code == 504


@pytest.mark.parametrize(("path", "asked"), [(PATH, {}), ("/v1/messages", {"max_tokens": 9})])
def test_a_broken_image_is_a_400_also_where_it_is_streamed(path, asked):
    broken = InputError("the image cannot be decoded", param="there")
    client = serve(FakeBackend(lambda prompt, sampling: [0.0, broken]))
    turns = [{"role": "user", "content": "?"}]
    reply = client.post(path, json={"input" if path == PATH else "messages": turns, **asked, "stream": True})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "there")


def test_silence_is_filled():
    steps = [AllDecoded(), 0.3, *answer_steps("red", tiny_processor().generation.sampling(max_new_tokens=9))[1:]]
    client = serve(FakeBackend(lambda prompt, sampling: steps), limits=Limits(ping_s=0.1))
    kinds = [event["type"] for event in events_of(client.post(PATH, json={"input": "?", "stream": True}))]
    assert kinds[:4] == ["response.created", *["response.in_progress"] * 3]


USER = {"role": "user", "content": "?"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 7}, "input"),
        ({"input": [USER, 7]}, "input[1]"),
        ({"input": [{"role": "other", "content": "?"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 7}]}]}, "input[0].content[0].text"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
            "input[0].content[0].type",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}]},
            "input[0].content[0].file_id",
        ),
        ({"input": [USER, {"type": "item_reference", "id": "x"}]}, "input[1].type"),
        ({"input": [USER, {"type": ["x"]}]}, "input[1].type"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": 7, "arguments": ""}]}, "input[0].name"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": 7}]}, "input[0].output"),
        ({"input": [{"type": "function_call_output", "output": [{"type": "x"}]}]}, "input[0].output[0].type"),
        ({"input": [{"type": "reasoning", "summary": [7]}]}, "input[0].summary"),
        ({"instructions": 7}, "instructions"),
        ({"instructions": "a", "input": [{"role": "system", "content": 7}]}, "input[0].content"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [7]}, "tools[0]"),
        ({"tools": 7}, "tools"),
        ({"tool_choice": {"type": "function", "name": "add"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "x"}}}, "text.format.type"),
        ({"text": {"format": 7}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": 7}, "text"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"metadata": {"a": 7}}, "metadata"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"include": "x"}, "include"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"messages": [USER]}, "messages"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 2}, "n"),
    ],
)
def test_what_is_refused_is_named(fields, param):
    assert refusal(**fields)[0] == param


def test_what_asks_for_nothing_is_taken():
    nothing = {"background": False, "truncation": "disabled", "previous_response_id": None, "store": True, "user": "u"}
    more = {"text": {"verbosity": "medium"}, "reasoning": {"effort": None, "summary": "auto"}, "n": 1}
    include = ["reasoning.encrypted_content"]
    body = whole(**nothing, **more, include=include, max_tool_calls=3, prompt_cache_key="k", safety_identifier="s")
    assert body["reasoning"] == {"effort": None, "summary": None}
    assert body["store"] is False


def test_a_large_one_is_made_in_a_child():
    tool = {**ADD, "parameters": {**SCHEMA, "examples": [-(2**63) - 5]}}
    body = json.dumps({"input": "?", "tools": [tool]}).encode() + b" " * 2**20
    reply = serve(FakeBackend()).post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 200, reply.text
    assert reply.json()["tools"] == [{**tool, "strict": None}]
