"""The scheduler with no model: made-up sequences, hypothesis arrivals, cancels and page pressure."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.requests import SamplingParams
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
    for sequence in (step.prefill or step.decode) if step else []:
        sequence.num_cached = sequence.num_prompt if step.prefill else sequence.num_cached + 1
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
        for sequence in step.prefill:
            sequence.num_cached = sequence.num_prompt
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
    for step in range(sum(new for _, new in requests) * 3 + 10):
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
