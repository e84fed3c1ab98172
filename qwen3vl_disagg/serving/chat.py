"""`POST /v1/chat/completions`: prompt -> backend -> answer."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

from starlette.types import Receive, Scope, Send

from qwen3vl_disagg.cluster.backend import FinishedEvent
from qwen3vl_disagg.serving.answer import Answer
from qwen3vl_disagg.serving.chat_request import ChatRequest
from qwen3vl_disagg.serving.errors import JSONResponse
from qwen3vl_disagg.serving.intake import GRACE_S, Arrived, Intake
from qwen3vl_disagg.serving.stream import EventStream
from qwen3vl_disagg.serving.types import ChatCompletion, Choice, Logprobs


class ChatCompletions:
    """The route as an ASGI app: it needs `receive` to notice that a client leaves."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._intake.run("chat", scope, receive, lambda arrived: self._answer(arrived, scope, receive, send))

    async def _answer(self, arrived: Arrived, scope: Scope, receive: Receive, send: Send) -> None:
        request, prompt, sampling = arrived.prepared.request, arrived.prepared.prompt, arrived.prepared.sampling
        if not isinstance(request, ChatRequest):
            raise TypeError(f"{type(request).__name__} on this route")
        handle = self._intake.submit(prompt, sampling, arrived.deadline)
        prompt_ids, deadline, told = prompt.token_ids, arrived.deadline, arrived.told
        del arrived, prompt  # images and clips: from here on the backend says how long they are kept
        processor, limits = self._intake.processor, self._intake.limits
        tokenizer, eos_ids = processor.tokenizer, processor.generation.eos_token_ids
        answer = Answer(tokenizer, eos_ids, sampling, prompt_ids, with_tools=request.has_tools, told=told)
        events = answer.events(handle, deadline=deadline + GRACE_S, silence_s=limits.ping_s)
        names = {"id": f"chatcmpl-{handle.request_id}", "model": self._intake.model_name}
        try:
            async with aclosing(events):
                if request.stream:
                    timeout_s = limits.send_timeout_s
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
