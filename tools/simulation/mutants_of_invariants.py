"""Planted bugs: one or more for each invariant."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from qwen3vl_disagg.protocol import encode_sessions, language_sessions
from qwen3vl_disagg.protocol import session as session_module
from qwen3vl_disagg.protocol.allocator import BlockAllocator, Lease, Want
from qwen3vl_disagg.protocol.encode_sessions import EncodeSessions
from qwen3vl_disagg.protocol.language_sessions import LanguageSessions
from qwen3vl_disagg.protocol.layout import RowSizes
from qwen3vl_disagg.protocol.link_state import LinkState
from qwen3vl_disagg.protocol.messages import Frame
from qwen3vl_disagg.protocol.router import Router
from qwen3vl_disagg.protocol.routing import Deliver
from qwen3vl_disagg.protocol.session import HELD, WAITING, Session
from qwen3vl_disagg.protocol.session_events import Recall
from tools.simulation import encode as sim_encode
from tools.simulation import language as sim_language
from tools.simulation.mutants import method, mutant, swap


@mutant("blocks-leak", "I1", "the blocks of consumed rows are forgotten")
def _() -> Iterator[None]:
    free = method(BlockAllocator, "free")

    def leak(self: BlockAllocator, lease: Lease) -> None:
        if lease.rows and not lease.slots and lease.generation % 3 == 0:
            del self._leases[lease.generation]
            return
        free(self, lease)

    with swap(BlockAllocator, "free", leak):
        yield


@mutant("free-without-owner", "I2", "a lease is taken back from whoever has it now")
def _() -> Iterator[None]:
    returned = method(LanguageSessions, "_returned")

    def free(self: LanguageSessions, event: Any, now: float) -> None:
        returned(self, event, now)
        item = self.requests[event.request_id].sessions[event.item] if event.request_id in self.requests else None
        if item is not None and item.room is not None:
            self.allocator.free(item.room)

    with swap(LanguageSessions, "_returned", free):
        yield


@mutant("quarantine-is-granted", "I3", "what is in quarantine counts as free")
def _() -> Iterator[None]:
    quarantine = method(BlockAllocator, "quarantine")

    def keep(self: BlockAllocator, lease: Lease) -> None:
        quarantine(self, lease)
        self._free["rows"] += lease.rows

    with swap(BlockAllocator, "quarantine", keep):
        yield


@mutant("resume-from-the-last-row-again", "I4", "a resume asks for one row that has been delivered")
def _() -> Iterator[None]:
    consumed = method(LanguageSessions, "_consumed")

    def again(self: LanguageSessions, event: Any, now: float) -> None:
        item = self.find(*event.key)
        if item is not None and item.state == HELD and 1 < item.received < item.total:
            item.received -= 1
        consumed(self, event, now)

    with swap(LanguageSessions, "_consumed", again):
        yield


@mutant("resume-skips-a-row", "I4", "received counts one row too many")
def _() -> Iterator[None]:
    consumed = method(LanguageSessions, "_consumed")

    def skip(self: LanguageSessions, event: Any, now: float) -> None:
        item = self.find(*event.key)
        consumed(self, event, now)
        if item is not None and item.state == WAITING and item.received + 1 < item.total:
            item.received += 1

    with swap(LanguageSessions, "_consumed", skip):
        yield


@mutant("aux-slot-is-given-back-early", "I16", "the aux slot is freed when the first rows are consumed")
def _() -> Iterator[None]:
    consumed = method(LanguageSessions, "_consumed")

    def early(self: LanguageSessions, event: Any, now: float) -> None:
        item = self.find(*event.key)
        if item is not None and item.hold is not None and item.state == HELD and item.received < item.total:
            hold, room = item.hold, item.room
            self.allocator.free(hold)
            item.hold = self.allocator._lease(item.request_id, Want(deepstack=len(hold.deepstack)))
            item.room = room
        consumed(self, event, now)

    with swap(LanguageSessions, "_consumed", early):
        yield


@mutant(
    "aux-comes-again", "I6", "every transfer carries aux, and that of a resume is about the rest", is_of_simulator=True
)
def _() -> Iterator[None]:
    make = sim_encode.make_payload

    def again(names: Any, attempt: Any, grant: Any, total: int) -> Any:
        payload = make(names, attempt, grant, total)
        payload.aux = (total - grant.row_start, attempt[2])
        return payload

    with swap(sim_encode, "make_payload", again):
        yield


@mutant("digest-is-not-checked", "I7", "rows that were damaged on their way are used", is_of_simulator=True)
def _() -> Iterator[None]:
    with swap(sim_language.SimLanguage, "_problem", lambda self, job: None):
        yield


@mutant("read-after-free", "I8", "blocks that the engine reads go back to the pool")
def _() -> Iterator[None]:
    def free(self: LanguageSessions, leases: tuple[Lease, ...], where: Any, key: Any) -> None:
        for lease in leases:
            if where is self.recalled:
                self.allocator.free(lease)
            else:
                self.allocator.quarantine(lease)
        where[key] = () if where is self.recalled else leases

    with swap(LanguageSessions, "_quarantine", free):
        yield


@mutant("duplicates-are-handled", "I9", "a frame that comes twice is taken twice", stands_for="F5")
def _() -> Iterator[None]:
    take = method(LinkState, "take")

    def twice(self: LinkState, frame: Frame) -> bool | None:
        verdict = take(self, frame)
        return True if verdict is False else verdict

    with swap(LinkState, "take", twice):
        yield


@mutant("epochs-are-ignored", "I9", "frames of an old link are taken for those of the new one", stands_for="F12")
def _() -> Iterator[None]:
    language, encode = method(LanguageSessions, "_frame_in"), method(EncodeSessions, "_frame_in")

    def renamed(frame_in: Callable[..., None]) -> Callable[..., None]:
        def handle(self: Any, event: Any, now: float) -> None:
            link = self.links.get(event.peer) if hasattr(self, "links") else self.outlets.get(event.peer)
            if link is not None:
                state = link if isinstance(link, LinkState) else link.state
                frame = msgspec.structs.replace(event.frame, epoch=state.epoch)
                event = msgspec.structs.replace(event, frame=frame)
            frame_in(self, event, now)

        return handle

    with (
        swap(LanguageSessions, "_frame_in", renamed(language)),
        swap(EncodeSessions, "_frame_in", renamed(encode)),
    ):
        yield


@mutant("gaps-are-ignored", "I9", "a lost frame goes unnoticed")
def _() -> Iterator[None]:
    take = method(LinkState, "take")

    def lax(self: LinkState, frame: Frame) -> bool | None:
        verdict = take(self, frame)
        if verdict is None:
            self.num_received = frame.seq
            return not isinstance(frame.body, language_sessions.Stale)
        return verdict

    with swap(LinkState, "take", lax):
        yield


@mutant("two-attempts-mixed", "I10", "a new attempt goes on at the row where the old one was lost")
def _() -> Iterator[None]:
    def assigned(self: LanguageSessions, event: Any, now: float) -> None:
        request = self.requests.get(event.request_id)
        if request is None or event.attempt <= request.sessions[event.item].attempt:
            return
        item = request.sessions[event.item]
        received = item.received if item.state == WAITING else item.first
        self._drop(item, "another attempt takes its place", now)
        item.attempt, item.encode_rank, item.received = event.attempt, event.encode_rank, received
        self._wait(item, now)
        self._give_room(now)

    with swap(LanguageSessions, "_assigned", assigned):
        yield


@mutant("recall-is-forgotten", "I10", "the engine is not told to forget what it took from a lost attempt")
def _() -> Iterator[None]:
    handle = method(LanguageSessions, "handle")

    def deaf(self: LanguageSessions, event: Any, now: float) -> Any:
        return [
            action for action in handle(self, event, now) if type(action) is not Recall or action.key in self.recalled
        ]

    with swap(LanguageSessions, "handle", deaf):
        yield


@mutant("no-deadline-without-a-link", "I11", "an item waits for ever for a link that does not come back")
def _() -> Iterator[None]:
    def wait(self: LanguageSessions, session: Session, now: float) -> None:
        session.state, session.grant, session.deadline = WAITING, None, float("inf")

    with swap(LanguageSessions, "_wait", wait):
        yield


@mutant("deadlock-on-one-block", "I11", "the last free block is never granted")
def _() -> Iterator[None]:
    num_free = method(BlockAllocator, "num_free")

    def spare(self: BlockAllocator, pool: str) -> int:
        return max(0, num_free(self, pool) - 1) if pool == "rows" else num_free(self, pool)

    with swap(BlockAllocator, "num_free", spare):
        yield


@mutant("encode-runs-ahead", "I12", "items are encoded without regard to memory")
def _() -> Iterator[None]:
    def fill(self: EncodeSessions, now: float) -> None:
        while self.queue:
            item = self.items[self.queue.pop(0)]
            item.state = encode_sessions.ENCODING
            said = (item.attempt, item.visual, item.is_alone, item.due, now - item.granted_at)
            self._actions.append(encode_sessions.StartEncode(*said))

    with swap(EncodeSessions, "_fill_places", fill):
        yield


@mutant("rows-go-with-the-first-ack", "I13", "the encode rank forgets rows as soon as some are acknowledged")
def _() -> Iterator[None]:
    def park(self: EncodeSessions, item: Any, now: float) -> None:
        self._end(item.attempt)
        self._fill_places(now)

    with swap(EncodeSessions, "_park", park):
        yield


@mutant("two-results", "I14", "the end of a request is told twice")
def _() -> Iterator[None]:
    handle = method(Router, "handle")

    def twice(self: Router, event: Any, now: float) -> Any:
        actions = handle(self, event, now)
        return actions + [action for action in actions if type(action).__name__ == "End"]

    with swap(Router, "handle", twice):
        yield


@mutant("tokens-repeat", "I14", "tokens that came before are passed on again")
def _() -> Iterator[None]:
    def tokens(self: Router, request: Any, message: Any) -> None:
        if message.sample not in request.num_received:
            return
        num_before = request.num_received[message.sample]
        request.num_received[message.sample] = max(num_before, message.index + len(message.token_ids))
        self._actions.append(Deliver(message.request_id, message))
        if message.index:
            self._actions.append(Deliver(message.request_id, message))

    with swap(Router, "_tokens", tokens):
        yield


@mutant("leases-outlive-their-request", "I15", "nobody waits for the answer to a recall: its blocks stay away")
def _() -> Iterator[None]:
    with swap(LanguageSessions, "_returned", lambda self, event, now: None):
        yield


@mutant("blocks-without-deepstack", "I16", "row blocks are granted though the DeepStack has no room")
def _() -> Iterator[None]:
    take = session_module.take_room

    def partial(session: Session, allocator: BlockAllocator, block_size: int, sizes: RowSizes, now: float) -> Any:
        without = dataclasses.replace(sizes, deepstack_embeddings=0)
        return take(session, allocator, block_size, sizes, now) or take(session, allocator, block_size, without, now)

    with swap(language_sessions, "take_room", partial):
        yield


@mutant("rows-ready-before-they-came", "I7", "a broken payload counts as received")
def _() -> Iterator[None]:
    payload_end = method(LanguageSessions, "_payload_end")

    def lax(self: LanguageSessions, event: Any, now: float) -> None:
        payload_end(self, msgspec.structs.replace(event, error=None, is_broken=False), now)

    with swap(LanguageSessions, "_payload_end", lax):
        yield
