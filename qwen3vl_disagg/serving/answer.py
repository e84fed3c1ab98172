"""One answer as it grows: token events -> text, ids, logprobs, usage."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from qwen3vl_disagg.cluster.backend import FinishedEvent, TokenEvent
from qwen3vl_disagg.core.requests import RequestTimings, SamplingParams, TokenLogprob
from qwen3vl_disagg.processing import AnswerParts, Parts, Tokenizer
from qwen3vl_disagg.serving.types import (
    AnswerMessage,
    ChatUsage,
    CompletionTokensDetails,
    LogprobEntry,
    PromptTokensDetails,
    TopLogprob,
)

# OpenAI's stand-in for a probability of zero: JSON has no -Infinity.
_MIN_LOGPROB = -9999.0


class TokenNames:
    """Tokens as logprobs show them: text, and the exact bytes (a token may hold part of a character)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def top(self, token_id: int, logprob: float) -> TopLogprob:
        raw = self._tokenizer.token_bytes(token_id)
        text = raw.decode("utf-8", "replace")
        return TopLogprob(token=text, token_id=token_id, logprob=max(logprob, _MIN_LOGPROB), bytes=list(raw))

    def entry(self, found: TokenLogprob) -> LogprobEntry:
        own = self.top(found.token_id, found.logprob)
        top = [self.top(token_id, logprob) for token_id, logprob in found.top]
        return LogprobEntry(
            token=own.token, token_id=own.token_id, logprob=own.logprob, bytes=own.bytes, top_logprobs=top
        )


class Answer:
    """Collects one request's tokens. `token_ids` and `entries` hold the end token too, the text in `parts` does not."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        names: TokenNames,
        eos_ids: frozenset[int],
        sampling: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        with_tools: bool = False,
    ) -> None:
        self.parts, self._names = AnswerParts(tokenizer, eos_ids, sampling, prompt_ids, with_tools=with_tools), names
        self._first_timings, self._first_token_at = RequestTimings(), 0.0
        self.num_prompt = len(prompt_ids)
        self.entries: list[LogprobEntry] = []

    def push(self, event: TokenEvent) -> Parts:
        """Take a token; returns what became certain with it, often nothing. Nothing counts after a stop."""
        if self.is_stopped:
            return Parts()
        if event.timings is not None:
            self._first_timings, self._first_token_at = event.timings, time.monotonic()
        if event.logprob is not None:
            self.entries.append(self._names.entry(event.logprob))
        return self.parts.push(event.token_id)

    def finish(self) -> Parts:
        """What is still held back."""
        return self.parts.finish()

    @property
    def is_stopped(self) -> bool:
        """A stop string is complete."""
        return self.parts.is_stopped

    def stop_event(self) -> FinishedEvent:
        """The end at a stop string, in place of the rank's. The time of decoding is measured here."""
        decode_ms = (time.monotonic() - self._first_token_at) * 1e3 if self._first_token_at else 0.0
        return FinishedEvent("stop", msgspec.structs.replace(self._first_timings, decode=decode_ms))

    @property
    def token_ids(self) -> list[int]:
        return self.parts.token_ids

    def message(self) -> AnswerMessage:
        parts = self.parts
        return AnswerMessage(
            content=None if parts.calls and not parts.content else parts.content,
            reasoning_content=parts.reasoning or msgspec.UNSET,
            tool_calls=parts.calls or msgspec.UNSET,
        )

    def usage(self, cached_tokens: int = 0) -> ChatUsage:
        usage = ChatUsage(
            prompt_tokens=self.num_prompt,
            completion_tokens=len(self.token_ids),
            total_tokens=self.num_prompt + len(self.token_ids),
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        )
        if self.parts.reasoning_tokens:
            usage.completion_tokens_details = CompletionTokensDetails(reasoning_tokens=self.parts.reasoning_tokens)
        return usage


def with_frontend(
    timings: RequestTimings, *, queue_ms: float, preprocess_ms: float, hide_cache_hits: bool = False
) -> RequestTimings:
    """The ranks' timings plus what the frontend did before them: waiting for a thread, and making the prompt.

    `hide_cache_hits`: without all that is less, or zero, where something was there already.
    """
    if hide_cache_hits:
        timings = RequestTimings(
            queue=timings.queue, prefill=timings.prefill, decode=timings.decode, language_rank=timings.language_rank
        )
    return msgspec.structs.replace(
        timings, queue=timings.queue + queue_ms, preprocess=timings.preprocess + preprocess_ms
    )
