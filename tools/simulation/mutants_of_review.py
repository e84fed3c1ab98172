"""Planted bugs of somebody who did not write the machines, many of which heal themselves and only cost time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen3vl_disagg.core.errors import DisaggError
from qwen3vl_disagg.protocol.allocator import BlockAllocator, Lease, Want
from qwen3vl_disagg.protocol.attempts import Attempts
from qwen3vl_disagg.protocol.encode_sessions import ENCODING, PARKED, EncodeSessions, Outgoing
from qwen3vl_disagg.protocol.language_sessions import LanguageSessions
from qwen3vl_disagg.protocol.link_state import LinkState
from qwen3vl_disagg.protocol.messages import ItemReceived, Nack
from qwen3vl_disagg.protocol.router import Router
from qwen3vl_disagg.protocol.routing import Item
from qwen3vl_disagg.protocol.session import WAITING
from qwen3vl_disagg.protocol.session_events import Tell
from qwen3vl_disagg.protocol.suspects import Suspects
from tools.simulation.mutants import method, mutant, swap

# ---- router ----


@mutant("jobs-of-items-that-came-are-kept", "I15", "an encode rank whose rows have come still counts as busy with them")
def _() -> Iterator[None]:
    take_back = method(Attempts, "_take_back")

    def keep(self: Attempts, request_id: str, index: int, item: Item) -> None:
        if item.failures:
            take_back(self, request_id, index, item)

    with swap(Attempts, "_take_back", keep):
        yield


@mutant("links-that-come-wake-nobody", "I11", "items that wait for an encode rank are not given to one that comes")
def _() -> Iterator[None]:
    def only_note(self: Attempts, rank: int, links: set[int], now: float) -> None:
        self.ranks[rank].links = links

    with swap(Attempts, "_links_up", only_note):
        yield


@mutant("failed-ranks-are-asked-again", "I11", "an item goes back to the encode rank that has failed on it")
def _() -> Iterator[None]:
    try_again = method(Attempts, "_try_again")

    def forgive(self: Attempts, request_id: str, index: int, worker: tuple[int, int], now: float) -> None:
        try_again(self, request_id, index, (-1, 0), now)

    with swap(Attempts, "_try_again", forgive):
        yield


@mutant("the-wait-goes-on", "I11", "an item that is being encoded is given up for want of an encode rank")
def _() -> Iterator[None]:
    assign = method(Attempts, "_assign")

    def keep_on(self: Attempts, request_id: str, index: int, now: float) -> None:
        request = self._requests.get(request_id)
        until = None if request is None else request.items[index].wait_until
        assign(self, request_id, index, now)
        if request is not None and until is not None:
            request.items[index].wait_until = until

    with swap(Attempts, "_assign", keep_on):
        yield


@mutant("suspects-are-never-cleared", "I11", "an image that was encoded well after a death is tried alone for ever")
def _() -> Iterator[None]:
    with swap(Suspects, "cleared", lambda self, digest: None):
        yield


@mutant("items-that-came-count-as-encoding", "I11", "an item whose rows are here cannot be asked for once more")
def _() -> Iterator[None]:
    from_language = method(Attempts, "from_language")

    def keep(self: Attempts, rank: int, message: Any, now: float) -> None:
        item = self._current(message) if isinstance(message, ItemReceived) else None
        from_language(self, rank, message, now)
        if item is not None:
            item.state = "encoding"

    with swap(Attempts, "from_language", keep):
        yield


@mutant("language-ranks-run-on", "I15", "a language rank is not told that its request has ended")
def _() -> Iterator[None]:
    end = method(Router, "_end")

    def silent(
        self: Router, request_id: str, error: DisaggError | None = None, *, by_language_rank: bool = False
    ) -> None:
        end(self, request_id, error, by_language_rank=True)

    with swap(Router, "_end", silent):
        yield


# ---- encode ranks ----


@mutant("rows-that-are-here-are-said-to-be-gone", "I13", "a resume of rows that are kept is refused")
def _() -> Iterator[None]:
    def refuse(self: EncodeSessions, outlet: Any, resume: Any, now: float) -> None:
        nack = Nack(request_id=resume.request_id, item=resume.item, attempt=resume.attempt, reason="gone")
        self._actions.append(outlet.state.send(nack, now))

    with swap(EncodeSessions, "_resumed", refuse):
        yield


@mutant("the-queue-is-in-order-of-arrival", "I16", "an encode rank begins with what came first, not with what is due")
def _() -> Iterator[None]:
    fill = method(EncodeSessions, "_fill_places")

    def by_arrival(self: EncodeSessions, now: float) -> None:
        places = {attempt: number for number, attempt in enumerate(self.items)}
        self.queue.sort(key=lambda attempt: places[attempt])
        fill(self, now)

    with swap(EncodeSessions, "_fill_places", by_arrival):
        yield


@mutant("grants-of-a-lost-link-are-kept", "raised", "what is encoded when its link is lost is sent over none")
def _() -> Iterator[None]:
    cut = method(EncodeSessions, "_cut")

    def keep(self: EncodeSessions, outlet: Any, now: float) -> None:
        grants = {key: item.grant for key, item in self.items.items() if item.state == ENCODING}
        cut(self, outlet, now)
        for key, grant in grants.items():
            if key in self.items:
                self.items[key].grant = grant

    with swap(EncodeSessions, "_cut", keep):
        yield


@mutant("leases-are-short", "I13", "rows that wait for a resume are dropped after a quarter of their time")
def _() -> Iterator[None]:
    park = method(EncodeSessions, "_park")

    def short(self: EncodeSessions, item: Outgoing, now: float) -> None:
        park(self, item, now)
        if item.state == PARKED:
            item.deadline = now + self.limits.lease_s / 4

    with swap(EncodeSessions, "_park", short):
        yield


# ---- language ranks ----


@mutant("items-that-came-are-not-told", "I11", "the router does not hear that all rows of an item are here")
def _() -> Iterator[None]:
    payload_end = method(LanguageSessions, "_payload_end")

    def silent(self: LanguageSessions, event: Any, now: float) -> None:
        payload_end(self, event, now)
        self._actions = [
            action
            for action in self._actions
            if not (isinstance(action, Tell) and isinstance(action.message, ItemReceived))
        ]

    with swap(LanguageSessions, "_payload_end", silent):
        yield


@mutant("broken-payloads-add-up", "I11", "payloads that broke before rows came count against those behind them")
def _() -> Iterator[None]:
    payload_end = method(LanguageSessions, "_payload_end")

    def remember(self: LanguageSessions, event: Any, now: float) -> None:
        session = self.find(*event.key)
        before = 0 if session is None else session.num_broken
        payload_end(self, event, now)
        if session is not None and event.error is None:
            session.num_broken = before

    with swap(LanguageSessions, "_payload_end", remember):
        yield


@mutant("a-link-that-is-back-is-too-late", "I11", "an item is given up for want of a link that has come back in time")
def _() -> Iterator[None]:
    link_up = method(LanguageSessions, "_link_up")

    def late(self: LanguageSessions, event: Any, now: float) -> None:
        waiting = [(s, s.deadline) for s in self._sessions_of(event.peer) if s.state == WAITING]
        link_up(self, event, now)
        for session, deadline in waiting:
            if session.state == WAITING:
                session.deadline = deadline

    with swap(LanguageSessions, "_link_up", late):
        yield


@mutant("grants-outlive-their-link", "I11", "what was granted over a link that is gone is still waited for")
def _() -> Iterator[None]:
    def cut(self: LanguageSessions, link: LinkState, now: float) -> None:
        del self.links[link.peer]
        for session in self._sessions_of(link.peer):
            if session.state == WAITING:
                self._wait(session, now)

    with swap(LanguageSessions, "_cut", cut):
        yield


# ---- allocator ----


@mutant("half-a-grant-is-kept", "I2", "of two leases that do not both fit the first one is taken")
def _() -> Iterator[None]:
    grant = method(BlockAllocator, "grant")

    def half(self: BlockAllocator, owner: str, *wants: Want) -> tuple[Lease, ...] | None:
        leases = grant(self, owner, *wants)
        if leases is None and len(wants) > 1:
            grant(self, owner, wants[0])
        return leases

    with swap(BlockAllocator, "grant", half):
        yield


@mutant("slots-stay-in-quarantine", "I1", "what comes back from quarantine comes without its aux slots")
def _() -> Iterator[None]:
    release = method(BlockAllocator, "release")

    def rows_only(self: BlockAllocator, lease: Lease) -> None:
        slots = list(self._free["slots"])
        release(self, lease)
        self._free["slots"] = slots

    with swap(BlockAllocator, "release", rows_only):
        yield
