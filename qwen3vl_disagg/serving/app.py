"""The HTTP application: routes, request ids, errors. Fields and shapes are OpenAI's, see docs/serving.md."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3vl_disagg.cluster.backend import Backend
from qwen3vl_disagg.core.errors import DisaggError, InputError
from qwen3vl_disagg.processing import Processor
from qwen3vl_disagg.serving.body import ClientGone
from qwen3vl_disagg.serving.chat import ChatCompletions
from qwen3vl_disagg.serving.doors import Doors
from qwen3vl_disagg.serving.errors import JSONResponse, envelope, error_response, on_http_exception
from qwen3vl_disagg.serving.limits import MAX_HEADER_BYTES, Limits
from qwen3vl_disagg.serving.types import Model, ModelList

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestGuard:
    """Around everything: each response names its request, no exception leaves without an envelope."""

    def __init__(self, app: ASGIApp, doors: Doors | None = None) -> None:
        self._app, self._doors = app, doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        started = False

        async def send_named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                answer = MutableHeaders(scope=message)
                answer["X-Request-ID"] = request_id
                if message["status"] >= 400 and "expect" in headers:
                    # Whether the body comes after all, nobody can know (RFC 9110, 10.1.1).
                    answer["Connection"] = "close"
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, receive, send_named)
        except ClientGone:
            logger.debug("request %s: the client left", request_id)
        except Exception as failure:
            if started:
                raise
            if not isinstance(failure, DisaggError):
                logger.exception("request %s failed", request_id)
            await error_response(failure)(scope, receive, send_named)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """InputError for a request that no route may see."""
        # The server bounds headers that are still coming; those that came in one piece are measured here.
        if _header_bytes(scope) > MAX_HEADER_BYTES:
            message = f"the headers are larger than the limit of {MAX_HEADER_BYTES} bytes"
            raise InputError(message, status=431, code="headers_too_large")
        if self._doors is not None:
            self._doors.check(scope["method"], headers)


def _header_bytes(scope: Scope) -> int:
    target = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    return target + sum(len(name) + len(value) for name, value in scope["headers"])


def create_app(
    backend: Backend,
    processor: Processor,
    *,
    model_name: str,
    limits: Limits | None = None,
    doors: Doors | None = None,
    debug: bool = False,
    warm_up: bool = False,
) -> Starlette:
    """The application over a backend. `doors`: whose requests it takes, anybody's without. `debug` opens GET
    /debug/processes. `warm_up`: be ready for large requests."""
    limits = limits or Limits()
    created = int(time.time())
    context = processor.config.text.max_position_embeddings

    async def models(request: Request) -> Response:
        return JSONResponse(ModelList(data=[Model(id=model_name, created=created, max_model_len=context)]))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        state = backend.readiness()
        status = "degraded" if state.ready and state.degraded else "ready" if state.ready else "not_ready"
        body = {"status": status, "ready": state.ready, "degraded": state.degraded, "reasons": state.reasons}
        if state.ready:
            return JSONResponse(body)
        reasons = "; ".join(state.reasons) or "starting"
        error = envelope(503, f"the server is not ready: {reasons}", code="unavailable").error
        return JSONResponse({"error": error, **body}, 503, {"Retry-After": "1"})

    async def processes(request: Request) -> Response:
        return JSONResponse({"processes": backend.debug_processes()})

    chat = ChatCompletions(backend, processor, model_name=model_name, limits=limits)
    if warm_up:
        chat.warm_up()
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
        Route("/ready", ready),
    ]
    if debug:
        routes.append(Route("/debug/processes", processes))
    app = Starlette(
        routes=routes,
        middleware=[Middleware(RequestGuard, doors=doors)],
        exception_handlers={HTTPException: on_http_exception},
    )
    app.router.redirect_slashes = False
    return app
