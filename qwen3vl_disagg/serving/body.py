"""What a request's body may take: of memory, all requests together, and in itself, as its headers say."""

from __future__ import annotations

import threading
from types import TracebackType

from starlette.datastructures import Headers

from qwen3vl_disagg.core.errors import InputError, OverloadedError
from qwen3vl_disagg.serving.limits import Limits


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
        raise too_large(limits)
    account.check_room(num_bytes)


def too_large(limits: Limits) -> InputError:
    return InputError(
        f"the body is larger than the limit of {limits.max_body_bytes} bytes", status=413, code="request_too_large"
    )
