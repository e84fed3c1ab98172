"""Values of JSON and texts, of request bodies and of callers in Python: what is let in."""

from __future__ import annotations

import math

from qwen3vl_disagg.core.errors import InputError

MAX_DEPTH = 64
MAX_INT = 2**64


class _Bad(Exception):
    """A bad value; its path is put together on the way out, so that good ones cost nothing."""

    def __init__(self, message: str) -> None:
        self.message = message
        self.path: list[str] = []


class _TooDeep(Exception):
    pass


def _problem(text: str) -> str:
    """Empty if it is well-formed Unicode without NUL."""
    if "\0" in text:
        return "text must not contain NUL"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "text must not contain lone surrogates"
    return ""


def check_text(text: str, where: str) -> str:
    """The text, if it is well-formed Unicode without NUL."""
    if problem := _problem(text):
        raise InputError(problem, param=where)
    return text


def too_deep(where: str | None = None) -> InputError:
    return InputError(f"nested deeper than {MAX_DEPTH} levels", param=where, code="invalid_json")


def check_json(value: object, where: str = "") -> None:
    """InputError naming the place, below `where`, unless the value is plain JSON: keys are strings, texts as
    `check_text` has them, numbers finite and below MAX_INT, at most MAX_DEPTH levels."""
    try:
        _check(value, 1)
    except _TooDeep:
        raise too_deep(where or None) from None
    except _Bad as bad:
        param = (where + "".join(reversed(bad.path))).lstrip(".")
        raise InputError(bad.message, param=param or None) from None


def _check(value: object, depth: int) -> None:
    if isinstance(value, str):
        if problem := _problem(value):
            raise _Bad(problem)
    elif isinstance(value, (int, float)):
        if abs(value) >= MAX_INT if isinstance(value, int) else not math.isfinite(value):
            raise _Bad("the number is too large, or too long")
    elif isinstance(value, (dict, list)):
        if depth > MAX_DEPTH:
            raise _TooDeep
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            try:
                if isinstance(value, dict):
                    if not isinstance(key, str):
                        raise _Bad("keys must be strings")
                    _check(key, depth)
                _check(entry, depth + 1)
            except _Bad as bad:
                bad.path.append(f".{key[:64]}" if isinstance(key, str) else f"[{key}]")
                raise
    elif value is not None:
        raise _Bad("must be JSON")
