"""The scheduler with no model: made-up sequences, hypothesis arrivals, cancels and page pressure."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.requests import SamplingParams, VisualItem
from qwen3vl_disagg.disagg.rows import VisualRows
from qwen3vl_disagg.engine.pages import PagePool
from qwen3vl_disagg.engine.scheduler import Scheduler
from qwen3vl_disagg.engine.sequence import Sequence


def make_sequence(name: str, prompt: int, new: int) -> Sequence:
    return Sequence(
        request_id=name,
        token_ids=[1] * prompt,
        items=[],
        sampling=SamplingParams(max_new_tokens=new),
        positions=torch.zeros(3, prompt, dtype=torch.long),
        delta=0,
        generator=torch.Generator(),
    )


def advance(scheduler: Scheduler) -> list[str]:
    """Run one step as the engine would; the requests that finished."""
    scheduler.admit()
    step = scheduler.schedule()
    finished = []
    chunks = step.prefill if step else []
    assert sum(chunk.stop - chunk.start for chunk in chunks) <= scheduler.max_prefill_tokens
    for chunk in chunks:
        assert chunk.sequence.num_cached == chunk.start < chunk.stop <= chunk.sequence.num_prompt
        chunk.sequence.num_cached = chunk.stop
    running = [chunk.sequence for chunk in chunks if chunk.is_last]
    for sequence in step.decode if step else []:
        sequence.num_cached += 1
        running.append(sequence)
    for sequence in running:
        assert sequence.num_cached <= len(sequence.pages) * scheduler.pool.page_size
        sequence.generated.append(0)
        if len(sequence.generated) == sequence.sampling.max_new_tokens:
            scheduler.remove(sequence.request_id)
            finished.append(sequence.request_id)
    return finished


def test_first_come_first_served_and_the_queue_waits_for_pages():
    scheduler = Scheduler(PagePool(4, 4), max_running=8, max_prefill_tokens=100)
    for name, prompt in (("a", 8), ("b", 12), ("c", 1)):
        scheduler.add(make_sequence(name, prompt, 1))
    assert [s.request_id for s in scheduler.admit()] == ["a"]  # b needs 3 pages, 2 are free; c waits its turn
    assert advance(scheduler) == ["a"]
    assert [s.request_id for s in scheduler.admit()] == ["b", "c"]


def test_prefill_and_decode_take_turns():
    scheduler = Scheduler(PagePool(100, 4), max_running=8, max_prefill_tokens=8)
    for i in range(3):
        scheduler.add(make_sequence(str(i), 8, 9))
    scheduler.admit()
    kinds = []
    for _ in range(5):
        step = scheduler.schedule()
        kinds.append("prefill" if step.prefill else "decode")
        for chunk in step.prefill:
            chunk.sequence.num_cached = chunk.stop
    assert kinds == ["prefill", "decode", "prefill", "decode", "prefill"]


def test_a_request_larger_than_the_pool_is_refused():
    scheduler = Scheduler(PagePool(2, 4), max_running=8, max_prefill_tokens=100)
    with pytest.raises(InputError, match="needs 9 tokens of cache; there are 8"):
        scheduler.add(make_sequence("a", 9, 1))


@given(
    requests=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 6)), min_size=1, max_size=12),
    num_pages=st.integers(7, 20),
    max_running=st.integers(1, 5),
    budget=st.integers(1, 40),
    cancelled=st.sets(st.integers(0, 11)),
)
def test_every_request_ends_once_and_no_page_leaks(requests, num_pages, max_running, budget, cancelled):
    scheduler = Scheduler(PagePool(num_pages, 4), max_running=max_running, max_prefill_tokens=budget)
    names = set()
    for i, (prompt, new) in enumerate(requests):
        scheduler.add(make_sequence(str(i), prompt, new))
        names.add(str(i))
    finished: list[str] = []
    for step in range(sum(prompt + new for prompt, new in requests) * 3 + 10):
        finished += advance(scheduler)
        if step in cancelled and str(step) in names:
            assert scheduler.remove(str(step)) == (str(step) not in finished)
            names.discard(str(step))
        assert len(scheduler.admitted) <= max_running
    assert len(finished) == len(set(finished))
    assert names <= set(finished)
    assert scheduler.pool.num_free == num_pages
    assert not scheduler.waiting
    assert not scheduler.admitted


def make_visual(offset: int, num_rows: int) -> VisualItem:
    return VisualItem(
        modality="image", digest="", num_bytes=1, grid=(1, 2, 2 * num_rows), num_rows=num_rows, offset=offset, param=""
    )


def window(start: int, stop: int) -> VisualRows:
    return VisualRows(1, start, stop, (), ())


def with_items() -> Sequence:
    """20 tokens: 2 of text, 6 rows, 2 of text, 8 rows, 2 of text."""
    return replace(make_sequence("a", 20, 1), items=[make_visual(2, 6), make_visual(10, 8)])


@pytest.mark.parametrize(
    ("cached", "rows", "limit"),
    [
        (0, {}, (2, 0)),
        (0, {0: (0, 6)}, (10, 1)),
        (0, {0: (0, 4)}, (6, 0)),
        (6, {0: (4, 6)}, (10, 1)),
        (6, {}, (2, 0)),  # waits for the rest of item 0
        (8, {1: (0, 3)}, (13, 1)),
        (8, {1: (0, 8)}, (20, None)),
        (0, {1: (0, 8)}, (2, 0)),
        (18, {}, (20, None)),
    ],
)
def test_prefill_goes_as_far_as_the_rows_do(cached, rows, limit):
    sequence = with_items()
    sequence.num_cached = cached
    sequence.rows = {index: window(*rows[index]) for index in rows}
    assert sequence.limit == limit
    assert sequence.reach == limit[0]


def test_a_chunk_knows_its_rows():
    sequence = with_items()
    assert sequence.touched(0, 2) == []
    assert sequence.touched(0, 3) == [(0, 0, 1)]
    assert sequence.touched(5, 12) == [(0, 3, 6), (1, 0, 2)]
    assert sequence.touched(8, 10) == []
    assert sequence.touched(0, 20) == [(0, 0, 6), (1, 0, 8)]


@pytest.mark.parametrize(
    ("rows", "options", "is_short", "chunk"),
    [
        ({}, {}, False, None),
        ({}, {"min_overlap_tokens": 2}, False, (0, 2)),
        ({}, {"min_overlap_tokens": 2, "overlap": False}, False, None),
        ({}, {"min_overlap_tokens": 3}, False, None),
        ({}, {"overlap": False}, True, None),  # text takes nobody's room
        ({0: (0, 6)}, {}, False, None),
        ({0: (0, 6)}, {"min_overlap_tokens": 10}, False, (0, 10)),
        ({0: (0, 6)}, {"overlap": False}, True, (0, 10)),
        ({0: (0, 4)}, {"overlap": False}, False, (0, 6)),  # the rest cannot come before these are used
        ({0: (0, 6), 1: (0, 8)}, {"overlap": False}, False, (0, 20)),
        ({0: (0, 6), 1: (0, 8)}, {"budget": 7}, False, (0, 7)),
    ],
)
def test_when_a_prompt_that_is_not_whole_is_prefilled(rows, options, is_short, chunk):
    options = dict(options)
    budget = options.pop("budget", 100)
    scheduler = Scheduler(PagePool(10, 4), max_running=8, max_prefill_tokens=budget, **options)
    sequence = with_items()
    scheduler.add(sequence)
    scheduler.admit()
    sequence.rows = {index: window(*rows[index]) for index in rows}
    scheduler.is_short_of_room = is_short
    assert scheduler.has_step == (chunk is not None)
    step = scheduler.schedule()
    assert (None if step is None else [(c.start, c.stop) for c in step.prefill]) == (None if chunk is None else [chunk])


def test_the_budget_is_shared_in_order_of_arrival():
    scheduler = Scheduler(PagePool(100, 4), max_running=8, max_prefill_tokens=25)
    for name in "abc":
        scheduler.add(replace(with_items(), request_id=name) if name == "b" else make_sequence(name, 12, 1))
    a, b, c = scheduler.admit()
    assert [(k.sequence, k.start, k.stop) for k in scheduler.schedule().prefill] == [(a, 0, 12), (c, 0, 12)]
    b.rows = {0: window(0, 6), 1: window(0, 8)}
    chunks = scheduler.schedule().prefill
    assert [(k.sequence, k.start, k.stop, k.is_last) for k in chunks] == [(a, 0, 12, True), (b, 0, 13, False)]


@given(
    sequences=st.lists(
        st.tuples(st.integers(0, 20), st.none() | st.integers(1, 6), st.none() | st.integers(1, 8)), max_size=4
    ),
    budget=st.integers(1, 30),
    least=st.integers(1, 12),
    overlap=st.booleans(),
    is_short=st.booleans(),
    max_running=st.integers(1, 4),
    num_pages=st.integers(5, 20),
)
def test_there_is_a_step_exactly_when_has_step_says_so(
    sequences, budget, least, overlap, is_short, max_running, num_pages
):
    """The engine's thread sleeps on `has_step`; rules as the requirement says them, not as the scheduler does."""
    scheduler = Scheduler(
        PagePool(num_pages, 4),
        max_running=max_running,
        max_prefill_tokens=budget,
        overlap=overlap,
        min_overlap_tokens=least,
    )
    scheduler.is_short_of_room = is_short
    for number, (cached, *stops) in enumerate(sequences):
        sequence = replace(with_items(), request_id=str(number))
        sequence.num_cached = cached
        sequence.rows = {index: window(0, stop) for index, stop in enumerate(stops) if stop is not None}
        scheduler.add(sequence)
    assert scheduler.has_step == bool(scheduler.admit() or scheduler.schedule())
    for _ in range(3):
        wanted = {}
        for name, sequence in scheduler.admitted.items():
            ends = [(item, sequence.rows.get(index)) for index, item in enumerate(sequence.items)]
            reach, has_window = sequence.num_prompt, False
            for item, rows in reversed(ends):
                if sequence.num_cached < item.offset + item.num_rows and (rows is None or rows.stop < item.num_rows):
                    reach, has_window = item.offset + (rows.stop if rows else 0), rows is not None
            new = reach - sequence.num_cached
            must = is_short or has_window or reach == sequence.num_prompt
            if new > 0 and (must or (overlap and new >= least)):
                wanted[name] = reach
        is_decoding = any(s.is_prefilled for s in scheduler.admitted.values())
        assert scheduler.has_step == bool(wanted or is_decoding)
        step = scheduler.schedule()
        assert (step is not None) == bool(wanted or is_decoding)
        if step is None:
            return
        assert bool(step.prefill) != bool(step.decode)
        left = budget
        for chunk, name in zip(step.prefill, wanted, strict=False):
            expected = min(wanted[name], chunk.sequence.num_cached + left)
            assert (chunk.sequence.request_id, chunk.stop) == (name, expected)
            left -= chunk.stop - chunk.start
        assert not step.prefill or left == 0 or len(step.prefill) == len(wanted)
        for chunk in step.prefill:
            chunk.sequence.num_cached = chunk.stop
