"""Server-sent events: an answer as chunks, each sent as soon as its token is there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import Message, Send

from qwen3vl_disagg.cluster.backend import Event, FinishedEvent, TokenEvent
from qwen3vl_disagg.core.json_text import json_line
from qwen3vl_disagg.processing import Parts
from qwen3vl_disagg.serving.answer import Answer, usage_of
from qwen3vl_disagg.serving.body import ClientGone
from qwen3vl_disagg.serving.chat_request import ChatRequest
from qwen3vl_disagg.serving.errors import ErrorEnvelope, describe, interrupted
from qwen3vl_disagg.serving.http_words import EVENT
from qwen3vl_disagg.serving.types import (
    ChatCompletionChunk,
    ChunkChoice,
    Delta,
    LogprobEntry,
    Logprobs,
    ToolCallDelta,
)

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
FAILED = "has_failed"
"""In the last message of a stream that was not brought to its end."""
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy must not collect the chunks
]


def sse(value: object) -> bytes:
    """One event, in one `data:` line.

    There are no other events and no comments: some clients take `: ping` for JSON, or for the end, and others an empty
    line behind a comment for an event without data (openai-python issue 2722, ollama pull request 16443).
    """
    return b"data: " + json_line(value) + b"\n\n"


def typed_sse(event: dict[str, Any]) -> bytes:
    """One event that has a type, which stands before its `data:` line too."""
    return b"event: " + event["type"].encode() + b"\n" + sse(event)


class ChunkSender:
    """A stream whose status line goes out with its first event: until then errors can still be a 4xx.

    `frame`: an event on the wire; `is_long`: one that is made beside the event loop; `failed`: the event of an error
    with this status; `done`: what stands at the end; `lost`: as `failed`, made when the stream begins, for the case
    that nobody is there at its end.
    """

    def __init__(
        self,
        send: Send,
        *,
        send_timeout_s: float,
        frame: Callable[[Any], bytes] = sse,
        is_long: Callable[[Any], bool] = lambda _: False,
        failed: Callable[[int, ErrorEnvelope], object] = lambda _, body: body,
        done: bytes = DONE,
        lost: Callable[[int, ErrorEnvelope], object] | None = None,
    ) -> None:
        self._send_message, self._send_timeout_s = send, send_timeout_s
        self._frame, self._is_long, self._failed, self._done = frame, is_long, failed, done
        self._lost = lost or failed
        self.is_started = False

    async def run(self, chunks: AsyncGenerator[object | None]) -> None:
        """Send everything, and that it was all; for None the status line alone. Raises what goes wrong before it; later
        errors become an event."""
        async with self.telling_errors():
            async for chunk in chunks:
                await self.start()
                if chunk is not None:
                    await self.send(await self._framed(chunk))
            await self.start()
            await self.send(self._done, last=True)

    @asynccontextmanager
    async def telling_errors(self) -> AsyncIterator[None]:
        try:
            yield
        except ClientGone:
            raise
        except Exception as error:
            if not self.is_started:
                raise
            status, body, _ = describe(error)
            if status == 500:
                logger.exception("a stream failed")
            await self.send(await self._framed(self._failed(status, body)), last=True, has_failed=True)

    async def _framed(self, chunk: object) -> bytes:
        return await asyncio.to_thread(self._frame, chunk) if self._is_long(chunk) else self._frame(chunk)

    async def start(self) -> None:
        """Send the status line, once."""
        if not self.is_started:
            status, body, _ = describe(interrupted())
            begin = {"type": "http.response.start", "status": 200, "headers": list(HEADERS)}
            await self._message({**begin, EVENT: self._frame(self._lost(status, body))})
            self.is_started = True

    async def send(self, data: bytes, *, last: bool = False, has_failed: bool = False) -> None:
        message = {"type": "http.response.body", "body": data, "more_body": not last}
        await self._message({**message, FAILED: True} if has_failed else message)

    async def _message(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await self._send_message(message)
        except (TimeoutError, OSError):
            raise ClientGone from None


class EventStream:
    """The streamed answers to a chat request, each chunk with the number of its answer."""

    def __init__(
        self, send: Send, request: ChatRequest, answers: Sequence[Answer], *, id: str, model: str, send_timeout_s: float
    ) -> None:
        self._sender = ChunkSender(send, send_timeout_s=send_timeout_s)
        self._send = self._sender.send
        self._request, self._answers = request, answers
        self._num_running = len(answers)
        self._id, self._model, self._created = id, model, int(time.time())

    async def run(self, events: AsyncGenerator[tuple[int, Event | None, Parts]]) -> None:
        """Send everything. Raises what goes wrong before the status line; later errors become an event."""
        async with self._sender.telling_errors():
            async for number, event, new in events:
                if event is None:
                    if self._sender.is_started:
                        await self._ping(number)
                    continue
                if not self._sender.is_started:
                    await self._start()
                if isinstance(event, TokenEvent):
                    await self._token(number, event, new)
                elif isinstance(event, FinishedEvent):
                    await self._finish(number, new)

    async def _start(self) -> None:
        await self._sender.start()
        for number in range(len(self._answers)):
            chunk = self._chunk(ChunkChoice(index=number, delta=Delta(role="assistant", content="")))
            if self._request.return_token_ids and not number:
                chunk.prompt_token_ids = self._answers[0].prompt_ids
            await self._send(sse(chunk))

    async def _ping(self, number: int) -> None:
        """A chunk that says nothing, in the form of the first one, so that no proxy takes the silence for the end."""
        await self._send(sse(self._chunk(ChunkChoice(index=number, delta=Delta(content="")))))

    async def _token(self, number: int, event: TokenEvent, new: Parts) -> None:
        entries = self._answers[number].entries() if self._request.sampling.wants_logprobs else []
        self._answers[number].logprobs.clear()
        if new or entries or self._request.return_token_ids:
            await self._send(sse(self._chunk(self._content(number, new, entries, [event.token_id]))))

    async def _finish(self, number: int, rest: Parts) -> None:
        """The end of one; that of the last says how much and how long it was."""
        if rest:
            await self._send(sse(self._chunk(self._content(number, rest, [], []))))
        answer = self._answers[number]
        last = self._chunk(ChunkChoice(index=number, delta=Delta(), finish_reason=answer.reason))
        self._num_running -= 1
        if self._num_running:
            await self._send(sse(last))
            return
        if self._request.include_usage:
            await self._send(sse(last))
            last = self._chunk()
            last.usage = usage_of(self._answers)
        last.timings = answer.end.timings
        await self._send(sse(last))
        await self._send(DONE, last=True)

    def _content(self, number: int, new: Parts, entries: list[LogprobEntry], token_ids: list[int]) -> ChunkChoice:
        choice = ChunkChoice(index=number, delta=self._delta(number, new))
        if entries:
            choice.logprobs = Logprobs(content=entries)
        if self._request.return_token_ids:
            choice.token_ids = token_ids
        return choice

    def _delta(self, number: int, new: Parts) -> Delta:
        """All that is new; an empty text if nothing is."""
        delta = Delta(reasoning_content=new.reasoning or None, reasoning=new.reasoning or None)
        if new.content or not new:
            delta.content = new.content
        if new.calls:
            calls = self._answers[number].parts.calls
            first = len(calls) - len(new.calls)
            numbered = enumerate(calls[first:], first)
            delta.tool_calls = [ToolCallDelta(index=i, id=call.id, function=call.function) for i, call in numbered]
        return delta

    def _chunk(self, *choices: ChunkChoice) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(id=self._id, created=self._created, model=self._model, choices=list(choices))
        if self._request.continuous_usage:
            chunk.usage = usage_of(self._answers)
        elif self._request.include_usage:
            chunk.usage = None
        return chunk
