"""`POST /v1/embeddings`, `/v1/rerank` and `/v1/score`: prompts -> the backend's vectors -> the answer."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.types import Receive, Scope, Send

from qwen3vl_disagg.cluster.backend import FinishedEvent, RequestHandle
from qwen3vl_disagg.core.errors import DeadlineError, DisaggError, Failure, OverloadedError
from qwen3vl_disagg.core.pooling import read_score, read_vector
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.processing import Prompt
from qwen3vl_disagg.serving.errors import JSONResponse, encoded
from qwen3vl_disagg.serving.intake import GRACE_S, Arrived, Intake
from qwen3vl_disagg.serving.pooling_request import PoolingRequest, PoolRoute
from qwen3vl_disagg.serving.types import (
    Embedding,
    Embeddings,
    PoolingUsage,
    RankedDocument,
    Ranking,
    RankingResult,
    ScoreOfPair,
    Scores,
)
from qwen3vl_disagg.serving.watching import AnswerWatch, RequestWatch

SLICE, MAX_UNDER_WAY = 64, 256
"""So many prompts are submitted in one go, and so many of one request are with the backend at once: others come between
them."""
RETRY_S = 0.1


class Pooled:
    """A route as an ASGI app."""

    def __init__(self, intake: Intake, route: PoolRoute) -> None:
        self._intake, self._route = intake, route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._intake.run(self._route, scope, receive, lambda arrived: self._answer(arrived, scope, receive, send))

    async def _answer(self, arrived: Arrived, scope: Scope, receive: Receive, send: Send) -> None:
        request = arrived.prepared.request
        if not isinstance(request, PoolingRequest):
            raise TypeError(f"{type(request).__name__} on this route")
        prompts = arrived.prepared.prompts
        deadline, target_s, release, watch = arrived.deadline, arrived.target_s, arrived.release, arrived.watch
        del arrived  # images and clips: each is the backend's once its prompt is submitted
        usage = PoolingUsage.of(sum(len(prompt.token_ids) for prompt, _ in prompts))
        handles: list[RequestHandle] = []
        try:
            async with asyncio.timeout(deadline + GRACE_S - time.monotonic()):
                is_led = request.has_one_query
                vectors = await self._run(prompts, deadline, target_s, handles, release, watch, is_led=is_led)
        except TimeoutError:
            watch.close(DeadlineError.code)
            raise DeadlineError("the request took longer than it may") from None
        except Exception as error:
            watch.close(Failure.of(error).code)
            raise
        finally:
            watch.close()
            for handle in handles:
                handle.cancel()
        write, names = _WRITERS[self._route], (handles[0].request_id, self._intake.model_name)
        response = await JSONResponse.aside(lambda: write(request, vectors, usage, *names))
        await response(scope, receive, send)

    async def _run(
        self,
        prompts: list[tuple[Prompt, SamplingParams]],
        deadline: float,
        target_s: float,
        handles: list[RequestHandle],
        release: Callable[[], None],
        watch: RequestWatch,
        *,
        is_led: bool,
    ) -> list[bytes]:
        """What comes of the prompts, which are used up, in their order; `release` is called when all are submitted.
        `is_led`: they begin the same way, so the first one goes alone, and the others find what is computed of it."""
        ends: list[asyncio.Task[bytes]] = []
        room = asyncio.Semaphore(MAX_UNDER_WAY)
        try:
            async with asyncio.TaskGroup() as group:
                while prompts:
                    num_next = min(1 if is_led and not ends else SLICE, len(prompts))
                    for _ in range(num_next):
                        await room.acquire()
                    begun = await self._begin(prompts[:num_next], deadline, target_s, is_first=not ends)
                    for _ in range(num_next - len(begun)):
                        room.release()
                    handles += begun
                    watch.begun(begun)
                    for handle, (prompt, _) in zip(begun, prompts, strict=False):
                        ends.append(group.create_task(_end(handle, room, watch.answer(len(prompt.token_ids)))))
                    del prompts[: len(begun)]
                    if is_led:
                        await ends[0]
                release()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [end.result() for end in ends]

    async def _begin(
        self, prompts: Sequence[tuple[Prompt, SamplingParams]], deadline: float, target_s: float, *, is_first: bool
    ) -> Sequence[RequestHandle]:
        """The first of these, all if there is room. Where there is none, the client hears it while nothing was begun;
        else it is asked again until the deadline, for half as many each time, down to one."""
        num_next = len(prompts)
        while True:
            try:
                return await self._intake.submit(prompts[:num_next], deadline, target_s)
            except OverloadedError:
                if is_first:
                    raise
            num_next = max(1, num_next // 2)
            await asyncio.sleep(RETRY_S)


async def _end(handle: RequestHandle, room: asyncio.Semaphore, watch: AnswerWatch) -> bytes:
    try:
        async for event in handle:
            if isinstance(event, FinishedEvent):
                watch.end(event.finish_reason, event.timings)
                return event.vector
    finally:
        room.release()
    raise DisaggError("the request ended without a result")


def _embeddings(
    request: PoolingRequest, vectors: Sequence[bytes], usage: PoolingUsage, id: str, model: str
) -> Embeddings:
    def spelled(vector: bytes) -> str | list[float]:
        return base64.b64encode(vector).decode() if request.is_base64 else list(read_vector(vector))

    data = [encoded(Embedding(index=index, embedding=spelled(vector))) for index, vector in enumerate(vectors)]
    return Embeddings(id=f"embd-{id}", created=int(time.time()), model=model, data=data, usage=usage)


def _ranking(request: PoolingRequest, vectors: Sequence[bytes], usage: PoolingUsage, id: str, model: str) -> Ranking:
    scores = list(map(read_score, vectors))
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    results = [RankingResult(index=index, relevance_score=scores[index]) for index in order[: request.top_n or None]]
    for result in results if request.texts is not None else []:
        result.document = RankedDocument(text=request.texts[result.index] if request.texts else None)
    return Ranking(id=f"rerank-{id}", model=model, results=results, usage=usage)


def _scores(request: PoolingRequest, vectors: Sequence[bytes], usage: PoolingUsage, id: str, model: str) -> Scores:
    data = [ScoreOfPair(index=index, score=read_score(vector)) for index, vector in enumerate(vectors)]
    return Scores(id=f"score-{id}", created=int(time.time()), model=model, data=data, usage=usage)


_WRITERS: dict[PoolRoute, Callable[..., Any]] = {"embeddings": _embeddings, "rerank": _ranking, "score": _scores}
