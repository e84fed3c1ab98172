"""The encode side of all transfers: which item is encoded when, what is sent, how long rows are kept. Pure.

`handle(event, now)` changes the tables and returns actions. Each attempt at an item goes through `STATES`.

Nothing is encoded without a grant. At most `max_items` are encoded at a time, `max_clips` of them clips, and no item is
begun for a language rank that has its share in memory; besides, `max_parked` wait for each: that is how far this side
can run ahead of receivers that are full or silent. The queue is in the order in which first tokens are due
(`core/due.py`), one time for all items of a request. What has no place is passed by those behind it that have one, and
for what is more urgent than those that have places there are `max_urgent` more: the images of one request do not stand
before another's only one. So it is with the places of clips; those beyond `max_clips` take none from images.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.errors import Failure, late
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.protocol.link_state import LinkState
from qwen3vl_disagg.protocol.messages import Abort, Ack, Grant, HeaderOk, ItemFailed, Nack, Resume, Stale
from qwen3vl_disagg.protocol.session_events import (
    Attempt,
    BreakLink,
    EncodeAction,
    Encoded,
    EncodeEvent,
    FrameIn,
    LinkDown,
    LinkUp,
    PayloadSent,
    Release,
    SendHeader,
    SendPayload,
    SessionLimits,
    StartEncode,
    Tell,
    Tick,
)
from qwen3vl_disagg.protocol.states import State, check_transition

QUEUED, ENCODING, READY = "queued", "encoding", "ready"
HEADER, SENDING, SENT, PARKED = "header", "sending", "sent", "parked"

STATES = {
    QUEUED: State(
        "granted; waits for a place in memory",
        "a place; link down: forgotten, the next link's grant brings it again",
        (ENCODING,),
    ),
    ENCODING: State("pull, decode, tower", "rows: ready, or parked when the grant is void", (READY, PARKED)),
    READY: State("waits for its link's turn", "turn: header; link down: parked", (HEADER, PARKED)),
    HEADER: State(
        "header is out",
        "header ok: sending; nack: over; link down: parked",
        (SENDING, PARKED),
        lambda limits: limits.answer_s,
        "then the link is broken",
    ),
    SENDING: State(
        "payload has to follow",
        "payload out: sent; link down, or acknowledged in part: parked",
        (SENT, PARKED),
        lambda limits: 2 * limits.payload_s,
        "more by its size, then the link is broken",
    ),
    SENT: State(
        "waits for the acknowledgement",
        "ack of all: over; of some, or link down: parked",
        (PARKED,),
        lambda limits: limits.answer_s,
        "more by its size, then the link is broken",
    ),
    PARKED: State(
        "rows wait for a resume", "grant: ready", (READY,), lambda limits: limits.lease_s, "then they are dropped"
    ),
}
"""Of an attempt on the encode side. Each can end at any time: aborted, failed, or in favour of a newer attempt."""


@dataclass(slots=True)
class Outgoing:
    """One attempt at one item. `grant` is void once the link of `epoch` is gone."""

    attempt: Attempt
    language_rank: int
    visual: VisualItem
    is_alone: bool
    item_deadline: float
    grant: Grant | Resume | None
    state: str
    deadline: float
    due: float = FIRST_COME
    granted_at: float = 0.0
    moving_s: float = 0.0
    """What the bytes of the payload that is sent may take on the way, beside all else."""
    is_encoded: bool = False
    is_dropped: bool = False
    """Given up while its header was out: if that is answered with yes, the payload still has to follow."""


@dataclass(slots=True)
class _Outlet:
    """A link, and whose turn it is: payloads follow one another in the order of their headers."""

    state: LinkState
    turn: Attempt | None = None
    ready: deque[Attempt] = field(default_factory=deque)


@dataclass
class EncodeSessions:
    """All attempts on one encode rank."""

    limits: SessionLimits = field(default_factory=SessionLimits)

    def __post_init__(self) -> None:
        self.items: dict[Attempt, Outgoing] = {}
        self.outlets: dict[int, _Outlet] = {}
        self.queue: list[Attempt] = []
        self._last_epochs: dict[int, int] = {}
        self._actions: list[EncodeAction] = []
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            FrameIn: self._frame_in,
            Tick: self._tick,
            Encoded: self._encoded,
            ItemFailed: self._encode_failed,
            LinkUp: self._link_up,
            LinkDown: self._link_down,
            PayloadSent: self._payload_sent,
        }
        self._frames: dict[type, Callable[[_Outlet, Any, float], None]] = {
            Grant: self._granted,
            Resume: self._resumed,
            HeaderOk: self._header_ok,
            Ack: self._acknowledged,
            Nack: self._given_up,
            Abort: self._given_up,
            Stale: self._stale,
        }

    def handle(self, event: EncodeEvent, now: float) -> list[EncodeAction]:
        """Take one event in; `now` is in seconds on any clock that does not go back."""
        self._handlers[type(event)](event, now)
        actions, self._actions = self._actions, []
        return actions

    @property
    def is_idle(self) -> bool:
        return not self.items and not self.queue and all(not o.ready and o.turn is None for o in self.outlets.values())

    @property
    def num_in_memory(self) -> int:
        """Items with bytes or rows in memory that are on their way (parked ones not counted)."""
        return sum(map(len, self._in_memory().values()))

    @property
    def num_parked(self) -> int:
        return sum(1 for item in self.items.values() if item.state == PARKED)

    def _end(self, attempt: Attempt) -> None:
        """Forget an attempt, also the rows; a payload that has begun goes on to its end by itself."""
        item = self.items.get(attempt)
        if item is None:
            return
        outlet = self.outlets.get(item.language_rank)
        if item.state == HEADER and outlet is not None and outlet.turn == attempt:
            item.is_dropped = True
            return
        del self.items[attempt]
        if item.state == QUEUED:
            self.queue.remove(attempt)
            return
        if item.state == READY and outlet is not None:
            outlet.ready.remove(attempt)
        self._actions.append(Release(attempt))

    def _fail(self, attempt: Attempt, failure: Failure, now: float) -> None:
        """Give an attempt up. The router is told, and it alone tells the language rank: were both told, the news of a
        lost attempt could overtake that of a bad image."""
        self._end(attempt)
        request_id, item, number = attempt
        self._actions.append(Tell(ItemFailed(request_id=request_id, item=item, attempt=number, failure=failure)))
        self._fill_places(now)

    def _go(self, item: Outgoing, state: str, now: float, *, more_s: float = 0.0) -> None:
        """To another state, for as long as the table says and `more_s`."""
        check_transition(STATES, item.state, state)
        seconds = STATES[state].seconds
        deadline = item.item_deadline if seconds is None else now + seconds(self.limits) + more_s
        item.state, item.deadline = state, deadline

    # ---- encoding ----

    def _fill_places(self, now: float) -> None:
        if not self.queue:
            return
        limits, in_memory = self.limits, self._in_memory()
        encoding, clips = list[float](), list[float]()
        clips_of = defaultdict[int, list[float]](list)
        for item in self.items.values():
            if item.state == ENCODING:
                insort(encoding, item.due)
                if item.visual.modality == "video":
                    insort(clips, item.due)
                    insort(clips_of[item.language_rank], item.due)
        share = limits.max_items if len(self.outlets) < 2 else -(-limits.max_items // 2)
        for attempt in list(self.queue):
            item = self.items[attempt]
            is_clip, rank = item.visual.modality == "video", item.language_rank
            if self._is_full(encoding, limits.max_items, item, clips):
                return
            if is_clip and self._is_full(clips, limits.max_clips, item):
                continue
            if self._is_full(in_memory[rank], share, item, clips_of[rank]):
                continue
            self.queue.remove(attempt)
            self._go(item, ENCODING, now)
            for dues in (encoding, in_memory[rank], *((clips, clips_of[rank]) if is_clip else ())):
                insort(dues, item.due)
            waited_s = now - item.granted_at
            self._actions.append(StartEncode(attempt, item.visual, item.is_alone, item.due, waited_s))

    def _is_full(self, dues: list[float], places: int, item: Outgoing, clips: Sequence[float] = ()) -> bool:
        """Whether places are taken by what is no less urgent, or all and those for the urgent. Of these `clips` those
        above their number are not counted with images."""
        num_before = bisect_right(dues, item.due) - max(0, bisect_right(clips, item.due) - self.limits.max_clips)
        return num_before >= places or len(dues) >= places + self.limits.max_urgent

    def _in_memory(self) -> defaultdict[int, list[float]]:
        """When the items are due that are on their way with bytes or rows in memory: by language rank, in order."""
        states, dues = (ENCODING, READY, HEADER, SENDING, SENT), defaultdict[int, list[float]](list)
        for item in self.items.values():
            if item.state in states:
                insort(dues[item.language_rank], item.due)
        return dues

    def _encoded(self, event: Encoded, now: float) -> None:
        item = self.items.get(event.attempt)
        if item is None or item.state != ENCODING:
            return
        item.is_encoded = True
        if item.grant is None:
            self._park(item, now)
        else:
            self._make_ready(item, now)
            self._fill_places(now)

    def _encode_failed(self, event: ItemFailed, now: float) -> None:
        item = self.items.get(event.key)
        if item is not None and item.state == ENCODING:
            self._fail(item.attempt, event.failure, now)

    def _park(self, item: Outgoing, now: float) -> None:
        """Keep the rows for a while, within bounds."""
        if item.is_dropped:
            self._end(item.attempt)
            return
        self._go(item, PARKED, now)
        item.grant = None
        rank = item.language_rank
        parked = [other for other in self.items.values() if other.state == PARKED and other.language_rank == rank]
        if len(parked) > self.limits.max_parked:
            self._end(min(parked, key=lambda other: other.deadline).attempt)
        self._fill_places(now)

    # ---- sending ----

    def _make_ready(self, item: Outgoing, now: float) -> None:
        self._go(item, READY, now)
        outlet = self.outlets[item.language_rank]
        outlet.ready.append(item.attempt)
        self._take_turn(outlet, now)

    def _take_turn(self, outlet: _Outlet, now: float) -> None:
        if outlet.turn is None and outlet.ready:
            item = self.items[outlet.ready.popleft()]
            if item.grant is None:
                raise RuntimeError(f"{item.attempt} is ready without a grant")
            outlet.turn = item.attempt
            self._go(item, HEADER, now)
            link = outlet.state
            self._actions.append(SendHeader(link.peer, link.epoch, link.next_seq(now), item.grant))

    def _next_turn(self, outlet: _Outlet, attempt: Attempt, now: float) -> None:
        if outlet.turn == attempt:
            outlet.turn = None
            self._take_turn(outlet, now)

    def _granted(self, outlet: _Outlet, grant: Grant, now: float) -> None:
        """A new attempt ends those before it. One that is here was granted over a link that is gone. Frames take longer
        and shorter: it is due when the items of its request are that are here."""
        attempt = grant.key
        if attempt in self.items:
            self._grant_again(outlet, self.items[attempt], grant, now)
            return
        due = next((item.due for key, item in self.items.items() if key[0] == attempt[0]), now + grant.due_s)
        for other in [key for key in self.items if key[:2] == attempt[:2]]:
            self._end(other)
        deadline = now + grant.timeout_s
        self.items[attempt] = Outgoing(
            attempt,
            outlet.state.peer,
            grant.visual,
            grant.is_alone,
            deadline,
            grant,
            QUEUED,
            deadline,
            due,
            granted_at=now,
        )
        insort(self.queue, attempt, key=lambda key: self.items[key].due)
        self._fill_places(now)

    def _resumed(self, outlet: _Outlet, resume: Resume, now: float) -> None:
        attempt = resume.key
        if attempt in self.items:
            self._grant_again(outlet, self.items[attempt], resume, now)
            return
        nack = Nack(request_id=resume.request_id, item=resume.item, attempt=resume.attempt, reason="gone")
        self._actions.append(outlet.state.send(nack, now))

    def _grant_again(self, outlet: _Outlet, item: Outgoing, grant: Grant | Resume, now: float) -> None:
        if item.language_rank == outlet.state.peer and item.state in (ENCODING, PARKED):
            item.grant = grant
            if item.state == PARKED:
                self._make_ready(item, now)

    def _header_ok(self, outlet: _Outlet, message: HeaderOk, now: float) -> None:
        attempt = message.key
        if outlet.turn != attempt:
            return
        item = self.items.get(attempt)
        if item is None or item.state != HEADER or item.grant is None or item.grant.row_start != message.row_start:
            # The other end waits for a payload that nobody will send.
            self._break(outlet, "a payload was awaited that had been given up", now)
            return
        # Who receives knows the size and what the link has moved lately.
        payload_s = max(self.limits.payload_s, message.payload_s)
        item.moving_s = payload_s - self.limits.payload_s
        self._go(item, SENDING, now, more_s=2 * item.moving_s)
        self._actions.append(SendPayload(outlet.state.peer, outlet.state.epoch, item.grant, payload_s))
        if item.is_dropped:
            self._end(attempt)

    def _payload_sent(self, event: PayloadSent, now: float) -> None:
        outlet = self.outlets.get(event.language_rank)
        if outlet is None or outlet.state.epoch != event.epoch:
            return
        if event.error is not None:
            self._break(outlet, event.error, now)
            return
        item = self.items.get(event.attempt)
        if item is not None and item.state == SENDING:
            self._go(item, SENT, now, more_s=item.moving_s)  # what is sent may be on its way as long
        self._next_turn(outlet, event.attempt, now)

    def _acknowledged(self, outlet: _Outlet, message: Ack, now: float) -> None:
        attempt = message.key
        item = self.items.get(attempt)
        if item is None or item.language_rank != outlet.state.peer or not item.is_encoded:
            return
        if message.received == item.visual.num_rows:
            self._end(attempt)
            self._next_turn(outlet, attempt, now)
            self._fill_places(now)
        elif item.state in (SENDING, SENT) and item.grant is not None and message.received == item.grant.row_stop:
            self._park(item, now)

    def _given_up(self, outlet: _Outlet, message: Nack | Abort, now: float) -> None:
        attempt = message.key
        item = self.items.get(attempt)
        if item is not None and item.language_rank == outlet.state.peer:
            if type(message) is Nack and item.state == HEADER and outlet.turn == attempt:
                outlet.turn = None  # the header was refused: no payload
            self._end(attempt)
            self._take_turn(outlet, now)
            self._fill_places(now)

    # ---- links and time ----

    def _link_up(self, event: LinkUp, now: float) -> None:
        old = self.outlets.get(event.peer)
        if event.epoch <= self._last_epochs.get(event.peer, 0):
            return
        if old is not None:
            self._cut(old, now)
        self._last_epochs[event.peer] = event.epoch
        self.outlets[event.peer] = _Outlet(LinkState(event.peer, event.epoch, now))

    def _link_down(self, event: LinkDown, now: float) -> None:
        outlet = self.outlets.get(event.peer)
        if outlet is not None and outlet.state.epoch == event.epoch:
            self._cut(outlet, now)

    def _break(self, outlet: _Outlet, reason: str, now: float) -> None:
        self._actions.append(BreakLink(outlet.state.peer, outlet.state.epoch, reason))
        self._cut(outlet, now)

    def _cut(self, outlet: _Outlet, now: float) -> None:
        """Grants over this link are void; what is encoded waits for the next one. What is queued goes first, so that it
        takes none of the places that come free."""
        del self.outlets[outlet.state.peer]
        items = [item for item in self.items.values() if item.language_rank == outlet.state.peer]
        for item in sorted(items, key=lambda item: item.state != QUEUED):
            item.grant = None
            if item.state == QUEUED:
                self._end(item.attempt)
            elif item.state in (READY, HEADER, SENDING, SENT):
                self._park(item, now)
        self._fill_places(now)

    def _stale(self, outlet: _Outlet, message: Stale, now: float) -> None:
        if message.epoch > outlet.state.epoch:
            self._break(outlet, f"the other end is at epoch {message.epoch}", now)

    def _frame_in(self, event: FrameIn, now: float) -> None:
        outlet, frame = self.outlets.get(event.peer), event.frame
        if outlet is None:
            return
        if frame.epoch != outlet.state.epoch:
            if frame.epoch < outlet.state.epoch and type(frame.body) is not Stale:
                self._actions.append(outlet.state.send(Stale(epoch=outlet.state.epoch), now))
            return
        verdict = outlet.state.take(frame)
        if verdict is None:
            self._break(outlet, f"frames before {frame.seq} were lost", now)
        elif verdict and (handler := self._frames.get(type(frame.body))) is not None:
            handler(outlet, frame.body, now)

    def _tick(self, _: Tick, now: float) -> None:
        for item in list(self.items.values()):
            if now >= item.deadline and item.attempt in self.items:
                self._out_of_time(item, now)
        for outlet in self.outlets.values():
            if now - outlet.state.sent_at >= self.limits.beat_s:
                self._actions.append(outlet.state.beat(now))

    def _out_of_time(self, item: Outgoing, now: float) -> None:
        outlet = self.outlets.get(item.language_rank)
        if item.state in (HEADER, SENDING, SENT):
            item.deadline = math.inf
            if outlet is not None:
                self._break(outlet, f"no answer for an item in state {item.state}", now)
        elif item.state == PARKED:
            self._end(item.attempt)
        else:
            self._fail(item.attempt, Failure.of(late()), now)
