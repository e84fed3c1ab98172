"""What stands before every route: request ids, CORS, whose requests are taken, and errors as envelopes."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3vl_disagg.core.errors import DisaggError, InputError
from qwen3vl_disagg.serving.access import OPEN_PATHS, ApiKeys
from qwen3vl_disagg.serving.body import ClientGone
from qwen3vl_disagg.serving.doors import Doors
from qwen3vl_disagg.serving.errors import error_response
from qwen3vl_disagg.serving.limits import MAX_HEADER_BYTES

logger = logging.getLogger(__name__)
REQUEST_ID, SALT = "request_id", "salt"
"""In a request's `state`: its id, and the salt of its key, empty or absent without keys."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def guards(doors: Doors | None, keys: ApiKeys | None) -> list[Middleware]:
    """Outermost first. Pages of allowed origins can read every answer, errors too, and ask first without a key."""
    cors = [] if doors is None or not doors.origins else [Middleware(Cors, doors=doors)]
    return [Middleware(RequestNames), *cors, Middleware(RequestGuard, doors=doors, keys=keys)]


class RequestNames:
    """Each response names its request: what the client calls it, or else a random id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})[REQUEST_ID] = request_id

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer["X-Request-ID"] = request_id
                if message["status"] >= 400 and "expect" in headers:
                    # Whether the body comes after all, nobody can know (RFC 9110, 10.1.1).
                    answer["Connection"] = "close"
            await send(message)

        await self._app(scope, receive, send_named)


class Cors(CORSMiddleware):
    """Starlette's, for the origins of `doors`; its refusals are envelopes. No cookies: keys are what counts."""

    def __init__(self, app: ASGIApp, doors: Doors) -> None:
        super().__init__(
            app,
            allow_origins=sorted(doors.origins),
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("X-Request-ID", "Retry-After"),
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
            scope["state"][SALT] = self._keys.salt_of(headers)


def _header_bytes(scope: Scope) -> int:
    target = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    return target + sum(len(name) + len(value) for name, value in scope["headers"])
