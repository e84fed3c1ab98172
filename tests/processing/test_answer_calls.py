"""Which objects are calls, and what may stand between the tags of one."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.processing.answer_calls import CallReader, read_call

cheap = settings(max_examples=10 * settings().max_examples)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def read(text: str) -> tuple[int, bool]:
    """How many characters are taken, and whether they are complete."""
    reader = CallReader()
    for n, char in enumerate(text):
        if reader.is_complete or not reader.take(char):
            return n, reader.is_complete
    return len(text), reader.is_complete


@cheap
@given(
    value=st.dictionaries(st.text(max_size=3), values, max_size=3),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    space=st.text(" \t\n\r", max_size=3),
    after=st.text(max_size=3),
)
def test_every_object_is_read_to_the_end_of_the_tag_and_no_further(value, indent, ascii_only, space, after):
    text = f"{space}{json.dumps(value, indent=indent, ensure_ascii=ascii_only)}{space}</tool_call>"
    assert read(text + after) == (len(text), True)


@cheap
@given(text=st.lists(st.sampled_from([*'{}[]":,\\ \n<0tx', "</tool_call>", '"a"']), max_size=8).map("".join))
def test_what_is_not_taken_begins_no_call(text):
    if read("{" + text)[1]:
        return
    with contextlib.suppress(ValueError):  # no JSON at all: then it begins none either
        _, end = json.JSONDecoder().raw_decode("{" + text)
        assert not text[end - 1 :].lstrip().startswith("</tool_call>")


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ('{"name": "f", "arguments": {"b": "<é>", "a": [1.5, null]}}', ("f", '{"b": "<é>", "a": [1.5, null]}')),
        ('{"arguments":{"a":1},"name":"f"}', ("f", '{"a": 1}')),
        (r'{"name": "f", "arguments": "{\"a\": 1}"}', ("f", '{"a": 1}')),
        ('{"name": "f"}', ("f", "{}")),
        ('{"name": "f", "arguments": null}', ("f", "{}")),
        ('{"name": "f", "arguments": ""}', ("f", "{}")),
        ('{"name": "f", "arguments": {"a": 1}, "id": 5}', ("f", '{"a": 1}')),
        ('{"name": "f", "parameters": {"a": 1}}', None),
        ('{"name": "f", "parameters": {"a": 1}, "arguments": null}', None),
        ('{"name": "f", "parameters": {"a": 1}, "arguments": ""}', None),
        ('{"name": "f", "id": 5}', None),
        ('{"name": "", "arguments": {}}', None),
        ('{"name": ["f"], "arguments": {}}', None),
        ('{"arguments": {}}', None),
        ('{"name": "f", "arguments": [1]}', None),
        ('{"name": "f", "arguments": "1"}', None),
        ('{"name": "f", "arguments": {"a": NaN}}', None),
        ('{"name": "f", "arguments": {"a": 1e999}}', None),
        (r'{"name": "f", "arguments": {"a": "\ud800"}}', None),
        ('{"name": "f", "arguments": {"a": ' + "1" * 400 + "}}", None),
        ('{"name": "f", "arguments": {"a": ' + "1" * 5000 + "}}", None),
        ('{"name": "f", "arguments": {"a": ' + "[" * 99999, None),
        ('{"name": "f", "arguments": {"a": ' + "[" * 70 + "]" * 70 + "}}", None),
        ('["f"]', None),
        ("", None),
        ("f(1)", None),
    ],
)
def test_what_is_a_call(text, call):
    found = read_call(text)
    assert (found and (found.name, found.arguments)) == call
    if call:
        json.dumps(json.loads(call[1])).encode()
