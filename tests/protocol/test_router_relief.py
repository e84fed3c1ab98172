"""A rank that is slow but alive loses what it has to one that has nothing to do."""

from __future__ import annotations

import pytest

from qwen3vl_disagg.protocol.messages import Assign, EncodingBegun, ItemFailed, ItemReceived, Leaving, LinksUp
from qwen3vl_disagg.protocol.routing import RankDown, RankUp, RouterLimits
from qwen3vl_disagg.protocol.session_events import Tick
from tests.support.routing import BAD_KEPT, Script

RELIEF_S = RouterLimits().relief_s


def at(script: Script, now: float) -> list[Assign]:
    script.now = now
    script.do(Tick())
    return script.assigned()


def taught(seconds: float = 0.1, encode: int = 2) -> tuple[Script, Assign]:
    """All encode ranks have shown how fast they are, and one has an item since 100 s."""
    script, seen = Script(encode), set[int]()
    for n in range(20):
        script.now = float(n)
        language = script.start(f"t{n}", f"t{n}")
        [assign] = script.assigned()
        script.now += seconds
        script.language_says(language, ItemReceived(request_id=f"t{n}", item=0, attempt=1))
        seen.add(assign.encode_rank)
    assert seen == set(range(encode))
    script.now = 100.0
    script.start("slow", "slow")
    [assign] = script.assigned()
    return script, assign


def test_an_idle_rank_takes_it_once_and_it_does_not_come_back():
    script, first = taught()
    assert at(script, 100.0 + RELIEF_S - 0.1) == []
    [second] = at(script, 100.0 + RELIEF_S + 0.1)
    assert (second.request_id, second.item, second.attempt) == ("slow", 0, 2)
    assert second.encode_rank == 1 - first.encode_rank
    assert at(script, 190.0) == []
    item = script.router._requests["slow"].items[0]
    assert item.failures == 0
    assert not script.router._attempts.ranks[first.encode_rank].jobs


@pytest.mark.parametrize("dies", [False, True])
def test_it_does_not_come_back_either_when_the_one_that_took_it_fails(dies):
    script, first = taught(encode=3)
    [second] = at(script, 100.0 + RELIEF_S + 0.1)
    if dies:
        script.do(RankDown("encode", second.encode_rank))
    else:
        failed = ItemFailed(request_id="slow", item=0, attempt=2, failure=BAD_KEPT)
        script.encode_says(second.encode_rank, failed)
    [third] = script.assigned()
    assert third.encode_rank not in (first.encode_rank, second.encode_rank)


def test_a_slow_rank_is_asked_again_before_one_that_has_failed():
    script, first = taught()
    [second] = at(script, 100.0 + RELIEF_S + 0.1)
    script.encode_says(second.encode_rank, ItemFailed(request_id="slow", item=0, attempt=2, failure=BAD_KEPT))
    assert [assign.encode_rank for assign in script.assigned()] == [first.encode_rank]


def test_it_is_slow_only_beside_what_others_take():
    script, first = taught(seconds=3.0)
    assert at(script, 100.0 + 14.9) == []
    [second] = at(script, 100.0 + 15.1)
    assert second.encode_rank != first.encode_rank


def test_a_rank_that_has_work_takes_none():
    script, first = taught()
    while True:
        script.start(f"b{script.router._num_submitted}", f"b{script.router._num_submitted}")
        [assign] = script.assigned()
        if assign.encode_rank != first.encode_rank:
            break
    assert at(script, 104.0) == []


@pytest.mark.parametrize("why", ["leaving", "failed"])
def test_a_rank_that_goes_or_has_failed_with_it_takes_none(why):
    script, first = taught()
    other = 1 - first.encode_rank
    if why == "leaving":
        script.encode_says(other, Leaving())
        assert at(script, 104.0) == []
        return
    failed = ItemFailed(request_id="slow", item=0, attempt=1, failure=BAD_KEPT)
    script.encode_says(first.encode_rank, failed)
    [second] = script.assigned()
    assert second.encode_rank == other
    assert at(script, 104.0) == []


def test_what_has_killed_a_rank_is_not_handed_around():
    script, first = taught()
    script.encode_says(first.encode_rank, EncodingBegun(digest="slow"))
    script.do(RankDown("encode", first.encode_rank))
    [second] = script.assigned()
    assert second.is_alone
    script.do(RankUp("encode", first.encode_rank))
    script.encode_says(first.encode_rank, LinksUp(language_ranks=script.languages))
    assert at(script, 130.0) == []


def test_nothing_is_known_before_something_has_arrived():
    script = Script()
    script.start("slow", "slow")
    assert len(script.assigned()) == 1
    assert at(script, 60.0) == []
