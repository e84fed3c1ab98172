"""Routes that answer a chat in another API's form: the same way to a prompt, the same answer, other events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from qwen3vl_disagg.cluster.backend import Event, FinishedEvent
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.processing import Parts
from qwen3vl_disagg.serving.answer import Answer
from qwen3vl_disagg.serving.errors import ErrorEnvelope, JSONResponse
from qwen3vl_disagg.serving.intake import GRACE_S, Arrived, Intake
from qwen3vl_disagg.serving.prepared import BodyRoute
from qwen3vl_disagg.serving.stream import ChunkSender, typed_sse

TypedEvent = dict[str, Any]
"""Of a stream; its `type` names it."""


class AnswerWriter(Protocol):
    """Makes events of an answer as it grows, and the whole of it: `whole`, once `end` has been taken."""

    @property
    def whole(self) -> object: ...

    def begin(self) -> Iterator[TypedEvent]:
        """All media are good."""

    def take(self, new: Parts) -> Iterator[TypedEvent]:
        """A token has come, and with it this."""

    def silence(self) -> Iterator[TypedEvent]:
        """What may be said when there is nothing to say."""

    def end(self, event: FinishedEvent) -> Iterator[TypedEvent]: ...

    def failed(self, status: int, body: ErrorEnvelope) -> TypedEvent:
        """The last event of a stream that could not be brought to its end."""


WriterMaker = Callable[[Any, Answer, SamplingParams, str, str], AnswerWriter]
"""(request, answer, sampling, id of the request, model's name) -> its writer."""


class ChatForm:
    """A route as an ASGI app."""

    def __init__(self, intake: Intake, route: BodyRoute, writer: WriterMaker) -> None:
        self._intake, self._route, self._writer = intake, route, writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._intake.run(self._route, scope, receive, lambda arrived: self._answer(arrived, scope, receive, send))

    async def _answer(self, arrived: Arrived, scope: Scope, receive: Receive, send: Send) -> None:
        request: Any = arrived.prepared.request
        prompt, sampling = arrived.prepared.prompt, arrived.prepared.sampling
        [handle] = await self._intake.submit(arrived.prepared.prompts, arrived.deadline)
        prompt_ids, deadline, told = prompt.token_ids, arrived.deadline, arrived.told
        del arrived, prompt  # images and clips: from here on the backend says how long they are kept
        processor, limits = self._intake.processor, self._intake.limits
        eos_ids = processor.generation.eos_token_ids
        answer = Answer(processor.tokenizer, eos_ids, sampling, prompt_ids, with_tools=request.has_tools, told=told)
        writer = self._writer(request, answer, sampling, handle.request_id, self._intake.model_name)
        events = answer.events(handle, deadline=deadline + GRACE_S, silence_s=limits.ping_s)
        try:
            async with aclosing(events), aclosing(_typed(writer, events)) as typed:
                if request.stream:
                    await ChunkSender(
                        send, send_timeout_s=limits.send_timeout_s, frame=typed_sse, failed=writer.failed, done=b""
                    ).run(typed)
                    return
                async for _ in typed:
                    pass
                await JSONResponse(writer.whole)(scope, receive, send)
        finally:
            handle.cancel()


async def _typed(
    writer: AnswerWriter, events: AsyncGenerator[tuple[Event | None, Parts]]
) -> AsyncGenerator[TypedEvent]:
    is_begun = False
    async for event, new in events:
        if event is None:
            for one in writer.silence() if is_begun else ():
                yield one
            continue
        if not is_begun:
            is_begun = True
            for one in writer.begin():
                yield one
        for one in writer.take(new):
            yield one
        if isinstance(event, FinishedEvent):
            for one in writer.end(event):
                yield one
