"""The scheduler with no model: made-up sequences, hypothesis arrivals, cancels and page pressure."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.requests import SamplingParams, VisualItem
from qwen3vl_disagg.engine.pages import PagePool
from qwen3vl_disagg.engine.scheduler import Scheduler, SchedulerLimits
from qwen3vl_disagg.engine.sequence import Sequence
from qwen3vl_disagg.transport.buffers import VisualRows


def make_sequence(name: str, prompt: int, new: int) -> Sequence:
    return Sequence(
        request_id=name,
        token_ids=[1] * prompt,
        items=[],
        sampling=SamplingParams(max_new_tokens=new),
        positions=torch.zeros(3, prompt, dtype=torch.long),
        delta=0,
        seed=0,
    )


def make_scheduler(pool: PagePool, **limits) -> Scheduler:
    return Scheduler(pool, SchedulerLimits(**limits))


def test_first_come_first_served_and_the_queue_waits_for_pages():
    scheduler = make_scheduler(PagePool(4, 4))
    for name, prompt in (("a", 8), ("b", 12), ("c", 1)):
        scheduler.add(make_sequence(name, prompt, 1))
    assert [s.request_id for s in scheduler.admit()] == ["a"]  # b needs 3 pages, 2 are free; c waits its turn
    scheduler.remove("a")
    assert [s.request_id for s in scheduler.admit()] == ["b", "c"]


def test_prefill_and_decode_take_turns_and_chunks_are_short_while_others_are_decoded():
    scheduler = make_scheduler(PagePool(100, 4), max_prefill_tokens=8, chunk_tokens=3)
    for name in "abc":
        scheduler.add(make_sequence(name, 8, 9))
    scheduler.admit()
    kinds = []
    for _ in range(6):
        step, _ = scheduler.schedule()
        kinds.append([c.stop - c.start for c in step.prefill] or "decode")
        for chunk in step.prefill:
            chunk.sequence.num_cached = chunk.stop
            chunk.sequence.generated += [5] * chunk.is_last
    assert kinds == [[8], "decode", [3], "decode", [3], "decode"]


@pytest.mark.parametrize(
    ("target", "steps"),
    [("auto", [[8, 4], [4, 5], [3], [3], [3]]), (50.0, [[8], [3], [3], [2, 1], [3]])],
)
def test_a_chunk_is_longer_where_more_wait_than_are_answered(target, steps):
    """Four wait while none is answered: 12 tokens; then three wait and one is answered: 9; then two and two: 3."""
    scheduler = make_scheduler(PagePool(100, 4), max_prefill_tokens=20, chunk_tokens=3, gap_target_ms=target)
    for due, name in enumerate("abcd"):
        sequence = make_sequence(name, 8, 9)
        sequence.due = due
        scheduler.add(sequence)
    scheduler.admit()
    found = []
    for _ in range(2 * len(steps)):  # a decode step after each
        step, _ = scheduler.schedule()
        found += [[c.stop - c.start for c in step.prefill]] * bool(step.prefill)
        for chunk in step.prefill:
            chunk.sequence.num_cached = chunk.stop
            chunk.sequence.generated += [5] * chunk.is_last
    assert found == steps


@pytest.mark.parametrize(
    ("num_decoding", "num_ready", "num_without_rows", "most", "tokens"),
    [(1, 4, 0, 100, 12), (1, 4, 0, 8, 8), (1, 20, 0, 100, 24), (1, 2, 5, 100, 6), (3, 2, 0, 100, 3)],
)
def test_how_long_a_chunk_may_become(num_decoding, num_ready, num_without_rows, most, tokens):
    """Never longer than a step or 8 chunks; who waits for rows, and could not run, makes it no longer."""
    scheduler = make_scheduler(PagePool(200, 4), max_prefill_tokens=most, chunk_tokens=3, gap_target_ms="auto")
    for number in range(num_decoding + num_ready + num_without_rows):
        is_ready = number < num_decoding + num_ready
        sequence = make_sequence(str(number), 20, 9)
        scheduler.add(sequence if is_ready else replace(sequence, items=[make_visual(0, 6)]))
    for sequence in scheduler.admit()[:num_decoding]:
        sequence.num_cached = sequence.num_prompt
        sequence.generated.append(5)
    step, _ = scheduler.schedule()
    assert sum(chunk.stop - chunk.start for chunk in step.prefill) == tokens


def test_a_request_larger_than_the_pool_is_refused():
    scheduler = make_scheduler(PagePool(2, 4))
    with pytest.raises(InputError, match="needs 9 tokens of keys and values; there is room for 8"):
        scheduler.add(make_sequence("a", 9, 1))


def test_the_last_to_arrive_gives_its_pages_up():
    """4 pages of 4: a and b begin with one each, grow to two, and then there is none for a's ninth token."""
    scheduler = make_scheduler(PagePool(4, 4))
    a, b = make_sequence("a", 4, 9), make_sequence("b", 4, 9)
    for sequence in (a, b):
        scheduler.add(sequence)
    scheduler.admit()
    log = []
    for _ in range(40):
        scheduler.admit()
        step, preempted = scheduler.schedule()
        log += [(s.request_id, len(s.generated)) for s in preempted]
        for sequence in [c.sequence for c in step.prefill] + step.decode:
            sequence.num_cached = sequence.num_tokens
            sequence.generated.append(7)
            if len(sequence.generated) == 9:
                scheduler.remove(sequence.request_id)
        if not scheduler.admitted and not scheduler.waiting:
            break
    assert log == [("b", 5)]
    assert (a.num_preempted, b.num_preempted, scheduler.pool.num_free) == (0, 1, 4)


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
        (6, {}, (6, 0)),  # waits for the rest of item 0
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
    scheduler = make_scheduler(PagePool(10, 4), max_prefill_tokens=budget, **options)
    sequence = with_items()
    scheduler.add(sequence)
    scheduler.admit()
    sequence.rows = {index: window(*rows[index]) for index in rows}
    scheduler.is_short_of_room = is_short
    assert scheduler.has_step == (chunk is not None)
    step, _ = scheduler.schedule()
    assert (None if step is None else [(c.start, c.stop) for c in step.prefill]) == (None if chunk is None else [chunk])


def test_the_budget_is_shared_in_order_of_arrival():
    scheduler = make_scheduler(PagePool(100, 4), max_prefill_tokens=25)
    for name in "abc":
        scheduler.add(replace(with_items(), request_id=name) if name == "b" else make_sequence(name, 12, 1))
    a, b, c = scheduler.admit()
    assert [(k.sequence, k.start, k.stop) for k in scheduler.schedule()[0].prefill] == [(a, 0, 12), (c, 0, 12)]
    b.rows = {0: window(0, 6), 1: window(0, 8)}
    chunks = scheduler.schedule()[0].prefill
    assert [(k.sequence, k.start, k.stop, k.is_last) for k in chunks] == [(a, 0, 12, True), (b, 0, 13, False)]


@given(
    sequences=st.lists(
        st.tuples(st.integers(0, 19), st.none() | st.integers(1, 6), st.none() | st.integers(1, 8)), max_size=4
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
    scheduler = make_scheduler(
        PagePool(num_pages, 4),
        max_running=max_running,
        max_prefill_tokens=budget,
        overlap=overlap,
        min_overlap_tokens=least,
    )
    scheduler.is_short_of_room = is_short
    begun = {}
    for number, (cached, *stops) in enumerate(sequences):
        sequence = replace(with_items(), request_id=str(number))
        begun[str(number)] = cached
        sequence.rows = {index: window(0, stop) for index, stop in enumerate(stops) if stop is not None}
        scheduler.add(sequence)
    assert scheduler.has_step == bool(sequences)
    assert bool(scheduler.admit()) == bool(sequences)
    for name, sequence in scheduler.admitted.items():
        sequence.num_cached = begun[name]
    for _ in range(3):
        wanted = {}
        for name, sequence in scheduler.admitted.items():
            ends = [(item, sequence.rows.get(index)) for index, item in enumerate(sequence.items)]
            reach, has_window = sequence.num_prompt, False
            for item, rows in reversed(ends):
                if sequence.num_cached < item.offset + item.num_rows and (rows is None or rows.stop < item.num_rows):
                    reach, has_window = item.offset + (rows.stop if rows else 0), rows is not None
            new = reach - sequence.num_cached
            uses_rows = any(i.offset < reach and index in sequence.rows for index, i in enumerate(sequence.items))
            must = (is_short and uses_rows) or has_window or reach == sequence.num_prompt
            if new > 0 and (must or (overlap and new >= least)):
                wanted[name] = reach
        assert scheduler.has_step == bool(wanted)
        step, _ = scheduler.schedule()
        assert (step is not None) == bool(wanted)
        if step is None:
            return
        assert not step.decode
        left = budget
        for chunk, name in zip(step.prefill, wanted, strict=False):
            expected = min(wanted[name], chunk.sequence.num_cached + left)
            assert (chunk.sequence.request_id, chunk.stop) == (name, expected)
            left -= chunk.stop - chunk.start
        assert not step.prefill or left == 0 or len(step.prefill) == len(wanted)
        for chunk in step.prefill:
            chunk.sequence.num_cached = chunk.stop
