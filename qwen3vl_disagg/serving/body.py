"""Request bodies: read under limits, then parsed more strictly than JSON asks for."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from types import TracebackType
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive

from qwen3vl_disagg.core.errors import InputError, OverloadedError
from qwen3vl_disagg.core.json_text import GivenTwice, unique
from qwen3vl_disagg.processing.json_values import check_json, too_deep
from qwen3vl_disagg.serving.limits import Limits

# Objects, lists and their entries: each costs tens of bytes once parsed, whatever it took on the wire.
MAX_VALUES = 2**18
MAX_INT_CHARS = 21
"""Of a whole number below MAX_INT, with its sign."""
MAX_FLOAT_CHARS = 1024


class ClientGone(Exception):
    """The client closed the connection: nobody waits for an answer."""


class BodyBudget:
    """Bytes of request bodies in memory, all requests together."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self.lock = threading.Lock()


class BodyAccount:
    """One request's share of the budget; given back when the block is left, or earlier by `release`, but not before
    all who `hold` the body have let it go. Thread-safe."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget, self._taken = budget, 0
        self._num_holders, self._is_released = 0, False

    def check_room(self, num_bytes: int) -> None:
        """OverloadedError if that is more than is left."""
        if self._budget.used + num_bytes > self._budget.limit:
            raise OverloadedError("too many large requests at once")

    def take(self, num_bytes: int) -> None:
        """OverloadedError if that is more than is left."""
        with self._budget.lock:
            self.check_room(num_bytes)
            self._budget.used += num_bytes
            self._taken += num_bytes

    def hold(self) -> None:
        with self._budget.lock:
            self._num_holders += 1

    def let_go(self) -> None:
        with self._budget.lock:
            self._num_holders -= 1
            self._give_back()

    def release(self) -> None:
        with self._budget.lock:
            self._is_released = True
            self._give_back()

    def _give_back(self) -> None:
        if self._is_released and not self._num_holders:
            self._budget.used -= self._taken
            self._taken = 0

    def __enter__(self) -> BodyAccount:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


def check_headers(headers: Headers, limits: Limits, account: BodyAccount) -> None:
    """What can be said of a body before any of it has come.

    InputError 413 (too large), 415 (not plain JSON, or not said to be); OverloadedError.
    """
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise InputError("Content-Type must be application/json", status=415, code="unsupported_media_type")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise InputError("Content-Encoding is not supported", status=415, code="unsupported_encoding")
    length = headers.get("content-length", "0")
    num_bytes = int(length[:20]) if length.isdecimal() else 0
    if num_bytes > limits.max_body_bytes:
        raise _too_large(limits)
    account.check_room(num_bytes)


async def read_body(receive: Receive, limits: Limits, account: BodyAccount) -> bytearray:
    """The whole body. The limit holds while it comes, whether or not its length was declared.

    InputError 408 (too slow), 413 (too large); OverloadedError; ClientGone.
    """
    body, is_whole = bytearray(), False
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            while not is_whole:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk, is_whole = message.get("body", b""), not message.get("more_body", False)
                if len(body) + len(chunk) > limits.max_body_bytes:
                    raise _too_large(limits)
                account.take(len(chunk))
                body += chunk
    except TimeoutError:
        raise InputError("the body came too slowly", status=408, code="body_timeout") from None
    return body


def _too_large(limits: Limits) -> InputError:
    return InputError(
        f"the body is larger than the limit of {limits.max_body_bytes} bytes", status=413, code="request_too_large"
    )


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
