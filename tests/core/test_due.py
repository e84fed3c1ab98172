"""What a request costs, and when its first token is due."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.due import FIRST_COME, PATIENCE, Prices, allowance
from qwen3vl_disagg.core.requests import ItemTimings, RequestTimings


def test_an_allowance_is_target_and_price_and_at_most_the_time_limit():
    assert allowance(1.0, 0.5, 600.0) == 1.0 + PATIENCE * 0.5
    assert allowance(1.0, 1000.0, 600.0) == 600.0
    assert allowance(FIRST_COME, 1000.0, 600.0) == FIRST_COME
    assert 12.0 + FIRST_COME - 34.0 == FIRST_COME, "the same on every clock"


TIMES = st.floats(0, 1e4)


@given(st.tuples(TIMES, TIMES, TIMES, TIMES), st.tuples(TIMES, TIMES, TIMES, TIMES))
def test_who_comes_later_than_an_allowance_does_not_pass(one, other):
    (a, *of_a), (b, *of_b) = one, other
    p, q = allowance(*of_a), allowance(*of_b)
    assert p >= 0
    assert q >= 0
    if b >= a + p:
        assert b + q >= a + p


def taken(num_rows: list[int], encode: list[float], *, batches: list[int], prefill: float, cached: int = 0):
    rows = zip(num_rows, encode, batches, strict=True)
    items = [ItemTimings(rows=n, encode=ms, batch=batch, encode_rank=0, cached=ms == 0) for n, ms, batch in rows]
    return RequestTimings(items=items, prefill=prefill, cached_tokens=cached)


def test_prices_come_to_what_was_measured():
    """4 ms a row, a batch counted once; 2 ms a token that was not cached. Items that were cached say nothing."""
    prices = Prices()
    for _ in range(300):
        prices.learn(150, taken([100, 100, 50], [800.0, 800.0, 0.0], batches=[7, 7, 0], prefill=200.0, cached=50))
    assert prices.of(10, 0) == pytest.approx(0.04, rel=1e-3)
    assert prices.of(0, 10) == pytest.approx(0.02, rel=1e-3)
    assert prices.of(10, 10) == pytest.approx(0.06, rel=1e-3)


def test_what_was_not_measured_changes_no_price():
    prices = Prices()
    before = prices.of(1, 0), prices.of(0, 1)
    prices.learn(50, taken([20], [0.0], batches=[0], prefill=0.0, cached=50))
    assert (prices.of(1, 0), prices.of(0, 1)) == before


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 1e6), st.floats(0, 1e6)), max_size=20))
def test_a_price_is_always_a_number_and_grows_with_the_work(learnt):
    prices = Prices()
    for count, encode, prefill in learnt:
        prices.learn(count, taken([count], [encode], batches=[1], prefill=prefill))
    assert 0 <= prices.of(1, 1) <= prices.of(2, 2) < math.inf
