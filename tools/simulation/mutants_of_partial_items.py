"""Planted bugs: items of which only a part is needed, and requests that need rows once more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from qwen3vl_disagg.protocol import language_sessions
from qwen3vl_disagg.protocol import session as session_module
from qwen3vl_disagg.protocol.allocator import BlockAllocator
from qwen3vl_disagg.protocol.language_sessions import LanguageSessions
from qwen3vl_disagg.protocol.layout import RowSizes
from qwen3vl_disagg.protocol.messages import ItemReceived, Resume
from qwen3vl_disagg.protocol.session import IDLE, Session
from qwen3vl_disagg.protocol.session_events import Expect, Tell
from tools.simulation import encode as sim_encode
from tools.simulation.engine import SimEngine, Window
from tools.simulation.mutants import method, mutant, swap


@mutant(
    "partial-item-is-sent-from-row-0",
    "I7",
    "the initial transfer has the item's first rows, not those asked for",
    is_of_simulator=True,
)
def _() -> Iterator[None]:
    make = sim_encode.make_payload

    def from_0(names: Any, attempt: Any, grant: Any, total: int) -> Any:
        payload = make(names, attempt, grant, total)
        if not isinstance(grant, Resume):
            payload.rows = [row - grant.row_start for row in payload.rows]
        return payload

    with swap(sim_encode, "make_payload", from_0):
        yield


@mutant("all-rows-of-a-partial-item", "I4", "which rows are cached is not heard: the grant begins at row 0")
def _() -> Iterator[None]:
    expect = method(LanguageSessions, "_expect")

    def deaf(self: LanguageSessions, event: Expect, now: float) -> None:
        expect(self, msgspec.structs.replace(event, first_rows=[]), now)

    with swap(LanguageSessions, "_expect", deaf):
        yield


@mutant(
    "lost-partial-item-begins-at-row-0", "I4", "a new attempt at an item starts at row 0, wherever that of before did"
)
def _() -> Iterator[None]:
    lose = method(LanguageSessions, "_lose")

    def forget(self: LanguageSessions, session: Session, reason: str, now: float, dead_epoch: int = 0) -> None:
        lose(self, session, reason, now, dead_epoch)
        session.first = session.received = 0

    with swap(LanguageSessions, "_lose", forget):
        yield


@mutant("partial-item-has-no-aux", "I6", "what begins behind row 0 is sent as if it were resumed")
def _() -> Iterator[None]:
    take = session_module.take_room

    def bare(session: Session, allocator: BlockAllocator, block_size: int, sizes: RowSizes, now: float) -> Any:
        grant = take(session, allocator, block_size, sizes, now)
        if grant is None or not grant.row_start:
            return grant
        return Resume(**{name: getattr(grant, name) for name in Resume.__struct_fields__})

    with swap(language_sessions, "take_room", bare):
        yield


@mutant(
    "deepstack-of-a-partial-item-from-row-0",
    "I5",
    "the DeepStack of a partial item is counted from the item's first row",
)
def _() -> Iterator[None]:
    take = session_module.take_room

    def shifted(session: Session, allocator: BlockAllocator, block_size: int, sizes: RowSizes, now: float) -> Any:
        grant = take(session, allocator, block_size, sizes, now)
        if grant is None or isinstance(grant, Resume) or not grant.deepstack_runs:
            return grant
        rows = grant.deepstack_stop - grant.deepstack_start
        return msgspec.structs.replace(grant, deepstack_start=0, deepstack_stop=rows)

    with swap(language_sessions, "take_room", shifted):
        yield


@mutant("full-hit-stands-in-the-way", "I11", "later items wait for one that is all in the cache")
def _() -> Iterator[None]:
    def need_from(self: Session, first: int) -> None:
        self.first = self.received = min(first, self.total - 1)
        self.state, self.quarantined_as = IDLE, None

    with swap(Session, "need_from", need_from):
        yield


@mutant("needed-again-from-the-row-of-before", "I4", "a request that asks once more gets the rows it asked for first")
def _() -> Iterator[None]:
    need_from = method(Session, "need_from")

    def once(self: Session, first: int) -> None:
        is_new = self.attempt == 0 and self.state == IDLE
        need_from(self, first if is_new or first == self.total else min(self.first, self.total - 1))

    with swap(Session, "need_from", once):
        yield


@mutant("preempted-keeps-its-room", "I15", "a request that needs no rows for now keeps the blocks it was given")
def _() -> Iterator[None]:
    drop = method(LanguageSessions, "_drop")

    def keep(self: LanguageSessions, session: Session, reason: str, now: float, *, gives_back: bool = False) -> None:
        drop(self, session, reason, now, gives_back=gives_back and reason == "the request is over")

    with swap(LanguageSessions, "_drop", keep):
        yield


def is_received(action: Any) -> bool:
    return isinstance(action, Tell) and isinstance(action.message, ItemReceived)


@mutant("given-up-attempt-is-not-told", "I11", "the router still counts on an attempt that its request gave up")
def _() -> Iterator[None]:
    expect = method(LanguageSessions, "_expect")

    def silent(self: LanguageSessions, event: Expect, now: float) -> None:
        expect(self, event, now)
        self._actions = [action for action in self._actions if not is_received(action)]

    with swap(LanguageSessions, "_expect", silent):
        yield


@mutant("rows-that-were-given-up-go-on", "I4", "what a preempted request had asked for still comes")
def _() -> Iterator[None]:
    expect = method(LanguageSessions, "_expect")

    def keep(self: LanguageSessions, event: Expect, now: float) -> None:
        if event.lacking or event.request_id not in self.requests:
            expect(self, event, now)

    with swap(LanguageSessions, "_expect", keep):
        yield


@mutant(
    "rows-of-before-the-preemption",
    "I4",
    "a request that was preempted and is back takes any rows that come",
    is_of_simulator=True,
)
def _() -> Iterator[None]:
    def take(self: SimEngine, window: Window) -> None:
        request_id, item, _ = window.attempt
        sequence = self.known.get(request_id)
        if sequence is not None and sequence.is_admitted and sequence.next_row(item) < sequence.items[item].num_rows:
            sequence.windows[item] = window

    with swap(SimEngine, "_take_rows", take):
        yield
