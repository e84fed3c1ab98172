"""Random bodies: an answer or a 4xx, never a 500, and always an envelope."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.processing.request_fields import FIELDS as TABLE
from tests.support.fake_backend import PATH, FakeBackend, serve
from tests.support.images import png, uri

TEXT = st.text(max_size=20) | st.sampled_from(["user", "assistant", "system", "text", "<|image_pad|>", "\ud800", "\0"])
NUMBER = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 1e308, 10**400])
SCALAR = st.none() | st.booleans() | NUMBER | TEXT
VALUE = st.recursive(SCALAR, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=8)

URL = st.sampled_from([uri(png()), uri(png()[:30]), "data:", "data:;base64,", "http://a", "file:///a"]) | TEXT
PART = (
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXT | VALUE})
    | st.fixed_dictionaries(
        {"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": URL}) | URL | VALUE}
    )
    | st.fixed_dictionaries({"type": VALUE, "text": TEXT})
    | VALUE
)
FUNCTION = st.fixed_dictionaries(
    {"name": st.just("f") | TEXT | VALUE}, optional={"arguments": st.just("{}") | VALUE, "parameters": VALUE}
)
CALL = st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION | VALUE}, optional={"id": VALUE})
MESSAGE = (
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "user", "assistant", "system", "tool"]) | VALUE,
            "content": TEXT | st.lists(PART, max_size=3) | VALUE,
        },
        optional={"name": VALUE, "tool_calls": st.lists(CALL, max_size=2) | VALUE, "reasoning_content": TEXT | VALUE},
    )
    | VALUE
)
MESSAGES = st.lists(MESSAGE, max_size=3) | VALUE
GOOD = st.just([{"role": "user", "content": "?"}])
FIELD = st.deferred(lambda: VALUE | NUMBER | st.booleans() | BIAS | st.lists(CALL, max_size=2))
NAMES = [
    *("model", "temperature", "top_p", "top_k", "seed", "max_tokens", "max_completion_tokens", "logprobs"),
    *("top_logprobs", "stream", "stream_options", "return_token_ids", "ignore_eos", "user"),
    *(
        "tools",
        "tools",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "stop",
        "min_tokens",
    ),
]
_OWN = st.sampled_from(
    [
        *("instructions", "text", "include", "metadata", "max_output_tokens", "system"),
        "thinking",
        "output_config",
        "tools",
    ]
)
BIAS = st.dictionaries(st.integers(-2, 2**40).map(str) | TEXT, NUMBER, max_size=4)
FIELDS = st.dictionaries(st.sampled_from([*NAMES, *TABLE["request"]]) | TEXT, FIELD, max_size=4)


@pytest.fixture(scope="module")
def client():
    with serve(FakeBackend()) as client:
        yield client


def check(reply) -> None:
    assert reply.status_code == 200 or 400 <= reply.status_code < 500, reply.text
    if reply.status_code != 200:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@given(messages=GOOD | MESSAGES, fields=FIELDS)
def test_random_requests(client, messages, fields):
    body = json.dumps({"messages": messages, **fields})
    check(client.post(PATH, content=body.encode(), headers={"content-type": "application/json"}))


ITEM = (
    st.fixed_dictionaries(
        {"type": st.sampled_from(["message", "reasoning", "function_call", "function_call_output"]) | VALUE},
        optional={
            **{name: st.lists(PART, max_size=2) | TEXT | VALUE for name in ("content", "output", "summary")},
            **dict.fromkeys(("role", "call_id", "name", "arguments"), TEXT | VALUE),
        },
    )
    | MESSAGE
)
SOURCE = st.fixed_dictionaries({"type": st.sampled_from(["base64", "url"]), "data": TEXT, "url": URL}) | VALUE
INNER = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "thinking"]), "text": TEXT, "source": SOURCE},
    optional={"thinking": TEXT},
)
BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(["tool_use", "tool_result"])},
    optional={
        **dict.fromkeys(("id", "name", "tool_use_id"), TEXT | VALUE),
        "input": st.just({}) | VALUE,
        "content": TEXT | st.lists(INNER, max_size=2) | VALUE,
    },
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": TEXT | st.lists(INNER | BLOCK | VALUE, max_size=3)}
)
TOOLS = st.lists(st.fixed_dictionaries({"name": st.just("f") | TEXT}, optional={"type": VALUE, "input_schema": VALUE}))


@given(items=st.lists(ITEM, max_size=4) | VALUE, fields=FIELDS, own=st.dictionaries(_OWN, VALUE, max_size=3))
def test_random_items(client, items, fields, own):
    body = json.dumps({**fields, **own, "input": items})
    check(client.post("/v1/responses", content=body.encode(), headers={"content-type": "application/json"}))


@given(
    turns=st.lists(TURN, max_size=4) | VALUE, fields=FIELDS, own=st.dictionaries(_OWN, VALUE, max_size=3), tools=TOOLS
)
def test_random_blocks(client, turns, fields, own, tools):
    body = json.dumps({"max_tokens": 9, "tools": tools, **fields, **own, "messages": turns})
    check(client.post("/v1/messages", content=body.encode(), headers={"content-type": "application/json"}))


@given(body=st.binary(max_size=60) | VALUE.map(lambda value: json.dumps(value).encode()))
def test_random_bytes(client, body):
    check(client.post(PATH, content=body, headers={"content-type": "application/json"}))
