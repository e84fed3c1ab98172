"""Spans travel when somebody looks, each once, and the frontend keeps so many of them."""

from __future__ import annotations

import asyncio
import time
import tracemalloc

import pytest

from qwen3vl_disagg.cluster import traces
from qwen3vl_disagg.cluster.traces import DRIFT, MOST, Traces, spans_told
from qwen3vl_disagg.core import spans
from qwen3vl_disagg.core.spans import Ring, Span, SpanRing
from qwen3vl_disagg.protocol.messages import LanguageLoad, Spans, TellSpans
from tests.support.fake_ranks import System, in_loop

LANGUAGE, ENCODE = ("language", 1), ("encode", 0)


def one(number: int, start: float = 0.0, name: str = "decode") -> Span:
    return Span(name, "engine", start, start + 0.5, [f"r-{number}"], [], {"tokens": number})


def told(*found: Span, behind: int, num_gone: int = 0, now: float = 0.0) -> Spans:
    return Spans(spans=list(found), next=behind, num_gone=num_gone, now=now)


async def asked(made: Traces, *, num: int = 1, posted: list) -> asyncio.Task[None]:
    """Somebody looks, and so many questions are out."""
    looking = asyncio.create_task(made.collect())
    while len(posted) < num:
        await asyncio.sleep(0.001)
    return looking


def test_a_rank_tells_what_is_of_its_role_the_oldest_first(monkeypatch):
    monkeypatch.setattr(spans, "ring", SpanRing(MOST + 500, 2**30))
    for number in range(MOST + 600):
        spans.ring.add_span(Span("encode" if number % 2 else "prefill", "x", 0.0, 1.0, [str(number)]))
    first = spans_told("encode", TellSpans(number=0))
    assert (first.next, first.num_gone, len(first.spans)) == (MOST + 100, 100, MOST // 2)
    assert first.spans[0].requests == ["101"]
    rest = spans_told("language", TellSpans(number=first.next))
    assert (rest.next, rest.num_gone, {one.name for one in rest.spans}) == (MOST + 600, 0, {"prefill"})
    assert abs(rest.now - time.monotonic()) < 10


@in_loop
async def test_ranks_are_asked_when_somebody_looks_and_once_for_all_who_do(monkeypatch):
    monkeypatch.setattr(traces, "FRESH_S", 60.0)
    monkeypatch.setattr(traces, "WAIT_S", 60.0)
    made, posted = Traces(), list[TellSpans]()
    made.up(LANGUAGE, posted.append, has_our_clock=True)
    await asyncio.sleep(0.05)
    assert posted == [], "nobody looks"
    lookers = [await asked(made, posted=posted) for _ in range(5)]
    assert posted == [TellSpans(number=0)]
    made.note(LANGUAGE, told(one(1), one(2), behind=2))
    await asyncio.gather(*lookers)
    seen = made.since(0)
    assert [entry[1].numbers["tokens"] for entry in seen.spans] == [1, 2]
    assert (seen.next, seen.num_gone, seen.lost, seen.silent) == (2, 0, {}, [])
    await made.collect()
    assert len(posted) == 1, "that was just now"
    monkeypatch.setattr(traces, "FRESH_S", 0.0)
    looking = await asked(made, num=2, posted=posted)
    made.note(LANGUAGE, told(one(3), behind=3))
    await looking
    assert posted[1] == TellSpans(number=2)
    assert [key for key, _ in made.since(2).spans] == [LANGUAGE]
    made.note(LANGUAGE, told(one(9), behind=9))
    assert made.since(0).next == 3, "nobody had asked"


@in_loop
async def test_a_full_answer_is_asked_on_and_what_the_rank_had_dropped_is_told(monkeypatch):
    monkeypatch.setattr(traces, "WAIT_S", 60.0)
    made, posted = Traces(), list[TellSpans]()
    made.up(LANGUAGE, posted.append, has_our_clock=True)
    looking = await asked(made, posted=posted)
    made.note(LANGUAGE, told(*[one(n, 50.0 + n) for n in range(MOST)], behind=MOST + 70, num_gone=70))
    assert posted[1:] == [TellSpans(number=MOST + 70)]
    assert not looking.done()
    made.note(LANGUAGE, told(one(1), behind=MOST + 71))
    await looking
    assert len(posted) == 2
    assert made.since(0).lost == {LANGUAGE: (70, 50.0)}
    monkeypatch.setattr(traces, "FRESH_S", 0.0)
    looking = await asked(made, num=3, posted=posted)
    made.note(LANGUAGE, told(one(1, 90.0), behind=MOST + 80, num_gone=5))
    await looking
    assert made.since(0).lost == {LANGUAGE: (75, 90.0)}


@in_loop
async def test_nobody_waits_for_a_rank_that_left(monkeypatch):
    monkeypatch.setattr(traces, "WAIT_S", 60.0)
    made, posted = Traces(), list[TellSpans]()
    made.up(LANGUAGE, posted.append, has_our_clock=True)
    looking = await asked(made, posted=posted)
    made.down(LANGUAGE)
    await asyncio.wait_for(looking, 10)


@in_loop
async def test_a_silent_rank_holds_nobody_up_for_long_and_is_not_asked_twice(monkeypatch):
    monkeypatch.setattr(traces, "WAIT_S", 0.05)
    monkeypatch.setattr(traces, "FRESH_S", 0.0)
    made, silent, speaking = Traces(), list[TellSpans](), list[TellSpans]()
    made.up(ENCODE, silent.append, has_our_clock=True)
    made.up(LANGUAGE, speaking.append, has_our_clock=True)
    for round in range(3):
        looking = await asked(made, num=round + 1, posted=speaking)
        made.note(LANGUAGE, told(one(round), behind=round + 1))
        await asyncio.wait_for(looking, 5)
    seen = made.since(0)
    assert (len(silent), len(speaking), len(seen.spans), seen.silent) == (1, 3, 3, [ENCODE])
    made.note(ENCODE, told(one(7, name="encode"), behind=1))
    assert (made.since(0).spans[-1][0], made.since(0).silent) == (ENCODE, [])
    looking = await asked(made, num=2, posted=silent)
    made.down(ENCODE)
    made.note(LANGUAGE, told(behind=3))
    await asyncio.wait_for(looking, 5)
    made.up(ENCODE, silent.append, has_our_clock=True)  # another process, which counts anew
    await asked(made, num=3, posted=silent)
    assert silent[-1] == TellSpans(number=0)


@pytest.mark.parametrize("ahead", [0.0, 1_000.0, -250.0])
@in_loop
async def test_another_hosts_clock_is_estimated_and_its_error_is_told(ahead, monkeypatch):
    monkeypatch.setattr(traces, "FRESH_S", 0.0)
    made, posted = Traces(), list[TellSpans]()
    made.up(LANGUAGE, posted.append, has_our_clock=False)
    for way_s, back_s in ((0.4, 0.2), (0.03, 0.01), (0.2, 0.6)):  # the second answer is the one to go by
        looking = await asked(made, num=len(posted) + 1, posted=posted)
        asked_at = made._ranks[LANGUAGE].asked_at
        happened = asked_at + way_s + ahead
        made.note(LANGUAGE, told(one(1, happened), behind=1, now=happened), now=asked_at + way_s + back_s)
        await looking
        seen = made.since(0, now=asked_at + way_s + back_s)
        _, span = seen.spans[-1]
        clock = seen.clocks[LANGUAGE]
        assert abs(span.start - (asked_at + way_s)) <= clock.error_s + 1e-6
        assert abs(clock.ahead_s - ahead) <= clock.error_s + 1e-6
    assert clock.error_s == pytest.approx(0.02, abs=1e-4)
    assert span.stop - span.start == pytest.approx(0.5)


async def answered(
    made: Traces, posted: list, *, way_s: float, back_s: float, ahead: float, num_gone: int = 0
) -> float:
    """What the rank did as it was asked is told; when that was, on the frontend's clock."""
    await asked(made, num=len(posted) + 1, posted=posted)
    asked_at = made._ranks[LANGUAGE].asked_at
    happened = asked_at + way_s
    span = one(1, happened + ahead)
    made.note(LANGUAGE, told(span, behind=1, num_gone=num_gone, now=happened + ahead), now=happened + back_s)
    return happened


@in_loop
async def test_times_that_were_told_before_the_clock_was_known_well_are_as_right_as_those_after(monkeypatch):
    monkeypatch.setattr(traces, "FRESH_S", 0.0)
    made, posted = Traces(), list[TellSpans]()
    made.up(LANGUAGE, posted.append, has_our_clock=False)
    first = await answered(made, posted, way_s=0.8, back_s=0.0, ahead=500.0)
    assert abs(made.since(0).spans[0][1].start - first) == pytest.approx(0.4, abs=1e-3)
    second = await answered(made, posted, way_s=0.004, back_s=0.0, ahead=500.0)
    seen = made.since(0, now=second + 1.0)
    error_s = seen.clocks[LANGUAGE].error_s
    assert error_s == pytest.approx(0.002 + DRIFT * 1.0)
    for (_, span), happened in zip(seen.spans, (first, second), strict=True):
        assert abs(span.start - happened) <= error_s
    assert made.since(0, now=second + 100).clocks[LANGUAGE].error_s == pytest.approx(0.002 + DRIFT * 100)


@in_loop
async def test_the_clock_and_the_losses_of_a_rank_that_left_stay_as_long_as_its_spans(monkeypatch):
    monkeypatch.setattr(traces, "FRESH_S", 0.0)
    made, posted = Traces(), list[TellSpans]()
    made._ring = Ring(2, 2**20)
    made.up(LANGUAGE, posted.append, has_our_clock=False)
    happened = await answered(made, posted, way_s=0.02, back_s=0.0, ahead=500.0, num_gone=7)
    made.down(LANGUAGE)
    seen = made.since(0, now=happened)
    assert abs(seen.spans[0][1].start - happened) <= seen.clocks[LANGUAGE].error_s + 1e-6
    assert seen.clocks[LANGUAGE].error_s == pytest.approx(0.01)
    assert (seen.lost[LANGUAGE][0], seen.lost[LANGUAGE][1]) == (7, pytest.approx(happened, abs=0.011))
    made.up(LANGUAGE, posted.append, has_our_clock=False)  # on a host with another clock
    again = await answered(made, posted, way_s=0.002, back_s=0.0, ahead=-90.0)
    seen = made.since(0, now=again + 1)
    for (_, span), when in zip(seen.spans, (happened, again), strict=True):
        assert abs(span.start - when) <= seen.clocks[LANGUAGE].error_s
    assert seen.clocks[LANGUAGE].error_s >= 0.01, "that of the worse one"
    made.down(LANGUAGE)
    made.up(ENCODE, posted.append, has_our_clock=True)
    for number in range(2):
        made._ranks[ENCODE].asked_at = again
        made.note(ENCODE, told(one(number, name="encode"), behind=number + 1))
    seen = made.since(0)
    assert (set(seen.clocks), seen.lost) == ({ENCODE}, {}), "nothing of it is left"


@in_loop
async def test_a_clock_of_this_host_is_ours():
    made, posted = Traces(), list[TellSpans]()
    made.up(LANGUAGE, posted.append, has_our_clock=True)
    looking = await asked(made, posted=posted)
    made.note(LANGUAGE, told(one(1, 7.0), behind=1, now=99.0))
    await looking
    assert made.since(0).spans[0][1].start == 7.0
    assert made.since(0).clocks[LANGUAGE].error_s == 0.0


def test_the_frontend_does_not_grow_and_counts_what_it_drops():
    made, most = Traces(), 2**20
    made._ring = Ring(1_000, most)
    made.up(LANGUAGE, lambda _: None, has_our_clock=True)

    def hear(first: int) -> None:
        for number in range(first, first + 1_500):
            made._ranks[LANGUAGE].asked_at = 0.0
            names = [f"{number}-{name}" for name in range(number % 40)]
            made.note(LANGUAGE, told(Span("decode", f"lane {number}", 0.0, 1.0, names), behind=number + 1))

    mine = [tracemalloc.Filter(True, file) for file in (__file__, traces.__file__, spans.__file__)]  # nobody else's

    def memory() -> int:
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(mine).traces)

    tracemalloc.start()
    try:
        hear(0)
        full = memory()
        hear(1_500)
        again = memory()
    finally:
        tracemalloc.stop()
    seen = made.since(0)
    assert full < made._ring.num_bytes <= most
    assert again < full + 0.05 * most
    assert (seen.num_gone, seen.next) == (3_000 - len(seen.spans), 3_000)
    assert len(seen.spans) <= 1_000


@in_loop
async def test_the_hub_asks_ranks_and_hears_them(monkeypatch):
    monkeypatch.setattr(traces, "WAIT_S", 60.0)
    async with System(2, 1) as system:
        encode, language = await system.join_all()
        await language[1].tell(LanguageLoad(running=1))
        await system.until(lambda: system.hub.rank_loads()["language", 1] == LanguageLoad(running=1))
        assert not [m for rank in (encode[0], language[1]) for m in rank.inbox if isinstance(m, TellSpans)]
        looking = asyncio.create_task(system.hub.spans())
        for rank, name in ((language[1], "prefill"), (encode[0], "encode")):
            question = await rank.expect(TellSpans)
            await rank.tell(told(one(1, name=name), behind=question.number + 1))
        seen = await looking
        assert {(key, span.name) for key, span in seen.spans} == {(LANGUAGE, "prefill"), (ENCODE, "encode")}
        assert {clock.error_s for clock in seen.clocks.values()} == {0.0}
        encode[0].die()
        await system.until(lambda: system.hub.rank_loads()["encode", 0] is None)
        assert ENCODE in {key for key, _ in system.hub._traces.since(0).spans}, "what it did is still there"
