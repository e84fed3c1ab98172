"""The HTTP application: routes. Fields and shapes are OpenAI's, see docs/serving.md."""

from __future__ import annotations

import time

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from qwen3vl_disagg.cluster.backend import Backend
from qwen3vl_disagg.processing import Processor
from qwen3vl_disagg.serving.access import ApiKeys
from qwen3vl_disagg.serving.chat import ChatCompletions
from qwen3vl_disagg.serving.doors import Doors
from qwen3vl_disagg.serving.errors import JSONResponse, envelope, on_http_exception
from qwen3vl_disagg.serving.guard import guards
from qwen3vl_disagg.serving.limits import Limits
from qwen3vl_disagg.serving.types import Model, ModelList


def create_app(
    backend: Backend,
    processor: Processor,
    *,
    model_name: str,
    limits: Limits | None = None,
    doors: Doors | None = None,
    keys: ApiKeys | None = None,
    debug: bool = False,
    warm_up: bool = False,
) -> Starlette:
    """The application over a backend. `doors`: whose requests it takes, anybody's without; `keys`: which of them
    know one. `debug` opens GET /debug/processes. `warm_up`: be ready for large requests."""
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
        middleware=guards(doors, keys),
        exception_handlers={HTTPException: on_http_exception},
    )
    app.router.redirect_slashes = False
    return app
