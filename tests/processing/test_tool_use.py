"""Tools and tool calls as clients send them: what is let in, and the place that an error names."""

from __future__ import annotations

import copy
import json

import pytest

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.processing import parse_tools
from qwen3vl_disagg.processing.messages import parse_messages
from tests.support.fake_backend import tiny_processor


def tool(**function) -> dict:
    return {"type": "function", "function": {"name": "f", **function}}


def call(**function) -> dict:
    return {"type": "function", "function": {"name": "f", "arguments": "{}", **function}}


def deep(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


def test_tools_are_kept_as_they_are():
    tools = [
        tool(),
        tool(name="A-b_9" * 12, description=None, parameters=None),
        tool(description="<|im_end|>", parameters={"b": {"type": ["é", 1.5, True, None]}, "a": 1}, strict=True),
        {"function": {"name": "g"}, "type": "function", "x": []},
    ]
    assert parse_tools(copy.deepcopy(tools)) == tools
    assert parse_tools([tool()] * 128) == [tool()] * 128


@pytest.mark.parametrize(
    ("tools", "param", "text"),
    [
        (None, "tools", "list"),
        ({"a": 1}, "tools", "list"),
        ([tool()] * 129, "tools", "limit is 128"),
        ([tool(), "f"], "tools[1]", "object"),
        ([{"function": {"name": "f"}}], "tools[0].type", "must be function"),
        ([{"type": "retrieval"}], "tools[0].type", "must be function"),
        ([{"type": "function"}], "tools[0].function", "object"),
        ([{"type": "function", "function": "f"}], "tools[0].function", "object"),
        ([tool(name=None)], "tools[0].function.name", "1 to 64"),
        ([tool(name="")], "tools[0].function.name", "1 to 64"),
        ([tool(name="f" * 65)], "tools[0].function.name", "1 to 64"),
        ([tool(name="f\n")], "tools[0].function.name", "1 to 64"),
        ([tool(name="é")], "tools[0].function.name", "1 to 64"),
        ([tool(name="<|im_end|>")], "tools[0].function.name", "1 to 64"),
        ([tool(description=5)], "tools[0].function.description", "string"),
        ([tool(parameters="{}")], "tools[0].function.parameters", "object"),
        ([tool(parameters=[])], "tools[0].function.parameters", "object"),
        ([tool(description="\ud800")], "tools[0].function.description", "surrogates"),
        ([tool(parameters={"a\0": 1})], "tools[0].function.parameters.a\0", "NUL"),
        ([tool(parameters={1: 1})], "tools[0].function.parameters[1]", "keys must be strings"),
        ([tool(parameters={"a": float("nan")})], "tools[0].function.parameters.a", "too large"),
        ([tool(parameters={"a": 10**400})], "tools[0].function.parameters.a", "too large"),
        ([tool(parameters={"a": {1, 2}})], "tools[0].function.parameters.a", "must be JSON"),
        ([tool(parameters={"a": deep(10_000)})], "tools[0]", "deeper than 64"),
    ],
)
def test_bad_tools_name_their_place(tools, param, text):
    with pytest.raises(InputError, match=text) as caught:
        parse_tools(tools)
    assert caught.value.param == param


@pytest.mark.parametrize("given", [None, "", {}])
def test_no_arguments_are_an_empty_object(given):
    [message], _ = parse_messages([{"role": "assistant", "content": "", "tool_calls": [call(arguments=given)]}])
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


@pytest.mark.parametrize(
    "given",
    ["{", "[]", '{"a": NaN}', "[" * 99999, "{}" + " " * 2**20, [1], 5, "no JSON at all", '{"a": "line\nbreak"}'],
)
def test_calls_that_were_made_badly_are_shown_as_they_were_made(given):
    """A model's slip must not end the conversation: clients send back what they got."""
    turn = {"role": "assistant", "content": None, "tool_calls": [{"id": "", **call(name="a b" * 99, arguments=given)}]}
    [message, _], _ = parse_messages([turn, {"role": "tool", "tool_call_id": "", "content": "no such tool"}])
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "a b" * 99, "arguments": given}}]
    pieces = tiny_processor().template.render([message])
    shown = given if isinstance(given, str) else json.dumps(given)
    assert any(shown in piece.text for piece in pieces)


ARGUMENTS = "messages[0].tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    ("message", "param", "text"),
    [
        ({"role": "user", "content": "?", "tool_calls": [call()]}, "messages[0].tool_calls", "assistant turns"),
        ({"role": "tool", "content": "?", "tool_calls": [call()]}, "messages[0].tool_calls", "assistant turns"),
        ({"role": "tool", "content": "?", "tool_call_id": 5}, "messages[0].tool_call_id", "string"),
        ({"role": "assistant", "tool_calls": [call()], "content": 0}, "messages[0].content", "content must be"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "messages[0].tool_calls", "list"),
        ({"role": "assistant", "tool_calls": [call()] * 1025}, "messages[0].tool_calls", "limit is 1024"),
        ({"role": "assistant", "tool_calls": [call(), "f"]}, "messages[0].tool_calls[1]", "object"),
        ({"role": "assistant", "tool_calls": [{"type": "x"}]}, "messages[0].tool_calls[0].type", "function"),
        ({"role": "assistant", "tool_calls": [{"function": 5}]}, "messages[0].tool_calls[0].function", "object"),
        ({"role": "assistant", "tool_calls": [call(name=None)]}, "messages[0].tool_calls[0].function.name", "string"),
        ({"role": "assistant", "tool_calls": [call(name="\0")]}, "messages[0].tool_calls[0].function.name", "NUL"),
        ({"role": "assistant", "tool_calls": [{"id": 5, **call()}]}, "messages[0].tool_calls[0].id", "string"),
        ({"role": "assistant", "tool_calls": [call(arguments={"a": float("nan")})]}, f"{ARGUMENTS}.a", "too large"),
        ({"role": "assistant", "tool_calls": [call(arguments="a\0")]}, ARGUMENTS, "NUL"),
        ({"role": "assistant", "tool_calls": [call(arguments={"a": deep(10_000)})]}, ARGUMENTS, "deeper than 64"),
        ({"role": "assistant", "tool_calls": [call(arguments={"a": "\ud800"})]}, f"{ARGUMENTS}.a", "surrogates"),
        ({"role": "assistant", "content": "", "reasoning_content": []}, "messages[0].reasoning_content", "string"),
        ({"role": "assistant", "content": "", "reasoning": "\0"}, "messages[0].reasoning", "NUL"),
    ],
)
def test_bad_turns_name_their_place(message, param, text):
    with pytest.raises(InputError, match=text) as caught:
        parse_messages([message])
    assert caught.value.param == param
