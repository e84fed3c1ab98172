"""A body -> JSON, read more strictly than it asks for."""

from __future__ import annotations

import json
import math
from typing import Any

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.json_text import GivenTwice, unique
from qwen3vl_disagg.processing.json_values import check_json, too_deep

# Objects, lists and their entries: each costs tens of bytes once parsed, whatever it took on the wire.
MAX_VALUES = 2**18
MAX_INT_CHARS = 21
"""Of a whole number below MAX_INT, with its sign."""
MAX_FLOAT_CHARS = 1024


def parse_json(body: bytes | bytearray) -> dict[str, Any]:
    """A JSON object as Python values.

    InputError for anything that is not one, for NaN, infinite and very large numbers, keys that occur twice, depth
    over MAX_DEPTH, too many values, bytes that are not UTF-8, NUL and lone surrogates; `param` names the place. A byte
    order mark is skipped.
    """
    if num_values(body) > MAX_VALUES:
        raise InputError(f"the body has more than {MAX_VALUES} values", code="invalid_json")
    try:
        value = json.loads(
            body.decode("utf-8-sig"),
            object_pairs_hook=unique,
            parse_constant=_constant,
            parse_int=_whole,
            parse_float=_number,
        )
    except GivenTwice as error:
        raise InputError("a key occurs twice in one object", param=error.name, code="invalid_json") from None
    except UnicodeDecodeError:
        raise InputError("the body is not valid UTF-8", code="invalid_json") from None
    except RecursionError:
        raise too_deep() from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"the body is not valid JSON ({place})", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InputError("the body must be a JSON object", code="invalid_json")
    check_json(value)
    return value


def _whole(digits: str) -> int | float:
    """Converting takes quadratic time in the digits: what has too many is infinite, and refused where it stands."""
    return int(digits) if len(digits) <= MAX_INT_CHARS else math.inf


def _number(digits: str) -> float:
    return float(digits) if len(digits) <= MAX_FLOAT_CHARS else math.inf


def num_values(body: bytes | bytearray) -> int:
    """At most so many objects, lists and entries are in it."""
    return sum(body.count(sign) for sign in (b"[", b"{", b","))


def _constant(name: str) -> None:
    raise InputError(f"{name} is not JSON", code="invalid_json")
