"""When a request's first token is due, and so in which order requests are served. Pure.

    due = arrival + min(target + PATIENCE * price, time limit / 2)

`price`: the seconds that its rows and tokens are estimated to cost. Everywhere the least `due` goes first, among equals
who came first. Between processes `due` travels as seconds from now (`due_s`), as clocks of hosts are not compared: a
hop makes it later by the time that the message takes.

Nobody starves: on one clock a due time is absolute and never moves. Let A come at `a` with allowance `p`, B at `b` with
`q`. B passes A only if b + q < a + p; as q >= 0, only if b < a + p. So who comes `p` or more after A does not pass it,
those before that are finitely many, and each of them is served once. As `p` is at most half the time limit, in
the other half nobody new passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from qwen3vl_disagg.core.requests import RequestTimings

FIRST_COME = -math.inf
"""`due`, `due_s` and target of all where order is by arrival: the same for everybody, whenever it is looked at."""
PATIENCE = 5.0
"""At four fifths of a server's capacity a request stays about 1 / (1 - 0.8) times as long as its own work takes."""
_FADE = 0.95
"""What one request weighs less when the next one of its kind has been measured."""
_JUMP = 4.0
"""One request counts as so many times as dear as those before it, at most: a stall is not a price."""


def allowance(target_s: float, price_s: float, timeout_s: float) -> float:
    """Seconds from a request's arrival until its first token is due; FIRST_COME without a target."""
    return min(target_s + PATIENCE * price_s, timeout_s / 2)


@dataclass
class _Rate:
    amount: float
    seconds: float

    def add(self, amount: float, seconds: float) -> None:
        """What is no time at all (none, negative, not finite) is ignored."""
        if amount > 0 and 0 < seconds < math.inf:
            seconds = min(seconds, _JUMP * amount * self.each)
            self.amount, self.seconds = _FADE * self.amount + amount, _FADE * self.seconds + seconds

    @property
    def each(self) -> float:
        return self.seconds / self.amount


@dataclass
class Prices:
    """Seconds of work by what the last requests took, at first by what a CPU may take. Steps and batches that requests
    share count for each of them, and what is cached is not known beforehand: the price is what it costs at most."""

    _row: _Rate = field(default_factory=lambda: _Rate(256, 0.5))
    _token: _Rate = field(default_factory=lambda: _Rate(256, 0.25))

    def learn(self, num_prompt: int, timings: RequestTimings) -> None:
        """A request with so many tokens in its prompt has its first token."""
        encoded = [item for item in timings.items if item.encode > 0]
        batches = {(item.encode_rank, item.batch or -i): item.encode for i, item in enumerate(encoded, 1)}
        self._row.add(sum(item.rows for item in encoded), sum(batches.values()) / 1e3)
        self._token.add(num_prompt - timings.cached_tokens, timings.prefill / 1e3)

    def of(self, num_rows: int, num_prompt: int) -> float:
        """Seconds for so many visual rows and tokens, those of the rows included."""
        return num_rows * self._row.each + num_prompt * self._token.each
