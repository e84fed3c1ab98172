"""The language side by hand: frames too late, twice or for nobody; links; quarantine; what was a deadlock once."""

from __future__ import annotations

import msgspec
import pytest

from qwen3vl_disagg.protocol.messages import Abort, Ack, Assign, Beat, Cancel, Frame, Nack, Stale
from qwen3vl_disagg.protocol.session import DONE, GRANTED, HELD, IDLE, RECEIVING, WAITING
from qwen3vl_disagg.protocol.session_events import (
    BreakLink,
    Consumed,
    Expect,
    FrameIn,
    LinkDown,
    LinkUp,
    Recall,
    Returned,
    RowsReady,
    SendFrame,
)
from tests.properties.language_side import DEADLINE, Side, bodies, granted
from tests.properties.session_parts import arrived, ids, lost, make_visual

KEY = ("r", 0, 1)
STATES = [IDLE, "no link", GRANTED, RECEIVING, HELD, DONE]


def state_of(side):
    return [
        (s.key, s.state, s.received, s.grant, s.room, s.hold, s.encode_rank)
        for request in side.sessions.requests.values()
        for s in request.sessions
    ], [side.sessions.allocator.free_ids(pool) for pool in ("rows", "deepstack", "slots")]


# ---- frames ----


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("which", ["header", "nack", "abort"])
@pytest.mark.parametrize("how", ["older attempt", "newer attempt", "other item", "unknown request", "other rank"])
def test_frames_for_another_attempt_change_nothing(state, which, how):
    side = Side()
    side.bring(state)
    key = {"older attempt": ("r", 0, 0), "newer attempt": ("r", 0, 2), "other item": ("r", 1, 1)}.get(how, KEY)
    key = ("s", 0, 1) if how == "unknown request" else key
    body = {"header": None, "nack": Nack(**ids(key), reason="x"), "abort": Abort(**ids(key), reason="x")}[which]
    if body is None:
        donor = Side()
        donor.bring(GRANTED)
        body = msgspec.structs.replace(donor.header_of("r"), **ids(key))
    before = state_of(side)
    rank = 1 if how == "other rank" else 0
    actions = side.frame(rank, body)
    assert state_of(side) == before
    is_answered = which == "header" and (state, rank) != ("no link", 0)
    assert bodies(actions) == [Nack(**ids(key), reason="no such session")] * is_answered
    assert len(actions) == is_answered


@pytest.mark.parametrize("state", [IDLE, "no link", RECEIVING, HELD, DONE])
def test_a_header_that_nobody_waits_for_is_refused(state):
    donor, side = Side(), Side()
    donor.bring(GRANTED)
    side.bring(state)
    if state == "no link":
        side.up(0)
        side["r", 0].state = WAITING
    before = state_of(side)
    assert bodies(side.frame(0, donor.header_of("r"))) == [Nack(**ids(KEY), reason="no such session")]
    assert state_of(side) == before


BAD_HEADERS = {
    "grid": {"grid": (1, 4, 6)},
    "total_rows": {"total_rows": 7},
    "rows": {"row_stop": 5},
    "rows from elsewhere": {"row_start": 1},
    "deepstack_rows": {"deepstack_stop": 5},
    "runs": {"row_digests": [0, 0]},
    "deepstack_runs": {"deepstack_digests": []},
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_header_that_says_something_else_ends_the_attempt(name):
    side = Side()
    side.bring(GRANTED)
    nack, news = side.header("r", **BAD_HEADERS[name])
    assert nack.frame.body.reason.startswith(name.split()[0] + ": expected")
    assert news == lost(KEY, nack.frame.body.reason)
    assert side.counts() == (5, 3, 0), "its room stays with the item"
    assert side["r", 0].state == IDLE


@pytest.mark.parametrize("body", [Nack(**ids(KEY), reason="gone"), Abort(**ids(KEY), reason="gone")])
@pytest.mark.parametrize("state", STATES)
def test_the_encode_rank_gives_up(state, body):
    """Rows that are all here need nobody any more."""
    side = Side(blocks=1)
    side.bring(state, rows=2 if state == DONE else 6)
    if state == "no link":
        side.up(0)
    before = state_of(side)
    actions = side.frame(0, body)
    if state in (IDLE, DONE):
        assert (actions, state_of(side)) == ([], before)
        return
    assert actions == [Recall(*KEY)] * (state == HELD) + [lost(KEY, "gone")]
    assert side["r", 0].state == IDLE
    assert side.counts() == ((0, 0, 1) if state in (RECEIVING, HELD) else (0, 1, 0)), "its room stays with the item"


def test_a_frame_that_comes_twice_is_not_looked_at():
    side = Side()
    side.bring(GRANTED)
    frame = Frame(epoch=1, seq=1, body=Abort(**ids(KEY), reason="x"))
    assert len(side.do(FrameIn(0, frame))) == 1
    side.assign("r", attempt=2)
    before = state_of(side)
    assert side.do(FrameIn(0, frame)) == []
    assert side.do(FrameIn(0, Frame(epoch=1, seq=0, body=Beat()))) == []
    assert side.do(FrameIn(0, Frame(epoch=1, seq=1, body=Beat()))) == []
    assert state_of(side) == before


@pytest.mark.parametrize("seq", [2, 3])
@pytest.mark.parametrize("body", [Abort(**ids(KEY), reason="x"), Beat()])
def test_a_gap_ends_the_link(seq, body):
    side = Side()
    side.bring(GRANTED)
    seq -= type(body) is Beat
    assert side.do(FrameIn(0, Frame(epoch=1, seq=seq, body=body))) == [
        BreakLink(0, 1, f"frames before {seq} were lost")
    ]
    assert (side["r", 0].state, side.counts()) == (WAITING, (5, 3, 0))
    assert side.do(LinkDown(0, 1, "closed")) == []
    assert side.do(FrameIn(0, Frame(epoch=1, seq=1, body=Beat()))) == [], "a link that is down"


def test_frames_of_another_epoch_are_told_the_present_one():
    side = Side()
    side.up(0)
    side.bring(GRANTED)
    before = state_of(side)
    old = Frame(epoch=1, seq=1, body=Abort(**ids(KEY), reason="x"))
    assert bodies(side.do(FrameIn(0, old))) == [Stale(epoch=2)]
    assert side.do(FrameIn(0, Frame(epoch=1, seq=1, body=Stale(epoch=0)))) == [], "or they would go on for ever"
    assert side.do(FrameIn(0, Frame(epoch=3, seq=1, body=old.body))) == []
    assert side.do(FrameIn(0, Frame(epoch=2, seq=1, body=Stale(epoch=2)))) == []
    assert side.do(FrameIn(7, old)) == []
    assert state_of(side) == before


# ---- links ----


def test_links_come_only_with_a_higher_epoch():
    side = Side()
    side.up(0)
    side.bring(GRANTED)
    before = state_of(side)
    for event in (LinkUp(0, 2), LinkUp(0, 1), LinkDown(0, 1, "x"), LinkDown(5, 1, "x")):
        assert side.do(event) == []
    side.down(0)
    assert side.do(LinkUp(0, 2)) == []
    assert state_of(side) != before
    assert granted(side.do(LinkUp(0, 7))) == [("r", 0, 0, 6)]


def test_a_new_link_in_place_of_one_that_was_not_seen_to_end_grants_anew():
    side = Side()
    side.bring(GRANTED)
    room = side["r", 0].room
    assert granted(side.up(0)) == [("r", 0, 0, 6)]
    assert side["r", 0].room == room, "its room stays with the item"
    assert side.counts() == (5, 3, 0)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("rows", [2, 6])
def test_what_is_all_here_is_acknowledged_again_when_a_link_comes_up(state, rows):
    """The last acknowledgement may have been lost with the old link; then the rows would be kept for nothing."""
    side = Side(blocks=1)
    side.bring(state, rows=rows)
    side.down(0)
    acks = [body for body in bodies(side.up(0)) if isinstance(body, Ack)]
    assert acks == ([Ack(**ids(KEY), received=2)] if rows == 2 and state in (HELD, DONE) else [])


def test_a_payload_that_ends_well_after_its_link_counts():
    """Every byte is here and right; the next link goes on behind it."""
    side = Side(blocks=1)
    side.bring(RECEIVING)
    side.down(0)
    assert side["r", 0].state == RECEIVING
    assert side.up(0) == []
    assert [a for a in side.payload("r", epoch=1) if not isinstance(a, SendFrame)] == [RowsReady(*KEY, 0, 2)]
    assert granted(side.consume("r")) == [("r", 0, 2, 4)]


@pytest.mark.parametrize("received", [0, 2])
def test_a_payload_that_breaks_comes_again(received):
    side = Side(blocks=1)
    side.bring(HELD if received else GRANTED)
    if received:
        side.consume("r")
    hold = side["r", 0].hold
    side.header("r")
    [broke] = side.payload("r", error="reset", is_broken=True)
    assert broke == BreakLink(0, 1, "reset")
    assert (side["r", 0].state, side["r", 0].received) == (WAITING, received)
    assert side["r", 0].hold == hold, "its room stays with the item"
    assert granted(side.up(0)) == [("r", 0, received, received + 2)]


def test_a_payload_that_is_wrong_ends_the_attempt_and_not_the_link():
    side = Side()
    side.bring(RECEIVING)
    nack, news = side.payload("r", error="digest")
    assert nack.frame.body == Nack(**ids(KEY), reason="digest")
    assert news == lost(KEY, "digest")
    assert side.counts() == (5, 3, 0), "its room stays with the item"
    assert 0 in side.sessions.links


def test_an_end_that_nobody_waits_for_is_a_mistake():
    side = Side()
    side.bring(GRANTED)
    with pytest.raises(ValueError, match="nothing is being received"):
        side.payload("r")
    with pytest.raises(ValueError, match="nothing is being received"):
        side.payload("s")


# ---- attempts, and quarantine ----


@pytest.mark.parametrize("how", ["forgotten", "another attempt", "abort", "needed again"])
@pytest.mark.parametrize("end", ["ok", "digest", "broken"])
def test_blocks_of_a_pending_receive_stay_apart_until_it_has_returned(how, end):
    side = Side(blocks=3)
    side.bring(RECEIVING)
    if how == "forgotten":
        actions = side.do(Cancel(request_id="r"))
    elif how == "another attempt":
        actions = side.assign("r", rank=1, attempt=2)
    elif how == "needed again":
        actions = side.do(Expect("r", [make_visual(6)], [0], DEADLINE))
    else:
        actions = side.frame(0, Abort(**ids(KEY), reason="x"))
    assert [b.attempt for b in bodies(actions, 0)] == ([] if how == "abort" else [1])
    assert (side.counts(), side.counts("slots")[2], side.counts("deepstack")[2]) == ((0, 0, 3), 1, 3)
    side.expect("s", 2)
    assert granted(side.assign("s", rank=1)) == []
    assert side.do(Returned(*KEY)) == []
    actions = side.payload("r", error=None if end == "ok" else end, is_broken=end == "broken")
    assert [type(a) for a in actions if not isinstance(a, SendFrame)] == [BreakLink] * (end == "broken")
    assert side.counts()[2] == 0
    # They go back to the item, unless its request is over or has given up what it had.
    next_one = [("s", 0, 0, 2)]
    now_granted = {"another attempt": [("r", 0, 0, 6)], "forgotten": next_one, "needed again": next_one}
    assert granted(actions) == now_granted.get(how, [])


@pytest.mark.parametrize("how", ["forgotten", "another attempt", "abort"])
def test_blocks_that_the_engine_may_read_stay_apart_until_it_has_answered(how):
    side = Side(blocks=1)
    side.bring(HELD)
    if how == "forgotten":
        actions = side.do(Cancel(request_id="r"))
    elif how == "another attempt":
        actions = side.assign("r", rank=1, attempt=2)
    else:
        actions = side.frame(0, Abort(**ids(KEY), reason="x"))
    assert Recall(*KEY) in actions
    assert (side.counts(), side.counts("slots")[2], side.counts("deepstack")[2]) == ((0, 0, 1), 1, 3)
    assert side.do(Consumed(*KEY, 2)) == []
    actions = side.do(Returned(*KEY))
    assert granted(actions) == ([("r", 0, 0, 2)] if how == "another attempt" else [])
    assert side.counts()[2] == 0
    assert side.do(Returned(*KEY)) == []


@pytest.mark.parametrize("state", [WAITING, GRANTED, RECEIVING])
def test_rows_that_were_used_are_recalled_when_the_rest_never_comes(state):
    """Never a mixture of two attempts: the engine goes back behind the item. Not when the request is over."""
    for is_over in (False, True):
        side = Side(blocks=1)
        side.bring(HELD)
        if state == WAITING:
            side.down(0)
        side.consume("r")
        if state == RECEIVING:
            side.header("r")
        assert side["r", 0].state == state
        actions = side.do(Cancel(request_id="r")) if is_over else side.assign("r", rank=1, attempt=2)
        assert [a for a in actions if isinstance(a, Recall)] == [] if is_over else [Recall(*KEY)]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("attempt", [0, 1])
def test_an_attempt_that_is_not_newer_changes_nothing(state, attempt):
    side = Side()
    side.bring(state)
    if state == IDLE:
        side["r", 0].attempt = 1
    before = state_of(side)
    assert side.assign("r", rank=1, attempt=attempt) == []
    assert state_of(side) == before
    others = [("x", 0, 1), ("r", 1, 1), ("r", -1, 9)]
    for event in (*(Assign(**ids(key), encode_rank=0) for key in others), Cancel(request_id="x")):
        assert side.do(event) == []
    assert state_of(side) == before


@pytest.mark.parametrize("event", [Consumed("r", 0, 2, 2), Consumed("r", 1, 1, 2), Consumed("s", 0, 1, 2)])
def test_rows_of_nobody_are_not_consumed(event):
    side = Side(blocks=1)
    side.bring(HELD)
    before = state_of(side)
    assert side.do(event) == []
    assert state_of(side) == before


# ---- what was wrong once ----


@pytest.mark.parametrize("short", ["slots", "deepstack_blocks"])
def test_one_that_has_begun_does_not_wait_for_one_that_waits_for_it(short):
    """b has its slot and DeepStack and wants only the next rows. a came first, but could be assigned only now: it wants
    what b has. Neither is served ever again, nor anybody behind them, until a request's deadline."""
    side = Side(blocks=1, **{short: 2 if short == "deepstack_blocks" else 1})
    side.expect("a", 4)
    side.expect("b", 4)
    side.assign("b")
    side.receive("b")
    side.assign("a", rank=1)
    assert granted(side.consume("b")) == [("b", 0, 2, 4)]


def test_rows_behind_an_item_that_lost_its_room_do_not_block_it():
    """b/1 is here, but cannot be read before b/0, which lost its room with its link. a wants all DeepStack and is
    first; so b/0 gets nothing, and b/1 never goes."""
    side = Side(deepstack_blocks=2)
    side.expect("a", 4)
    side.expect("b", 2, 2)
    side.assign("b", 0, rank=0)
    side.assign("b", 1, rank=1)
    side.receive("b", 1, rank=1)
    side.assign("a", rank=1)
    actions = [*side.down(0), *side.up(0)]
    for action in actions:
        if isinstance(action, Recall):
            actions += side.do(Returned(action.request_id, action.item, action.attempt))
    assert granted(actions) != [], "nobody can go on"


@pytest.mark.parametrize("state", [HELD, DONE])
def test_a_new_attempt_at_an_item_that_is_here_is_called_off(state):
    """The router sent it before it heard that the item is here (its encode rank died meanwhile). The engine has these
    rows in its cache, ignores the new ones and never says that they are consumed; or, recalled, it goes back and lacks
    the later items, which were consumed and which nobody asks for."""
    side = Side()
    side.bring(state, rows=2)
    actions = side.assign("r", rank=1, attempt=2)
    assert side["r", 0].state == state
    assert not [a for a in actions if isinstance(a, Recall) or (isinstance(a, SendFrame) and granted([a]))]
    assert arrived(("r", 0, 2)) in actions, "the router waits for this attempt"


def test_the_last_rows_are_acknowledged_over_the_link_that_is_there():
    """Otherwise the encode rank keeps them until their lease ends, and drops others instead."""
    side = Side()
    side.bring(RECEIVING)
    side.up(0)
    assert Ack(**ids(KEY), received=6) in bodies(side.payload("r", epoch=1))


def test_a_ranged_item_does_not_stop_the_one_that_has_the_deepstack_it_waits_for():
    """a's DeepStack is larger than its pool, so each of its grants needs blocks of it; b, which began while a had no
    link, has them all, and wants only rows. The first of those that have begun cannot be served: the next one can."""
    side = Side(blocks=1, deepstack_blocks=2)
    side.expect("a", 6)
    side.expect("b", 4)
    side.assign("a")
    side.receive("a")
    side.down(0)
    side.consume("a")
    side.assign("b", rank=1)
    side.receive("b", rank=1)
    assert granted([*side.up(0), *side.consume("b")]) == [("b", 0, 2, 4)]
    side.receive("b", rank=1)
    assert granted(side.consume("b")) == [("a", 0, 2, 4)]
