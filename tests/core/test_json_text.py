"""JSON that others wrote: read, or refused by ValueError and nothing else."""

import pytest

from qwen3vl_disagg.core.json_text import parse_json


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
