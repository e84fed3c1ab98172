"""How much may wait, and how long it will take."""

from __future__ import annotations

import pytest

from qwen3vl_disagg.core.errors import OverloadedError
from qwen3vl_disagg.protocol.admission import Admission
from qwen3vl_disagg.protocol.routing import RouterLimits


def admission(**limits: int) -> Admission:
    return Admission(RouterLimits(**limits))


@pytest.mark.parametrize("count", [100, 300])
def test_many_short_questions_at_once_are_no_overload(count):
    """Whatever their answers may be in length, and however little a rank holds."""
    queue = admission()
    for number in range(count):
        costs = Admission.costs(300, 200_300, 1)
        assert queue.refusal(0.0, kv_tokens=1000, cost=sum(costs)) is None
        queue.add(str(number), costs, 0.0)


def test_what_may_wait_grows_with_what_the_ranks_hold():
    queue = admission(max_waiting_tokens=1000, max_waiting_fills=2)
    queue.add("a", [900], 0.0)
    assert isinstance(queue.refusal(0.0, kv_tokens=0, cost=200), OverloadedError)
    assert queue.refusal(0.0, kv_tokens=550, cost=200) is None
    assert isinstance(queue.refusal(0.0, kv_tokens=549, cost=200), OverloadedError)


def test_the_time_follows_from_the_queue():
    queue = admission(max_waiting=10)
    for number in range(10):
        queue.add(str(number), [1000], 0.0)
    for number in range(4):
        queue.leave(str(number), 1.0 + number, is_served=True)
    # 1,000 a second were served, 6,000 wait
    assert queue.retry_after(4.0) == pytest.approx(6.0, rel=0.15)
    for number in range(100):
        queue.add(f"more {number}", [1000], 4.0)
    assert queue.retry_after(4.0) == 60.0
    refusal = queue.refusal(4.0, kv_tokens=0)
    assert refusal is not None
    assert refusal.retry_after == 60.0


def test_before_anything_was_served_the_time_so_far_is_a_hint():
    queue = admission()
    assert queue.retry_after(100.0) == 1.0
    queue.add("a", [1000], 100.0)
    assert queue.retry_after(100.0) == 1.0
    assert 5.0 < queue.retry_after(108.0) < 8.1


def test_time_without_a_queue_does_not_count_and_who_leaves_was_not_served():
    queue = admission()
    queue.add("a", [1000], 0.0)
    queue.leave("a", 1.0, is_served=True)
    queue.add("b", [5000], 1000.0)
    assert queue.retry_after(1000.0) == pytest.approx(5.0, rel=0.1)
    queue.leave("b", 1000.0, is_served=False)
    queue.leave("b", 1000.0, is_served=False)
    assert queue.retry_after(1000.0) == 1.0
    assert queue.refusal(1000.0, kv_tokens=0, cost=10**9) is None


def test_those_that_are_on_their_way_count():
    queue = admission(max_waiting=10)
    queue.add("a", [1], 0.0)
    assert queue.refusal(0.0, kv_tokens=0, num_coming=8) is None
    assert queue.refusal(0.0, kv_tokens=0, num_coming=9) is not None


def test_answers_to_one_prompt_wait_one_by_one_and_their_prompt_costs_once():
    queue = admission(max_waiting=4, max_waiting_tokens=500)
    assert Admission.costs(300, 350, 3) == [350, 50, 50]
    assert queue.refusal(0.0, kv_tokens=0, cost=10**6, num_new=100) is None  # alone it always fits
    queue.add("a", Admission.costs(300, 350, 3), 0.0)
    assert queue.refusal(0.0, kv_tokens=0, cost=50) is None
    assert queue.refusal(0.0, kv_tokens=0, cost=51) is not None
    assert queue.refusal(0.0, kv_tokens=0, num_new=2) is not None
    queue.leave("a", 0.0, sample=1, is_served=True)
    queue.leave("a", 0.0, sample=1, is_served=True)
    assert queue.refusal(0.0, kv_tokens=0, cost=100, num_new=2) is None
    assert queue.refusal(0.0, kv_tokens=0, cost=101) is not None
    queue.leave("a", 0.0, is_served=False)
    assert queue.refusal(0.0, kv_tokens=0, cost=10**6, num_new=100) is None
