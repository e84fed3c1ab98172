"""The encode side by hand: frames too late, twice or for nobody; links that come and go."""

from __future__ import annotations

import pytest

from qwen3vl_disagg.protocol.encode_sessions import (
    ENCODING,
    HEADER,
    PARKED,
    QUEUED,
    READY,
    SENDING,
    SENT,
)
from qwen3vl_disagg.protocol.messages import Abort, Ack, Beat, Frame, HeaderOk, Nack, Stale
from qwen3vl_disagg.protocol.session_events import (
    BreakLink,
    Encoded,
    FrameIn,
    LinkDown,
    LinkUp,
    PayloadSent,
    Release,
    SendHeader,
)
from tests.properties.encode_side import ENCODED, STATES, A, Side, bodies, grant_of, snapshot
from tests.properties.session_parts import ids

OTHERS = [("a", 0, 0), ("a", 0, 2), ("a", 1, 1), ("z", 0, 1)]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("key", OTHERS)
def test_frames_for_an_attempt_that_is_not_here(state, key):
    """Answers and aborts are ignored, a resume is refused."""
    side = Side()
    side.bring(A, state)
    before = snapshot(side)
    answers = [HeaderOk(**ids(key), row_start=0), Ack(**ids(key), received=6)]
    for body in (*answers, Nack(**ids(key), reason="x"), Abort(**ids(key), reason="x")):
        assert side.frame(body) == []
    assert bodies(side.frame(grant_of(key, 4, 6))) == [Nack(**ids(key), reason="gone")]
    assert snapshot(side) == before


@pytest.mark.parametrize("state", [QUEUED, READY, HEADER, SENDING, SENT])
def test_a_grant_for_an_item_that_has_one_changes_nothing(state):
    side = Side()
    side.bring(A, state)
    before = snapshot(side)
    assert side.grant(A, 4) == []
    assert snapshot(side) == before


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("received", [0, 3, 5, 7])
def test_an_acknowledgement_of_something_else_changes_nothing(state, received):
    side = Side()
    side.bring(A, state)
    before = snapshot(side)
    assert side.ack(A, received) == []
    assert snapshot(side) == before


@pytest.mark.parametrize("state", [QUEUED, ENCODING])
def test_rows_that_are_not_encoded_cannot_be_acknowledged(state):
    side = Side()
    side.bring(A, state)
    before = snapshot(side)
    assert side.ack(A, 6) == []
    assert snapshot(side) == before


@pytest.mark.parametrize("state", ENCODED)
def test_an_acknowledgement_of_everything_ends_the_item(state):
    """Also after a link that was lost with the first one of these."""
    side = Side()
    side.bring(A, state)
    if state == HEADER:
        return  # rows cannot be there whose header is not answered
    assert side.ack(A, 6) == [Release(A)]
    assert side.state(A) is None


@pytest.mark.parametrize("state", [s for s in STATES if s != HEADER])
def test_a_yes_to_no_header_is_nothing_unless_it_is_this_items_turn(state):
    side = Side()
    side.bring(A, state)
    before, is_turn = snapshot(side), state == SENDING
    actions = side.header_ok(A)
    assert [type(a) for a in actions] == [BreakLink] * is_turn
    if not is_turn:
        assert snapshot(side) == before


def test_a_yes_to_other_rows_than_those_of_the_header_ends_the_link():
    """The other end waits for a payload that nobody will send."""
    side = Side()
    side.bring(A, HEADER)
    [broke] = side.header_ok(A, 4)
    assert isinstance(broke, BreakLink)
    assert side.state(A) == PARKED


@pytest.mark.parametrize("state", STATES)
def test_another_language_ranks_frames_are_not_about_this_item(state):
    side = Side()
    side.do(LinkUp(1, 1))
    side.bring(A, state)
    before = snapshot(side)
    frames = [grant_of(A), HeaderOk(**ids(A), row_start=0), Ack(**ids(A), received=6)]
    frames += [Nack(**ids(A), reason="x"), Abort(**ids(A), reason="x")]
    for seq, body in enumerate(frames, 1):
        assert side.do(FrameIn(1, Frame(epoch=1, seq=seq, body=body))) == []
    assert snapshot(side) == before


def test_a_frame_that_comes_twice_is_not_looked_at():
    side = Side()
    side.bring(A, HEADER)
    frame = Frame(epoch=1, seq=2, body=HeaderOk(**ids(A), row_start=0))
    assert len(side.do(FrameIn(0, frame))) == 1
    before = snapshot(side)
    assert side.do(FrameIn(0, frame)) == []
    assert side.do(FrameIn(0, Frame(epoch=1, seq=1, body=grant_of(A)))) == []
    assert side.do(FrameIn(0, Frame(epoch=1, seq=2, body=Beat()))) == []
    assert snapshot(side) == before


@pytest.mark.parametrize("body", [Beat(), Abort(**ids(A), reason="x")])
@pytest.mark.parametrize("ahead", [1, 5])
def test_a_gap_ends_the_link(body, ahead):
    side = Side()
    side.bring(A, SENT)
    seq = side.seq + ahead + (type(body) is not Beat)
    assert side.do(FrameIn(0, Frame(epoch=1, seq=seq, body=body))) == [
        BreakLink(0, 1, f"frames before {seq} were lost")
    ]
    assert side.state(A) == PARKED
    assert side.do(LinkDown(0, 1, "closed")) == []


def test_frames_of_another_epoch_are_told_the_present_one():
    side = Side()
    side.up()
    side.bring(A, SENT)
    before = snapshot(side)
    old = Frame(epoch=1, seq=1, body=Ack(**ids(A), received=6))
    assert bodies(side.do(FrameIn(0, old))) == [Stale(epoch=2)]
    assert side.do(FrameIn(0, Frame(epoch=1, seq=1, body=Stale(epoch=0)))) == [], "or they would go on for ever"
    assert side.do(FrameIn(0, Frame(epoch=3, seq=1, body=old.body))) == []
    assert side.do(FrameIn(7, old)) == []
    assert snapshot(side) == before


def test_one_that_hears_of_a_newer_epoch_makes_a_new_link():
    side = Side()
    side.bring(A, SENT)
    assert side.frame(Stale(epoch=1)) == []
    assert side.frame(Stale(epoch=0)) == []
    assert side.frame(Stale(epoch=2)) == [BreakLink(0, 1, "the other end is at epoch 2")]
    assert side.state(A) == PARKED


# ---- links ----


AFTER_A_CUT = {QUEUED: None, ENCODING: ENCODING} | dict.fromkeys(ENCODED, PARKED)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("how", ["down", "new link", "payload not sent"])
def test_grants_are_void_when_their_link_is_gone(state, how):
    side = Side()
    side.bring(A, state)
    if how == "down":
        assert side.down() == []
    elif how == "new link":
        assert side.up() == []
    else:
        [broke] = side.sent(A, "reset")
        assert broke == BreakLink(0, 1, "reset")
    assert side.state(A) == AFTER_A_CUT[state]
    if state != QUEUED:
        assert side.sessions.items[A].grant is None
    if how != "new link":
        side.up()
    actions = side.grant(A)
    if state == QUEUED:
        assert side.state(A) == QUEUED
    if state in ENCODED:
        assert actions == [SendHeader(0, 2, 1, grant_of(A))]
    if state == ENCODING:
        assert actions == []
        assert side.do(Encoded(A)) == [SendHeader(0, 2, 1, grant_of(A))]


def test_rows_that_are_encoded_without_a_link_wait_for_one():
    side = Side()
    side.bring(A, ENCODING)
    side.down()
    assert side.do(Encoded(A)) == []
    assert (side.state(A), side.sessions.items[A].deadline) == (PARKED, side.sessions.limits.lease_s)
    side.up()
    assert side.grant(A) == [SendHeader(0, 2, 1, grant_of(A))]


def test_links_come_only_with_a_higher_epoch():
    side = Side()
    side.up()
    side.bring(A, SENT)
    before = snapshot(side)
    for event in (LinkUp(0, 2), LinkUp(0, 1), LinkDown(0, 1, "x"), LinkDown(5, 1, "x"), PayloadSent(0, 1, A, "x")):
        assert side.do(event) == []
    assert side.do(PayloadSent(5, 1, A)) == []
    assert snapshot(side) == before
    side.down()
    side.do(LinkUp(0, 2))
    assert side.sessions.outlets == {}


def test_a_link_to_one_language_rank_is_not_one_to_another():
    side = Side()
    side.do(LinkUp(1, 1))
    side.bring(A, SENT)
    assert side.do(LinkDown(1, 1, "x")) == []
    assert side.state(A) == SENT
