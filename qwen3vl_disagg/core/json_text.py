"""JSON that others wrote, and JSON that is read line by line."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import msgspec

_MAX_SHOWN = 100


_LINE_BREAKS = [(char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\x85\u2028\u2029"]


def json_line(value: object) -> bytes:
    """The value in JSON, without what any reader takes for the end of a line.

    JSON lets U+0085, U+2028 and U+2029 stand in a string as they are, and `str.splitlines`, `httpx.iter_lines`,
    `requests.iter_lines` and Node's readline break lines there; the others of that kind it escapes by itself.
    """
    line = msgspec.json.encode(value)
    for raw, escaped in _LINE_BREAKS:
        line = line.replace(raw, escaped)
    return line


def shown(value: object) -> str:
    """A value from there, for a message: its beginning where it is long."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}.."


class GivenTwice(ValueError):
    """A name occurs twice in one object."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{shown(name)} is given twice")
        self.name = name


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its pairs, for `json.loads`; GivenTwice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise GivenTwice(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return values


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_json(data: bytes, *, is_strict: bool = False) -> Any:
    """JSON in UTF-8; ValueError for anything else, a name given twice, or nesting too deep to parse.

    `is_strict`: NaN and infinity are refused, too; config files have them.
    """
    try:
        constant = _refuse if is_strict else None
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
