"""What a request costs, and when its first token is due."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen3vl_disagg.core.due import FIRST_COME, PATIENCE, Prices, allowance
from qwen3vl_disagg.core.requests import ItemTimings, RequestTimings


def test_an_allowance_is_target_and_price_and_at_most_half_the_time_limit():
    assert allowance(1.0, 0.5, 600.0) == 1.0 + PATIENCE * 0.5
    assert allowance(1.0, 1000.0, 600.0) == 300.0
    assert allowance(FIRST_COME, 1000.0, 600.0) == FIRST_COME
    assert 12.0 + FIRST_COME - 34.0 == FIRST_COME, "the same on every clock"


@dataclass(frozen=True)
class Asked:
    """Comes so many seconds after the one before it."""

    after: int
    target: int
    price: int
    timeout: int


ASKED = st.builds(Asked, st.integers(0, 30), st.integers(0, 20), st.integers(0, 20), st.integers(1, 60))


@given(st.lists(ASKED, min_size=2, max_size=12))
@example([Asked(0, 0, 18, 1), Asked(0, 20, 20, 30), Asked(16, 0, 0, 1)])
def test_who_comes_later_than_an_allowance_does_not_pass(asked):
    """One server, one request at a time, each as long as its price."""
    came = list(accumulate(one.after for one in asked))
    waiting = {
        number: (came[number] + allowance(one.target, one.price, one.timeout), number)
        for number, one in enumerate(asked)
    }
    begun: dict[int, float] = {}
    now = 0.0
    while waiting:
        now = max(now, min(came[number] for number in waiting))
        first = min((due, number) for due, number in waiting.values() if came[number] <= now)[1]
        del waiting[first]
        begun[first] = now
        now += asked[first].price
    order = list(begun)
    for a, one in enumerate(asked):
        limits = came[a] + one.target + PATIENCE * one.price, came[a] + one.timeout / 2
        passed_by = [b for b in order[: order.index(a)] if b > a]
        assert all(came[b] < min(limits) for b in passed_by), f"{a} is passed by {passed_by}"
        before = [other.price for b, other in enumerate(asked) if b < a or (b > a and came[b] < min(limits))]
        assert begun[a] - came[a] <= sum(before)


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


@pytest.mark.parametrize("ms", [math.nan, math.inf, -math.inf, -5.0, 0.0])
def test_what_is_no_time_changes_no_price(ms):
    prices = Prices()
    before = prices.of(1, 0), prices.of(0, 1)
    prices.learn(50, taken([20], [ms], batches=[1], prefill=ms))
    assert (prices.of(1, 0), prices.of(0, 1)) == before


def test_one_stall_hardly_changes_prices_and_what_is_slow_for_good_does():
    prices = Prices()

    def learn(ms: float) -> None:
        prices.learn(100, taken([100], [ms], batches=[1], prefill=ms))

    for _ in range(300):
        learn(100.0)
    assert prices.of(1, 0) == pytest.approx(1e-3, rel=1e-3)
    learn(600_000.0)
    assert 1e-3 < prices.of(1, 0) < 1.25e-3
    assert 1e-3 < prices.of(0, 1) < 1.25e-3
    for _ in range(100):
        learn(10_000.0)
    assert prices.of(1, 0) == pytest.approx(0.1, rel=0.05)
    assert prices.of(0, 1) == pytest.approx(0.1, rel=0.05)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 1e6), st.floats(0, 1e6)), max_size=20))
def test_a_price_is_always_a_number_and_grows_with_the_work(learnt):
    prices = Prices()
    for count, encode, prefill in learnt:
        prices.learn(count, taken([count], [encode], batches=[1], prefill=prefill))
    assert 0 <= prices.of(1, 1) <= prices.of(2, 2) < math.inf
