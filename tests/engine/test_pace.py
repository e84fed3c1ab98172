"""Chunks of prompts that follow a target for the gap between two tokens: on machines whose rates are known exactly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.engine.pace import LEAST, Pace
from tests.support.engine import make_engine, make_requests, run
from tests.support.random_model import random_language_model, small_config

MOST = 4096


def settle(pace: Pace, decode_s: float, fixed_s: float, token_s: float, rounds: int = 40) -> float:
    """Whole chunks and decode steps in turns on a machine of these costs. Returns the last gap, in seconds."""
    for _ in range(rounds):
        pace.decoded(decode_s)
        pace.prefilled(pace.chunk, fixed_s + pace.chunk * token_s)
    return decode_s + fixed_s + pace.chunk * token_s


def test_by_hand():
    """Decode steps of 20 ms and 1 ms a token: a target of 100 ms leaves room for 80 tokens."""
    pace = Pace(64, MOST, 100.0, is_cuda=False)
    settle(pace, 0.020, 0.0, 0.001)
    assert pace.chunk == 80


def test_auto_is_three_steps_or_the_default():
    slow, fast = Pace(64, MOST, "auto", is_cuda=False), Pace(64, MOST, "auto", is_cuda=False)
    settle(slow, 0.100, 0.0, 0.001)
    settle(fast, 0.010, 0.0, 0.001)
    assert slow.target_s == pytest.approx(0.3)
    assert slow.chunk == pytest.approx(200, abs=16)
    assert fast.target_s == pytest.approx(0.1)
    assert fast.chunk == pytest.approx(90, abs=16)


def test_auto_never_goes_below_the_first_chunk_and_a_given_target_does():
    """0.1 s for the weights alone: no number of tokens comes near a gap of 0.1 s."""
    auto, given_ = Pace(64, MOST, "auto", is_cuda=False), Pace(64, MOST, 100.0, is_cuda=False)
    settle(auto, 0.020, 0.1, 0.001)
    settle(given_, 0.020, 0.1, 0.001)
    assert (auto.chunk, given_.chunk) == (64, LEAST)


@given(
    st.floats(0.001, 0.5),
    st.floats(0.0, 0.1),
    st.floats(1e-6, 0.01),
    st.floats(10, 2000),
    st.integers(1, MOST),
)
def test_the_gap_is_near_the_target_wherever_it_can_be(decode_s, fixed_s, token_s, target_ms, first):
    pace = Pace(first, MOST, target_ms, is_cuda=False)
    gap = settle(pace, decode_s, fixed_s, token_s, rounds=400)  # where weights are nearly all of a step, it takes many
    assert 1 <= pace.chunk <= MOST
    room = max(target_ms / 1e3 - decode_s, target_ms / 4e3)
    if pace.chunk > LEAST:
        assert gap <= decode_s + 1.1 * room + 8 * token_s
    if pace.chunk < MOST - 16:
        assert gap + 8 * token_s >= decode_s + 0.9 * room


def test_short_chunks_teach_nothing_unless_they_are_too_slow():
    pace = Pace(64, MOST, 100.0, is_cuda=False)
    pace.decoded(0.02)
    pace.prefilled(3, 0.004)
    assert pace.chunk == 64
    pace.prefilled(32, 0.200)
    assert pace.chunk < 64


def test_one_slow_step_is_soon_forgotten():
    pace = Pace(64, MOST, 100.0, is_cuda=False)
    settle(pace, 0.020, 0.0, 0.001)
    pace.prefilled(pace.chunk, 10.0)
    assert pace.chunk >= 32
    settle(pace, 0.020, 0.0, 0.001, rounds=4)
    assert pace.chunk >= 64


def test_a_slow_first_step_and_single_slow_ones_do_not_move_the_target():
    pace = Pace(64, MOST, "auto", is_cuda=False)
    for seconds in (5.0, 0.02, 0.02, 0.02, 4.0, 0.02):
        pace.decoded(seconds)
    assert pace.target_s == pytest.approx(0.1)


def test_never_above_what_a_step_may_take():
    pace = Pace(64, 20, "auto", is_cuda=False)
    settle(pace, 0.001, 0.0, 1e-6)
    assert pace.chunk == 20
    assert Pace(64, 8, "auto", is_cuda=False).chunk == 8


@pytest.mark.parametrize(("target_ms", "moves"), [(None, 0), (60_000.0, 1), (0.001, -1)])
def test_an_engine_goes_by_what_its_steps_take(target_ms, moves):
    model = random_language_model(small_config(), seed=0)
    requests = make_requests(model, 6)
    engine = make_engine(model, max_prefill_tokens=256, chunk_tokens=32, gap_target_ms=target_ms)
    events = run(engine, requests, SamplingParams(max_new_tokens=4))
    assert set(events) == set(requests)
    chunk = engine.scheduler.chunk_tokens
    assert (chunk > 32) - (chunk < 32) == moves
    assert engine.outlook(1).chunk == 0, "there are no prompts any more"
    engine.add("more", [5, 6, 7], [], SamplingParams(max_new_tokens=1))
    engine.admit()
    assert engine.outlook(1).chunk == chunk
