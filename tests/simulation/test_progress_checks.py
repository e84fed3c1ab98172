"""What the simulator's checks of progress take for a fault, and what they leave to the time that a message takes."""

from __future__ import annotations

import pytest

from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.protocol.encode_sessions import ASSIGNED
from qwen3vl_disagg.protocol.layout import RowSizes
from qwen3vl_disagg.protocol.messages import Abort, Cancel, EncodeItem
from qwen3vl_disagg.protocol.router import RouterLimits
from tools.simulation.cluster import Cluster, Sizes
from tools.simulation.world import Violation, World

ATTEMPT = ("r0", 0, 1)
NEWS_TAKE_S = 9.0
"""Longer than any state of a session but the longest; a link whose frames are late, one behind the other, takes it."""


@pytest.fixture
def cluster():
    """Nothing fails; an encode rank has an item that neither its language rank nor the hub knows."""
    world = World(0, frozenset(), 0.0, 0.0)
    sizes = Sizes(1, 1, 2, 4, 4, 2, RowSizes(4, 4, 12, 64, 4), RouterLimits())
    cluster = Cluster(world, sizes)
    world.run(1.2)
    encode = cluster.encodes[0]
    visual = VisualItem(
        modality="image", digest="d", num_bytes=1, grid=(1, 2, 4), num_rows=2, offset=0, param="", salt=""
    )
    cluster.issued_at[ATTEMPT] = world.now
    request_id, item, attempt = ATTEMPT
    encode.from_hub(
        EncodeItem(
            request_id=request_id,
            item=item,
            attempt=attempt,
            language_rank=0,
            visual=visual,
            visual_token_id=7,
            timeout_s=60.0,
        )
    )
    assert encode.sessions.items[ATTEMPT].state == ASSIGNED
    return cluster


def abort(cluster):
    request_id, item, attempt = ATTEMPT
    language = cluster.languages[0]
    body = Abort(request_id=request_id, item=item, attempt=attempt, reason="the item is here")
    language._send_frame(language.sessions.links[0].send(body, cluster.world.now))


def cancel(cluster):
    cluster.encodes[0].from_hub_channel.send(Cancel(request_id=ATTEMPT[0]))


@pytest.mark.parametrize(
    ("way", "tell"),
    [
        (lambda encode: encode.links[0].to_encode, abort),
        (lambda encode: encode.from_hub_channel, cancel),
    ],
    ids=["of the language rank", "of the hub"],
)
def test_an_item_may_be_kept_while_the_news_that_nobody_wants_it_is_under_way(cluster, way, tell):
    encode, world = cluster.encodes[0], cluster.world
    way(encode).last = heard_at = world.now + NEWS_TAKE_S
    tell(cluster)
    world.run(heard_at - 0.1)
    assert encode.sessions.items[ATTEMPT].state == ASSIGNED
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
