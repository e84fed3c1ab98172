"""The encode side of the sessions as a test drives it by hand."""

from __future__ import annotations

import msgspec

from qwen3vl_disagg.protocol.encode_sessions import (
    ENCODING,
    HEADER,
    PARKED,
    QUEUED,
    READY,
    SENDING,
    SENT,
    EncodeSessions,
)
from qwen3vl_disagg.protocol.messages import Ack, Beat, Frame, Grant, HeaderOk, Resume
from qwen3vl_disagg.protocol.session_events import (
    Encoded,
    FrameIn,
    LinkDown,
    LinkUp,
    PayloadSent,
    SendFrame,
    Tick,
)
from tests.properties.session_parts import LIMITS, ids, make_visual

A, B, C = ("a", 0, 1), ("b", 0, 1), ("c", 0, 1)
ROWS = 6
TIMEOUT = 100.0
STATES = [QUEUED, ENCODING, READY, HEADER, SENDING, SENT, PARKED]
ENCODED = [READY, HEADER, SENDING, SENT, PARKED]


def grant_of(key, start=0, stop=4):
    runs = [stop - start]
    kind = Resume if start else Grant
    item = {} if start else {"visual": make_visual(ROWS), "timeout_s": TIMEOUT}
    return kind(
        **ids(key),
        **item,
        row_start=start,
        row_stop=stop,
        deepstack_start=start,
        deepstack_stop=ROWS if start == 0 else start,
        row_runs=runs,
        deepstack_runs=[ROWS] if start == 0 else [],
    )


class Side:
    """An encode rank, linked to language rank 0. Grants are of rows 0 .. 4 of 6, resumes of 4 .. 6."""

    def __init__(self, **limits):
        self.sessions = EncodeSessions(msgspec.structs.replace(LIMITS, **limits))
        self.now, self.epoch, self.seq = 0.0, 0, 0
        self.up()

    def do(self, event):
        return self.sessions.handle(event, self.now)

    def up(self):
        self.epoch, self.seq = self.epoch + 1, 0
        return self.do(LinkUp(0, self.epoch))

    def down(self):
        return self.do(LinkDown(0, self.epoch, "gone"))

    def frame(self, body):
        self.seq += type(body) is not Beat
        return self.do(FrameIn(0, Frame(epoch=self.epoch, seq=self.seq, body=body)))

    def grant(self, key, start=0):
        return self.frame(grant_of(key, start, ROWS if start else 4))

    def header_ok(self, key, start=0):
        return self.frame(HeaderOk(**ids(key), row_start=start))

    def sent(self, key, error=None):
        return self.do(PayloadSent(0, self.epoch, key, error))

    def ack(self, key, received=4):
        return self.frame(Ack(**ids(key), received=received))

    def state(self, key):
        item = self.sessions.items.get(key)
        return item and item.state

    def tick(self, seconds):
        self.now += seconds
        return [a for a in self.do(Tick()) if not (isinstance(a, SendFrame) and isinstance(a.frame.body, Beat))]

    def bring(self, key, state):
        """One item to a state, on its way alone."""
        if state == QUEUED:
            self.sessions.limits = msgspec.structs.replace(self.sessions.limits, max_items=0)
        if state == READY:
            self.sessions.outlets[0].turn = ("other", 0, 1)
        self.grant(key)
        if state in ENCODED:
            self.do(Encoded(key))
        if state in (SENDING, SENT, PARKED):
            self.header_ok(key)
        if state in (SENT, PARKED):
            self.sent(key)
        if state == PARKED:
            self.ack(key)
        assert self.state(key) == state


def bodies(actions):
    return [a.frame.body for a in actions if isinstance(a, SendFrame)]


def snapshot(side):
    s = side.sessions
    items = [(i.attempt, i.state, i.grant, i.deadline, i.is_encoded, i.is_dropped) for i in s.items.values()]
    return items, list(s.queue), [(o.turn, list(o.ready)) for o in s.outlets.values()]
