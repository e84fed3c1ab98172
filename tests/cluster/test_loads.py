"""A rank that could step and does not is noticed; one that has nothing to do is not."""

from __future__ import annotations

from qwen3vl_disagg.cluster.loads import STUCK_S, Loads
from qwen3vl_disagg.protocol.messages import EncodeLoad, LanguageLoad

KEY = ("language", 1)


def test_time_counts_from_the_last_step():
    loads = Loads()
    loads.note(KEY, LanguageLoad(num_steps=5, can_step=True), 0.0)
    loads.note(KEY, LanguageLoad(num_steps=6, can_step=True), 8.0)
    loads.note(KEY, LanguageLoad(num_steps=6, can_step=True, waiting=3), 15.0)  # more to do is no step
    assert loads.stuck(8.0 + STUCK_S - 0.1) == []
    assert loads.stuck(8.0 + STUCK_S + 1) == ["language rank 1 has not stepped for 11 s"]
    loads.note(KEY, LanguageLoad(num_steps=7, can_step=True), 30.0)
    assert loads.stuck(31.0) == []


def test_rest_is_not_stuck_nor_is_the_first_work_after_it():
    loads = Loads()
    loads.note(KEY, LanguageLoad(num_steps=5), 0.0)
    loads.note(("encode", 0), EncodeLoad(waiting=9), 0.0)
    assert loads.stuck(1000.0) == []
    loads.note(KEY, LanguageLoad(num_steps=5, can_step=True), 1000.0)
    assert loads.stuck(1001.0) == []
    assert loads.stuck(1000.0 + STUCK_S) != []
    loads.forget(KEY)
    assert loads.stuck(5000.0) == []


def test_sums_are_by_role():
    loads = Loads()
    loads.note(KEY, LanguageLoad(running=2, waiting=1, kv_pages_used=1, kv_pages=4), 0.0)
    loads.note(("language", 2), LanguageLoad(running=3, kv_pages_used=3, kv_pages=4), 0.0)
    loads.note(("encode", 0), EncodeLoad(running=5, waiting=6), 0.0)
    assert loads.sums() == {"running": 5, "waiting": 1, "kv_cache": 0.5, "encoding": 5, "to_encode": 6}
