"""What stands before every route: request ids, a line in the log, CORS, whose requests are taken, and errors as
envelopes."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Iterable
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3vl_disagg.core.errors import DisaggError, InputError
from qwen3vl_disagg.core.logs import say
from qwen3vl_disagg.serving.access import OPEN_PATHS, ApiKeys
from qwen3vl_disagg.serving.body import ClientGone
from qwen3vl_disagg.serving.doors import Doors
from qwen3vl_disagg.serving.errors import error_response
from qwen3vl_disagg.serving.http_words import EVENT, WORDS, HttpWords
from qwen3vl_disagg.serving.limits import MAX_HEADER_BYTES
from qwen3vl_disagg.serving.metrics import METRICS_PATH, Metrics
from qwen3vl_disagg.serving.trace import LIVE_DATA_PATH
from qwen3vl_disagg.serving.watching import Seen

logger = logging.getLogger(__name__)
REQUEST_ID, SALT, SEEN = "request_id", "salt", "seen"
"""In a request's `state`: its id, the salt of its key, empty or absent without keys, and what is seen of it."""
QUIET_PATHS = (*OPEN_PATHS, METRICS_PATH, LIVE_DATA_PATH)
"""Asked for by machines, again and again: no lines."""
MAX_LINES = 100
"""Of the log in a second for requests that no rank has heard of: anybody can send such."""
LEFT = 499
"""The status of a request whose client left before the answer began."""
MAX_METHOD, MAX_PATH = 20, 200
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def guards(doors: Doors | None, keys: ApiKeys | None, metrics: Metrics, paths: Iterable[str]) -> list[Middleware]:
    """Outermost first. Pages of allowed origins can read every answer, errors too, and ask first without a key.
    `paths`: of the routes."""
    cors = [] if doors is None or not doors.origins else [Middleware(Cors, doors=doors)]
    names = Middleware(RequestNames, metrics=metrics, paths=frozenset(paths))
    return [names, *cors, Middleware(RequestGuard, doors=doors, keys=keys)]


class RequestNames:
    """Each response names its request: what the client calls it, or else a random id. When it is whole, or the client
    has left, it is counted and has its line in the log."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths
        self._second, self._num_lines, self._num_left_out = 0, 0, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        started, status, seen = time.monotonic(), 0, Seen()
        scope.setdefault("state", {}).update({REQUEST_ID: request_id, SEEN: seen})
        words: HttpWords | None = scope["state"].get(WORDS)

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["X-Request-ID"] = request_id
                if message["status"] >= 400 and "expect" in headers:
                    # Whether the body comes after all, nobody can know (RFC 9110, 10.1.1).
                    answer["Connection"] = "close"
            if words is not None:
                words.answer(message, scope["http_version"])
            else:
                message.pop(EVENT, None)
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.answered(path, status or LEFT)
            if path not in QUIET_PATHS and (seen.ids or self._may_say()):
                fields = {
                    "request_id": request_id,
                    "method": scope["method"][:MAX_METHOD],
                    "path": _visible(scope["path"]),
                }
                fields |= {"status": status or LEFT, "seconds": round(time.monotonic() - started, 4), **seen.fields()}
                say("request", fields)

    def _may_say(self) -> bool:
        """Whether there is room for a line; says how many had none."""
        second = int(time.monotonic())
        if second != self._second:
            if self._num_left_out:
                logger.warning("%d requests more than the log has room for", self._num_left_out)
            self._second, self._num_lines, self._num_left_out = second, 0, 0
        self._num_lines += 1
        self._num_left_out += self._num_lines > MAX_LINES
        return self._num_lines <= MAX_LINES


class Cors(CORSMiddleware):
    """Starlette's, for the origins of `doors`; its refusals are envelopes. No cookies: keys are what counts."""

    def __init__(self, app: ASGIApp, doors: Doors) -> None:
        super().__init__(
            app,
            allow_origins=sorted(doors.origins),
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("X-Request-ID", "Retry-After", "Idempotent-Replayed"),
            allow_private_network=True,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        message = "pages of this origin may not send such a request (see the server's option --allow-origin)"
        refusal = error_response(InputError(message, status=403, code="origin_not_allowed"))
        refusal.headers["Vary"] = response.headers["Vary"]
        return refusal


class RequestGuard:
    """Refuses what no route may see; no exception leaves without an envelope."""

    def __init__(self, app: ASGIApp, doors: Doors | None = None, keys: ApiKeys | None = None) -> None:
        self._app, self._doors, self._keys = app, doors, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, request_id = False, scope["state"][REQUEST_ID]

        async def send_noted(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            self._check(scope, Headers(scope=scope))
            await self._app(scope, receive, send_noted)
        except ClientGone:
            logger.debug("request %s: the client left", request_id)
        except Exception as failure:
            if started:
                raise
            if not isinstance(failure, DisaggError):
                logger.exception("request %s failed", request_id)
            await error_response(failure, scope["path"])(scope, receive, send_noted)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """InputError for a request that no route may see."""
        # The server bounds headers that are still coming; those that came in one piece are measured here.
        if _header_bytes(scope) > MAX_HEADER_BYTES:
            message = f"the headers are larger than the limit of {MAX_HEADER_BYTES} bytes"
            raise InputError(message, status=431, code="headers_too_large")
        if self._doors is not None:
            self._doors.check(scope["method"], headers)
        if self._keys is not None and scope["path"] not in OPEN_PATHS:
            salt = scope["state"][SALT] = self._keys.salt_of(headers)
            scope["state"][SEEN].key = self._keys.number_of(salt)


def _visible(path: str) -> str:
    """As a client may spell it there are blanks, lines and colours in it."""
    return quote(path[:MAX_PATH])


def _header_bytes(scope: Scope) -> int:
    target = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    return target + sum(len(name) + len(value) for name, value in scope["headers"])
