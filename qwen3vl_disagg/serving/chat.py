"""`POST /v1/chat/completions`: body -> prompt -> backend -> answer, cancelled at any stage when the client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from contextlib import aclosing
from functools import partial

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from qwen3vl_disagg.cluster.backend import Backend, FinishedEvent
from qwen3vl_disagg.core.errors import DeadlineError, InputError, OverloadedError
from qwen3vl_disagg.processing import Processor
from qwen3vl_disagg.serving.answer import Answer, with_frontend
from qwen3vl_disagg.serving.body import BodyAccount, BodyBudget, ClientGone, check_headers
from qwen3vl_disagg.serving.chat_request import ChatRequest
from qwen3vl_disagg.serving.errors import JSONResponse
from qwen3vl_disagg.serving.guard import SALT
from qwen3vl_disagg.serving.limits import Limits
from qwen3vl_disagg.serving.preparation import Fetcher, Preparation, Rules, read_body
from qwen3vl_disagg.serving.prepare_child import PreparePool
from qwen3vl_disagg.serving.stream import EventStream
from qwen3vl_disagg.serving.types import ChatCompletion, Choice, Logprobs

TIMEOUT_HEADER = "X-Request-Timeout-Ms"
# The backend keeps the same deadline and knows more about what took so long: its error should come first.
_GRACE_S = 1.0


class ChatCompletions:
    """The route as an ASGI app: it needs `receive` to notice that a client leaves."""

    def __init__(
        self,
        backend: Backend,
        processor: Processor,
        *,
        model_names: Sequence[str],
        limits: Limits,
        fetcher: Fetcher | None = None,
    ) -> None:
        self._backend, self._processor = backend, processor
        self._model_name, self._limits = model_names[0], limits
        self._budget = BodyBudget(limits.max_body_memory)
        rules = Rules(model_names=list(model_names), max_answer_tokens=limits.max_answer_tokens)
        children = None if processor.folder is None else PreparePool(processor, rules, fetches=fetcher is not None)
        self._preparation = Preparation(processor, rules, limits, children, fetcher)
        self._num_running = self._num_preparing = 0

    def warm_up(self) -> None:
        """Get ready for large requests before the first comes."""
        self._preparation.warm_up()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        with BodyAccount(self._budget) as account:
            check_headers(headers, self._limits, account)
            timeout_s = self._timeout(headers)
            self._check_room()
            body = await read_body(receive, self._limits, account)
            self._check_room()
            self._num_running += 1
            try:
                await until_disconnect(receive, self._work(scope, receive, send, body, account, timeout_s))
            finally:
                self._num_running -= 1

    def _check_room(self) -> None:
        """Raise what the backend would say in the end, before anything is done for the request."""
        if self._num_running >= self._limits.max_requests:
            raise OverloadedError(f"{self._num_running} requests are running, the limit is reached")
        if refusal := self._backend.refusal(self._num_preparing):
            raise refusal

    def _timeout(self, headers: Headers) -> float:
        text = headers.get(TIMEOUT_HEADER)
        if text is None:
            return self._limits.request_timeout_s
        most = int(self._limits.max_request_timeout_s * 1000)
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and 1 <= int(text) <= most):
            raise InputError(f"{TIMEOUT_HEADER} must be a whole number from 1 to {most}", param=TIMEOUT_HEADER)
        return int(text) / 1000

    async def _work(
        self, scope: Scope, receive: Receive, send: Send, body: bytearray, account: BodyAccount, timeout_s: float
    ) -> None:
        arrival = time.monotonic()
        deadline = arrival + timeout_s
        self._num_preparing += 1
        try:
            prepared = await self._preparation.prepare(body, account, deadline)
        finally:
            self._num_preparing -= 1
        account.release()
        prepared = prepared.salted(scope.get("state", {}).get(SALT, ""))
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineError("making the prompt took longer than the request may")
        request, sampling, prompt = prepared.request, prepared.sampling, prepared.prompt
        preprocess_ms = prepared.seconds * 1e3
        told = partial(
            with_frontend,
            queue_ms=(time.monotonic() - arrival) * 1e3 - preprocess_ms,
            preprocess_ms=preprocess_ms,
            hide_cache_hits=self._limits.hide_cache_hits,
        )
        self._backend.media.hold(prompt.items, prompt.media)
        handle = self._backend.submit(prompt.token_ids, prompt.items, sampling, left)
        prompt_ids = prompt.token_ids
        del prepared, prompt  # images and clips: from here on the backend says how long they are kept
        eos_ids = self._processor.generation.eos_token_ids
        tokenizer = self._processor.tokenizer
        answer = Answer(tokenizer, eos_ids, sampling, prompt_ids, with_tools=request.has_tools, told=told)
        events = answer.events(handle, deadline=deadline + _GRACE_S, silence_s=self._limits.ping_s)
        names = {"id": f"chatcmpl-{handle.request_id}", "model": self._model_name}
        try:
            async with aclosing(events):
                if request.stream:
                    timeout_s = self._limits.send_timeout_s
                    await EventStream(send, request, answer, **names, send_timeout_s=timeout_s).run(events)
                else:
                    [finished] = [event async for event, _ in events if isinstance(event, FinishedEvent)]
                    completion = _completion(request, answer, finished, **names)
                    if sampling.prompt_logprobs is not None:
                        # Up to a second of work, which others need not wait for.
                        scores = answer.prompt_scores.by_token
                        completion.prompt_logprobs = await asyncio.to_thread(scores, tokenizer)
                    await JSONResponse(completion)(scope, receive, send)
        finally:
            handle.cancel()


def _completion(request: ChatRequest, answer: Answer, end: FinishedEvent, *, id: str, model: str) -> ChatCompletion:
    choice = Choice(message=answer.message(), finish_reason=answer.parts.reason(end.finish_reason))
    if request.sampling.wants_logprobs:
        choice.logprobs = Logprobs(content=answer.entries)
    completion = ChatCompletion(
        id=id,
        created=int(time.time()),
        model=model,
        choices=[choice],
        usage=answer.usage(end.timings.cached_tokens),
        timings=end.timings,
    )
    if request.return_token_ids:
        choice.token_ids, completion.prompt_token_ids = answer.token_ids, answer.prompt_ids
    return completion


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
        await asyncio.wait({task, watch}, timeout=_GRACE_S)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
