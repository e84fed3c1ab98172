"""Planted bugs: what other systems got wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from qwen3vl_disagg.disagg import language_sessions, room
from qwen3vl_disagg.disagg.allocator import BlockAllocator, Lease, Want
from qwen3vl_disagg.disagg.encode_sessions import EncodeSessions
from qwen3vl_disagg.disagg.language_sessions import LanguageSessions
from qwen3vl_disagg.disagg.link_state import LinkState
from qwen3vl_disagg.disagg.messages import Frame, Nack, Resume
from qwen3vl_disagg.disagg.router import Router
from qwen3vl_disagg.disagg.session import GRANTED, WAITING, Session
from qwen3vl_disagg.disagg.simulation import encode as sim_encode
from qwen3vl_disagg.disagg.simulation import language as sim_language
from qwen3vl_disagg.disagg.simulation.mutants import method, mutant, swap


@mutant("deepstack-of-the-first-grant-only", "F1 I5", "the initial transfer asks for the DeepStack of its own rows")
def _() -> Iterator[None]:
    take = room.take_room

    def cut(item: Session, *pools: Any) -> Any:
        grant = take(item, *pools)
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


@mutant("newcomers-take-freed-blocks", "F2 I16 I11", "whoever came last is served first")
def _() -> Iterator[None]:
    def newest(requests: Any, links: Any, _: Any) -> list[Session]:
        waiting = [s for request in requests for s in request.sessions if s.state == WAITING]
        return [s for s in reversed(waiting) if s.encode_rank in links and s.apart is None]

    with swap(language_sessions, "in_line", newest):
        yield


@mutant("whole-item-or-nothing", "F3 I11", "an item is granted only when all of it fits")
def _() -> Iterator[None]:
    take = room.take_room

    def whole(item: Session, allocator: BlockAllocator, size: int, sizes: Any) -> Any:
        needed = -(-(item.visual.num_rows - item.received) // size)
        return take(item, allocator, size, sizes) if needed <= allocator.num_free("rows") else None

    with swap(language_sessions, "take_room", whole):
        yield


@mutant("abort-is-local", "F4 I15", "the encode rank is not told that an attempt was dropped, nor by the router")
def _() -> Iterator[None]:
    def drop(self: LanguageSessions, item: Session, reason: str, now: float, *, gives_back: bool = False) -> None:
        self._let_go(item, gives_back=gives_back)

    def ignore(self: EncodeSessions, event: Any, now: float) -> None:
        return

    with swap(LanguageSessions, "_drop", drop), swap(EncodeSessions, "_cancel", ignore):
        yield


@mutant("abort-frees-at-once", "F4 I3 I8", "blocks under a pending receive go back to the pool")
def _() -> Iterator[None]:
    def free(self: LanguageSessions, leases: tuple[Lease, ...], where: Any, key: Any) -> None:
        for lease in leases:
            if where is self.pending:
                self.allocator.free(lease)
            else:
                self.allocator.quarantine(lease)
        where[key] = () if where is self.pending else leases

    with swap(LanguageSessions, "_keep_apart", free):
        yield


@mutant("late-message-revives", "F5 I14", "tokens and ends of a request that has ended are passed on")
def _() -> Iterator[None]:
    handle = method(Router, "_end")

    def end(self: Router, request_id: str, error: Any = None, *, by_language_rank: bool = False) -> None:
        request = self._requests.get(request_id)
        handle(self, request_id, error, by_language_rank=by_language_rank)
        if request is not None and request.items and request.language_rank in self._language:
            self._requests[request_id] = request
            self._language[request.language_rank].requests[request_id] = request.num_tokens

    with swap(Router, "_end", end):
        yield


@mutant("double-free", "F6 I1 I2", "the blocks of a dropped attempt are given back twice")
def _() -> Iterator[None]:
    let_go = method(LanguageSessions, "_let_go")

    def twice(self: LanguageSessions, item: Session, *, gives_back: bool = False) -> None:
        room, state = item.room, item.state
        let_go(self, item, gives_back=gives_back)
        if room is not None and state == GRANTED:
            self.allocator._return(room)

    with swap(LanguageSessions, "_let_go", twice):
        yield


@mutant("rows-of-another-request", "F7 I7 I8", "rows are read from the block next to the right one")
def _() -> Iterator[None]:
    place = sim_language._place

    def shifted(buffer: list[int], runs: list[tuple[int, int]], cells: list[int]) -> None:
        place(buffer, runs, cells)
        if len(runs) > 1 and runs[0][1] - runs[0][0] == runs[1][1] - runs[1][0]:
            (a, b), (c, d) = runs[0], runs[1]
            buffer[a:b], buffer[c:d] = buffer[c:d], buffer[a:b]

    with swap(sim_language, "_place", shifted), swap(sim_language.SimLanguage, "_problem", lambda *_: None):
        yield


@mutant("deepstack-lost", "F8 I5", "a resume throws the cached DeepStack away")
def _() -> Iterator[None]:
    consumed = method(LanguageSessions, "_consumed")

    def lose(self: LanguageSessions, event: Any, now: float) -> None:
        item = self.find(event.request_id, event.item, event.attempt)
        if item is not None and item.hold is not None and item.hold.deepstack and item.received < item.total:
            slots, room = item.hold.slots, item.room
            self.allocator.free(item.hold)
            [item.hold] = self.allocator.grant(item.request_id, Want(slots=len(slots))) or [None]
            item.room = room
        consumed(self, event, now)

    with swap(LanguageSessions, "_consumed", lose):
        yield


@mutant("deepstack-shifted", "F8 I5", "DeepStack rows lie one row off")
def _() -> Iterator[None]:
    place = sim_language._place

    def shifted(buffer: list[int], runs: list[tuple[int, int]], cells: list[int]) -> None:
        place(buffer, runs, [*cells[1:], cells[0]] if cells and cells[0] < 0 else cells)

    with swap(sim_language, "_place", shifted), swap(sim_language.SimLanguage, "_problem", lambda *_: None):
        yield


@mutant("gone-is-fatal", "F9", "a resume for rows that are no longer kept kills the rank")
def _() -> Iterator[None]:
    granted = method(EncodeSessions, "_granted")

    def die(self: EncodeSessions, outlet: Any, grant: Any, now: float) -> None:
        if isinstance(grant, Resume) and (grant.request_id, grant.item, grant.attempt) not in self.items:
            raise KeyError(grant.request_id)
        granted(self, outlet, grant, now)

    with swap(EncodeSessions, "_granted", die):
        yield


@mutant("failure-is-not-told", "F10 I11", "the router does not hear that an item could not be encoded")
def _() -> Iterator[None]:
    def silent(self: EncodeSessions, item: Any, kind: str, reason: str) -> None:
        self._end(item.attempt)
        self._fill_places()

    with swap(EncodeSessions, "_fail", silent):
        yield


@mutant("burst-is-dropped", "F11 I11", "of many requests at once, some are forgotten without a word")
def _() -> Iterator[None]:
    admit = method(Router, "_admit")

    def drop(self: Router, event: Any, now: float) -> None:
        if self.num_requests < 3:
            admit(self, event, now)

    with swap(Router, "_admit", drop):
        yield


@mutant("restarted-peer-stays-out", "F12 I11", "a second link of the same rank is never accepted")
def _() -> Iterator[None]:
    link_up = method(LanguageSessions, "_link_up")

    def once(self: LanguageSessions, event: Any, now: float) -> None:
        if event.peer not in self._last_epochs:
            link_up(self, event, now)

    with swap(LanguageSessions, "_link_up", once):
        yield


@mutant("objects-on-the-wire", "F13", "something that only pickle could carry is sent between ranks")
def _() -> Iterator[None]:
    def send(self: LinkState, body: object, now: float) -> Any:
        frame = Frame(epoch=self.epoch, seq=self.next_seq(now), body=body)  # type: ignore[arg-type]
        if isinstance(body, Nack):
            frame = msgspec.structs.replace(frame, body={"reason": KeyError(body.reason)})
        return sim_encode.SendFrame(self.peer, frame)

    with swap(LinkState, "send", send):
        yield
