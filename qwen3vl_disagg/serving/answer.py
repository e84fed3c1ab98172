"""One answer as it grows: token events -> text, ids, logprobs, usage."""

from __future__ import annotations

import msgspec

from qwen3vl_disagg.core.requests import RequestTimings, TokenLogprob
from qwen3vl_disagg.processing import Tokenizer
from qwen3vl_disagg.serving.backend import TokenEvent
from qwen3vl_disagg.serving.types import LogprobEntry, PromptTokensDetails, TopLogprob, Usage

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
    """Collects one request's tokens. `token_ids` and `entries` hold the end token too, the text does not."""

    def __init__(self, tokenizer: Tokenizer, names: TokenNames, eos_ids: frozenset[int], num_prompt: int) -> None:
        self._stream, self._names, self._eos_ids = tokenizer.stream(), names, eos_ids
        self._pieces: list[str] = []
        self.num_prompt = num_prompt
        self.token_ids: list[int] = []
        self.entries: list[LogprobEntry] = []

    def push(self, event: TokenEvent) -> str:
        """Take a token; returns the text that became certain with it, often none."""
        self.token_ids.append(event.token_id)
        if event.logprob is not None:
            self.entries.append(self._names.entry(event.logprob))
        if event.token_id in self._eos_ids:
            return ""
        return self._keep(self._stream.push(event.token_id))

    def finish(self) -> str:
        """The text still held back."""
        return self._keep(self._stream.finish())

    def _keep(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def usage(self, cached_tokens: int = 0) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt,
            completion_tokens=len(self.token_ids),
            total_tokens=self.num_prompt + len(self.token_ids),
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        )


def with_frontend(timings: RequestTimings, *, queue_ms: float, preprocess_ms: float) -> RequestTimings:
    """The ranks' timings plus what the frontend did before them: waiting for a thread, and making the prompt."""
    return msgspec.structs.replace(
        timings, queue=timings.queue + queue_ms, preprocess=timings.preprocess + preprocess_ms
    )
