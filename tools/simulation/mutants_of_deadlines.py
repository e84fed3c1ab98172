"""Planted bugs: headers that are believed, and states, links and payloads that never come to an end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import msgspec

from qwen3vl_disagg.protocol import language_sessions
from qwen3vl_disagg.protocol.allocator import BlockAllocator
from qwen3vl_disagg.protocol.encode_sessions import (
    HEADER,
    PARKED,
    SENDING,
    SENT,
    EncodeSessions,
    Outgoing,
)
from qwen3vl_disagg.protocol.language_sessions import LanguageSessions
from qwen3vl_disagg.protocol.link_state import LinkState
from qwen3vl_disagg.protocol.messages import Ack, Beat, Frame, Header
from qwen3vl_disagg.protocol.session import GRANTED, RECEIVING, Leases, Session, header_problem
from qwen3vl_disagg.protocol.session_events import Attempt, Expect, SendFrame
from tools.simulation.mutants import method, mutant, swap

# ---- headers ----


@mutant("headers-are-never-checked", "I8", "whatever a header says, the receives are posted")
def _() -> Iterator[None]:
    with swap(language_sessions, "header_problem", lambda session, header: None):
        yield


def _not_compared(*names: str) -> Iterator[None]:
    def lax(session: Session, header: Header) -> str | None:
        problems = (header_problem(session, header) or "").split("; ")
        return "; ".join([problem for problem in problems if not problem.startswith(names)]) or None

    with swap(language_sessions, "header_problem", lax):
        yield


@mutant("grid-of-a-header-is-not-checked", "I8", "an item of another shape is taken for this one")
def _() -> Iterator[None]:
    yield from _not_compared("grid:", "total_rows:")


@mutant("rows-of-a-header-are-not-checked", "I8", "other rows are announced than were granted, and awaited")
def _() -> Iterator[None]:
    yield from _not_compared("rows:", "deepstack_rows:")


@mutant("runs-of-a-header-are-not-checked", "I8", "rows come in another number of pieces than there are receives")
def _() -> Iterator[None]:
    yield from _not_compared("runs:", "deepstack_runs:")


# ---- deadlines of the language side ----


@mutant("no-deadline-while-receiving", "I11", "receives that were posted are waited for without end")
def _() -> Iterator[None]:
    handle = method(LanguageSessions, "_header")

    def endless(self: LanguageSessions, link: LinkState, header: Header, now: float) -> None:
        handle(self, link, header, now)
        session = self.find(*header.key)
        if session is not None and session.state == RECEIVING:
            session.deadline = math.inf

    with swap(LanguageSessions, "_header", endless):
        yield


@mutant("no-deadline-for-a-grant", "I11", "the header of a grant is waited for without end")
def _() -> Iterator[None]:
    serve = method(LanguageSessions, "_serve_line")

    def endless(self: LanguageSessions, now: float) -> bool:
        result = serve(self, now)
        for request in self.requests.values():
            for session in request.sessions:
                session.deadline = math.inf if session.state == GRANTED else session.deadline
        return result

    with swap(LanguageSessions, "_serve_line", endless):
        yield


@mutant("no-deadline-of-the-request", "I11", "a request's own deadline is not kept by its language rank")
def _() -> Iterator[None]:
    expect = method(LanguageSessions, "_expect")

    def endless(self: LanguageSessions, event: Expect, now: float) -> None:
        expect(self, event, now)
        self.requests[event.request_id].deadline = math.inf

    with swap(LanguageSessions, "_expect", endless):
        yield


@mutant("language-side-never-ticks", "I11", "the language side does nothing when time has passed")
def _() -> Iterator[None]:
    with swap(LanguageSessions, "_tick", lambda self, _, now: None):
        yield


@mutant("payloads-break-without-end", "I11", "a payload that broke is asked for again, however often it has broken")
def _() -> Iterator[None]:
    payload_end = method(LanguageSessions, "_payload_end")

    def again(self: LanguageSessions, event: Any, now: float) -> None:
        session = self.find(*event.key)
        if session is not None:
            session.num_broken = 0
        payload_end(self, event, now)

    with swap(LanguageSessions, "_payload_end", again):
        yield


@mutant("last-ack-is-not-repeated", "I13", "the last acknowledgement goes once, though its link may have been lost")
def _() -> Iterator[None]:
    link_up = method(LanguageSessions, "_link_up")

    def once(self: LanguageSessions, event: Any, now: float) -> None:
        link_up(self, event, now)
        actions = self._actions
        is_ack = [isinstance(a, SendFrame) and isinstance(a.frame.body, Ack) for a in actions]
        if any(is_ack):
            self._actions = [action for action, drop in zip(actions, is_ack, strict=True) if not drop]
            link = self.links[event.peer]
            link.num_sent = 0  # as if it had never been: the frames that are left are counted anew
            self._actions = [_again(link, action, now) for action in self._actions]

    with swap(LanguageSessions, "_link_up", once):
        yield


def _again(link: LinkState, action: Any, now: float) -> Any:
    is_own = isinstance(action, SendFrame) and action.frame.epoch == link.epoch and action.peer == link.peer
    return link.send(action.frame.body, now) if is_own else action


@mutant("room-in-quarantine-is-lost-to-its-item", "I2", "what an item had before its attempt was lost goes to others")
def _() -> Iterator[None]:
    def end(where: Leases, key: Attempt, session: Session | None, allocator: BlockAllocator) -> bool:
        leases = where.pop(key, ())
        for lease in leases:
            allocator.release(lease)
        return bool(leases)

    with swap(language_sessions, "end_quarantine", end):
        yield


@mutant("short-of-room-is-not-said", "I11", "the engine does not hear that items wait for blocks")
def _() -> Iterator[None]:
    give_room = method(LanguageSessions, "_give_room")

    def silent(self: LanguageSessions, now: float) -> None:
        give_room(self, now)
        self.is_short_of_room = False

    with swap(LanguageSessions, "_give_room", silent):
        yield


# ---- deadlines of the encode side ----


def _endless(sessions: EncodeSessions, state: str) -> None:
    for item in sessions.items.values():
        if item.state == state:
            item.deadline = math.inf


@mutant("no-deadline-for-an-item", "I11", "an item may take as long as it likes on its way to rows")
def _() -> Iterator[None]:
    granted = method(EncodeSessions, "_granted")

    def endless(self: EncodeSessions, outlet: Any, grant: Any, now: float) -> None:
        granted(self, outlet, msgspec.structs.replace(grant, timeout_s=math.inf), now)

    with swap(EncodeSessions, "_granted", endless):
        yield


@mutant("no-deadline-for-a-header", "I11", "the answer to a header is waited for without end")
def _() -> Iterator[None]:
    take_turn = method(EncodeSessions, "_take_turn")

    def endless(self: EncodeSessions, outlet: Any, now: float) -> None:
        take_turn(self, outlet, now)
        _endless(self, HEADER)

    with swap(EncodeSessions, "_take_turn", endless):
        yield


@mutant("no-deadline-while-sending", "I11", "a payload may take as long as it likes")
def _() -> Iterator[None]:
    header_ok = method(EncodeSessions, "_header_ok")

    def endless(self: EncodeSessions, outlet: Any, message: Any, now: float) -> None:
        header_ok(self, outlet, message, now)
        _endless(self, SENDING)

    with swap(EncodeSessions, "_header_ok", endless):
        yield


@mutant("no-deadline-for-an-acknowledgement", "I11", "the answer to a payload is waited for without end")
def _() -> Iterator[None]:
    sent = method(EncodeSessions, "_payload_sent")

    def endless(self: EncodeSessions, event: Any, now: float) -> None:
        sent(self, event, now)
        _endless(self, SENT)

    with swap(EncodeSessions, "_payload_sent", endless):
        yield


@mutant("lease-without-end", "I11", "rows that nobody asks for are kept for ever")
def _() -> Iterator[None]:
    park = method(EncodeSessions, "_park")

    def endless(self: EncodeSessions, item: Outgoing, now: float) -> None:
        park(self, item, now)
        _endless(self, PARKED)

    with swap(EncodeSessions, "_park", endless):
        yield


@mutant("encode-side-never-ticks", "I11", "the encode side does nothing when time has passed")
def _() -> Iterator[None]:
    with swap(EncodeSessions, "_tick", lambda self, _, now: None):
        yield


@mutant("no-beats", "I11", "a link on which nothing happens is silent: the loss of its last frame goes unnoticed")
def _() -> Iterator[None]:
    def silent(self: LinkState, now: float) -> SendFrame:
        self.sent_at = now
        return SendFrame(-1, Frame(epoch=self.epoch, seq=self.num_sent, body=Beat()))

    with swap(LinkState, "beat", silent):
        yield


@mutant("older-attempts-go-on", "I10", "a newer attempt at an item does not end those before it")
def _() -> Iterator[None]:
    granted = method(EncodeSessions, "_granted")

    def beside(self: EncodeSessions, outlet: Any, grant: Any, now: float) -> None:
        self._end = lambda attempt: None  # type: ignore[method-assign]
        granted(self, outlet, grant, now)
        del self._end

    with swap(EncodeSessions, "_granted", beside):
        yield


@mutant("abort-is-not-heard-in-the-queue", "I15", "an item that is given up while it waits for a place is kept")
def _() -> Iterator[None]:
    given_up = method(EncodeSessions, "_given_up")

    def forget(self: EncodeSessions, outlet: Any, message: Any, now: float) -> None:
        if message.key not in self.queue:
            given_up(self, outlet, message, now)

    with swap(EncodeSessions, "_given_up", forget):
        yield


@mutant("a-grant-that-comes-again-starts-anew", "I13", "rows that wait for their link are encoded once more")
def _() -> Iterator[None]:
    granted = method(EncodeSessions, "_granted")

    def anew(self: EncodeSessions, outlet: Any, grant: Any, now: float) -> None:
        item = self.items.get(grant.key)
        if item is not None and item.state == PARKED:
            del self.items[item.attempt]
        granted(self, outlet, grant, now)

    with swap(EncodeSessions, "_granted", anew):
        yield


@mutant("parked-without-bound", "I12", "any number of items wait for a resume")
def _() -> Iterator[None]:
    def park(self: EncodeSessions, item: Outgoing, now: float) -> None:
        if item.is_dropped:
            self._end(item.attempt)
            return
        item.state, item.grant, item.deadline = PARKED, None, now + self.limits.lease_s
        self._fill_places(now)

    with swap(EncodeSessions, "_park", park):
        yield


@mutant("turn-is-not-passed-on", "I11", "after the first payload of a link nothing else is sent over it")
def _() -> Iterator[None]:
    with swap(EncodeSessions, "_next_turn", lambda self, outlet, attempt, now: None):
        yield
