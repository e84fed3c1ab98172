"""The language side of the sessions as a test drives it by hand."""

from __future__ import annotations

import msgspec

from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.protocol.allocator import BlockAllocator
from qwen3vl_disagg.protocol.language_sessions import LanguageSessions
from qwen3vl_disagg.protocol.layout import RowSizes
from qwen3vl_disagg.protocol.messages import Assign, Beat, Frame, Room
from qwen3vl_disagg.protocol.session import DONE, HELD, IDLE, RECEIVING
from qwen3vl_disagg.protocol.session_events import (
    Consumed,
    Expect,
    FrameIn,
    LinkDown,
    LinkUp,
    PayloadEnd,
    SendFrame,
    Tick,
)
from tests.properties.session_parts import LIMITS, header_of, make_visual

SIZES = RowSizes(4, 4, 12, 64, 8)
DEADLINE = 1000.0


class Side:
    """A language rank; encode ranks 0 and 1 are linked. Blocks of 2 rows. Events go in with short names."""

    def __init__(self, *, blocks=8, deepstack_blocks=8, slots=8, row_sizes=SIZES):
        allocator = BlockAllocator(num_blocks=blocks, num_deepstack_blocks=deepstack_blocks, num_slots=slots)
        self.sessions = LanguageSessions(allocator, 2, row_sizes, LIMITS)
        self.now = 0.0
        self.seqs, self.epochs = [0, 0], [0, 0]
        self.grants = {}
        for rank in (0, 1):
            self.up(rank)

    def do(self, event):
        actions = self.sessions.handle(event, self.now)
        for action in actions:
            if isinstance(action, SendFrame) and isinstance(action.frame.body, Room):
                body = action.frame.body
                self.grants[body.request_id, body.item] = body
        return actions

    def up(self, rank):
        self.epochs[rank] += 1
        self.seqs[rank] = 0
        return self.do(LinkUp(rank, self.epochs[rank]))

    def down(self, rank):
        return self.do(LinkDown(rank, self.epochs[rank], "gone"))

    def frame(self, rank, body):
        self.seqs[rank] += type(body) is not Beat
        return self.do(FrameIn(rank, Frame(epoch=self.epochs[rank], seq=self.seqs[rank], body=body)))

    def expect(self, request_id, *rows, due=FIRST_COME):
        items = [make_visual(n) for n in rows]
        return self.do(Expect(request_id, items, list(range(len(rows))), DEADLINE, due=due))

    def assign(self, request_id, item=0, rank=0, attempt=1):
        return self.do(Assign(request_id=request_id, item=item, attempt=attempt, encode_rank=rank))

    def header_of(self, request_id, item=0, **changed):
        grant = self.grants[request_id, item]
        total = self.sessions.requests[request_id].sessions[item].total
        header = header_of(grant, total)
        return msgspec.structs.replace(header, **changed)

    def header(self, request_id, item=0, rank=0, **changed):
        return self.frame(rank, self.header_of(request_id, item, **changed))

    def payload(self, request_id, item=0, rank=0, attempt=1, error=None, is_broken=False, epoch=None):
        epoch = epoch or self.epochs[rank]
        return self.do(PayloadEnd(request_id, item, attempt, rank, epoch, error, is_broken))

    def receive(self, request_id, item=0, rank=0, attempt=1):
        self.header(request_id, item, rank)
        return self.payload(request_id, item, rank, attempt)

    def consume(self, request_id, item=0, attempt=1):
        return self.do(Consumed(request_id, item, attempt, self[request_id, item].received))

    def tick(self, seconds):
        self.now += seconds
        return [a for a in self.do(Tick()) if not (isinstance(a, SendFrame) and isinstance(a.frame.body, Beat))]

    def __getitem__(self, at):
        return self.sessions.requests[at[0]].sessions[at[1]]

    def counts(self, pool="rows"):
        return self.sessions.allocator.counts(pool)

    def bring(self, state, rows=6):
        """Request r with one item on rank 0, brought to a state; HELD, WAITING and so on with 2 of its rows there."""
        self.expect("r", rows)
        if state == IDLE:
            return
        if state in ("no link", "partly no link"):
            self.down(0)
        self.assign("r")
        if state in (RECEIVING, HELD, DONE):
            self.header("r")
        if state in (HELD, DONE):
            self.payload("r")
        if state == DONE:
            self.consume("r")


def bodies(actions, rank=None):
    return [a.frame.body for a in actions if isinstance(a, SendFrame) and rank in (None, a.peer)]


def granted(actions):
    return [(b.request_id, b.item, b.row_start, b.row_stop) for b in bodies(actions) if isinstance(b, Room)]
