"""Both sides by hand: items of which only the last rows are needed, or none; rows that are needed once more."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from qwen3vl_disagg.core.errors import Failure
from qwen3vl_disagg.encode.embedding_cache import HeldItem
from qwen3vl_disagg.protocol.allocator import BlockAllocator
from qwen3vl_disagg.protocol.encode_sessions import PARKED
from qwen3vl_disagg.protocol.messages import Abort, Assign, Cancel, Grant, Header, ItemFailed, Nack, Resume, Room
from qwen3vl_disagg.protocol.session import DONE, GRANTED, HELD, IDLE, RECEIVING, Session, fits_whole
from qwen3vl_disagg.protocol.session_events import (
    Encoded,
    Expect,
    Recall,
    Release,
    Returned,
    RowsReady,
    SendHeader,
    SendPayload,
    StartEncode,
    Tell,
)
from tests.properties import encode_side
from tests.properties.language_side import DEADLINE, SIZES, Side, bodies, granted
from tests.properties.session_parts import LIMITS, arrived, ids, lost, make_visual

KEY = ("r", 0, 1)


def expect(side, rows, lacking, first_rows=(), request_id="r"):
    return side.do(Expect(request_id, [make_visual(n) for n in rows], lacking, DEADLINE, list(first_rows)))


def all_grants(side, actions, **where):
    """Receive and consume one item to its end: every grant on the way."""
    seen = []
    while side["r", 0].state != DONE:
        [body] = [b for b in bodies(actions) if isinstance(b, Room)]
        seen.append(body)
        side.receive("r", **where)
        actions = side.consume("r", attempt=where.get("attempt", 1))
    return seen


# ---- an item that begins in the middle ----


def test_rows_below_the_first_needed_are_not_asked_for():
    """Rows 3 to 7 of 8 through one block of 2: a grant from row 3, with the DeepStack of 3 to 7, and two resumes."""
    side = Side(blocks=1)
    expect(side, [8], [0], [3])
    [grant] = bodies(side.assign("r"))
    assert grant == Grant(
        **ids(KEY),
        row_start=3,
        row_stop=5,
        deepstack_start=3,
        deepstack_stop=8,
        row_runs=[2],
        deepstack_runs=[5],
        visual=make_visual(8),
        timeout_s=DEADLINE,
    )
    assert type(grant) is Grant
    assert side.counts("deepstack") == (5, 3, 0), "blocks for rows that nobody needs"
    side.header("r")
    assert side.payload("r")[1:] == [RowsReady(*KEY, 3, 5)]
    [resume] = bodies(side.consume("r"))
    assert resume == Resume(
        **ids(KEY), row_start=5, row_stop=7, deepstack_start=5, deepstack_stop=5, row_runs=[2], deepstack_runs=[]
    )
    assert type(resume) is Resume
    side.receive("r")
    side.consume("r")
    assert side.receive("r")[1:] == [RowsReady(*KEY, 7, 8), arrived(KEY)]
    side.consume("r")
    assert side.sessions.allocator.is_idle


@pytest.mark.parametrize(
    ("rows", "first", "blocks", "deepstack_blocks", "has_deepstack", "expected"),
    [
        (8, 3, 8, 3, True, [(3, 8, 3, 8)]),
        (8, 7, 8, 1, True, [(7, 8, 7, 8)]),
        (8, 3, 2, 3, True, [(3, 7, 3, 8), (7, 8, 7, 7)]),
        (8, 3, 8, 2, True, [(3, 7, 3, 7), (7, 8, 7, 8)]),  # ranged: 3 blocks of DeepStack never fit
        (8, 4, 8, 2, True, [(4, 8, 4, 8)]),  # of the whole item they would not fit either, of these rows they do
        (8, 4, 1, 2, True, [(4, 6, 4, 8), (6, 8, 6, 6)]),
        (8, 3, 2, 8, False, [(3, 7, 3, 3), (7, 8, 7, 7)]),
    ],
)
def test_which_rows_each_grant_of_a_partial_item_asks_for(
    rows, first, blocks, deepstack_blocks, has_deepstack, expected
):
    sizes = SIZES if has_deepstack else replace(SIZES, deepstack_embeddings=0)
    side = Side(blocks=blocks, deepstack_blocks=deepstack_blocks, row_sizes=sizes)
    expect(side, [rows], [0], [first])
    seen = all_grants(side, side.assign("r"))
    assert [(g.row_start, g.row_stop, g.deepstack_start, g.deepstack_stop) for g in seen] == expected
    assert [type(g) for g in seen] == [Grant] + [Resume] * (len(seen) - 1)
    assert side.sessions.allocator.is_idle


@pytest.mark.parametrize("body", [Nack, Abort])
@pytest.mark.parametrize("state", [GRANTED, RECEIVING, HELD, "consumed"])
def test_a_lost_attempt_begins_again_at_the_first_needed_row(state, body):
    """What was consumed of it is recalled; where nothing was received there is nothing to recall."""
    side = Side(blocks=1)
    expect(side, [8], [0], [3])
    side.assign("r")
    if state in (RECEIVING, HELD, "consumed"):
        side.header("r")
    if state in (HELD, "consumed"):
        side.payload("r")
    if state == "consumed":
        side.consume("r")
    actions = side.frame(0, body(**ids(KEY), reason="gone"))
    assert actions == [Recall(*KEY)] * (state in (HELD, "consumed")) + [lost(KEY, "gone")]
    assert (side["r", 0].received, side["r", 0].first) == (3, 3)
    actions = side.assign("r", attempt=2, rank=1)
    if state == RECEIVING:
        actions = side.payload("r", error="broken", is_broken=True)
    elif state == HELD:
        actions = side.do(Returned(*KEY))
    seen = all_grants(side, actions, rank=1, attempt=2)
    assert [(g.row_start, g.row_stop) for g in seen] == [(3, 5), (5, 7), (7, 8)]
    assert type(seen[0]) is Grant


def test_a_grant_that_is_void_with_its_link_is_made_again_from_the_first_needed_row():
    side = Side(blocks=1)
    expect(side, [8], [0], [3])
    side.assign("r")
    side.down(0)
    [grant] = bodies(side.up(0))
    assert (type(grant), grant.row_start, grant.deepstack_start, grant.deepstack_stop) == (Grant, 3, 3, 8)


def test_what_an_item_can_ever_want_is_that_of_its_needed_rows():
    visual, allocator = make_visual(8), BlockAllocator(num_blocks=3, num_deepstack_blocks=3, num_slots=1)
    for first, fits in [(0, False), (1, False), (2, True), (7, True)]:
        session = Session("r", 0, visual, DEADLINE)
        session.need_from(first)
        assert fits_whole(session, allocator, 2, SIZES) == fits


@pytest.mark.parametrize(
    ("lacking", "first_rows", "reason"),
    [
        ([0], [4], "needs item 0 from row 4 of 4"),
        ([0], [5], "needs item 0 from row 5 of 4"),
        ([1], [-1], "needs item 1 from row -1 of 6"),
        ([2], [0], "lacks item 2 of 2"),
        ([-1], [0], "lacks item -1 of 2"),
        ([0, 1], [3], "argument"),
        ([0], [3, 3], "argument"),
    ],
)
@pytest.mark.parametrize("is_again", [False, True])
def test_rows_that_an_item_does_not_have_are_refused_by_name(lacking, first_rows, reason, is_again):
    side = Side()
    if is_again:
        side.expect("r", 4, 6)
        side.assign("r")
    with pytest.raises(ValueError, match=reason):
        expect(side, [4, 6], lacking, first_rows)
    assert ("r" in side.sessions.requests) == is_again
    if is_again:
        assert side["r", 0].state == GRANTED


# ---- a full hit ----


def test_an_item_that_is_not_lacking_stands_in_nobodys_way():
    side = Side()
    expect(side, [4, 6, 2, 8], [1, 3], [2, 0])
    assert [side["r", i].state for i in range(4)] == [DONE, IDLE, DONE, IDLE]
    assert granted(side.assign("r", 3)) == []  # item 1 comes first
    assert granted(side.assign("r", 1)) == [("r", 1, 2, 6), ("r", 3, 0, 8)]
    assert side.counts("slots")[1] == 2


def test_an_attempt_at_an_item_that_is_not_lacking_is_sent_back():
    """The router may have assigned it before it heard that it is not needed any more."""
    side = Side()
    expect(side, [4], [])
    assert side["r", 0].state == DONE
    assert side.assign("r", attempt=3) == [arrived(("r", 0, 3))]
    assert side["r", 0].state == DONE
    assert side.do(Cancel(request_id="r")) == []
    assert side.sessions.is_idle


# ---- needed once more ----

STATES = [IDLE, "no link", "waiting", GRANTED, RECEIVING, HELD, "consumed", "all held", DONE]


def bring(side, state):
    """6 rows from row 1 on, through one block of 2."""
    expect(side, [6], [0], [1])
    if state == IDLE:
        return
    if state == "waiting":  # s has the block
        side.expect("s", 2)
        side.assign("s", rank=1)
    side.assign("r")
    if state == "no link":
        side.down(0)
    if state in (RECEIVING, HELD, "consumed"):
        side.header("r")
    if state in (HELD, "consumed"):
        side.payload("r")
    if state == "consumed":
        side.consume("r")
    while state in ("all held", DONE) and side["r", 0].received < 6:
        side.receive("r")
        if state == DONE or side["r", 0].received < 6:
            side.consume("r")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("first", [0, 1, 4, 6])
def test_a_request_that_gives_up_what_it_had_begins_anew(state, first):
    """The other end and the router are told of an attempt under way, the engine of rows that it may be reading; blocks
    go back to the pool; what comes next is what is needed now."""
    side = Side(blocks=1)
    bring(side, state)
    actions = expect(side, [6], [0] if first < 6 else [], [first] if first < 6 else [])
    is_held, is_under_way = state in (HELD, "all held"), state not in (IDLE, "all held", DONE)
    assert [a for a in actions if isinstance(a, Tell)] == [arrived(KEY)] * is_under_way
    aborts = [b for b in bodies(actions, 0) if isinstance(b, Abort)]
    assert [b.attempt for b in aborts] == [1] * (is_under_way and state != "no link")
    assert [a for a in actions if isinstance(a, Recall)] == [Recall(*KEY)] * is_held
    session = side["r", 0]
    assert (session.state, session.room, session.hold) == (DONE if first == 6 else IDLE, None, None)
    assert (session.first, session.received) == (first, first)
    assert side.counts("rows")[2] == (is_held or state == RECEIVING), "somebody may still write or read"
    if state == "waiting":
        side.do(Cancel(request_id="s"))
    if state == "no link":
        side.up(0)
    if state == RECEIVING:
        side.payload("r")
    if is_held:
        side.do(Returned(*KEY))
    assert side.sessions.allocator.is_idle
    if first < 6:
        seen = all_grants(side, side.do(Assign(request_id="r", item=0, attempt=2, encode_rank=1)), rank=1, attempt=2)
        assert seen[0].row_start == first
        assert [b.row_start for b in seen] == list(range(first, 6, 2))
        assert (seen[0].deepstack_start, seen[0].deepstack_stop) == (first, 6)


@pytest.mark.parametrize("state", [GRANTED, RECEIVING, HELD])
def test_frames_of_an_attempt_that_was_given_up_change_nothing(state):
    donor, side = Side(blocks=1), Side(blocks=1)
    for one in (donor, side):
        bring(one, state)
    header = donor.header_of("r")
    expect(side, [6], [0], [2])
    assert bodies(side.frame(0, header)) == [Nack(**ids(KEY), reason="no such session")]
    assert side.frame(0, Abort(**ids(KEY), reason="x")) == []
    assert side["r", 0].state == IDLE


def test_quarantined_blocks_of_a_lost_attempt_go_to_the_pool_when_the_request_gives_up():
    """They would have come back to the item; now others may have them."""
    side = Side(blocks=1)
    bring(side, HELD)
    side.frame(0, Abort(**ids(KEY), reason="lost"))
    assert side["r", 0].quarantined_as == KEY
    side.expect("s", 2)
    assert granted(side.assign("s", rank=1)) == []
    expect(side, [6], [])
    assert granted(side.do(Returned(*KEY))) == [("s", 0, 0, 2)]


def test_a_request_keeps_its_place_in_the_order():
    side = Side(blocks=1)
    bring(side, GRANTED)
    side.expect("s", 2)
    expect(side, [6], [])
    expect(side, [6], [0], [4])
    side.down(0)
    side.down(1)
    side.assign("s", rank=1)
    side.assign("r", attempt=2)
    side.up(0)
    assert granted(side.up(1)) == []
    assert side["r", 0].state == GRANTED


# ---- the encode side ----


@pytest.mark.parametrize("kind", [Grant, Resume])
def test_the_encode_side_takes_a_grant_from_any_row_and_knows_a_resume_by_its_kind(kind):
    """A resume for what is not here is too late."""
    side, key = encode_side.Side(), ("a", 0, 1)
    item = {"visual": make_visual(6), "timeout_s": 100.0} if kind is Grant else {}
    runs = {"row_runs": [2], "deepstack_runs": [3]}
    body = kind(**ids(key), **item, row_start=3, row_stop=5, deepstack_start=3, deepstack_stop=6, **runs)
    actions = side.frame(body)
    if kind is Resume:
        assert encode_side.bodies(actions) == [Nack(**ids(key), reason="gone")]
        return
    assert actions == [StartEncode(key, make_visual(6), False)]
    assert side.do(Encoded(key)) == [SendHeader(0, 1, 1, body)]
    assert side.header_ok(key, 3) == [SendPayload(0, 1, body, LIMITS.payload_s)]
    side.sent(key)
    side.ack(key, 5)
    assert side.state(key) == PARKED
    [header] = side.grant(key, 5)
    assert header.grant.row_start == 5
    side.header_ok(key, 5)
    side.sent(key)
    assert side.ack(key, 6) == [Release(key)]


def test_what_waits_for_a_place_says_for_how_long():
    side, first, second = encode_side.Side(max_items=1, max_urgent=0), ("a", 0, 1), ("b", 0, 1)
    side.grant(first)
    assert not [action for action in side.grant(second) if isinstance(action, StartEncode)]
    side.now += 3.0
    actions = side.do(ItemFailed(**ids(first), failure=Failure.of(ValueError())))
    [start] = [action for action in actions if isinstance(action, StartEncode)]
    assert (start.attempt, start.waited_s) == (second, 3.0)


def test_the_wait_is_what_stages_do_not_explain():
    ranges = {"row_start": 0, "row_stop": 1, "deepstack_start": 0, "deepstack_stop": 1}
    made = {"grid": (1, 2, 2), "row_digests": [0], "deepstack_digests": [0], "preprocess_ms": 20.0, "encode_ms": 30.0}
    header = Header(**ids(("a", 0, 1)), total_rows=1, **ranges, **made)
    item = SimpleNamespace(header=lambda grant: header)
    assert HeldItem(item, None, waited_s=0.2).header(None).queue_ms == pytest.approx(150.0)
    cached = HeldItem(item, None, is_cached=True, waited_s=0.2).header(None)
    assert (cached.queue_ms, cached.encode_ms) == (pytest.approx(200.0), 0.0)


def test_a_grant_from_the_middle_may_come_again():
    """The link that carried the first one died; rows below it are not asked for this time either."""
    side, key = encode_side.Side(), ("a", 0, 1)
    item, runs = {"visual": make_visual(6), "timeout_s": 100.0}, {"row_runs": [3], "deepstack_runs": [3]}
    body = Grant(**ids(key), **item, row_start=3, row_stop=6, deepstack_start=3, deepstack_stop=6, **runs)
    side.frame(body)
    side.do(Encoded(key))
    side.header_ok(key, 3)
    side.down()
    assert side.state(key) == PARKED
    side.up()
    assert side.frame(body) == [SendHeader(0, 2, 1, body)]
