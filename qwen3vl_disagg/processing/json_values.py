"""Values of JSON and texts in requests: what is let in, and reading a text that holds JSON."""

from __future__ import annotations

import math

from qwen3vl_disagg.core.errors import InputError

MAX_DEPTH = 64
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
