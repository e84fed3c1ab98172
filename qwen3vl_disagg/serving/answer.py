"""One answer as it grows: a backend's events -> text, calls, ids, logprobs, usage. The form of it is a route's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import msgspec

from qwen3vl_disagg.cluster.backend import AllDecoded, Event, FinishedEvent, RequestHandle, TokenEvent
from qwen3vl_disagg.core.errors import DeadlineError, DisaggError
from qwen3vl_disagg.core.requests import RequestTimings, SamplingParams, TokenLogprob
from qwen3vl_disagg.processing import AnswerParts, AnswerReason, Parts, Tokenizer
from qwen3vl_disagg.protocol.messages import PromptLogprobs
from qwen3vl_disagg.serving.errors import encoded
from qwen3vl_disagg.serving.prompt_scores import MIN_LOGPROB, PromptScores
from qwen3vl_disagg.serving.types import (
    AnswerMessage,
    ChatUsage,
    CompletionTokensDetails,
    LogprobEntry,
    PromptTokensDetails,
    TopLogprob,
)
from qwen3vl_disagg.serving.watching import AnswerWatch


class Answer:
    """One request's answer. `token_ids` and `logprobs` hold the end token too, the text in `parts` does not.

    `watch` sees its tokens and its end. `is_plain`: all of it is text, without reasoning and calls. `first`: the first
    answer to the same prompt, which hears what is said of that.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        sampling: SamplingParams,
        prompt_ids: list[int],
        *,
        watch: AnswerWatch,
        with_tools: bool = False,
        is_plain: bool = False,
        first: Answer | None = None,
    ) -> None:
        self.parts = AnswerParts(tokenizer, eos_ids, sampling, None if is_plain else prompt_ids, with_tools=with_tools)
        self.prompt_ids = prompt_ids
        self.is_first = first is None
        self.prompt_scores: PromptScores = PromptScores(prompt_ids) if first is None else first.prompt_scores
        self.end = FinishedEvent("stop", RequestTimings())
        """What it has come to, once it has."""
        self.logprobs: list[TokenLogprob] = []
        self._tokenizer, self.watch = tokenizer, watch
        self._first_timings, self._first_token_at = RequestTimings(), 0.0

    async def events(
        self, handle: RequestHandle, *, deadline: float, silence_s: float
    ) -> AsyncGenerator[tuple[Event | None, Parts]]:
        """The request's events, each with what became certain with it; None after each `silence_s` without one.

        A stop string is the end: the rank is told at once, before a client that reads slowly gets the rest.
        DeadlineError at `deadline` (monotonic); else what the request fails with.
        """
        iterator = aiter(handle)
        while True:
            # Waited for beside the clock, not under a timeout: cancelling would end the iterator.
            pending = asyncio.ensure_future(_next(iterator))
            try:
                while not pending.done():
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise DeadlineError("the request took longer than it may")
                    await asyncio.wait({pending}, timeout=min(left, silence_s))
                    if not pending.done():
                        yield None, Parts()
                event = pending.result()
            finally:
                pending.cancel()
            match event:
                case None:
                    raise DisaggError("the request ended without a result")
                case AllDecoded():
                    yield event, Parts()
                case PromptLogprobs():
                    self.prompt_scores.parts.append(event)
                case TokenEvent():
                    new = self._push(event)
                    if self.parts.is_stopped:
                        handle.cancel()
                    yield event, new
                    if self.parts.is_stopped:
                        self.end = self._stop_event()
                        yield self.end, Parts()
                        return
                case FinishedEvent():
                    rest = self.parts.finish()
                    # What an unfinished character shows as may complete a stop string, too.
                    reason = "stop" if self.parts.is_stopped else event.finish_reason
                    self.end = FinishedEvent(reason, self.watch.end(self.parts.reason(reason), event.timings))
                    yield self.end, rest
                    return

    def _push(self, event: TokenEvent) -> Parts:
        """Take a token; what became certain with it, often nothing."""
        self.watch.token()
        if event.timings is not None:
            self._first_timings, self._first_token_at = event.timings, time.monotonic()
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
        return self.parts.push(event.token_id)

    def entries(self, start: int = 0) -> list[LogprobEntry]:
        """What is told of the tokens from `start` on, each encoded. Of many tokens it takes long."""
        return [encoded(self._entry(one)) for one in self.logprobs[start:]]

    def _entry(self, told: TokenLogprob) -> LogprobEntry:
        own = self._named(told.token_id, told.logprob)
        top = [self._named(token_id, logprob) for token_id, logprob in told.top]
        return LogprobEntry(**msgspec.structs.asdict(own), top_logprobs=top)

    def _named(self, token_id: int, logprob: float) -> TopLogprob:
        """Its text, and its exact bytes: a token may hold part of a character."""
        raw = self._tokenizer.token_bytes(token_id)
        text = raw.decode("utf-8", "replace")
        return TopLogprob(token=text, token_id=token_id, logprob=max(logprob, MIN_LOGPROB), bytes=list(raw))

    def _stop_event(self) -> FinishedEvent:
        """The end at a stop string, in place of the rank's. The time of decoding is measured here."""
        decode_ms = (time.monotonic() - self._first_token_at) * 1e3 if self._first_token_at else 0.0
        timings = msgspec.structs.replace(self._first_timings, decode=decode_ms)
        return FinishedEvent("stop", self.watch.end(self.parts.reason("stop"), timings))

    @property
    def token_ids(self) -> list[int]:
        return self.parts.token_ids

    @property
    def reason(self) -> AnswerReason:
        """Why it ended."""
        return self.parts.reason(self.end.finish_reason)

    def message(self) -> AnswerMessage:
        parts = self.parts
        reasoning = parts.reasoning or msgspec.UNSET
        return AnswerMessage(
            content=None if parts.calls and not parts.content else parts.content,
            reasoning_content=reasoning,
            reasoning=reasoning,
            tool_calls=parts.calls or msgspec.UNSET,
        )

    def usage(self) -> ChatUsage:
        return usage_of([self])


def usage_of(answers: Sequence[Answer], *, is_scoring: bool = False) -> ChatUsage:
    """Of one request: each prompt counts once. `is_scoring`: what follows the prompts is not told."""
    firsts = [answer for answer in answers if answer.is_first]
    num_prompt = sum(len(answer.prompt_ids) for answer in firsts)
    num_tokens = 0 if is_scoring else sum(len(answer.token_ids) for answer in answers)
    usage = ChatUsage(
        prompt_tokens=num_prompt,
        completion_tokens=num_tokens,
        total_tokens=num_prompt + num_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(one.end.timings.cached_tokens for one in firsts)),
    )
    if num_reasoning := sum(answer.parts.reasoning_tokens for answer in answers):
        usage.completion_tokens_details = CompletionTokensDetails(reasoning_tokens=num_reasoning)
    return usage


async def _next(iterator: AsyncIterator[Event]) -> Event | None:
    return await anext(iterator, None)
