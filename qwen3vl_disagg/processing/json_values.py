"""Values of JSON and texts in requests: what is let in, and reading a text that holds JSON."""

from __future__ import annotations

import json
import math
from typing import Any

from qwen3vl_disagg.core.errors import InputError

MAX_DEPTH = 64
MAX_CHARS = 2**20
"""Of JSON within a text: values take many times the room of their text."""
MAX_INT = 2**64


def check_text(text: str, where: str) -> str:
    """The text, if it is well-formed Unicode without NUL."""
    if "\0" in text:
        raise InputError("text must not contain NUL", param=where)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("text must not contain lone surrogates", param=where) from None
    return text


def check_json(value: object, where: str, depth: int = 1) -> None:
    """InputError unless the value is plain JSON: keys are strings, numbers finite, at most MAX_DEPTH levels."""
    if isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, (dict, list)):
        if depth > MAX_DEPTH:
            raise InputError(f"nested deeper than {MAX_DEPTH} levels", param=where)
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise InputError("keys must be strings", param=where)
                check_text(key, where)
        for entry in value.values() if isinstance(value, dict) else value:
            check_json(entry, where, depth + 1)
    elif isinstance(value, (int, float)):
        if abs(value) >= MAX_INT if isinstance(value, int) else not math.isfinite(value):
            raise InputError("a number is too large", param=where)
    elif value is not None:
        raise InputError("must be JSON", param=where)


def is_json_object(text: str) -> bool:
    return isinstance(read_json(text), dict)


def read_json(text: str) -> Any:
    """The value that a text holds in JSON. None also if it holds none, is too long, or `check_json` refuses it."""
    if len(text) > MAX_CHARS:
        return None
    try:
        value = json.loads(text, parse_constant=_no_constant)
        check_json(value, "")
    except (ValueError, RecursionError):
        return None
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
