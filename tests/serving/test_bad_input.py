"""Whatever a client sends wrong is a 4xx that names the place, and the next good request is served."""

from __future__ import annotations

import base64
import json

import pytest

from tests.support.fake_backend import ASK, PATH, FakeBackend, serve, tiny_processor
from tests.support.images import png, uri

IMAGE = png()


def user(*parts) -> dict:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def image(url) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


CONTEXT = tiny_processor().config.text.max_position_embeddings
VOCAB = tiny_processor().config.text.vocab_size

# (what is sent in place of or beside the question, param)
FIELDS: list[tuple[dict, str]] = [
    ({"model": 5}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "pirate", "content": "?"}]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": "?"}]}, "messages[0].role"),
    ({"messages": [{"role": "assistant", "content": [image(uri(IMAGE))]}]}, "messages[0].content[0]"),
    ({"messages": [*ASK["messages"], {"role": "tool", "content": 5}]}, "messages[1].content"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": 5}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
    ({"messages": [{"role": "assistant", "content": "", "reasoning": 5}]}, "messages[0].reasoning"),
    ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages[0].content"),
    (user({"type": "input_audio", "input_audio": {}}), "messages[0].content[0].type"),
    (user({"type": "video_url", "video_url": {"url": "data:"}}), "messages[0].content[0]"),
    (user({"type": "text", "text": 7}), "messages[0].content[0].text"),
    (user({"type": "text", "text": "ok"}, image("http://127.0.0.1/a.png")), "messages[0].content[1]"),
    (user(image("file:///etc/passwd")), "messages[0].content[0]"),
    (user(image("/etc/passwd")), "messages[0].content[0]"),
    (user(image("ftp://a/b")), "messages[0].content[0]"),
    (user(image("data:image/png;base64,!!!!")), "messages[0].content[0]"),
    (user(image("data:image/png,abc")), "messages[0].content[0]"),
    (user(image(uri(b""))), "messages[0].content[0]"),
    (user(image(uri(b"not an image"))), "messages[0].content[0]"),
    (user(image(uri(IMAGE[:20]))), "messages[0].content[0]"),
    (user(image(uri(png((1000, 4))))), "messages[0].content[0]"),
    (user(image(None)), "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "q z " * CONTEXT}]}, "messages"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -3}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": CONTEXT}, "max_tokens"),
    ({"max_tokens": 10**15}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 10**30}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"n": 129}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": True}, "n"),
    ({"n": 0}, "n"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 257}, "stop"),
    ({"stop": ["a", 5]}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop": False}, "stop"),
    ({"min_tokens": -2}, "min_tokens"),
    ({"min_tokens": 1.5}, "min_tokens"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ({"min_tokens": CONTEXT}, "min_tokens"),
    ({"stop_token_ids": [10**9]}, "stop_token_ids"),
    ({"logprobs": 5}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 10**6}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream_options": 5}, "stream_options"),
    ({"return_token_ids": "yes"}, "return_token_ids"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"tools": {"type": "function"}}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [5], "tool_choice": "none"}, "tools[0]"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tool_choice": 5}, "tool_choice"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"response_format": {"type": "json_objects"}}, "response_format.type"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"logit_bias": {"red": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"5.0": 1}}, "logit_bias"),
    ({"logit_bias": {"": 1}}, "logit_bias"),
    ({"logit_bias": {str(VOCAB): 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 400: 1}}, "logit_bias"),
    ({"logit_bias": {"٥": 1}}, "logit_bias"),
    ({"logit_bias": {"5": "1"}}, "logit_bias"),
    ({"logit_bias": {"5": True}}, "logit_bias"),
    ({"logit_bias": {"5": None}}, "logit_bias"),
    ({"logit_bias": [5, 1]}, "logit_bias"),
    ({"logit_bias": False}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"presence_penalty": -2.1}, "presence_penalty"),
    ({"presence_penalty": "1"}, "presence_penalty"),
    ({"frequency_penalty": 2.1}, "frequency_penalty"),
    ({"frequency_penalty": False}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": -1}, "repetition_penalty"),
    ({"repetition_penalty": 10**9}, "repetition_penalty"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": 1.1}, "min_p"),
    ({"min_p": [0.5]}, "min_p"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
]


def check_error(reply, statuses=(400,)) -> dict:
    assert reply.status_code in statuses, reply.text
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    return error


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def client(backend):
    with serve(backend) as client:
        yield client


@pytest.mark.parametrize(("fields", "param"), FIELDS, ids=[f"{i}-{p}" for i, (_, p) in enumerate(FIELDS)])
def test_bad_fields(client, backend, fields, param):
    before = len(backend.handles)
    error = check_error(client.post(PATH, json={**ASK, **fields}))
    assert error["param"] == param
    assert len(backend.handles) == before
    assert client.post(PATH, json=ASK).status_code == 200


def test_messages_missing(client):
    assert check_error(client.post(PATH, json={}))["param"] == "messages"


def test_another_model(client):
    error = check_error(client.post(PATH, json={**ASK, "model": "gpt-4"}), (404,))
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def field(text: str) -> bytes:
    return b'{"messages": [{"role": "user", "content": "?"}], ' + text.encode() + b"}"


BODIES: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"{", None),
    (b"null", None),
    (b"[]", None),
    (b'"text"', None),
    (b"5", None),
    (b"{} {}", None),
    (b"{'a': 1}", None),
    (b"\xef\xbb\xbf\xef\xbb\xbf{}", None),
    (json.dumps(ASK).encode("utf-16"), None),
    (field('"user": "')[:-1] + b'\xff\xfe"}', None),
    (b"\x1f\x8b\x08\x00", None),
    (b"[" * 10**6, None),
    (b'{"a":' * 10**5, None),
    (field('"x": ' + "[" * 64 + "]" * 64), None),
    (field('"x": [' + "0," * 2**18 + "0]"), None),
    (field('"temperature": 1, "temperature": 2'), "temperature"),
    (field('"x": {"a": 1, "a": 1}'), "a"),
    (field('"temperature": NaN'), None),
    (field('"temperature": Infinity'), None),
    (field('"temperature": -Infinity'), None),
    (field('"temperature": 1e400'), "temperature"),
    (field('"unknown": [0, -1e400]'), "unknown[1]"),
    (field('"top_k": 1' + "0" * 400), "top_k"),
    (field('"top_k": 1' + "0" * 10000), "top_k"),
    (field('"x": [0.' + "0" * 10000 + "1]"), "x[0]"),
    (field('"x": {"y": 1e' + "0" * 10000 + "1}"), "x.y"),
    (field('"max_tokens": 18446744073709551616'), "max_tokens"),
    (field(r'"user": "a\u0000b"'), "user"),
    (field(r'"user": "\ud800"'), "user"),
    (field(r'"x": [{"y": "\udc00 "}]'), "x[0].y"),
    (field(r'"\ud800": 1'), "?"),
    (field('"user": "a\nb"'), None),
    (rb'{"messages": [{"role": "user", "content": "\ud83d"}]}', "messages[0].content"),
]


@pytest.mark.parametrize(("body", "param"), BODIES, ids=range(len(BODIES)))
def test_bad_json(client, body, param):
    error = check_error(client.post(PATH, content=body, headers={"content-type": "application/json"}))
    assert error["param"] == param
    assert client.post(PATH, json=ASK).status_code == 200


def test_depth_within_the_limit_is_fine(client):
    body = field('"x": ' + "[" * 63 + "]" * 63)
    assert client.post(PATH, content=body, headers={"content-type": "application/json"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_other_media_types(client, headers):
    check_error(client.post(PATH, content=json.dumps(ASK).encode(), headers=headers), (415,))


def test_a_charset_is_no_other_media_type(client):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post(PATH, content=json.dumps(ASK).encode(), headers=headers).status_code == 200


def test_a_message_shows_no_internals(client):
    """Libraries' texts, paths and addresses stay inside."""
    half = base64.b64encode(IMAGE[: len(IMAGE) // 2]).decode()
    for url in (uri(b"\x89PNG\r\n\x1a\n" + b"\0" * 50), f"data:;base64,{half}", uri(b"GIF89a")):
        reply = client.post(PATH, json=user(image(url)))
        assert not {"0x", "PIL", "/opt", "/usr", ".py", "Traceback", "BytesIO"} & set(reply.text.split())
        assert "0x" not in reply.text
        assert "PIL" not in reply.text
