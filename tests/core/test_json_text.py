"""JSON that others wrote: read, or refused by ValueError and nothing else. JSON that is read by lines: one line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.json_text import json_line, parse_json


def test_read():
    assert parse_json('{"a": [1, "\u00e9"]}'.encode()) == {"a": [1, "\u00e9"]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Expecting value"),
        (b"\xff", "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' is given twice"),
        (b"9" * 5000, "integer string conversion"),
    ],
)
def test_refused(data, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(data)


@given(st.text() | st.text('\x0a\x0b\x0c\x0d\x1c\x1d\x1e\x85\u2028\u2029\\"a'))
def test_no_reader_of_lines_cuts_a_json_line(text):
    line = json_line({text: [text]})
    assert len(line.decode().splitlines()) == len(line.splitlines()) == 1
    assert json.loads(line) == {text: [text]}
