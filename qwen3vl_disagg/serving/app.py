"""The HTTP application: routes. Fields and shapes are OpenAI's, see docs/serving.md."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import metadata
from typing import Literal

from msgspec import structs
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from qwen3vl_disagg.cluster.answer_store import AnswerStore
from qwen3vl_disagg.cluster.backend import Backend
from qwen3vl_disagg.processing import Processor
from qwen3vl_disagg.serving.access import ApiKeys
from qwen3vl_disagg.serving.chat import ChatCompletions
from qwen3vl_disagg.serving.chat_forms import ChatForm
from qwen3vl_disagg.serving.chat_request import check_model
from qwen3vl_disagg.serving.completions import Completions
from qwen3vl_disagg.serving.doors import Doors
from qwen3vl_disagg.serving.errors import MESSAGES_PATH, JSONResponse, envelope, on_http_exception
from qwen3vl_disagg.serving.guard import guards
from qwen3vl_disagg.serving.idempotency import Idempotency
from qwen3vl_disagg.serving.intake import Intake
from qwen3vl_disagg.serving.limits import Limits
from qwen3vl_disagg.serving.messages_answer import CountTokens, MessagesWriter
from qwen3vl_disagg.serving.metrics import METRICS_PATH, Metrics
from qwen3vl_disagg.serving.openapi import document
from qwen3vl_disagg.serving.pooling import Pooled
from qwen3vl_disagg.serving.preparation import Fetcher
from qwen3vl_disagg.serving.responses import ResponseWriter
from qwen3vl_disagg.serving.tokenizing import Detokenize, Tokenize
from qwen3vl_disagg.serving.trace import LIVE_DATA_PATH, TRACE_PATH, Tracing
from qwen3vl_disagg.serving.types import Health, Model, ModelList, NotReady, ReadyState, Version
from qwen3vl_disagg.serving.ui import LIVE_PATH, UI_PATH, ui


def create_app(
    backend: Backend,
    processor: Processor,
    *,
    model_name: str,
    more_names: Sequence[str] = (),
    limits: Limits | None = None,
    doors: Doors | None = None,
    keys: ApiKeys | None = None,
    fetcher: Fetcher | None = None,
    debug: bool = False,
    warm_up: bool = False,
    store: AnswerStore | None = None,
) -> Starlette:
    """The application over a backend. `more_names`: what requests may call the model too. `doors`: whose requests it
    takes, anybody's without; `keys`: which of them know one. `fetcher`: gets images and clips by URL; none without.
    `debug` opens GET /debug/processes. `warm_up`: be ready for large requests. `store`: where
    answers are kept for those who ask again."""
    limits = limits or Limits()
    created = int(time.time())
    names = list(dict.fromkeys([model_name, *more_names]))
    known = {name: Model(id=name, created=created, max_model_len=processor.max_model_len) for name in names}

    async def models(request: Request) -> Response:
        return JSONResponse(ModelList(data=list(known.values())))

    async def model(request: Request) -> Response:
        check_model(name := request.path_params["name"], known)
        return JSONResponse(known[name])

    async def version(request: Request) -> Response:
        return JSONResponse(Version(version=_version()))

    async def health(request: Request) -> Response:
        return JSONResponse(Health())

    async def ready(request: Request) -> Response:
        state = backend.readiness()
        status: Literal["ready", "degraded", "not_ready"] = "not_ready"
        if state.ready:
            status = "degraded" if state.degraded else "ready"
        body = ReadyState(status=status, ready=state.ready, degraded=state.degraded, reasons=state.reasons)
        if state.ready:
            return JSONResponse(body)
        reasons = "; ".join(state.reasons) or "starting"
        error = envelope(503, f"the server is not ready: {reasons}", code="unavailable").error
        return JSONResponse(NotReady(**structs.asdict(body), error=error), 503, {"Retry-After": "1"})

    described = document(names, _version(), has_keys=bool(keys))

    async def openapi(request: Request) -> Response:
        return JSONResponse(described)

    async def processes(request: Request) -> Response:
        return JSONResponse({"processes": backend.debug_processes()})

    metrics = Metrics(backend, hides_cache_hits=limits.hide_cache_hits)
    intake = Intake(backend, processor, model_names=names, limits=limits, metrics=metrics, fetcher=fetcher)
    tracing = Tracing(backend, metrics, hides_cache_hits=limits.hide_cache_hits)
    if warm_up:
        intake.warm_up()
    routes = [
        Route("/v1/chat/completions", ChatCompletions(intake), methods=["POST"]),
        Route("/v1/completions", Completions(intake), methods=["POST"]),
        Route("/v1/responses", ChatForm(intake, "response", ResponseWriter), methods=["POST"]),
        Route(MESSAGES_PATH, ChatForm(intake, "messages", MessagesWriter), methods=["POST"]),
        Route(f"{MESSAGES_PATH}/count_tokens", CountTokens(intake), methods=["POST"]),
        Route("/v1/embeddings", Pooled(intake, "embeddings"), methods=["POST"]),
        Route("/v1/rerank", Pooled(intake, "rerank"), methods=["POST"]),
        Route("/v1/score", Pooled(intake, "score"), methods=["POST"]),
        Route("/tokenize", Tokenize(intake), methods=["POST"]),
        Route("/detokenize", Detokenize(intake), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/version", version),
        Route("/openapi.json", openapi),
        Route(METRICS_PATH, metrics.show),
        Route(UI_PATH, ui),
        Route(LIVE_PATH, ui),
        Route(TRACE_PATH, tracing.trace),
        Route(LIVE_DATA_PATH, tracing.live),
        Route("/health", health),
        Route("/ready", ready),
    ]
    if debug:
        routes.append(Route("/debug/processes", processes))
    app = Starlette(
        routes=routes,
        middleware=[
            *guards(doors, keys, metrics, [route.path for route in routes]),
            Middleware(Idempotency, store=store or AnswerStore(), limits=limits),
        ],
        exception_handlers={HTTPException: on_http_exception},
    )
    app.router.redirect_slashes = False
    return app


def _version() -> str:
    try:
        return metadata.version("qwen3vl-disagg")
    except metadata.PackageNotFoundError:  # run from a folder that was not installed
        return "unknown"
