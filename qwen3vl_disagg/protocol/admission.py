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
    """The requests that have no token yet, each with its cost: tokens of its prompt, visual ones included, and of its
    answer."""

    def __init__(self, limits: RouterLimits) -> None:
        self._limits = limits
        self._waiting: dict[str, int] = {}
        self._cost = 0
        self._served, self._seconds = 0.0, 0.0
        """Cost that got its first token, and the time in which something waited; both fade with that time."""
        self._measured_at = 0.0

    @staticmethod
    def cost(num_prompt: int, num_output: int) -> int:
        return num_prompt + min(num_output, _MAX_OUTPUT)

    def add(self, request_id: str, cost: int, now: float) -> None:
        self._measure(now)
        self._waiting[request_id] = cost
        self._cost += cost

    def leave(self, request_id: str, now: float, *, is_served: bool) -> None:
        """It has its first token, or has ended without one. Nothing happens if it does not wait."""
        cost = self._waiting.get(request_id)
        if cost is None:
            return
        self._measure(now)
        del self._waiting[request_id]
        self._cost -= cost
        if is_served:
            self._served += cost

    def refusal(self, now: float, *, kv_tokens: int, cost: int = 0, num_coming: int = 0) -> OverloadedError | None:
        """Why a request of this cost may not wait too. `kv_tokens`: what all ranks hold at once. `num_coming`: requests
        that were not refused and have not arrived yet."""
        num_waiting = len(self._waiting)
        if num_waiting + num_coming >= self._limits.max_waiting:
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
