"""Planted bugs: what other systems got wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from qwen3vl_disagg.protocol import language_sessions, layout
from qwen3vl_disagg.protocol import session as session_module
from qwen3vl_disagg.protocol.allocator import BlockAllocator, Lease, Want
from qwen3vl_disagg.protocol.encode_sessions import EncodeSessions
from qwen3vl_disagg.protocol.language_sessions import LanguageSessions
from qwen3vl_disagg.protocol.layout import RowSizes, blocks_for
from qwen3vl_disagg.protocol.link_state import LinkState
from qwen3vl_disagg.protocol.messages import Finished, Frame, Nack, Resume, Tokens
from qwen3vl_disagg.protocol.router import Router
from qwen3vl_disagg.protocol.routing import Deliver
from qwen3vl_disagg.protocol.session import GRANTED, WAITING, Session
from tools.simulation import encode as sim_encode
from tools.simulation import language as sim_language
from tools.simulation.mutants import method, mutant, swap


@mutant(
    "deepstack-of-the-first-grant-only",
    "I5",
    "the initial transfer asks for the DeepStack of its own rows",
    stands_for="F1",
)
def _() -> Iterator[None]:
    take = session_module.take_room

    def cut(session: Session, allocator: BlockAllocator, block_size: int, sizes: RowSizes, now: float) -> Any:
        grant = take(session, allocator, block_size, sizes, now)
        if grant is None or isinstance(grant, Resume) or grant.deepstack_stop <= grant.row_stop:
            return grant
        runs = _first(grant.deepstack_runs, grant.row_stop - grant.row_start)
        return msgspec.structs.replace(grant, deepstack_stop=grant.row_stop, deepstack_runs=runs)

    with swap(language_sessions, "take_room", cut):
        yield


def _first(runs: list[int], rows: int) -> list[int]:
    kept = []
    for run in runs:
        if rows > 0:
            kept.append(min(run, rows))
            rows -= run
    return kept


@mutant("newcomers-take-freed-blocks", "I16", "whoever came last is served first", stands_for="F2")
def _() -> Iterator[None]:
    def newest(requests: Any, links: Any, can_start_anew: Any) -> list[Session]:
        waiting = [s for request in requests for s in request.sessions if s.state == WAITING]
        return [s for s in reversed(waiting) if s.encode_rank in links and s.quarantined_as is None]

    with swap(language_sessions, "in_line", newest):
        yield


@mutant("grants-in-order-of-arrival", "I16", "who came first is served first, whoever is due before it")
def _() -> Iterator[None]:
    line = language_sessions.in_line

    def by_arrival(requests: Any, links: Any, can_start_anew: Any) -> list[Session]:
        found = line(requests, links, can_start_anew)
        places = {id(session): number for number, s in enumerate(requests) for session in s.sessions}
        return sorted(found, key=lambda s: (s.state != WAITING or s.room is None, s.hold is None, places[id(s)]))

    with swap(language_sessions, "in_line", by_arrival):
        yield


@mutant("whole-item-or-nothing", "I11", "an item is granted only when all of it fits", stands_for="F3")
def _() -> Iterator[None]:
    take = session_module.take_room

    def whole(session: Session, allocator: BlockAllocator, block_size: int, sizes: RowSizes, now: float) -> Any:
        needed = blocks_for(session.total - session.received, block_size)
        return take(session, allocator, block_size, sizes, now) if needed <= allocator.num_free("rows") else None

    with swap(language_sessions, "take_room", whole):
        yield


@mutant(
    "abort-is-local",
    "I15",
    "the encode rank is not told that an attempt was dropped",
    stands_for="F4",
)
def _() -> Iterator[None]:
    def drop(self: LanguageSessions, session: Session, reason: str, now: float, *, gives_back: bool = False) -> None:
        self._let_go(session, now, gives_back=gives_back)

    with swap(LanguageSessions, "_drop", drop):
        yield


@mutant("abort-frees-at-once", "I3", "blocks under a pending receive go back to the pool", stands_for="F4")
def _() -> Iterator[None]:
    def free(self: LanguageSessions, leases: tuple[Lease, ...], where: Any, key: Any) -> None:
        for lease in leases:
            if where is self.pending:
                self.allocator.free(lease)
            else:
                self.allocator.quarantine(lease)
        where[key] = () if where is self.pending else leases

    with swap(LanguageSessions, "_quarantine", free):
        yield


@mutant("late-message-revives", "I14", "tokens and ends of a request that has ended are passed on", stands_for="F5")
def _() -> Iterator[None]:
    from_language = method(Router, "_from_language")

    def pass_on(self: Router, rank: int, message: Any, now: float) -> None:
        from_language(self, rank, message, now)
        if isinstance(message, Tokens) and message.request_id not in self._requests:
            self._actions.append(Deliver(message.request_id, message))

    with swap(Router, "_from_language", pass_on):
        yield


@mutant("vector-is-lost", "I14", "the end of a request for a vector is passed on without it")
def _() -> Iterator[None]:
    from_language = method(Router, "_from_language")

    def without(self: Router, rank: int, message: Any, now: float) -> None:
        is_end = isinstance(message, Finished)
        from_language(self, rank, msgspec.structs.replace(message, vector=b"") if is_end else message, now)

    with swap(Router, "_from_language", without):
        yield


@mutant("double-free", "I1", "the blocks of a dropped attempt are given back twice", stands_for="F6")
def _() -> Iterator[None]:
    let_go = method(LanguageSessions, "_let_go")

    def twice(self: LanguageSessions, session: Session, now: float, *, gives_back: bool = False) -> None:
        room, state = session.room, session.state
        let_go(self, session, now, gives_back=gives_back)
        if room is not None and state == GRANTED:
            self.allocator._return(room)

    with swap(LanguageSessions, "_let_go", twice):
        yield


@mutant("rows-of-another-request", "I7", "rows are read from the block next to the right one", stands_for="F7")
def _() -> Iterator[None]:
    runs_of = layout.row_runs

    def next_to_it(blocks: Any, block_size: int, rows: int, max_rows: int | None = None) -> list[tuple[int, int]]:
        runs = runs_of(blocks, block_size, rows, max_rows)
        lengths = {stop - start for start, stop in runs}
        return [*runs[1:], runs[0]] if len(runs) > 1 and len(lengths) == 1 else runs

    with swap(layout, "row_runs", next_to_it):
        yield


@mutant("deepstack-lost", "I5", "a resume throws the cached DeepStack away", stands_for="F8")
def _() -> Iterator[None]:
    consumed = method(LanguageSessions, "_consumed")

    def lose(self: LanguageSessions, event: Any, now: float) -> None:
        item = self.find(*event.key)
        if item is not None and item.hold is not None and item.hold.deepstack and item.received < item.total:
            slots, room = item.hold.slots, item.room
            self.allocator.free(item.hold)
            [item.hold] = self.allocator.grant(item.request_id, Want(slots=len(slots))) or [None]
            item.room = room
        consumed(self, event, now)

    with swap(LanguageSessions, "_consumed", lose):
        yield


@mutant("deepstack-shifted", "I5", "DeepStack rows lie one row off", stands_for="F8", is_of_simulator=True)
def _() -> Iterator[None]:
    place = sim_language._place

    def shifted(buffer: list[int], runs: list[tuple[int, int]], cells: list[int]) -> None:
        place(buffer, runs, [*cells[1:], cells[0]] if cells and cells[0] < 0 else cells)

    with swap(sim_language, "_place", shifted), swap(sim_language.SimLanguage, "_problem", lambda self, job: None):
        yield


@mutant("gone-is-fatal", "raised", "a resume for rows that are no longer kept kills the rank", stands_for="F9")
def _() -> Iterator[None]:
    resumed = method(EncodeSessions, "_resumed")

    def die(self: EncodeSessions, outlet: Any, resume: Any, now: float) -> None:
        if resume.key not in self.items:
            raise KeyError(resume.request_id)
        resumed(self, outlet, resume, now)

    with swap(EncodeSessions, "_resumed", die):
        yield


@mutant("failure-is-not-told", "I11", "the router does not hear that an item could not be encoded", stands_for="F10")
def _() -> Iterator[None]:
    def silent(self: EncodeSessions, attempt: Any, failure: Any, now: float) -> None:
        self._end(attempt)
        self._fill_places(now)

    with swap(EncodeSessions, "_fail", silent):
        yield


@mutant("burst-is-dropped", "I11", "of many requests at once, some are forgotten without a word", stands_for="F11")
def _() -> Iterator[None]:
    admit = method(Router, "_admit")

    def drop(self: Router, events: Any, now: float) -> None:
        if self.num_requests < 3:
            admit(self, events, now)

    with swap(Router, "_admit", drop):
        yield


@mutant("restarted-peer-stays-out", "I11", "a second link of the same rank is never accepted", stands_for="F12")
def _() -> Iterator[None]:
    link_up = method(LanguageSessions, "_link_up")

    def once(self: LanguageSessions, event: Any, now: float) -> None:
        if event.peer not in self._last_epochs:
            link_up(self, event, now)

    with swap(LanguageSessions, "_link_up", once):
        yield


@mutant("objects-on-the-wire", "wire", "something that only pickle could carry is sent between ranks", stands_for="F13")
def _() -> Iterator[None]:
    def send(self: LinkState, body: object, now: float) -> Any:
        frame = Frame(epoch=self.epoch, seq=self.next_seq(now), body=body)  # type: ignore[arg-type]
        if isinstance(body, Nack):
            frame = msgspec.structs.replace(frame, body={"reason": KeyError(body.reason)})
        return sim_encode.SendFrame(self.peer, frame)

    with swap(LinkState, "send", send):
        yield
