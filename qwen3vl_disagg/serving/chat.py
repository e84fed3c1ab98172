"""`POST /v1/chat/completions`: prompt -> backend -> answers."""

from __future__ import annotations

import time
from contextlib import aclosing
from functools import partial

from starlette.types import Receive, Scope, Send

from qwen3vl_disagg.processing import Tokenizer
from qwen3vl_disagg.serving.answer import usage_of
from qwen3vl_disagg.serving.answers import Answers
from qwen3vl_disagg.serving.chat_request import ChatRequest
from qwen3vl_disagg.serving.intake import Arrived, Intake
from qwen3vl_disagg.serving.stream import EventStream
from qwen3vl_disagg.serving.types import ChatCompletion, Choice, Logprobs


class ChatCompletions:
    """The route as an ASGI app: it needs `receive` to notice that a client leaves."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._intake.run("chat", scope, receive, lambda arrived: self._answer(arrived, scope, receive, send))

    async def _answer(self, arrived: Arrived, scope: Scope, receive: Receive, send: Send) -> None:
        request, sampling = arrived.prepared.request, arrived.prepared.sampling
        if not isinstance(request, ChatRequest):
            raise TypeError(f"{type(request).__name__} on this route")
        answers = await Answers.start(self._intake, arrived, with_tools=request.has_tools)
        del arrived  # images and clips: from here on the backend says how long they are kept
        names = {"id": f"chatcmpl-{answers.request_id}", "model": self._intake.model_name}
        try:
            async with aclosing(answers.events()) as events:
                if request.stream:
                    timeout_s = self._intake.limits.send_timeout_s
                    await EventStream(send, request, answers.all, **names, send_timeout_s=timeout_s).run(events)
                else:
                    async for _ in events:
                        pass
                    tokenizer = None if sampling.prompt_logprobs is None else self._intake.processor.tokenizer
                    tells_more = request.sampling.wants_logprobs or request.return_token_ids or tokenizer is not None
                    make = partial(_completion, request, answers, tokenizer, **names)
                    await (await answers.response(make, tells_more=tells_more))(scope, receive, send)
        finally:
            answers.cancel()


def _completion(
    request: ChatRequest, answers: Answers, tokenizer: Tokenizer | None, *, id: str, model: str
) -> ChatCompletion:
    """`tokenizer`: where the prompt's own log probabilities are wanted."""
    choices = [Choice(index=i, message=one.message(), finish_reason=one.reason) for i, one in enumerate(answers.all)]
    completion = ChatCompletion(
        id=id,
        created=int(time.time()),
        model=model,
        choices=choices,
        usage=usage_of(answers.all),
        timings=answers.last.end.timings,
    )
    for choice, answer in zip(choices, answers.all, strict=True):
        if request.sampling.wants_logprobs:
            choice.logprobs = Logprobs(content=answer.entries())
        if request.return_token_ids:
            choice.token_ids, completion.prompt_token_ids = answer.token_ids, answer.prompt_ids
    if tokenizer is not None:
        completion.prompt_logprobs = answers.all[0].prompt_scores.by_token(tokenizer)
    return completion
