"""The calls of an answer: `<tool_call>`, `{"name": .., "arguments": {..}}`, `</tool_call>`."""

from __future__ import annotations

import json

import msgspec

from qwen3vl_disagg.processing.json_values import is_json_object, read_json
from qwen3vl_disagg.processing.tool_use import is_call_name

CALL, END_CALL = "<tool_call>", "</tool_call>"


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True):
    """`arguments`: a JSON object as a string."""

    name: str
    arguments: str


def read_call(text: str) -> FunctionCall | None:
    """What is between the tags: `{"name": .., "arguments": {..}}`. None if it is something else.

    A call without arguments has nothing beside its name: under another key they may be meant.
    """
    found = read_json(text)
    if not isinstance(found, dict):
        return None
    name, arguments = found.get("name"), found.get("arguments")
    if not isinstance(name, str) or not is_call_name(name):
        return None
    if arguments in (None, ""):
        if found.keys() - {"name", "arguments"}:
            return None
        arguments = {}
    if isinstance(arguments, dict):
        # In the form that the template gives it back to the model.
        return FunctionCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False))
    if isinstance(arguments, str) and is_json_object(arguments):
        return FunctionCall(name=name, arguments=arguments)
    return None


class CallReader:
    """Takes what follows `<tool_call>`, while an object in JSON and `</tool_call>` may still come of it.

    It looks at strings, brackets and single characters only, so what is complete may yet be no call. But a tag is
    taken only within a string. Hence of all the `<tool_call>` in a text at most two are read at any place, one that
    sees a string there and one that sees none: reading on behind each, once another failed, takes linear time.
    """

    _SPACE = frozenset(" \t\n\r")
    _OTHERS = frozenset('{}[]":,+-.0123456789eEtruefalsenull')

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._is_escaped = self._has_object = False
        self._num_matched = 0

    @property
    def is_complete(self) -> bool:
        return self._num_matched == len(END_CALL)

    def take(self, char: str) -> bool:
        """Take the next character; false if it cannot be there."""
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            else:
                self._is_escaped, self._in_string = char == "\\", char != '"'
            return char >= " "
        if char in self._SPACE:
            return self._num_matched == 0
        if self._has_object:
            matches = char == END_CALL[self._num_matched]
            self._num_matched += matches
            return matches
        if self._depth == 0:
            self._depth = 1
            return char == "{"
        if char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self._has_object = self._depth == 0
        elif char == '"':
            self._in_string = True
        return char in self._OTHERS
