"""The calls of an answer: `<tool_call>`, `{"name": .., "arguments": {..}}`, `</tool_call>`.

Models leave the second tag away, write line breaks into strings, say `parameters`, or put several objects between two
tags. vLLM's `hermes` and SGLang's `qwen25` parsers take these for calls (vllm/parser/hermes.py,
sglang/srt/function_call/base_format_detector.py), and so does this one. No bound is set on size, depth or numbers:
arguments are passed on as they are written, as text, and never become values.
"""

from __future__ import annotations

import re

import msgspec

CALL, END_CALL = "<tool_call>", "</tool_call>"

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_WRITTEN = re.compile(r"\\[^\x00-\x1f]|\\?[\x00-\x1f]")
"""What JSON has for a character, or a raw control character, with the backslash before it that makes no escape."""
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_objects = msgspec.json.Decoder(dict[str, msgspec.Raw] | list[dict[str, msgspec.Raw]])


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True):
    """`arguments`: a JSON object as a string."""

    name: str
    arguments: str


def read_calls(text: str) -> list[FunctionCall]:
    """The calls of `{"name": .., "arguments": {..}}`, or of a list of such objects. Empty if it is something else.

    `arguments` may be a string that holds the object, and `parameters` stand in their place. A call without any has
    nothing beside its name: under another key they may be meant.
    """
    try:
        found = _objects.decode(_escaped(text))
        return [_call(entry) for entry in ([found] if isinstance(found, dict) else found)]
    except (ValueError, RecursionError):
        return []


def _call(fields: dict[str, msgspec.Raw]) -> FunctionCall:
    """ValueError if it is none."""
    name = msgspec.json.decode(fields.pop("name", b""), type=str)
    written = [bytes(fields.pop(key, b"")) for key in ("arguments", "parameters")]
    arguments = next((value for value in written if value not in (b"", b"null", b'""')), b"")
    if not name or (fields and not arguments):
        raise ValueError("no name, or no arguments")
    text = arguments.decode() or "{}"
    if text.startswith('"'):
        text = _escaped(msgspec.json.decode(text, type=str))
    _object.decode(text)
    return FunctionCall(name=name, arguments=text)


def _escaped(text: str) -> str:
    """JSON with the control characters that stand in its strings as JSON writes them."""
    return _STRING.sub(lambda string: _WRITTEN.sub(_escape, string[0]), text)


def _escape(written: re.Match[str]) -> str:
    text, char = written[0], written[0][-1]
    if char >= " ":
        return text
    return "\\\\" * (len(text) - 1) + _SHORT.get(char, f"\\u{ord(char):04x}")


class CallReader:
    """Takes what follows `<tool_call>`, while an object or a list in JSON, and what may be behind it, can come of it.

    Behind it stand white space and one of: `</tool_call>`, the next `<tool_call>`, the next object, the end of the
    answer. The reader looks at strings, brackets and single characters only, so what it takes may yet be no call.

    A tag is taken only within a string. Hence of all the `<tool_call>` in a text at most two are read at any place, one
    that sees a string there and one that sees none: reading on behind each, once another failed, takes linear time.
    """

    _SPACE = frozenset(" \t\n\r")
    _OTHERS = frozenset('{}[]":,+-.0123456789eEtruefalsenull')

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._is_escaped = False
        self.has_value = False
        """The object is whole."""
        self._behind = ""
        """Of the tag behind it: what has come."""

    @property
    def end(self) -> str:
        """What ended it: a tag, or the `{` of the next object. Empty while nothing did."""
        return self._behind if self._behind in (CALL, END_CALL, "{") else ""

    def take(self, char: str) -> bool:
        """Take the next character; false if it cannot be there."""
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            else:
                self._is_escaped, self._in_string = char == "\\", char != '"'
            return True
        if char in self._SPACE:
            return not self._behind
        if self.has_value:
            self._behind += char
            return self._behind == "{" or any(tag.startswith(self._behind) for tag in (CALL, END_CALL))
        if self._depth == 0:
            self._depth = 1
            return char in "{["
        if char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.has_value = self._depth == 0
        elif char == '"':
            self._in_string = True
        return char in self._OTHERS
