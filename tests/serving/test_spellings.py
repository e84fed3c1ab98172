"""What well-behaved clients send is served, in each of their spellings, and means what they mean."""

from __future__ import annotations

import base64
import json

import pytest

from tests.support.fake_backend import ASK, PATH, FakeBackend, serve, tiny_processor
from tests.support.images import png, uri

IMAGE = uri(png())
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}


def ids(messages: list, **fields) -> list[int]:
    backend = FakeBackend()
    reply = serve(backend).post(PATH, json={"messages": messages, **fields})
    assert reply.status_code == 200, reply.text
    return backend.handles[0].prompt.token_ids


def user(*parts) -> list:
    return [{"role": "user", "content": list(parts)}]


def call(**fields) -> dict:
    return {"type": "function", "function": {"name": "f", "arguments": "{}"}, **fields}


TEXT, PICTURE = {"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": IMAGE}}
THEN = {"role": "user", "content": "and?"}


@pytest.mark.parametrize(
    ("messages", "plain"),
    [
        ([{"role": "developer", "content": "be short"}, THEN], [{"role": "system", "content": "be short"}, THEN]),
        *(
            (
                [{"role": "user", "content": "?"}, {"role": "assistant", **nothing}, THEN],
                [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}, THEN],
            )
            for nothing in ({"content": None}, {}, {"content": []}, {"content": None, "tool_calls": None})
        ),
        (
            [{"role": "assistant", "content": None, "tool_calls": []}, THEN],
            [{"role": "assistant", "content": ""}, THEN],
        ),
        (user("what is it?"), user(TEXT)),
        (user("what is it?", PICTURE), user(TEXT, PICTURE)),
        (user({"type": "input_text", "text": "what is it?"}), user(TEXT)),
        (user({"text": "what is it?"}), user(TEXT)),
        (
            [{"role": "assistant", "content": [{"type": "output_text", "text": "it"}]}, THEN],
            [{"role": "assistant", "content": "it"}, THEN],
        ),
        (
            [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "refusal": "no"}, THEN],
            [{"role": "assistant", "content": "no"}, THEN],
        ),
        *(
            (user(part, TEXT), user(PICTURE, TEXT))
            for part in (
                {"type": "input_image", "image_url": IMAGE, "detail": "auto"},
                {"type": "input_image", "image_url": {"url": IMAGE}},
                {"type": "image", "image": IMAGE},
                {"type": "image", "image": {"url": IMAGE}},
                {"type": "image", "url": IMAGE},
                {"type": "image", "base64": IMAGE.partition(",")[2], "mime_type": "image/png"},
                {"type": "image", "source_type": "base64", "data": IMAGE.partition(",")[2]},
                {"type": "image_url", "image_url": IMAGE, "uuid": "x", "cache_control": {"type": "ephemeral"}},
                {"image": IMAGE},
                {"image_url": {"url": IMAGE}},
            )
        ),
        (
            [
                {"role": "user", "content": "?"},
                {"role": "assistant", "tool_calls": [call(id="")]},
                {"role": "tool", "tool_call_id": "", "content": "1"},
            ],
            [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": "", "tool_calls": [call()]},
                {"role": "tool", "content": "1"},
            ],
        ),
        *(
            (
                [
                    {"role": "user", "content": "?"},
                    {"role": "assistant", "tool_calls": [call()]},
                    {"role": "tool", **nothing},
                ],
                [
                    {"role": "user", "content": "?"},
                    {"role": "assistant", "tool_calls": [call()]},
                    {"role": "tool", "content": ""},
                ],
            )
            for nothing in ({"content": None}, {}, {"content": []})
        ),
        ([{"role": "user", "content": "?", "name": "me", "id": "m1"}], [{"role": "user", "content": "?"}]),
    ],
)
def test_messages_in_other_spellings(messages, plain):
    assert ids(messages) == ids(plain)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"seed": -1}, {"seed": None}),
        ({"seed": -7}, {"seed": 2**63 - 7}),
        ({"seed": None}, {"seed": None}),
        ({"max_tokens": None}, {"is_open_ended": True}),
        ({"max_tokens": -1}, {"is_open_ended": True}),
        ({"max_completion_tokens": None, "max_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": 5.0, "top_k": 40.0, "seed": 3.0}, {"max_new_tokens": 5, "top_k": 40, "seed": 3}),
        ({"top_k": -1.0, "seed": -1.0, "max_tokens": -1.0}, {"top_k": 0, "seed": None, "is_open_ended": True}),
        ({"top_p": 0}, {"top_p": 1e-6}),
        ({"n_predict": 5}, {"max_new_tokens": 5}),
        ({"stop": None}, {"stop": []}),
        ({"stop": []}, {"stop": []}),
        ({"min_tokens": None}, {"min_tokens": 0}),
        ({"temperature": None, "top_p": None, "min_p": None}, {"temperature": 0.0}),
        ({"repeat_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"logprobs": None, "top_logprobs": 0}, {"logprobs": None}),
        ({"top_logprobs": 0}, {"logprobs": None}),
        ({"logprobs": False, "top_logprobs": 0}, {"logprobs": None}),
        ({"logit_bias": None}, {"logit_bias": {}}),
        ({"stream_options": {"include_usage": True}}, {}),
        ({"stream": False, "stream_options": {"include_usage": True}}, {}),
        ({"tools": None, "tool_choice": None, "parallel_tool_calls": None}, {}),
        ({"tools": [], "tool_choice": "auto"}, {}),
        ({"response_format": None, "n": None, "user": None, "model": None}, {}),
    ],
)
def test_values_that_say_not_set(fields, expected):
    backend = FakeBackend()
    reply = serve(backend).post(PATH, json={**ASK, **fields})
    assert reply.status_code == 200, reply.text
    sampling = backend.handles[0].sampling
    assert {name: getattr(sampling, name) for name in expected} == expected


def test_a_byte_order_mark():
    body = b"\xef\xbb\xbf" + json.dumps(ASK).encode()
    reply = serve(FakeBackend()).post(PATH, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 200


def test_base64_in_lines():
    lines = base64.encodebytes(png()).decode()
    assert ids(user({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{lines}"}})) == ids(
        user(PICTURE)
    )


def test_many_pictures():
    assert ids(user(*[PICTURE] * 40)).count(tiny_processor().config.image_token_id) == 40 * 16


def test_one_bad_call_does_not_end_a_conversation():
    """A model wrote JSON that is none: the client answers with the error, and the model may try again."""
    history = [
        {"role": "user", "content": "?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "no such tool!", "arguments": '{"a": '}}
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "not valid JSON"},
    ]
    text = tiny_processor().tokenizer.decode(ids(history, tools=[FUNCTION]))
    assert '{"name": "no such tool!", "arguments": {"a": }' in text


def test_a_system_turn_later_on_is_the_templates_affair():
    turns = [{"role": "system", "content": "alpha"}, THEN, {"role": "developer", "content": "omega"}, THEN]
    assert ids(turns) == ids([turns[0], THEN, THEN]), "the published template for Instruct leaves it out"


def test_the_last_answer_is_continued():
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "It is a <|im_end|> red "}]
    continued = ids(turns, continue_final_message=True)
    whole = ids(turns, add_generation_prompt=False)
    tokenizer = tiny_processor().tokenizer
    assert tokenizer.decode(continued).endswith("It is a <|im_end|> red ")
    assert whole[: len(continued) - 1] == continued[:-1]
    assert continued[-1] != tokenizer.token_id("<|im_end|>")
    parts = [turns[0], {"role": "assistant", "content": [{"type": "text", "text": turns[1]["content"]}]}]
    assert ids(parts, continue_final_message=True) == continued
    seen = ids([*user(PICTURE, TEXT), turns[1]], continue_final_message=True)
    assert seen.count(tiny_processor().config.image_token_id) == 16
    assert tokenizer.decode(seen).endswith("It is a <|im_end|> red ")
    for bad, fields in ((turns[:1], {}), (turns, {"add_generation_prompt": True})):
        reply = serve(FakeBackend()).post(PATH, json={"messages": bad, "continue_final_message": True, **fields})
        assert reply.status_code == 400
