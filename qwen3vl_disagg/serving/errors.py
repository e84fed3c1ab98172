"""Errors -> HTTP: one table of statuses, one envelope."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from typing import Any, Self, TypeVar, cast

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from qwen3vl_disagg.core.errors import MAX_RETRY_S, MIN_RETRY_S, Failure, TransferError, UnavailableError

T = TypeVar("T")
_TRANSFER = "the embeddings of an image or clip could not be transferred; try again"
"""A failed transfer has been tried again on every rank there was: an outage. Its message may name hosts and ranks."""

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_MESSAGES_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
MESSAGES_PATH = "/v1/messages"
_HTTP_MESSAGES = {
    404: ("there is nothing at this path", "not_found"),
    405: ("this path does not take this method", "method_not_allowed"),
}
_MAX_MESSAGE = 1000


class ErrorBody(msgspec.Struct, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(msgspec.Struct):
    error: ErrorBody


class MessagesErrorBody(msgspec.Struct, kw_only=True):
    type: str
    message: str
    param: str | None
    code: str | None


class MessagesError(msgspec.Struct, tag_field="type", tag="error"):
    """Anthropic's envelope, of errors of its routes."""

    error: MessagesErrorBody


class JSONResponse(Response):
    """A msgspec value as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)

    @classmethod
    async def aside(cls, make: Callable[[], object]) -> Self:
        """Of what `make` makes, both on a thread: up to seconds of work, which others need not wait for."""
        return await asyncio.to_thread(lambda: cls(make()))


def encoded(value: T) -> T:
    """Its JSON, to stand in its place in a larger value: one call for all of that would keep the interpreter's lock."""
    return cast(T, msgspec.Raw(msgspec.json.encode(value)))


def clean(text: str) -> str:
    """Text that can be encoded and is not long: parts of it may come from the client."""
    text = text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "..."
    return text.encode("utf-8", "replace").decode()


def envelope(status: int, message: str, *, param: str | None = None, code: str | None = None) -> ErrorEnvelope:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = ErrorBody(message=clean(message), type=kind, param=None if param is None else clean(param), code=code)
    return ErrorEnvelope(body)


def interrupted() -> UnavailableError:
    """What clients are told in place of a frontend that has died."""
    reason = "the server's frontend was started again while this request was under way; ask again"
    return UnavailableError(reason, code="interrupted")


def describe(error: Exception) -> tuple[int, ErrorEnvelope, dict[str, str]]:
    """Status, envelope and headers of an error. Only what was meant for the client gets into the envelope."""
    failure = Failure.of(error)
    status, headers = failure.status, dict[str, str]()
    if status in (408, 413, 431):  # a part of the request may be unread: the connection can carry no other
        headers["Connection"] = "close"
    elif status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    elif status in (429, 503):
        headers["Retry-After"] = _retry_after(getattr(error, "retry_after", MIN_RETRY_S))
    message = _TRANSFER if isinstance(error, TransferError) else failure.message
    return status, envelope(status, message, param=failure.param, code=failure.code), headers


def _retry_after(seconds: float) -> str:
    """Not the same for everybody: those who were refused together should not come back together."""
    return str(math.ceil(min(max(seconds * random.uniform(1.0, 1.2), MIN_RETRY_S), MAX_RETRY_S)))


def messages_error(status: int, body: ErrorEnvelope) -> MessagesError:
    """The same in Anthropic's form, with its names."""
    kind = _MESSAGES_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    error = body.error
    return MessagesError(MessagesErrorBody(type=kind, message=error.message, param=error.param, code=error.code))


def _formed(status: int, body: ErrorEnvelope, path: str) -> ErrorEnvelope | MessagesError:
    return messages_error(status, body) if is_messages_path(path) else body


def is_messages_path(path: str) -> bool:
    """Whether the path belongs to Anthropic's API."""
    return path == MESSAGES_PATH or path.startswith(MESSAGES_PATH + "/")


def error_response(error: Exception, path: str = "") -> JSONResponse:
    """In the form of the API that the path belongs to."""
    status, body, headers = describe(error)
    return JSONResponse(_formed(status, body, path), status, headers)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own errors: no route, wrong method."""
    if not isinstance(error, HTTPException):
        return error_response(error, request.url.path)
    message, code = _HTTP_MESSAGES.get(error.status_code, ("the request was refused", "refused"))
    body = _formed(error.status_code, envelope(error.status_code, message, code=code), request.url.path)
    return JSONResponse(body, error.status_code, dict(error.headers or {}))
