"""What is seen of a request on its way: for the metrics, for its line in the log, and for what its client hears."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from qwen3vl_disagg.cluster.backend import RequestHandle
from qwen3vl_disagg.core.requests import RequestTimings
from qwen3vl_disagg.serving.metrics import Metrics

LEFT_CODE = "left"
"""Of an answer whose client went before its end."""
STAGES = ("queue", "preprocess", "encode", "transfer", "prefill", "decode")


@dataclass
class Seen:
    """Of one HTTP request, for its line in the log."""

    key: int = 0
    """Which of the server's keys it showed, from 1; 0 where there are none."""
    ids: tuple[str, str] | None = None
    """What ranks call its first prompt and its last one."""
    num_prompt: int = 0
    num_tokens: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Why answers ended."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds, of the answer that took longest."""

    def fields(self) -> dict[str, Any]:
        """What there is to say."""
        said: dict[str, Any] = {"key": self.key} if self.key else {}
        if self.ids is not None:
            first, last = self.ids
            named = first if first == last else f"{first}..{last}"
            said |= {"id": named, "prompt_tokens": self.num_prompt, "tokens": self.num_tokens}
        if self.reasons:
            said |= {"finish": ",".join(f"{name}:{n}" if n > 1 else name for name, n in self.reasons.items())}
        return said | {name: round(seconds, 4) for name, seconds in self.stages.items()}


@dataclass(frozen=True)
class RequestWatch:
    """Over all answers to a request. `arrived`: when it was whole, on the monotonic clock; `queue_ms` and
    `preprocess_ms`: what the frontend took before the ranks, which it adds to what they tell.

    `hides_cache_hits`: clients hear nothing of what is less, or zero, where something was there already.
    """

    metrics: Metrics
    seen: Seen
    arrived: float
    queue_ms: float
    preprocess_ms: float
    hides_cache_hits: bool = False
    _answers: list[AnswerWatch] = field(default_factory=list)

    def begun(self, handles: Sequence[RequestHandle]) -> None:
        """These are with the backend."""
        first = self.seen.ids[0] if self.seen.ids else handles[0].request_id
        self.seen.ids = first, handles[-1].request_id

    def answer(self, num_prompt: int, *, is_first: bool = True) -> AnswerWatch:
        """`is_first`: of those to its prompt."""
        self.seen.num_prompt += num_prompt if is_first else 0
        self._answers.append(AnswerWatch(self, num_prompt if is_first else 0))
        return self._answers[-1]

    def close(self, code: str = LEFT_CODE) -> None:
        """Nothing more comes: answers without an end have failed, for this reason."""
        for answer in self._answers:
            answer.failed(code)


class AnswerWatch:
    """Over one answer: each `token`, then the `end`, or that it `failed`; the first of these counts."""

    def __init__(self, request: RequestWatch, num_prompt: int) -> None:
        self._request, self._num_prompt = request, num_prompt
        self._num_tokens, self._last_at, self._is_over = 0, 0.0, False

    def token(self) -> None:
        now, metrics = time.monotonic(), self._request.metrics
        if self._num_tokens:
            metrics.next_token(now - self._last_at)
        else:
            metrics.first_token(now - self._request.arrived)
        self._num_tokens, self._last_at = self._num_tokens + 1, now
        self._request.seen.num_tokens += 1

    def failed(self, code: str) -> None:
        if not self._is_over:
            self._is_over = True
            self._request.metrics.failed(code)
            self._request.seen.reasons[code] += 1

    def end(self, reason: str, timings: RequestTimings) -> RequestTimings:
        """What the client hears of the ranks' timings."""
        request, seen, self._is_over = self._request, self._request.seen, True
        seconds = time.monotonic() - request.arrived
        whole = msgspec.structs.replace(
            timings, queue=timings.queue + request.queue_ms, preprocess=timings.preprocess + request.preprocess_ms
        )
        request.metrics.ended(reason, seconds, self._num_tokens, whole)
        if self._num_prompt:
            request.metrics.prompted(self._num_prompt, timings)
        seen.reasons[reason] += 1
        for name in STAGES:
            seen.stages[name] = max(seen.stages.get(name, 0.0), getattr(whole, name) / 1e3)
        if not request.hides_cache_hits:
            return whole
        return RequestTimings(
            queue=whole.queue,
            preprocess=request.preprocess_ms,
            prefill=whole.prefill,
            decode=whole.decode,
            language_rank=whole.language_rank,
        )
