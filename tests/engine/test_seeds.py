"""A seed gives the same answer through the engine: alone, among others, and after a preemption."""

from __future__ import annotations

import pytest

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.sequence import Sequence
from tests.support.engine import make_engine, make_requests, run, token_ids
from tests.support.random_model import random_language_model, small_config

SAMPLED = SamplingParams(
    max_new_tokens=14,
    temperature=1.0,
    top_k=30,
    top_p=0.95,
    min_p=0.01,
    presence_penalty=0.5,
    frequency_penalty=0.2,
    repetition_penalty=1.1,
    seed=3,
    ignore_eos=True,
)


@pytest.fixture(scope="module")
def model():
    return random_language_model(small_config(), seed=0)


def test_a_preempted_request_gives_the_same_answer(model):
    requests = make_requests(model, 6)
    calm = make_engine(model, max_running=6)
    expected = run(calm, requests, SAMPLED)
    assert calm.scheduler.num_preempted == 0
    # A pool that holds about two of them.
    tight = make_engine(model, max_running=6)
    pool = tight.scheduler.pool
    taken = pool.allocate(pool.num_free - 2 * pool.pages_for(70))
    assert taken
    events = run(tight, requests, SAMPLED)
    assert tight.scheduler.num_preempted > 0
    for name in requests:
        assert token_ids(events[name]) == token_ids(expected[name])
        assert len(token_ids(events[name])) == 14


def test_without_a_seed_each_request_gets_its_own_and_keeps_it(model):
    engine = make_engine(model)
    for name in "abc":
        engine.add(name, [5, 6], [], SamplingParams(temperature=1.0))
    seeds = [s.seed for s in engine.scheduler.waiting if isinstance(s, Sequence)]
    assert len(set(seeds)) == 3
    engine.add("d", [5, 6], [], SAMPLED)
    assert [s.seed for s in engine.scheduler.waiting if s.request_id == "d"] == [3]


def test_the_first_token_comes_with_timings(model):
    [events] = run(make_engine(model), {"a": ([5, 6, 7], [], [])}, SAMPLED).values()
    tokens = [event for event in events if hasattr(event, "token_ids")]
    assert tokens[0].timings.prefill > 0
    assert {event.timings for event in tokens[1:]} == {None}
