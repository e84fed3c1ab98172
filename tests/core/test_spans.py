"""The ring of what a process did: bounded, counted, and cheap."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc

import pytest

from qwen3vl_disagg.core import spans
from qwen3vl_disagg.core.spans import JOIN_S, MAX_NAMES, Ring, Span, SpanRing, span


@pytest.fixture
def ring(monkeypatch) -> SpanRing:
    """This process's, new."""
    monkeypatch.setattr(spans, "ring", SpanRing(100, 2**20))
    return spans.ring


def test_a_span_has_its_thread_its_requests_and_its_numbers_also_where_it_failed(ring):
    with span("prefill", requests=["a", "b"], items=[("a", 1)], tokens=7):
        time.sleep(0.01)

    def fail() -> None:
        with span("encode", images=1) as items:
            items += [("c", 0), ("c", 1), ("d", 0)]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    (prefill, encode), behind, num_gone = ring.after(0, 10)
    assert (prefill.name, prefill.requests, prefill.items) == ("prefill", ["a", "b"], [("a", 1)])
    assert prefill.numbers == {"tokens": 7}
    assert 0.009 < prefill.stop - prefill.start < 5
    assert prefill.lane == threading.current_thread().name
    assert (encode.requests, encode.items) == (["c", "d"], [("c", 0), ("c", 1), ("d", 0)])
    assert (behind, num_gone) == (2, 0)


def test_what_has_no_room_is_counted_and_numbers_go_on():
    ring = Ring[int](3, 10**6)
    for number in range(5):
        ring.add(number, 1)
    assert ring.after(0, 10) == ([2, 3, 4], 5, 2)
    assert ring.after(3, 1) == ([3], 4, 0)
    assert ring.after(5, 10) == ([], 5, 0)
    assert ring.after(99, 10) == ([], 5, 0), "of another process, which counted further"
    ring.add(5, 10**6 - 1)
    assert (ring.after(0, 10)[0], ring.num_bytes) == ([4, 5], 10**6)
    ring.add(6, 10**6 + 1)
    assert (ring.after(0, 10), ring.num_bytes) == (([], 7, 7), 0), "one that never fits is none"


def memory_of(filters: list[tracemalloc.Filter]) -> int:
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(filters).traces)


@pytest.mark.parametrize("num_names", [0, 3, 100])
def test_it_does_not_grow(num_names, monkeypatch):
    """Names of their own for each span: the most that it can take."""
    most = 2**20
    monkeypatch.setattr(spans, "ring", SpanRing(200, most))

    def record(first: int, count: int) -> None:
        for number in range(first, first + count):
            names = [f"{number:x}-{name}-{'n' * 8}" for name in range(num_names)]
            with span("encode", items=[(name, number) for name in names], images=number, rows=number):
                pass

    mine = [tracemalloc.Filter(True, file) for file in (__file__, spans.__file__)]  # other tests left threads
    tracemalloc.start()
    try:
        record(0, 300)
        full = memory_of(mine)
        record(300, 300)
        again = memory_of(mine)
    finally:
        tracemalloc.stop()
    ring = spans.ring
    assert ring.num_added == 600
    assert len(ring) <= 200
    assert full <= ring.num_bytes <= most, "no less than it takes is counted"
    assert again < full + 0.05 * most
    assert all(len(one.items) <= MAX_NAMES for one in ring.after(0, 10)[0])
    if num_names > MAX_NAMES:
        assert ring.after(0, 1)[0][0].numbers["num_items"] == num_names


def test_of_many_requests_the_first_are_named_and_all_are_counted(ring):
    names = [str(number) for number in range(MAX_NAMES + 1)]
    with span("decode", requests=names[:-1], tokens=1), span("prefill", requests=names, tokens=2):
        pass
    (many, exact), _, _ = ring.after(0, 10)
    assert (many.requests, many.numbers) == (names[:-1], {"tokens": 2, "num_requests": MAX_NAMES + 1})
    assert (exact.requests, exact.numbers) == (names[:-1], {"tokens": 1})


def decode(start: float, seconds: float, requests: str = "ab", lane: str = "engine", name: str = "decode") -> Span:
    return Span(name, lane, start, start + seconds, list(requests), [], {"tokens": len(requests)})


@pytest.mark.parametrize("name", ["decode", "take part"])
def test_short_steps_are_one_span_until_somebody_has_read_it(name):
    ring = SpanRing(100, 2**20)
    for step in range(4):
        ring.add_span(decode(step * 0.002, 0.002, name=name))
    [one], behind, _ = ring.after(0, 10)
    assert (one.name, one.start, one.stop, one.numbers) == (name, 0.0, 0.008, {"tokens": 8, "steps": 4})
    behind_it = decode(0.008, 0.001, name=name)
    ring.add_span(behind_it)
    assert ring.after(behind, 10)[0] == [behind_it], "who has read it would never hear of this"


@pytest.mark.parametrize(
    "other",
    [
        decode(0.002, JOIN_S),  # long
        decode(0.006, 0.001),  # later
        decode(0.002, 0.001, "abc"),
        decode(0.002, 0.001, lane="another"),
        decode(0.002, 0.001, "ac"),  # as many
        Span("prefill", "engine", 0.002, 0.003, ["a", "b"]),
        Span("take part", "engine", 0.002, 0.003, ["a", "b"]),
    ],
)
def test_others_are_told_apart(other):
    ring = SpanRing(100, 2**20)
    ring.add_span(decode(0.0, 0.002))
    ring.add_span(other)
    assert len(ring.after(0, 10)[0]) == 2


def test_lines_have_every_step(ring, tmp_path, monkeypatch):
    monkeypatch.setattr(spans, "_file", None)
    monkeypatch.setattr(spans, "_rank", -1)
    spans.write_spans(tmp_path / "new", 3)
    for _ in range(3):
        with span("decode", requests=["a"], tokens=1):
            pass
    spans._file.close()
    lines = [json.loads(line) for line in (tmp_path / "new" / "rank-3.jsonl").read_text().splitlines()]
    assert [(line["name"], line["rank"], line["requests"], line["tokens"]) for line in lines] == [
        ("decode", 3, ["a"], 1)
    ] * 3
    assert len(ring) == 1


@pytest.mark.parametrize("why", ["the file has 0 MiB", "No space left on device"])
def test_a_file_that_is_large_or_a_disk_that_is_full_ends_with_a_line(ring, tmp_path, monkeypatch, caplog, why):
    monkeypatch.setattr(spans, "_file", None)
    monkeypatch.setattr(spans, "_rank", -1)
    monkeypatch.setattr(spans, "MAX_FILE_BYTES", 1000)
    spans.write_spans(tmp_path, 3)
    if why.startswith("No space"):
        spans._file.close()
        monkeypatch.setattr(spans, "_file", open("/dev/full", "ab", buffering=0))  # noqa: SIM115 - as the module has it
    for _ in range(50):
        with span("decode", requests=["a"], tokens=1):
            pass
    assert caplog.messages == [f"no more spans: {why}"]
    assert (tmp_path / "rank-3.jsonl").stat().st_size < 1200
    assert len(ring) == 1, "what is looked at goes on"


def test_threads_may_record_and_read_at_once():
    ring, seen, done = SpanRing(50, 2**20), [0, 0], threading.Event()

    def read() -> None:
        number = 0
        while not done.is_set() or number < ring.num_added:
            found, number, num_gone = ring.after(number, 7)
            seen[0] += len(found)
            seen[1] += num_gone

    reader = threading.Thread(target=read)
    reader.start()
    writers = [
        threading.Thread(target=lambda: [ring.add_span(Span("send", "x", 0.0, 1.0)) for _ in range(5_000)])
        for _ in range(3)
    ]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join(20)
    assert sum(seen) == ring.num_added == 15_000, "read or counted, each once"
