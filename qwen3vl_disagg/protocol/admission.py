"""How much may wait, and how long what waits will take: by cost, since a prompt of 100,000 tokens is no short question.

Pure: time comes with each call.
"""

from __future__ import annotations

from qwen3vl_disagg.core.errors import MAX_RETRY_S, MIN_RETRY_S, OverloadedError
from qwen3vl_disagg.protocol.routing import RouterLimits

_MAX_OUTPUT = 1024
"""Of an answer's length, which is only bounded beforehand, so much counts: few answers are as long as they may be."""
_HALF_LIFE_S = 30.0


class Admission:
    """The answers that have no token yet, each with its cost: its tokens, and with the first of a request those of the
    prompt, visual ones included."""

    def __init__(self, limits: RouterLimits) -> None:
        self._limits = limits
        self._waiting: dict[str, dict[int, int]] = {}
        """Request -> answer -> cost."""
        self._num_waiting = self._cost = 0
        self._served, self._seconds = 0.0, 0.0
        """Cost that got its first token, and the time in which something waited; both fade with that time."""
        self._measured_at = 0.0

    @staticmethod
    def costs(num_prompt: int, num_tokens: int, n: int) -> list[int]:
        """Of `n` answers to a prompt, which has `num_tokens` with one of them."""
        num_output = min(num_tokens - num_prompt, _MAX_OUTPUT)
        return [num_prompt + num_output] + [num_output] * (n - 1)

    def add(self, request_id: str, costs: list[int], now: float) -> None:
        self._measure(now)
        self._waiting[request_id] = dict(enumerate(costs))
        self._num_waiting += len(costs)
        self._cost += sum(costs)

    def leave(self, request_id: str, now: float, *, is_served: bool, sample: int | None = None) -> None:
        """An answer has its first token, or has ended without one; None: all that are left. Nothing happens to those
        that do not wait."""
        costs = self._waiting.get(request_id, {})
        leaving = [number for number in costs if sample in (None, number)]
        if not leaving:
            return
        self._measure(now)
        cost = sum(costs.pop(number) for number in leaving)
        if not costs:
            del self._waiting[request_id]
        self._num_waiting -= len(leaving)
        self._cost -= cost
        if is_served:
            self._served += cost

    def refusal(
        self, now: float, *, kv_tokens: int, cost: int = 0, num_coming: int = 0, num_new: int = 1
    ) -> OverloadedError | None:
        """Why so many new answers of this cost together may not wait too. `kv_tokens`: what all ranks hold at once.
        `num_coming`: answers that were not refused and have not arrived yet."""
        num_waiting = self._num_waiting
        if num_waiting + num_coming and num_waiting + num_coming + num_new > self._limits.max_waiting:
            reason = f"{num_waiting + num_coming} requests are waiting"
        # One request alone always fits: whether it is too long for the model is not decided here.
        elif num_waiting and self._cost + cost > self._max_cost(kv_tokens):
            reason = f"{self._cost} tokens are waiting"
        else:
            return None
        return OverloadedError(reason, retry_after=self.retry_after(now))

    def _max_cost(self, kv_tokens: int) -> int:
        return max(self._limits.max_waiting_tokens, self._limits.max_waiting_fills * kv_tokens)

    def retry_after(self, now: float) -> float:
        """Seconds until what waits now will have been served, at the rate of the last minute."""
        self._measure(now)
        if not self._served:
            return min(max(self._seconds, MIN_RETRY_S), MAX_RETRY_S)
        return min(max(self._cost * self._seconds / self._served, MIN_RETRY_S), MAX_RETRY_S)

    def _measure(self, now: float) -> None:
        """Take the time since the last call in."""
        if self._waiting:
            past = now - self._measured_at
            fade = 0.5 ** (past / _HALF_LIFE_S)
            self._served, self._seconds = self._served * fade, self._seconds * fade + past
        self._measured_at = now
