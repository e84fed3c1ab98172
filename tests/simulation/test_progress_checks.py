"""What the simulator's checks of progress take for a fault, and what they leave to the time that a message takes."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace

import msgspec
import pytest

from qwen3vl_disagg.core.errors import Failure, ServerError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.protocol.encode_sessions import QUEUED
from qwen3vl_disagg.protocol.layout import RowSizes
from qwen3vl_disagg.protocol.messages import Abort, Grant, ItemFailed, ItemLost
from qwen3vl_disagg.protocol.router import RouterLimits
from qwen3vl_disagg.protocol.routing import FromRank, RankDown
from tools.simulation.cluster import Cluster, Sizes
from tools.simulation.runner import simulate
from tools.simulation.world import Violation, World

ATTEMPT = ("r0", 0, 1)
NEWS_TAKE_S = 9.0
"""Longer than any state of a session but the longest; a link whose frames are late, one behind the other, takes it."""


@pytest.fixture
def cluster():
    """Nothing fails; an encode rank has no place for an item that its language rank does not know."""
    world = World(Random(0), frozenset(), 0.0, 0.0)
    sizes = Sizes(1, 1, 2, 4, 4, 2, RowSizes(4, 4, 12, 64, 4), RouterLimits())
    cluster = Cluster(world, sizes)
    world.run(1.2)
    sessions = cluster.encodes[0].sessions
    sessions.limits = msgspec.structs.replace(sessions.limits, max_items=0)
    visual = VisualItem(modality="image", digest="d", num_bytes=1, grid=(1, 2, 4), num_rows=2, offset=0, param="")
    cluster.issued_at[ATTEMPT] = world.now
    runs = {"row_runs": [2], "deepstack_runs": [2]}
    say(
        cluster,
        Grant,
        row_start=0,
        row_stop=2,
        deepstack_start=0,
        deepstack_stop=2,
        visual=visual,
        timeout_s=60,
        **runs,
    )
    world.run(1.3)
    assert sessions.items[ATTEMPT].state == QUEUED
    return cluster


def say(cluster, kind, **fields):
    """What the language rank says of the attempt."""
    body = kind(**dict(zip(("request_id", "item", "attempt"), ATTEMPT, strict=True)), **fields)
    language = cluster.languages[0]
    language.links[0].to_encode.send(language.sessions.links[0].send(body, cluster.world.now).frame)


def test_an_item_may_be_kept_while_the_news_that_nobody_wants_it_is_under_way(cluster):
    encode, world = cluster.encodes[0], cluster.world
    encode.links[0].to_encode.last = heard_at = world.now + NEWS_TAKE_S
    say(cluster, Abort, reason="not wanted")
    world.run(heard_at - 0.1)
    assert encode.sessions.items[ATTEMPT].state == QUEUED
    world.run(heard_at + 5.0)
    assert not encode.sessions.items


def test_an_item_is_kept_for_nobody_once_later_news_has_come(cluster):
    with pytest.raises(Violation, match=r"I15: \('r0', 0, 1\) is kept for nobody"):
        cluster.world.run(cluster.world.now + 8.0)


def test_late_news_of_other_things_are_no_excuse(cluster):
    """They only tell later that it is kept for nobody."""
    encode, world = cluster.encodes[0], cluster.world
    encode.links[0].to_encode.last = heard_at = world.now + NEWS_TAKE_S
    world.run(heard_at)
    with pytest.raises(Violation, match="is kept for nobody"):
        world.run(heard_at + 5.0)


def test_two_lost_links_of_one_rank_are_two_failures_and_its_death_takes_back_the_last(cluster):
    checks, key = cluster.hub.checks, ATTEMPT[:2]
    checks._given[0].add("r0")
    for attempt in (1, 2):
        checks._attempts[key], cluster.hub.counts._at[key] = (attempt, checks._worker(0)), (attempt, 0)
        lost = ItemLost(request_id="r0", item=0, attempt=attempt, reason="no link", dead_epoch=attempt)
        checks.heard(FromRank("language", 0, lost))
    assert checks._failed[key] == {1, 2}
    checks.heard(RankDown("encode", 0))
    assert checks._failed[key] == {1}


def test_what_had_failed_before_its_link_was_lost_stays_a_failure_when_the_rank_dies(cluster):
    checks, key = cluster.hub.checks, ATTEMPT[:2]
    checks._given[0].add("r0")
    checks._attempts[key], cluster.hub.counts._at[key] = (1, checks._worker(0)), (1, 0)
    failure = Failure.of(ServerError("out of memory"))
    checks.heard(FromRank("encode", 0, ItemFailed(request_id="r0", item=0, attempt=1, failure=failure)))
    lost = ItemLost(request_id="r0", item=0, attempt=1, reason="no link", dead_epoch=1)
    checks.heard(FromRank("language", 0, lost))
    checks.heard(RankDown("encode", 0))
    assert checks._failed[key] == {1}


def test_what_comes_to_a_frozen_process_keeps_its_order_when_it_is_frozen_again():
    world, seen = World(Random(0), frozenset(), 0.0, 0.0), []
    process = SimpleNamespace(is_dead=False, frozen_until=2.0, slowness=1.0)
    world.at_time(1.0, process, seen.append, "first")
    world.at_time(1.5, None, setattr, process, "frozen_until", 3.0)
    world.at_time(1.7, process, seen.append, "second")
    world.run(4.0)
    assert seen == ["first", "second"]


@pytest.mark.parametrize(("seed", "number"), [(4000, 3803), (4001, 3550), (5005, 11165)])
def test_what_takes_long_or_happens_twice_is_no_fault(seed, number):
    """Links lost twice; a grant to a slow rank and, behind it, the news that the item is there."""
    result = simulate(1, seed, first=number)
    assert result.violation is None, result.violation
