"""The language side of all transfers: who gets room, what is accepted, when blocks come back. Pure.

`handle(event, now)` changes the tables and returns actions; no clock, thread, socket or tensor inside. Each item of a
request is a session, whose states are `session.STATES`. A second `Expect` begins all of them anew.

Room is given in one order, as requests are due (`core/due.py`), then by arrival, then by item, and first to items that
have begun (they have slot and DeepStack, and want rows alone). The first that wants room takes what is free; nobody
behind it gets any before it has enough. An item that cannot use room now (no encode rank, no link) is passed over, and
with it the later items of its request. What an item has it keeps, through lost links and attempts, until its rows are
consumed: so no two wait for what the other has, and one block is enough.

Blocks that a pending receive may write into, or the engine may read, are kept in quarantine when their attempt goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qwen3vl_disagg.core.errors import Failure, late
from qwen3vl_disagg.protocol.allocator import BlockAllocator, Lease
from qwen3vl_disagg.protocol.layout import RowSizes
from qwen3vl_disagg.protocol.link_state import LinkState
from qwen3vl_disagg.protocol.messages import (
    Abort,
    Ack,
    Assign,
    Cancel,
    Header,
    HeaderOk,
    ItemLost,
    ItemReceived,
    Nack,
    RequestFailed,
    Stale,
)
from qwen3vl_disagg.protocol.payload_time import moving_s
from qwen3vl_disagg.protocol.session import (
    DONE,
    GRANTED,
    HELD,
    IDLE,
    RECEIVING,
    STATES,
    WAITING,
    Leases,
    RequestSessions,
    Session,
    end_quarantine,
    first_rows,
    fits_whole,
    header_problem,
    in_line,
    payload_bytes,
    receive_job,
    take_room,
)
from qwen3vl_disagg.protocol.session_events import (
    Attempt,
    BreakLink,
    Consumed,
    Expect,
    FrameIn,
    LanguageAction,
    LanguageEvent,
    LinkDown,
    LinkUp,
    PayloadEnd,
    Prolong,
    Recall,
    Returned,
    RowsReady,
    SessionLimits,
    Tell,
    Tick,
)
from qwen3vl_disagg.protocol.states import check_transition


@dataclass
class LanguageSessions:
    """All sessions of one language rank over one set of pools."""

    allocator: BlockAllocator
    block_size: int
    row_sizes: RowSizes
    limits: SessionLimits = field(default_factory=SessionLimits)

    def __post_init__(self) -> None:
        self.requests: dict[str, RequestSessions] = {}  # in order of arrival
        self.links: dict[int, LinkState] = {}
        self.pending: Leases = {}  # in quarantine until a posted receive has returned
        self.recalled: Leases = {}  # in quarantine until the engine has answered a recall
        self.is_short_of_room = False  # some item waits for blocks
        self.last_attempt = 0  # the highest number of all; a request's sessions, and their numbers, end before its id
        self._last_epochs: dict[int, int] = {}
        self._gone_at: dict[int, float] = {}  # when peers without a link had one last
        self._actions: list[LanguageAction] = []
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            FrameIn: self._frame_in,
            Tick: self._tick,
            Expect: self._expect,
            Assign: self._assigned,
            Cancel: self._cancelled,
            Prolong: self._prolonged,
            LinkUp: self._link_up,
            LinkDown: self._link_down,
            PayloadEnd: self._payload_end,
            Consumed: self._consumed,
            Returned: self._returned,
        }
        self._frames: dict[type, Callable[[LinkState, Any, float], None]]
        self._frames = {Header: self._header, Nack: self._given_up, Abort: self._given_up}

    def handle(self, event: LanguageEvent, now: float) -> list[LanguageAction]:
        """Take one event in; `now` is in seconds on any clock that does not go back."""
        self._handlers[type(event)](event, now)
        actions, self._actions = self._actions, []
        return actions

    @property
    def is_idle(self) -> bool:
        return not (self.requests or self.pending or self.recalled) and self.allocator.is_idle

    def find(self, request_id: str, item: int, attempt: int) -> Session | None:
        """The session whose present attempt this is."""
        request = self.requests.get(request_id)
        if request is None or not 0 <= item < len(request.sessions):
            return None
        session = request.sessions[item]
        return session if session.attempt == attempt and session.state != IDLE else None

    # ---- requests ----

    def _expect(self, event: Expect, now: float) -> None:
        firsts, request = first_rows(event), self.requests.get(event.request_id)
        if request is None:
            sessions = [Session(event.request_id, i, v, event.deadline, event.due) for i, v in enumerate(event.items)]
            request = self.requests[event.request_id] = RequestSessions(sessions, event.deadline)
        for session, first in zip(request.sessions, firsts, strict=True):
            if session.is_under_way:  # the router will hear that it is needed again, if it is
                self._actions.append(Tell(ItemReceived(**session.ids)))
            self._drop(session, "the request gave up what it had", now, gives_back=True)
            session.need_from(first)
        self._give_room(now)

    def _assigned(self, event: Assign, now: float) -> None:
        self.last_attempt = max(self.last_attempt, event.attempt)
        request = self.requests.get(event.request_id)
        if request is None or not 0 <= event.item < len(request.sessions):
            return
        session = request.sessions[event.item]
        if event.attempt <= session.attempt:
            return
        if session.state in (HELD, DONE) and session.received == session.total:  # the news of that is on its way
            ids = {**session.ids, "attempt": event.attempt}
            self._actions.append(Tell(ItemReceived(**ids)))
            return
        self._drop(session, "another attempt takes its place", now)
        session.attempt, session.encode_rank, session.is_alone = event.attempt, event.encode_rank, event.is_alone
        self._wait(session, now)
        self._give_room(now)

    def _cancelled(self, event: Cancel, now: float) -> None:
        self._forget(event.request_id, now)

    def _prolonged(self, event: Prolong, now: float) -> None:
        request = self.requests.get(event.request_id)
        if request is not None:
            request.deadline = event.deadline
            for session in request.sessions:
                session.request_deadline = event.deadline

    def _forget(self, request_id: str, now: float) -> None:
        request = self.requests.pop(request_id, None)
        if request is not None:
            for session in request.sessions:
                self._drop(session, "the request is over", now, gives_back=True)
            self._give_room(now)

    def _drop(self, session: Session, reason: str, now: float, *, gives_back: bool = False) -> None:
        """End the attempt under way; the other end is told."""
        link = self.links.get(session.encode_rank)
        if session.is_under_way and link is not None:
            self._actions.append(link.send(Abort(**session.ids, reason=reason), now))
        self._let_go(session, now, gives_back=gives_back)

    def _let_go(self, session: Session, now: float, *, gives_back: bool = False) -> None:
        """The attempt is over. Its blocks stay with the item, unless that gives them back: then the engine itself has
        forgotten what it consumed of it."""
        leases = tuple(lease for lease in (session.room, session.hold) if lease is not None)
        where = {RECEIVING: self.pending, HELD: self.recalled}.get(session.state)
        has_begun = session.state not in (IDLE, DONE) and session.received > session.first
        if session.state == HELD or (has_begun and not gives_back):
            self._actions.append(Recall(*session.key))
        if where is not None:
            self._quarantine(leases, where, session.key)
            session.quarantined_as = session.key
        elif gives_back:
            for lease in leases:
                self.allocator.free(lease)
        if where is not None or gives_back:
            session.room = session.hold = None
        session.grant, session.num_broken, session.received = None, 0, session.first
        self._go(session, IDLE, now)

    def _quarantine(self, leases: tuple[Lease, ...], where: Leases, key: Attempt) -> None:
        for lease in leases:
            self.allocator.quarantine(lease)
        where[key] = leases

    def _lose(self, session: Session, reason: str, now: float, dead_epoch: int = 0) -> None:
        lost = ItemLost(**session.ids, reason=reason, dead_epoch=dead_epoch)
        self._let_go(session, now)
        self._actions.append(Tell(lost))

    def _tick(self, _: Tick, now: float) -> None:
        for request_id, request in list(self.requests.items()):
            if now >= request.deadline:
                self._forget(request_id, now)
                self._actions.append(Tell(RequestFailed(request_id=request_id, failure=Failure.of(late()))))
                continue
            for session in request.sessions:
                if now >= session.deadline:
                    self._out_of_time(session, now)
        for link in self.links.values():
            if now - link.sent_at >= self.limits.beat_s:
                self._actions.append(link.beat(now))
        self._forget_peers(now)
        self._give_room(now)

    def _forget_peers(self, now: float) -> None:
        """Ranks that joined have numbers of their own and never come back under them."""
        for peer in [peer for peer, at in self._gone_at.items() if now - at >= self.limits.forget_s]:
            if not self._sessions_of(peer):
                del self._gone_at[peer], self._last_epochs[peer]

    def _out_of_time(self, session: Session, now: float) -> None:
        link = self.links.get(session.encode_rank)
        if session.state == RECEIVING:
            session.deadline = math.inf  # the receive itself has one and must have returned
            if link is not None:
                self._break(link, "a payload did not come", now)
        elif session.state == WAITING:
            epoch = self._last_epochs.get(session.encode_rank, 0)
            self._lose(session, f"no link to encode rank {session.encode_rank}", now, epoch)
        else:
            if link is not None:
                self._actions.append(link.send(Abort(**session.ids, reason="no header came"), now))
            self._lose(session, "no header came", now)

    # ---- room ----

    def _go(self, session: Session, state: str, now: float, *, more_s: float = 0.0) -> None:
        """To another state, for as long as the table says and `more_s`."""
        check_transition(STATES, session.state, state)
        seconds = STATES[state].seconds
        session.state, session.deadline = state, math.inf if seconds is None else now + seconds(self.limits) + more_s

    def _wait(self, session: Session, now: float) -> None:
        self._go(session, WAITING, now)
        session.grant = None
        if session.encode_rank in self.links:
            session.deadline = math.inf

    def _give_room(self, now: float) -> None:
        while self._serve_line(now):
            continue

    def _serve_line(self, now: float) -> bool:
        """A grant to the first in line; whether the line is another by that."""
        self.is_short_of_room = False
        pools = (self.allocator, self.block_size, self.row_sizes)
        for session in in_line(self.requests.values(), self.links, lambda session: fits_whole(session, *pools)):
            is_kept, is_waiting = session.room is not None, session.state == WAITING
            if self.is_short_of_room and session.hold is None:
                break
            grant = take_room(session, *pools, now) if is_waiting else None
            if grant is not None:
                self._go(session, GRANTED, now)
                session.grant = grant
                self._actions.append(self.links[session.encode_rank].send(grant, now))
                if is_kept or session.is_fully_granted:
                    return True
            # One that has part of its room will want more as soon as its rows are consumed.
            self.is_short_of_room = True
            if grant or not (is_waiting and session.hold and self.allocator.num_free("rows")):
                break  # else it wants DeepStack only, which others that have begun may have: they go on
        return False

    # ---- links ----

    def _link_up(self, event: LinkUp, now: float) -> None:
        old = self.links.get(event.peer)
        if event.epoch <= self._last_epochs.get(event.peer, 0):
            return
        if old is not None:
            self._cut(old, now)
        self._last_epochs[event.peer] = event.epoch
        self._gone_at.pop(event.peer, None)
        self.links[event.peer] = LinkState(event.peer, event.epoch, now)
        for session in self._sessions_of(event.peer):
            if session.state == WAITING:
                session.deadline = math.inf
            elif session.received == session.total:  # the last acknowledgement may have been lost with the old link
                self._acknowledge(session, self.links[event.peer], now)
        self._give_room(now)

    def _link_down(self, event: LinkDown, now: float) -> None:
        link = self.links.get(event.peer)
        if link is not None and link.epoch == event.epoch:
            self._cut(link, now)
            self._give_room(now)

    def _break(self, link: LinkState, reason: str, now: float) -> None:
        self._actions.append(BreakLink(link.peer, link.epoch, reason))
        self._cut(link, now)
        self._give_room(now)

    def _cut(self, link: LinkState, now: float) -> None:
        """Sessions go on when the link is back; what was granted over it is void, what is being received will fail."""
        del self.links[link.peer]
        self._gone_at[link.peer] = now
        for session in self._sessions_of(link.peer):
            if session.state == GRANTED or session.state == WAITING:
                self._wait(session, now)

    def _sessions_of(self, encode_rank: int) -> list[Session]:
        return [s for request in self.requests.values() for s in request.sessions if s.encode_rank == encode_rank]

    def _frame_in(self, event: FrameIn, now: float) -> None:
        link, frame = self.links.get(event.peer), event.frame
        if link is None:
            return
        if frame.epoch != link.epoch:
            if frame.epoch < link.epoch and type(frame.body) is not Stale:
                self._actions.append(link.send(Stale(epoch=link.epoch), now))
            return
        verdict = link.take(frame)
        if verdict is None:
            self._break(link, f"frames before {frame.seq} were lost", now)
        elif verdict and (handler := self._frames.get(type(frame.body))) is not None:
            handler(link, frame.body, now)

    # ---- transfers ----

    def _header(self, link: LinkState, header: Header, now: float) -> None:
        ids: dict[str, Any] = {"request_id": header.request_id, "item": header.item, "attempt": header.attempt}
        session = self.find(**ids)
        if session is None or session.state != GRANTED or session.encode_rank != link.peer:
            self._actions.append(link.send(Nack(**ids, reason="no such session"), now))
            return
        problem = header_problem(session, header)
        if problem:
            self._actions.append(link.send(Nack(**ids, reason=problem), now))
            self._lose(session, problem, now)
            self._give_room(now)
            return
        moving = 0.0 if session.grant is None else moving_s(payload_bytes(session.grant, self.row_sizes), link.pace)
        job = receive_job(session, header, link.epoch, self.limits.payload_s + moving)
        self._go(session, RECEIVING, now, more_s=2 * moving)
        session.receiving_since = now
        self._actions.append(link.send(HeaderOk(**ids, row_start=header.row_start, payload_s=job.payload_s), now))
        self._actions.append(job)

    def _given_up(self, link: LinkState, message: Nack | Abort, now: float) -> None:
        session = self.find(*message.key)
        if session is not None and session.encode_rank == link.peer and session.received < session.total:
            self._lose(session, message.reason, now)
            self._give_room(now)

    def _payload_end(self, event: PayloadEnd, now: float) -> None:
        if self._is_back(self.pending, event):
            if event.is_broken:
                self._break_if_current(event, now)
            self._give_room(now)
            return
        session = self.find(*event.key)
        if session is None or session.state != RECEIVING or session.grant is None:
            raise ValueError(f"nothing is being received for {event.key}")
        link = self.links.get(session.encode_rank)  # possibly a newer one than the payload came over
        if event.error is None:
            start, session.received = session.received, session.grant.row_stop
            if link is not None and link.epoch == event.epoch:
                link.pace.learn(payload_bytes(session.grant, self.row_sizes), now - session.receiving_since)
            self._go(session, HELD, now)
            session.num_broken = 0
            if link is not None:
                self._acknowledge(session, link, now)
            self._actions.append(RowsReady(*session.key, start, session.received))
            if session.received == session.total:
                self._actions.append(Tell(ItemReceived(**session.ids)))
        elif event.is_broken and session.num_broken < 2:
            session.num_broken += 1
            self._wait(session, now)
            self._break_if_current(event, now)
        else:
            if link is not None:
                self._actions.append(link.send(Nack(**session.ids, reason=event.error), now))
            self._wait(session, now)  # nothing is pending any more
            self._lose(session, event.error, now)
            if event.is_broken:
                self._break_if_current(event, now)
        self._give_room(now)

    def _acknowledge(self, session: Session, link: LinkState, now: float) -> None:
        self._actions.append(link.send(Ack(**session.ids, received=session.received), now))

    def _break_if_current(self, event: PayloadEnd, now: float) -> None:
        link = self.links.get(event.encode_rank)
        if link is not None and link.epoch == event.epoch:
            self._break(link, event.error or "broken", now)

    # ---- the engine ----

    def _consumed(self, event: Consumed, now: float) -> None:
        session = self.find(*event.key)
        if session is None or session.state != HELD or event.rows < session.received:
            return
        if session.room is not None:
            self.allocator.free(session.room)
        session.room = None
        if session.received == session.total:
            if session.hold is not None:
                self.allocator.free(session.hold)
            session.hold = session.grant = None
            self._go(session, DONE, now)
        else:
            self._wait(session, now)
        self._give_room(now)

    def _returned(self, event: Returned, now: float) -> None:
        self._is_back(self.recalled, event)
        self._give_room(now)

    def _is_back(self, where: Leases, event: PayloadEnd | Returned) -> bool:
        """End the quarantine that this event ends, if there is one."""
        request, key = self.requests.get(event.request_id), event.key
        session = None if request is None else request.sessions[event.item]
        return end_quarantine(where, key, session, self.allocator)
