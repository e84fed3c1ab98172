"""`POST /v1/completions`: text or token ids -> what follows, and how likely the prompt itself is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from starlette.types import Receive, Scope, Send

from qwen3vl_disagg.cluster.backend import AllDecoded, Event, FinishedEvent, TokenEvent
from qwen3vl_disagg.processing import Parts, Tokenizer
from qwen3vl_disagg.serving.answer import Answer, usage_of
from qwen3vl_disagg.serving.answers import Answers
from qwen3vl_disagg.serving.completion_request import CompletionRequest
from qwen3vl_disagg.serving.errors import encoded
from qwen3vl_disagg.serving.intake import Arrived, Intake
from qwen3vl_disagg.serving.prompt_scores import MIN_LOGPROB
from qwen3vl_disagg.serving.stream import ChunkSender
from qwen3vl_disagg.serving.types import (
    ChatUsage,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
)


class Completions:
    """The route as an ASGI app."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._intake.run(
            "completion", scope, receive, lambda arrived: self._answer(arrived, scope, receive, send)
        )

    async def _answer(self, arrived: Arrived, scope: Scope, receive: Receive, send: Send) -> None:
        request, intake = arrived.prepared.request, self._intake
        if not isinstance(request, CompletionRequest):
            raise TypeError(f"{type(request).__name__} on this route")
        answers = await Answers.start(intake, arrived, is_plain=True)
        runs = [_AnswerForm(answer, intake.processor.tokenizer, request) for answer in answers.all]
        names = {"id": f"cmpl-{answers.request_id}", "model": intake.model_name}
        try:
            async with aclosing(answers.events()) as events:
                if request.stream:
                    sender = ChunkSender(send, send_timeout_s=intake.limits.send_timeout_s)
                    await sender.run(_chunks(request, runs, events, **names))
                    return
                async for _ in events:
                    pass
            make = partial(_completion, request, runs, **names)
            await (await answers.response(make, tells_more=request.tells_more))(scope, receive, send)
        finally:
            answers.cancel()


@dataclass
class _AnswerForm:
    """One answer in this route's form."""

    answer: Answer
    tokenizer: Tokenizer
    request: CompletionRequest

    def read_prompt(self) -> str:
        stream = self.tokenizer.stream()
        return "".join([*map(stream.push, self.answer.prompt_ids), stream.finish()])

    def choice(self, index: int) -> CompletionChoice:
        """All of it."""
        request, answer = self.request, self.answer
        text = "" if request.is_scoring else answer.parts.content
        choice = CompletionChoice(
            index=index,
            text=self.read_prompt() + text if request.echo else text,
            finish_reason="length" if request.is_scoring else answer.reason,
            timings=answer.end.timings,
        )
        if request.sampling.wants_logprobs:
            choice.logprobs = self._logprobs()
        if request.num_scores is not None and not request.echo and answer.is_first:
            choice.prompt_logprobs = answer.prompt_scores.by_token(self.tokenizer)
        if request.return_token_ids:
            choice.prompt_token_ids = answer.prompt_ids
            choice.token_ids = [] if request.is_scoring else answer.token_ids
        return choice

    def _logprobs(self) -> CompletionLogprobs:
        """Of the answer's tokens, behind those of the prompt where that is part of the text."""
        request, answer = self.request, self.answer
        num_top = request.sampling.values["logprobs"]
        written = LogprobWriter(self.tokenizer)
        if request.echo:
            written.add(answer.prompt_ids[0], None, [])
            for score in answer.prompt_scores.scores():
                written.add(score.token_id, score.logprob, score.top[:num_top])
        for told in [] if request.is_scoring else answer.logprobs:
            written.add(told.token_id, told.logprob, told.top[:num_top])
        return written.logprobs


class LogprobWriter:
    """Tokens -> the lists of OpenAI's older form. `offset`: characters of text before the first."""

    def __init__(self, tokenizer: Tokenizer, offset: int = 0) -> None:
        self._tokenizer, self._stream, self._offset = tokenizer, tokenizer.stream(), offset
        self.logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])

    def add(self, token_id: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> None:
        """`logprob`: None for a prompt's first token, of which nothing can be said."""
        told = self.logprobs
        name = self._name(self._tokenizer.token_bytes(token_id))
        told.tokens.append(name)
        told.token_logprobs.append(None if logprob is None else max(logprob, MIN_LOGPROB))
        told.text_offset.append(self._offset)
        named = {self._name(self._tokenizer.token_bytes(other)): max(value, MIN_LOGPROB) for other, value in top}
        told.top_logprobs.append(None if logprob is None else encoded({**named, name: max(logprob, MIN_LOGPROB)}))
        self._offset += len(self._stream.push(token_id))

    @staticmethod
    def _name(raw: bytes) -> str:
        """The text; of a part of a character its bytes, as OpenAI spells them, so that no two have one name."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _usage(runs: Sequence[_AnswerForm]) -> ChatUsage:
    return usage_of([run.answer for run in runs], is_scoring=runs[0].request.is_scoring)


def _completion(request: CompletionRequest, runs: Sequence[_AnswerForm], *, id: str, model: str) -> Completion:
    choices = [run.choice(index) for index, run in enumerate(runs)]
    return Completion(id=id, created=int(time.time()), model=model, choices=choices, usage=_usage(runs))


async def _chunks(
    request: CompletionRequest,
    runs: Sequence[_AnswerForm],
    events: AsyncGenerator[tuple[int, Event | None, Parts]],
    *,
    id: str,
    model: str,
) -> AsyncGenerator[CompletionChunk | None]:
    """What a stream consists of; None where nothing is to be said yet but the status line."""
    created = int(time.time())
    offsets = [0] * len(runs)

    def chunk(*choices: CompletionChoice) -> CompletionChunk:
        made = CompletionChunk(id=id, created=created, model=model, choices=list(choices))
        if request.continuous_usage:
            made.usage = _usage(runs)
        elif request.include_usage:
            made.usage = None
        return made

    async for number, event, new in events:
        run = runs[number]
        choice = CompletionChoice(index=number, text=new.content, finish_reason=None)
        match event:
            case AllDecoded():
                yield None
                if request.echo:
                    choice.text = await asyncio.to_thread(run.read_prompt)  # up to half a second
                    offsets[number] += len(choice.text)
                    yield chunk(choice)
            case None:
                yield chunk(choice)
            case TokenEvent() if not request.is_scoring:
                if request.sampling.wants_logprobs:
                    told = run.answer.logprobs.pop()
                    writer = LogprobWriter(run.tokenizer, offsets[number])
                    writer.add(told.token_id, told.logprob, told.top)
                    choice.logprobs = writer.logprobs
                if request.return_token_ids:
                    choice.token_ids = [event.token_id]
                offsets[number] += len(new.content)
                if new or choice.logprobs or request.return_token_ids:
                    yield chunk(choice)
            case FinishedEvent():
                if request.is_scoring:
                    choice.text = ""
                choice.finish_reason = "length" if request.is_scoring else run.answer.reason
                choice.timings = event.timings
                yield chunk(choice)
    if request.include_usage:
        last = chunk()
        last.usage = _usage(runs)
        yield last
