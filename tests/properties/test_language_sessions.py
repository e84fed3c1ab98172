"""The language side by hand: each transition, each deadline, each frame that comes too late, twice or to nobody."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import pytest

from qwen3vl_disagg.protocol.messages import Abort, Ack, Beat, Cancel, Frame, Grant, HeaderOk, Resume
from qwen3vl_disagg.protocol.payload_time import moving_s
from qwen3vl_disagg.protocol.session import DONE, GRANTED, HELD, IDLE, RECEIVING, WAITING
from qwen3vl_disagg.protocol.session_events import (
    BreakLink,
    Consumed,
    Recall,
    Receive,
    RowsReady,
    SendFrame,
    Tick,
)
from tests.properties.language_side import DEADLINE, SIZES, Side, bodies, granted
from tests.properties.session_parts import LIMITS, arrived, ids, lost, make_visual

# ---- one item from beginning to end ----


def test_an_item_larger_than_the_pool_comes_in_parts():
    """5 rows through one block of 2: a grant and two resumes; DeepStack goes with the first alone."""
    side, key = Side(blocks=1), ("r", 0, 1)
    assert side.expect("r", 5) == []
    assert side["r", 0].state == IDLE
    [grant] = bodies(side.assign("r"))
    assert grant == Grant(
        **ids(key),
        row_start=0,
        row_stop=2,
        deepstack_start=0,
        deepstack_stop=5,
        row_runs=[2],
        deepstack_runs=[5],
        visual=make_visual(5),
        timeout_s=DEADLINE,
    )
    assert (side.counts(), side.counts("deepstack"), side.counts("slots")) == ((0, 1, 0), (5, 3, 0), (7, 1, 0))
    room, hold = side["r", 0].room, side["r", 0].hold
    header = side.header_of("r")
    payload_s = LIMITS.payload_s + moving_s(SIZES.transfer_bytes(2, 5))
    assert side.header("r") == [
        SendFrame(0, Frame(epoch=1, seq=2, body=HeaderOk(**ids(key), row_start=0, payload_s=payload_s))),
        Receive(0, 1, header, grant, make_visual(5), room, hold, payload_s),
    ]
    ready, ack = [RowsReady(*key, 0, 2)], Ack(**ids(key), received=2)
    assert side.payload("r") == [SendFrame(0, Frame(epoch=1, seq=3, body=ack)), *ready]
    assert side.do(Consumed(*key, 1)) == []
    assert side.counts() == (0, 1, 0), "freed before all of it was used"
    [resume] = bodies(side.do(Consumed(*key, 2)))
    assert resume == Resume(
        **ids(key), row_start=2, row_stop=4, deepstack_start=2, deepstack_stop=2, row_runs=[2], deepstack_runs=[]
    )
    assert side["r", 0].hold == hold
    side.receive("r")
    [last] = bodies(side.consume("r"))
    assert (last.row_start, last.row_stop, last.row_runs) == (4, 5, [1])
    assert side.receive("r")[1:] == [RowsReady(*key, 4, 5), arrived(key)]
    assert side.consume("r") == []
    assert side["r", 0].state == DONE
    assert side.sessions.allocator.is_idle
    assert side.do(Cancel(request_id="r")) == []
    assert side.sessions.is_idle


@pytest.mark.parametrize(
    ("rows", "blocks", "deepstack_blocks", "has_deepstack", "expected"),
    [
        (5, 8, 3, True, [(0, 5, 0, 5)]),
        (5, 8, 2, True, [(0, 4, 0, 4), (4, 5, 4, 5)]),  # ranged: 3 blocks of DeepStack never fit
        (5, 1, 2, True, [(0, 2, 0, 2), (2, 4, 2, 4), (4, 5, 4, 5)]),
        (5, 2, 1, True, [(0, 2, 0, 2), (2, 4, 2, 4), (4, 5, 4, 5)]),
        (5, 2, 3, True, [(0, 4, 0, 5), (4, 5, 4, 4)]),
        (5, 2, 8, False, [(0, 4, 0, 0), (4, 5, 4, 4)]),
        (1, 1, 1, True, [(0, 1, 0, 1)]),
    ],
)
def test_which_rows_each_grant_asks_for(rows, blocks, deepstack_blocks, has_deepstack, expected):
    sizes = SIZES if has_deepstack else replace(SIZES, deepstack_embeddings=0)
    side = Side(blocks=blocks, deepstack_blocks=deepstack_blocks, row_sizes=sizes)
    side.expect("r", rows)
    actions, seen = side.assign("r"), []
    while side["r", 0].state != DONE:
        [body] = bodies(actions)
        seen.append((body.row_start, body.row_stop, body.deepstack_start, body.deepstack_stop))
        side.receive("r")
        actions = side.consume("r")
    assert seen == expected


# ---- the order of grants ----


def test_three_requests_compete_for_three_blocks():
    """In the order of arrival, item by item, whoever could use room now; nobody overtakes one that lacks some."""
    side = Side(blocks=3)
    side.expect("a", 2, 6)
    side.expect("b", 2)
    side.expect("c", 2)
    assert granted(side.assign("c")) == [("c", 0, 0, 2)]  # nobody else is there yet
    assert granted(side.assign("a", 1)) == []  # its first item comes first
    assert granted(side.assign("b", rank=1)) == [("b", 0, 0, 2)]
    assert granted(side.assign("a", 0)) == [("a", 0, 0, 2)]  # a/0 is fully granted, a/1 lacks room
    assert side.sessions.is_short_of_room
    side.receive("b", rank=1)
    assert granted(side.consume("b")) == [("a", 1, 0, 2)]  # one block of three; it wants more
    side.expect("d", 2)
    assert granted(side.assign("d")) == []
    side.receive("c")
    assert granted(side.consume("c")) == [], "d before a/1, which lacks room"
    assert side.counts() == (1, 2, 0)
    side.receive("a", 0)
    assert granted(side.consume("a", 0)) == []
    side.receive("a", 1)
    assert granted(side.consume("a", 1)) == [("a", 1, 2, 6), ("d", 0, 0, 2)]
    assert not side.sessions.is_short_of_room


def test_one_that_cannot_use_room_is_passed_over_with_its_later_items():
    side = Side()
    side.expect("a", 2, 2)
    side.expect("b", 2)
    side.down(1)
    side.assign("a", 0, rank=1)
    side.assign("a", 1, rank=0)
    assert granted(side.assign("b")) == [("b", 0, 0, 2)]
    assert not side.sessions.is_short_of_room
    assert granted(side.up(1)) == [("a", 0, 0, 2), ("a", 1, 0, 2)]


@pytest.mark.parametrize("short", ["slots", "deepstack_blocks"])
def test_a_grant_takes_blocks_deepstack_and_slot_or_nothing(short):
    side = Side(**{short: 1})
    for name in "ab":
        side.expect(name, 2)
        side.assign(name)
    assert (side["a", 0].state, side["b", 0].state) == (GRANTED, WAITING)
    assert (side.counts(), side.counts("deepstack")[1], side.counts("slots")[1]) == ((7, 1, 0), 1, 1)
    assert side.sessions.is_short_of_room
    side.receive("a")
    assert granted(side.consume("a")) == [("b", 0, 0, 2)]


# ---- deadlines ----


@pytest.mark.parametrize("received", [0, 2])
def test_an_item_without_a_link_is_given_up_after_a_while(received):
    side = Side(blocks=1)
    side.bring(HELD if received else WAITING)
    side.down(0)
    if received:
        side.consume("r")
    assert (side["r", 0].state, side["r", 0].received) == (WAITING, received)
    assert side.counts("slots")[1] == 1, "its room stays with the item"
    assert side.tick(LIMITS.suspend_s - 0.1) == []
    recall = [Recall("r", 0, 1)] if received else []
    assert side.tick(0.2) == [*recall, lost(("r", 0, 1), "no link to encode rank 0", dead_epoch=1)]
    assert side["r", 0].state == IDLE
    assert side.counts("slots")[1] == 1
    side.do(Cancel(request_id="r"))
    assert side.sessions.allocator.is_idle


def test_a_link_that_comes_back_in_time_resumes():
    side = Side(blocks=1)
    side.bring(HELD)
    side.down(0)
    assert side.consume("r") == []
    side.tick(LIMITS.suspend_s - 0.1)
    assert granted(side.up(0)) == [("r", 0, 2, 4)]
    assert side["r", 0].deadline == side.now + LIMITS.grant_s
    assert side.tick(LIMITS.suspend_s) == []


def test_a_grant_that_nobody_answers_is_taken_back():
    side = Side()
    side.bring(GRANTED)
    assert side.tick(LIMITS.grant_s - 0.1) == []
    abort, news = side.tick(0.2)
    assert abort.frame.body == Abort(**ids(("r", 0, 1)), reason="no header came")
    assert news == lost(("r", 0, 1), "no header came")
    assert side.counts() == (5, 3, 0), "its room stays with the item"


def test_a_payload_that_does_not_end_breaks_the_link_and_keeps_the_blocks():
    side = Side(blocks=1)
    side.bring(RECEIVING)
    assert side.tick(2 * LIMITS.payload_s - 0.1) == []
    assert side.tick(0.2) == [BreakLink(0, 1, "a payload did not come")]
    assert side.tick(100.0) == []
    assert side.counts() == (0, 1, 0), "the receive may still write"
    assert side.payload("r", error="broken", is_broken=True, epoch=1) == []
    assert (side["r", 0].state, side.counts()) == (WAITING, (0, 1, 0))
    assert granted(side.up(0)) == [("r", 0, 0, 2)]


@pytest.mark.parametrize("state", [IDLE, "no link", GRANTED, RECEIVING, HELD, DONE])
def test_a_request_that_takes_too_long_is_forgotten(state):
    side = Side()
    side.bring(state)
    side["r", 0].deadline = math.inf  # its own deadline would come first
    actions = side.tick(DEADLINE)
    assert (actions[-1].message.request_id, actions[-1].message.failure.kind) == ("r", "deadline")
    assert [a.reason for a in bodies(actions)] == (["the request is over"] if state in (GRANTED, RECEIVING) else [])
    assert side.sessions.requests == {}
    assert side.sessions.is_idle == (state not in (RECEIVING, HELD))


def test_the_epoch_of_a_link_is_forgotten_when_nobody_can_come_with_an_older_one_any_more():
    side = Side()
    known = side.sessions._last_epochs
    side.bring(GRANTED)
    side.down(0)
    side.down(1)
    side.tick(LIMITS.forget_s - 0.1)
    assert known == {0: 1, 1: 1}
    side.up(0)
    side.tick(0.1)
    assert known == {0: 2}, "the one that is linked stays, and so it would with an item that waits for it"
    side.down(0)
    side.assign("r", attempt=2)
    side.sessions.limits = msgspec.structs.replace(LIMITS, forget_s=0.0)
    side.tick(0.1)
    assert known == {0: 2}
    side.do(Cancel(request_id="r"))
    side.tick(0.1)
    assert known == {}
    assert side.sessions._gone_at == {}


def test_beats_say_how_many_frames_there_were():
    side = Side()
    side.bring(GRANTED)
    side.now = LIMITS.beat_s
    assert side.do(Tick()) == [
        SendFrame(0, Frame(epoch=1, seq=1, body=Beat())),
        SendFrame(1, Frame(epoch=1, seq=0, body=Beat())),
    ]
    assert side.do(Tick()) == []
