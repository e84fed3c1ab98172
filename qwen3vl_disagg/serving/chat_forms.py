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
from qwen3vl_disagg.serving.answers import Answers
from qwen3vl_disagg.serving.errors import ErrorEnvelope
from qwen3vl_disagg.serving.intake import Arrived, Intake
from qwen3vl_disagg.serving.prepared import BodyRoute
from qwen3vl_disagg.serving.stream import ChunkSender, typed_sse

TypedEvent = dict[str, Any]
"""Of a stream; its `type` names it."""
SMALL_ENTRIES = 64
"""So many log probabilities, each with its alternatives, are framed in less than a millisecond."""


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

    def lost(self, status: int, body: ErrorEnvelope) -> TypedEvent:
        """The same for the case that the stream's process dies, made at its beginning: nothing else changes."""


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
        sampling, limits = arrived.prepared.sampling, self._intake.limits
        answers = await Answers.start(self._intake, arrived, with_tools=request.has_tools)
        del arrived  # images and clips: from here on the backend says how long they are kept
        writer = self._writer(request, answers.all[0], sampling, answers.request_id, self._intake.model_name)
        tells_more = sampling.logprobs is not None
        try:
            async with aclosing(answers.events()) as events, aclosing(_typed(writer, events)) as typed:
                if request.stream:
                    sender = ChunkSender(
                        send,
                        send_timeout_s=limits.send_timeout_s,
                        frame=typed_sse,
                        is_long=lambda event: tells_more and _repeats_much(event),
                        failed=writer.failed,
                        lost=writer.lost,
                        done=b"",
                    )
                    await sender.run(typed)
                    return
                async for _ in typed:
                    pass
                await (await answers.response(lambda: writer.whole, tells_more=tells_more))(scope, receive, send)
        finally:
            answers.cancel()


def _repeats_much(event: TypedEvent) -> bool:
    """An event that says more than what is new, or of which much was held back."""
    return not event["type"].endswith(".delta") or len(event.get("logprobs", ())) > SMALL_ENTRIES


async def _typed(
    writer: AnswerWriter, events: AsyncGenerator[tuple[int, Event | None, Parts]]
) -> AsyncGenerator[TypedEvent]:
    is_begun = False
    async for _, event, new in events:
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
