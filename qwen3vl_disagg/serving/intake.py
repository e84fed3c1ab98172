"""What comes before an answer on every route with a body: its headers, room for it, the body, and what is made of it;
cancelled at any stage when the client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from qwen3vl_disagg.cluster.backend import Backend, PromptCall, RequestHandle
from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.errors import DeadlineError, DisaggError, InputError, OverloadedError
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.core.sampling_params import ROUTES
from qwen3vl_disagg.processing import Processor, Prompt
from qwen3vl_disagg.processing.pooling import check_task
from qwen3vl_disagg.serving.body import BodyAccount, BodyBudget, ClientGone, check_headers, too_large
from qwen3vl_disagg.serving.guard import SALT, SEEN
from qwen3vl_disagg.serving.limits import Limits
from qwen3vl_disagg.serving.metrics import Metrics
from qwen3vl_disagg.serving.pooling_request import POOL_ROUTES, TASKS
from qwen3vl_disagg.serving.preparation import Fetcher, Preparation
from qwen3vl_disagg.serving.prepare_pool import PreparePool
from qwen3vl_disagg.serving.prepared import BodyRoute, Prepared, Rules
from qwen3vl_disagg.serving.watching import RequestWatch, Seen

KEEP_AS = "keep_as"
"""In a request's `state`: the name under which ranks keep it."""
TIMEOUT_HEADER, TARGET_HEADER = "X-Request-Timeout-Ms", "X-First-Token-Target-Ms"
# The backend keeps the same deadline and knows more about what took so long: its error should come first.
GRACE_S = 1.0


@dataclass(frozen=True)
class Arrived:
    """A request that has been prepared, and what was measured and decided on the way. `deadline` is monotonic;
    `target_s`, `keep_as`: see `Admit`. `release`: gives back the room for the body; on routes that submit at once that
    has been done."""

    prepared: Prepared
    deadline: float
    target_s: float
    watch: RequestWatch
    release: Callable[[], None]
    keep_as: str = ""


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
                    raise too_large(limits)
                account.take(len(chunk))
                body += chunk
    except TimeoutError:
        raise InputError("the body came too slowly", status=408, code="body_timeout") from None
    return body


class Intake:
    """All routes share one: its bounds are those of the server."""

    def __init__(
        self,
        backend: Backend,
        processor: Processor,
        *,
        model_names: Sequence[str],
        limits: Limits,
        metrics: Metrics | None = None,
        fetcher: Fetcher | None = None,
    ) -> None:
        self.backend, self.processor, self.limits = backend, processor, limits
        self._metrics = metrics or Metrics(backend)
        self.model_name = model_names[0]
        """The one in answers."""
        self._budget = BodyBudget(limits.max_body_memory)
        rules = Rules(model_names=list(model_names), max_answer_tokens=limits.max_answer_tokens)
        children = None if processor.folder is None else PreparePool(processor, rules, fetches=fetcher is not None)
        self._preparation = Preparation(processor, rules, limits, children, fetcher)
        self._num_running = self._num_preparing = 0

    def warm_up(self) -> None:
        """Get ready for large requests before the first comes."""
        self._preparation.warm_up()

    async def run(
        self, route: BodyRoute, scope: Scope, receive: Receive, work: Callable[[Arrived], Coroutine[None, None, None]]
    ) -> None:
        """Read and prepare the request, then let `work` answer it. InputError, OverloadedError, UnavailableError and
        DeadlineError for what cannot be answered; ClientGone."""
        headers = Headers(scope=scope)
        with BodyAccount(self._budget) as account:
            check_headers(headers, self.limits, account)
            limits = self.limits
            timeout_s = self._seconds(headers, TIMEOUT_HEADER, limits.request_timeout_s)
            target_s = self._seconds(headers, TARGET_HEADER, limits.first_token_target_s)
            if limits.first_token_target_s == FIRST_COME:
                target_s = FIRST_COME
            if route in (*ROUTES, *POOL_ROUTES):
                check_task(self.processor.task, TASKS.get(route, "generate"), scope["path"])
            self._check_room(route)
            body = await read_body(receive, self.limits, account)
            self._check_room(route)
            self._num_running += 1
            try:
                state = scope.get("state", {})
                await until_disconnect(receive, self._work(route, state, body, account, timeout_s, target_s, work))
            finally:
                self._num_running -= 1

    def _check_room(self, route: BodyRoute) -> None:
        """Raise what the backend would say in the end, before anything is done for the request."""
        if self._num_running >= self.limits.max_requests:
            raise OverloadedError(f"{self._num_running} requests are running, the limit is reached")
        if route in (*ROUTES, *POOL_ROUTES) and (refusal := self.backend.refusal(self._num_preparing)):
            raise refusal

    def _seconds(self, headers: Headers, name: str, default: float) -> float:
        """What a header says in milliseconds. InputError for what is none, or more than a request may take."""
        text = headers.get(name)
        if text is None:
            return default
        most = int(self.limits.max_request_timeout_s * 1000)
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and 1 <= int(text) <= most):
            raise InputError(f"{name} must be a whole number from 1 to {most}", param=name)
        return int(text) / 1000

    async def _work(
        self,
        route: BodyRoute,
        state: Mapping[str, Any],
        body: bytearray,
        account: BodyAccount,
        timeout_s: float,
        target_s: float,
        work: Callable[[Arrived], Coroutine[None, None, None]],
    ) -> None:
        arrival = time.monotonic()
        deadline = arrival + timeout_s
        self._num_preparing += 1
        try:
            prepared = await self._preparation.prepare(body, account, deadline, route)
        finally:
            self._num_preparing -= 1
        if route not in POOL_ROUTES:
            account.release()
        prepared = prepared.salted(state.get(SALT, ""))
        preprocess_ms = prepared.seconds * 1e3
        watch = RequestWatch(
            self._metrics,
            state.get(SEEN) or Seen(),
            arrival,
            queue_ms=(time.monotonic() - arrival) * 1e3 - preprocess_ms,
            preprocess_ms=preprocess_ms,
            hides_cache_hits=self.limits.hide_cache_hits,
        )
        answering = work(Arrived(prepared, deadline, target_s, watch, account.release, state.get(KEEP_AS, "")))
        del prepared  # images and clips: once they are submitted the backend says how long they are kept
        await answering

    async def submit(
        self,
        prompts: Sequence[tuple[Prompt, SamplingParams]],
        deadline: float,
        target_s: float,
        keep_as: str = "",
    ) -> Sequence[RequestHandle]:
        """Start all or none; a handle for each answer, those to one prompt behind one another. What the backend refuses
        is raised. `deadline`, `target_s`, `keep_as`: see `Arrived`."""
        calls = list[PromptCall]()
        for prompt, sampling in prompts:
            token_ids = np.asarray(prompt.token_ids, dtype="<i4").tobytes()
            name = f"{keep_as}-{len(calls)}" if keep_as else ""
            call = PromptCall(
                token_ids=token_ids, items=prompt.items, sampling=sampling, target_s=target_s, keep_as=name
            )
            calls.append(call)
            await asyncio.sleep(0)  # a long one takes milliseconds
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineError("making the prompt took longer than the request may")
        held = list[PromptCall]()
        try:
            for call, (prompt, _) in zip(calls, prompts, strict=True):
                self.backend.media.hold(prompt.items, prompt.media)
                held.append(call)
        except DisaggError:
            for call in held:
                self.backend.media.release(call.items)
            raise
        return self.backend.submit(calls, left)


async def until_disconnect(receive: Receive, work: Coroutine[None, None, None]) -> None:
    """Run `work` to its end; if the client leaves first, cancel it, let it clean up, and raise ClientGone.

    The body must have been read: `receive` says then nothing but that the connection closed.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.wait({task, watch}, timeout=GRACE_S)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
