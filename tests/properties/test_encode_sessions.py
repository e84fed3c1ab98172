"""The encode side by hand: each transition, each deadline, each frame that comes too late, twice or to nobody."""

from __future__ import annotations

import msgspec
import pytest

from qwen3vl_disagg.core.errors import Failure, InputError, ServerError
from qwen3vl_disagg.protocol.encode_sessions import (
    ENCODING,
    HEADER,
    PARKED,
    QUEUED,
    READY,
    SENDING,
    SENT,
)
from qwen3vl_disagg.protocol.messages import Abort, Beat, Frame, ItemFailed, Nack
from qwen3vl_disagg.protocol.session_events import (
    BreakLink,
    Encoded,
    Release,
    SendFrame,
    SendHeader,
    SendPayload,
    StartEncode,
    Tell,
    Tick,
)
from tests.properties.encode_side import ENCODED, ROWS, STATES, TIMEOUT, A, B, C, Side, bodies, grant_of
from tests.properties.session_parts import LIMITS, failed, ids, make_visual

# ---- one item from beginning to end ----


def start_of(key, is_alone=False):
    return StartEncode(key, make_visual(ROWS), is_alone)


@pytest.mark.parametrize("is_alone", [False, True])
def test_an_item_is_encoded_once_granted_and_sent_in_parts(is_alone):
    side, second = Side(), grant_of(A, 4, 6)
    first = msgspec.structs.replace(grant_of(A), is_alone=is_alone)
    assert side.frame(first) == [start_of(A, is_alone)]
    assert side.do(Encoded(A)) == [SendHeader(0, 1, 1, first)]
    assert side.header_ok(A) == [SendPayload(0, 1, first, LIMITS.payload_s)]
    assert side.sent(A) == []
    assert side.ack(A) == []
    assert (side.state(A), side.sessions.num_parked, side.sessions.num_in_memory) == (PARKED, 1, 0)
    assert side.grant(A, 4) == [SendHeader(0, 1, 2, second)]
    assert side.header_ok(A, 4) == [SendPayload(0, 1, second, LIMITS.payload_s)]
    assert side.sent(A) == []
    assert side.ack(A, 6) == [Release(A)]
    assert side.sessions.is_idle


@pytest.mark.parametrize("received", [4, 6])
def test_an_acknowledgement_may_come_before_the_payload_is_known_to_be_out(received):
    """The next header waits for the end of this payload only when it is this item's own."""
    side = Side()
    side.bring(A, SENDING)
    assert side.ack(A, received) == ([Release(A)] if received == 6 else [])
    if received == 4:
        assert side.grant(A, 4) == []
        assert side.state(A) == READY
        assert side.sent(A) == [SendHeader(0, 1, 2, grant_of(A, 4, 6))]
    else:
        assert side.sent(A) == []
        assert side.sessions.is_idle


def test_payloads_follow_one_another_in_the_order_of_their_headers():
    side = Side()
    side.bring(A, HEADER)
    side.grant(B)
    assert side.do(Encoded(B)) == []
    assert side.header_ok(A) == [SendPayload(0, 1, grant_of(A), LIMITS.payload_s)]
    assert side.state(B) == READY
    assert side.sent(A) == [SendHeader(0, 1, 2, grant_of(B))]
    assert side.sent(A) == [], "twice"
    assert (side.state(A), side.state(B)) == (SENT, HEADER)


@pytest.mark.parametrize("state", [QUEUED, ENCODING, READY, SENT, PARKED])
def test_a_newer_attempt_ends_those_before_it(state):
    side, newer = Side(), (*A[:2], 2)
    side.bring(A, state)
    actions = side.grant(newer)
    assert A not in side.sessions.items
    assert [a for a in actions if isinstance(a, Release)] == ([] if state == QUEUED else [Release(A)])
    assert newer in side.sessions.items


# ---- bounds ----


def test_no_more_is_encoded_than_memory_allows():
    """2 on their way, 1 parked: a third waits until one of the two is acknowledged; a second one parked costs the
    first its place."""
    side = Side()
    keys = [(name, 0, 1) for name in "abcdef"]
    started = []
    for key in keys:
        started += side.grant(key)
    assert started == [start_of(keys[0]), start_of(keys[1])]
    for number, key in enumerate(keys):
        side.do(Encoded(key))
        side.header_ok(key)
        side.sent(key)
        actions = side.ack(key)
        released = [a.attempt for a in actions if isinstance(a, Release)]
        begun = [a.attempt for a in actions if isinstance(a, StartEncode)]
        assert released == keys[number - 1 : number] if number else released == []
        assert begun == keys[number + 2 : number + 3]
        assert side.sessions.num_parked == 1
        assert side.sessions.num_in_memory <= 2
    assert side.grant(keys[0], 4)[0].frame.body == Nack(**ids(keys[0]), reason="gone")


def test_what_was_parked_longest_goes_first():
    side = Side(max_parked=2, max_items=8)
    for key in (A, B):
        side.bring(key, PARKED)
        side.now += 1
    side.grant(A, 4)  # A goes on, and is parked anew: now B has waited longest
    side.header_ok(A, 4)
    side.sent(A)
    side.down()
    side.up()
    side.now += 1
    side.grant(C)
    side.do(Encoded(C))
    assert side.down() == [Release(B)]
    assert (side.state(A), side.state(C)) == (PARKED, PARKED)


# ---- deadlines ----


@pytest.mark.parametrize("state", [QUEUED, ENCODING, READY])
def test_an_item_that_takes_too_long_fails(state):
    """The router is told, and it alone tells the language rank."""
    side = Side()
    side.bring(A, state)
    assert side.tick(TIMEOUT - 0.1) == []
    actions = side.tick(0.2)
    assert [type(a) for a in actions] == [Release] * (state in (ENCODING, READY)) + [Tell]
    assert actions[-1] == failed(A, actions[-1].message.failure)
    assert actions[-1].message.failure.kind == "deadline"
    assert A not in side.sessions.items


@pytest.mark.parametrize(("state", "seconds"), [(HEADER, 5.0), (SENDING, 6.0), (SENT, 5.0)])
def test_an_answer_that_does_not_come_breaks_the_link(state, seconds):
    side = Side()
    side.bring(A, state)
    assert side.tick(seconds - 0.1) == []
    assert side.tick(0.2) == [BreakLink(0, 1, f"no answer for an item in state {state}")]
    assert side.state(A) == PARKED
    assert side.sent(A) == [], "of a link that is gone"
    side.up()
    assert side.grant(A) == [SendHeader(0, 2, 1, grant_of(A))]


def test_parked_rows_live_as_long_as_their_lease():
    side = Side()
    side.bring(A, PARKED)
    assert side.tick(LIMITS.lease_s - 0.1) == []
    assert side.tick(0.2) == [Release(A)]
    assert bodies(side.grant(A, 4)) == [Nack(**ids(A), reason="gone")]


def test_beats_say_how_many_frames_there_were():
    side = Side()
    side.bring(A, HEADER)
    side.now = LIMITS.beat_s
    assert side.do(Tick()) == [SendFrame(0, Frame(epoch=1, seq=1, body=Beat()))]
    assert side.do(Tick()) == []


# ---- giving up ----


@pytest.mark.parametrize("how", ["abort", "newer attempt"])
@pytest.mark.parametrize("state", STATES)
def test_an_item_that_nobody_wants_any_more_is_dropped(state, how):
    side = Side()
    side.bring(A, state)
    if how == "newer attempt":
        actions = [a for a in side.grant((*A[:2], 2)) if not isinstance(a, StartEncode)]
    else:
        actions = side.frame(Abort(**ids(A), reason="x"))
    if state == HEADER:
        assert actions == []
        assert side.sessions.items[A].is_dropped, "the answer may be yes, and then rows have to follow"
        return
    assert actions == [Release(A)] * (state in (ENCODING, *ENCODED))
    assert A not in side.sessions.items


@pytest.mark.parametrize("answer", ["ok", "nack", "link down", "another abort", "no answer"])
def test_what_follows_when_an_item_was_dropped_under_its_header(answer):
    """Whatever the other end says, the link's turn goes on, and the rows go when they are no longer needed."""
    side = Side()
    side.bring(A, HEADER)
    side.grant(B)
    side.do(Encoded(B))
    side.frame(Abort(**ids(A), reason="x"))
    assert (side.state(A), side.state(B)) == (HEADER, READY)
    next_header = SendHeader(0, 1, 2, grant_of(B))
    if answer == "ok":
        assert side.header_ok(A) == [SendPayload(0, 1, grant_of(A), LIMITS.payload_s), Release(A)]
        assert side.sent(A) == [next_header]
    elif answer == "nack":
        assert side.frame(Nack(**ids(A), reason="no such session")) == [Release(A), next_header]
    elif answer == "another abort":
        assert side.frame(Abort(**ids(A), reason="x")) == []
        assert side.header_ok(A) == [SendPayload(0, 1, grant_of(A), LIMITS.payload_s), Release(A)]
    elif answer == "link down":
        assert side.down() == [Release(A)]
        assert side.state(B) == PARKED
    else:
        actions = side.tick(LIMITS.answer_s)
        assert [type(a) for a in actions] == [BreakLink, Release]
    assert side.state(A) is None


@pytest.mark.parametrize("error", [InputError("no image", status=413), ServerError("no memory")])
def test_a_failed_encoding_is_told_once(error):
    side = Side()
    side.bring(A, ENCODING)
    failure = Failure.of(error)
    assert side.do(ItemFailed(**ids(A), failure=failure)) == [Release(A), failed(A, failure)]
    assert side.do(ItemFailed(**ids(A), failure=failure)) == []
    assert side.do(Encoded(A)) == []
    assert side.sessions.is_idle


@pytest.mark.parametrize("state", STATES)
def test_rows_that_are_refused_are_dropped(state):
    side = Side()
    side.bring(A, state)
    side.frame(Nack(**ids(A), reason="digest"))
    assert side.state(A) is None
    if state == SENDING:
        assert side.sessions.outlets[0].turn == A, "the payload is still going out"
        side.sent(A)
    if state != READY:
        assert side.sessions.is_idle
