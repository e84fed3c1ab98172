"""What all ranks did lately, at the frontend: asked of them when somebody looks.

Every rank keeps its last spans (`core/spans.py`), so that what has just happened can still be looked at; while nobody
does, none of them travels. Whoever looks has the ranks asked for what is new, once for all who look at that time, and
no rank again before it has answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from qwen3vl_disagg.cluster.registry import RankKey
from qwen3vl_disagg.core import spans
from qwen3vl_disagg.core.spans import Ring, Span
from qwen3vl_disagg.protocol.messages import Message, Spans, TellSpans

OF_ENCODE_RANKS = frozenset({"preprocess", "encode", "send"})
"""Both kinds of rank may be in one process, with one ring."""
MOST = 2000
"""Spans in a message."""
MAX_SPANS, MAX_BYTES = 60_000, 64 * 2**20
"""That the frontend keeps, of all ranks together."""
FRESH_S, WAIT_S = 0.3, 1.0
"""Ranks are not asked again before, and not waited for longer."""
DRIFT = 1e-4
"""By how much two clocks may go apart in a second."""


def spans_told(role: Literal["encode", "language"], asked: TellSpans) -> Spans:
    """A rank's answer: what it still has of what was asked for, the oldest first."""
    found, behind, num_gone = spans.ring.after(asked.number, MOST)
    told = [one for one in found if (one.name in OF_ENCODE_RANKS) == (role == "encode")]
    return Spans(spans=told, next=behind, num_gone=num_gone, now=time.monotonic())


class Clock(msgspec.Struct, frozen=True):
    """Of a rank, against the frontend's. `ahead_s` is 0 on the same host, else an estimate that was off by `error_s` at
    most at `at`: half of the time that question and answer took. Before and after that clocks drift."""

    ahead_s: float = 0.0
    error_s: float = 0.0
    at: float = 0.0


class Watched(msgspec.Struct, kw_only=True):
    """What ranks did, times on the frontend's monotonic clock. `next`: what to ask for after this. `clocks`: how far
    they are off by now, also of ranks that have left and did some of this.

    `num_gone`: spans that the frontend had no room for, from the number on that was asked for. `lost`: how many each
    rank had no room for before it was asked, and since when none is missing. `silent`: ranks yet to answer.
    """

    now: float
    next: int = 0
    num_gone: int = 0
    spans: list[tuple[RankKey, Span]] = []
    clocks: dict[RankKey, Clock] = {}
    lost: dict[RankKey, tuple[int, float]] = {}
    silent: list[RankKey] = []


@dataclass(eq=False)
class _Teller:
    """Known of a rank's process, for as long as it is there, or a span of it."""

    key: RankKey
    clock: Clock
    lost: tuple[int, float] | None = None
    """On its clock."""


@dataclass
class _Rank:
    post: Callable[[Message], None]
    source: _Teller
    has_our_clock: bool
    next: int = 0
    asked_at: float | None = None
    """When it was asked for what it has not told yet."""


class Traces:
    """On one event loop, but for `since`. A rank that comes again is a new one; what it had told stays, with times on
    its own clock, of which later answers may tell more."""

    def __init__(self) -> None:
        self._ring = Ring[tuple[_Teller, Span]](MAX_SPANS, MAX_BYTES)
        self._ranks: dict[RankKey, _Rank] = {}
        self._heard = asyncio.Event()
        self._collecting: asyncio.Task[None] | None = None
        self._collected_at = -FRESH_S

    def up(self, key: RankKey, post: Callable[[Message], None], *, has_our_clock: bool) -> None:
        source = _Teller(key, Clock(error_s=0.0 if has_our_clock else math.inf))
        self._ranks[key] = _Rank(post, source, has_our_clock)

    def down(self, key: RankKey) -> None:
        self._ranks.pop(key, None)
        self._heard.set()

    def note(self, key: RankKey, told: Spans, now: float | None = None) -> None:
        """An answer is here. What was not asked for is dropped."""
        rank, now = self._ranks.get(key), time.monotonic() if now is None else now
        if rank is None or rank.asked_at is None:
            return
        source, error_s = rank.source, (now - rank.asked_at) / 2
        if not rank.has_our_clock and error_s < _by_now(source.clock, now).error_s:
            source.clock = Clock(told.now - (now + rank.asked_at) / 2, error_s, now)
        for one in told.spans:
            self._ring.add((source, one), one.num_bytes)
        has_more = told.next >= rank.next + MOST  # as many as were asked for, whosever they were
        if told.num_gone:
            since = told.spans[0].start if told.spans else told.now
            source.lost = told.num_gone + (source.lost[0] if source.lost else 0), since
        rank.next, rank.asked_at = told.next, None
        if has_more:
            self._ask(rank)
        self._heard.set()

    def _ask(self, rank: _Rank) -> None:
        rank.asked_at = time.monotonic()
        rank.post(TellSpans(number=rank.next))

    async def collect(self) -> None:
        """Have what ranks did since the last time, as far as they answer at once. Who waits may leave."""
        if self._collecting is None or self._collecting.done():
            if time.monotonic() - self._collected_at < FRESH_S:
                return
            self._collecting = asyncio.create_task(self._collect())
        await asyncio.shield(self._collecting)

    async def _collect(self) -> None:
        end = time.monotonic() + WAIT_S
        for rank in self._ranks.values():
            if rank.asked_at is None:
                self._ask(rank)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(end - time.monotonic()):
                while self._silent():
                    self._heard.clear()
                    await self._heard.wait()
        self._collected_at = time.monotonic()

    def _silent(self) -> list[RankKey]:
        return [key for key, rank in self._ranks.copy().items() if rank.asked_at is not None]

    def since(self, number: int, now: float | None = None) -> Watched:
        """What is here from this number on. For any thread: there may be much to shift."""
        found, behind, num_gone = self._ring.after(number, MAX_SPANS)
        now = time.monotonic() if now is None else now
        sources = dict.fromkeys([rank.source for rank in self._ranks.copy().values()])
        clocks = {source: _by_now(source.clock, now) for source in {**sources, **dict.fromkeys(s for s, _ in found)}}
        told = Watched(now=now, next=behind, num_gone=num_gone, silent=self._silent())
        told.spans = [(source.key, _shifted(one, clocks[source].ahead_s)) for source, one in found]
        for source, clock in clocks.items():  # of one that came again there are two
            told.clocks[source.key] = max(clock, told.clocks.get(source.key, clock), key=lambda clock: clock.error_s)
            if source.lost is not None:
                count, since = told.lost.get(source.key, (0, -math.inf))
                told.lost[source.key] = count + source.lost[0], max(since, source.lost[1] - clock.ahead_s)
        return told


def _by_now(clock: Clock, now: float) -> Clock:
    drift = DRIFT * (now - clock.at) if clock.error_s else 0.0
    return msgspec.structs.replace(clock, error_s=clock.error_s + drift)


def _shifted(one: Span, ahead_s: float) -> Span:
    return msgspec.structs.replace(one, start=one.start - ahead_s, stop=one.stop - ahead_s) if ahead_s else one
