"""Which objects are calls, and what may stand between the tags of one."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.processing.answer_calls import CallReader, read_calls

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
        if reader.end or not reader.take(char):
            return n, bool(reader.end)
    return len(text), bool(reader.end)


@cheap
@given(
    value=st.dictionaries(st.text(max_size=3), values, max_size=3),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    space=st.text(" \t\n\r", max_size=3),
    after=st.text(max_size=3),
)
@example(value={"a": "x\ny\tz\r\0"}, indent=None, ascii_only=False, space="", after="")
def test_every_object_is_read_to_the_end_of_the_tag_and_no_further(value, indent, ascii_only, space, after):
    written = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    for end in ("</tool_call>", "<tool_call>", "{"):
        for form in (
            written,
            written.replace("\\n", "\n").replace("\\u0000", "\0").replace("\\t", "\t"),
            f"[{written}]",
        ):
            text = f"{space}{form}{space}{end}"
            assert read(text + after) == (len(text), True)


@cheap
@given(text=st.lists(st.sampled_from([*'{}[]":,\\ \n<0tx', "</tool_call>", '"a"']), max_size=8).map("".join))
def test_what_is_not_taken_begins_no_call(text):
    if read("{" + text)[1]:
        return
    with contextlib.suppress(ValueError):  # no JSON at all: then it begins none either
        _, end = json.JSONDecoder(strict=False).raw_decode("{" + text)
        assert not text[end - 1 :].lstrip(" \t\n\r").startswith(("</tool_call>", "<tool_call>", "{"))


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ('{"name": "f", "arguments": {"b": "<é>", "a": [1.5, null]}}', ("f", '{"b": "<é>", "a": [1.5, null]}')),
        ('{"arguments":{"a":1},"name":"f"}', ("f", '{"a":1}')),
        (r'{"name": "f", "arguments": "{\"a\": 1}"}', ("f", '{"a": 1}')),
        (r'{"name": "f", "arguments": "{\"a\": \"x\ny\"}"}', ("f", r'{"a": "x\ny"}')),
        ('{"name": "f"}', ("f", "{}")),
        ('{"name": "f", "arguments": null}', ("f", "{}")),
        ('{"name": "f", "arguments": ""}', ("f", "{}")),
        ('{"name": "f", "arguments": {"a": 1}, "id": 5}', ("f", '{"a": 1}')),
        ('{"name": "f", "parameters": {"a": 1}}', ("f", '{"a": 1}')),
        (r'{"name": "f", "parameters": "{\"a\": 1}"}', ("f", '{"a": 1}')),
        ('{"name": "f", "parameters": {"a": 1}, "arguments": null}', ("f", '{"a": 1}')),
        ('{"name": "f", "parameters": {"a": 1}, "arguments": ""}', ("f", '{"a": 1}')),
        ('{"name": "f", "parameters": {"a": 1}, "arguments": {"b": 2}}', ("f", '{"b": 2}')),
        ('{"name": "f", "arguments": {"a": "x\ny\tz\r\0\x1f"}}', ("f", r'{"a": "x\ny\tz\r\u0000\u001f"}')),
        ('{\n"name":\t"f",\r\n"arguments":\n{"a":\n1}}', ("f", '{"a":\n1}')),
        ('{"name": "f\ng", "arguments": {"k\n": "\\"\n\\\\"}}', ("f\ng", r'{"k\n": "\"\n\\"}')),
        ('{"name": "f", "arguments": {"a": "ls \\\n \\\\\n"}}', ("f", r'{"a": "ls \\\n \\\n"}')),
        ('{"name": "' + "f" * 300 + '", "arguments": {}}', ("f" * 300, "{}")),
        ('{"name": "f", "arguments": {"a": 1e999}}', ("f", '{"a": 1e999}')),
        ('{"name": "f", "arguments": {"a": ' + "1" * 5000 + "}}", ("f", '{"a": ' + "1" * 5000 + "}")),
        ('{"name": "f", "arguments": {"a": 1.10}}', ("f", '{"a": 1.10}')),
        ('{"name": "f", "arguments": {"a": ' + "[" * 70 + "]" * 70 + "}}", ("f", '{"a": ' + "[" * 70 + "]" * 70 + "}")),
        ('{"name": "f", "arguments": {"a": "' + "x" * (2**20 + 1) + '"}}', ("f", '{"a": "' + "x" * (2**20 + 1) + '"}')),
        ('{"name": "f", "id": 5}', None),
        ('{"name": "", "arguments": {}}', None),
        ('{"name": ["f"], "arguments": {}}', None),
        ('{"arguments": {}}', None),
        ('{"name": "f", "arguments": [1]}', None),
        ('{"name": "f", "arguments": "1"}', None),
        ('{"name": "f", "arguments": "hello"}', None),
        ('{"name": "f", "arguments": {"a": NaN}}', None),
        ('{"name": "f", "arguments": {"a": 1,}}', None),
        ("{'name': 'f'}", None),
        (r'{"name": "f", "arguments": {"a": "\x"}}', None),
        (r'{"name": "f", "arguments": {"a": "\ud800"}}', None),
        ('{"name": "f", "arguments": {"a": ' + "[" * 99999, None),
        ('{"name": "f", "arguments": {"a": ' + "[" * 99999 + "]" * 99999 + "}}", None),
        ('["f"]', None),
        ("[]", None),
        ("", None),
        ("f(1)", None),
    ],
)
def test_what_is_a_call(text, call):
    found = read_calls(text)
    assert [(call.name, call.arguments) for call in found] == ([call] if call else [])
    if call:
        json.loads(call[1], parse_int=str)
        call[1].encode()


def test_a_list_of_calls_is_all_or_nothing():
    assert [call.name for call in read_calls('[{"name": "f"}, {"name": "g", "arguments": {"a": 1}}]')] == ["f", "g"]
    assert read_calls('[{"name": "f"}, {"arguments": {}}]') == []
    assert read_calls('[{"name": "f"}, 5]') == []


@given(value=st.dictionaries(st.text(max_size=3), values, max_size=3), key=st.sampled_from(["arguments", "parameters"]))
def test_arguments_are_passed_on_as_they_are_written(value, key):
    for written in (json.dumps(value), json.dumps(value, ensure_ascii=False, separators=(",", ":"))):
        [call] = read_calls(f'{{"name": "f", "{key}": {written}}}')
        assert call.arguments == written
        [call] = read_calls(json.dumps({"name": "f", key: written}))
        assert call.arguments == written
