"""Planted bugs that the checks did not find at first: what is counted, remembered and forgotten, where nothing else
goes wrong for long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from qwen3vl_disagg.language.request_book import RequestBook, Said
from qwen3vl_disagg.protocol.admission import Admission
from qwen3vl_disagg.protocol.attempts import Attempts
from qwen3vl_disagg.protocol.encode_sessions import EncodeSessions
from qwen3vl_disagg.protocol.link_state import LinkState
from qwen3vl_disagg.protocol.messages import (
    Beat,
    Cancel,
    EncodingEnded,
    Frame,
    ItemLost,
    Message,
    RequestFailed,
    Tokens,
)
from qwen3vl_disagg.protocol.placement import LanguageRankState
from qwen3vl_disagg.protocol.router import Router
from qwen3vl_disagg.protocol.routing import Admit, RankUp, Request
from qwen3vl_disagg.protocol.session_events import LanguageEvent
from qwen3vl_disagg.protocol.suspects import Suspects
from tools.simulation.mutants import method, mutant, swap

# ---- router ----


@mutant("adopted-begins-anew-each-time-it-fails", "I14", "an adopted request that fails later is computed once more")
def _() -> Iterator[None]:
    from_language = method(Router, "_from_language")

    def remember(self: Router, rank: int, message: Message, now: float) -> None:
        request = self._requests.get(getattr(message, "request_id", ""))
        again = None if request is None else request.again
        from_language(self, rank, message, now)
        if request is not None and not isinstance(message, RequestFailed):
            request.again = again

    with swap(Router, "_from_language", remember):
        yield


@mutant("tokens-count-as-messages", "I11", "several tokens that come together count as one")
def _() -> Iterator[None]:
    tokens = method(Router, "_tokens")

    def one(self: Router, request: Request, message: Tokens) -> None:
        before = request.num_received.get(message.sample, 0)
        tokens(self, request, message)
        if request.num_received.get(message.sample, 0) > before:
            request.num_received[message.sample] = before + 1

    with swap(Router, "_tokens", one):
        yield


@mutant("cost-of-what-is-not-served-stays", "I11", "what was cancelled counts for ever as what waits")
def _() -> Iterator[None]:
    leave = method(Admission, "leave")

    def keep(self: Admission, request_id: str, now: float, *, is_served: bool, sample: int | None = None) -> None:
        before = self._cost
        leave(self, request_id, now, is_served=is_served, sample=sample)
        if not is_served:
            self._cost = before

    with swap(Admission, "leave", keep):
        yield


@mutant("load-never-falls", "I11", "the load of a language rank is that of all requests it ever had")
def _() -> Iterator[None]:
    def keep(self: LanguageRankState, request_id: str) -> None:
        del self.requests[request_id]

    with swap(LanguageRankState, "remove", keep):
        yield


@mutant("old-news-of-a-link-count", "I11", "a link that was lost takes the one after it with it")
def _() -> Iterator[None]:
    from_language = method(Attempts, "from_language")

    def any_epoch(self: Attempts, rank: int, message: Any, now: float) -> None:
        if isinstance(message, ItemLost) and message.dead_epoch > 0:
            message = msgspec.structs.replace(message, dead_epoch=1 << 30)
        from_language(self, rank, message, now)

    with swap(Attempts, "from_language", any_epoch):
        yield


@mutant("slow-ranks-are-forgotten", "I11", "an item goes back and forth between ranks that are slow with it")
def _() -> Iterator[None]:
    relieve = method(Attempts, "relieve")

    def forget(self: Attempts, now: float) -> None:
        relieve(self, now)
        for request in self._requests.values():
            for item in request.items:
                item.relieved.clear()

    with swap(Attempts, "relieve", forget):
        yield


@mutant("slow-ranks-are-asked-when-others-fail", "I11", "an item goes back to a slow rank when the next one fails")
def _() -> Iterator[None]:
    assign = method(Attempts, "_assign")

    def forgive(self: Attempts, request_id: str, index: int, now: float) -> None:
        request = self._requests.get(request_id)
        relieved = set() if request is None else set(request.items[index].relieved)
        if request is not None:
            request.items[index].relieved.clear()
        assign(self, request_id, index, now)
        if request is not None:
            request.items[index].relieved |= relieved

    with swap(Attempts, "_assign", forgive):
        yield


@mutant("suspicion-never-ends", "I11", "what encode ranks died over is refused for ever")
def _() -> Iterator[None]:
    with swap(Suspects, "_find", lambda self, digest, now: self._records.get(digest)):
        yield


@mutant("items-of-a-rank-that-comes-again-are-awaited", "I11", "an encode rank that is back has what it had before")
def _() -> Iterator[None]:
    rank_up = method(Router, "_rank_up")

    def greet(self: Router, event: RankUp, now: float) -> None:
        if event.role == "encode":
            self._attempts.rank_up(event.rank)
        else:
            rank_up(self, event, now)

    with swap(Router, "_rank_up", greet):
        yield


@mutant("requests-of-a-rank-that-comes-again-go-on", "I11", "a language rank that is back has what it had before")
def _() -> Iterator[None]:
    rank_up = method(Router, "_rank_up")

    def greet(self: Router, event: RankUp, now: float) -> None:
        if event.role == "encode" or event.rank not in self._language:
            rank_up(self, event, now)

    with swap(Router, "_rank_up", greet):
        yield


@mutant(
    "what-begins-anew-has-all-its-time", "I11", "a request that is computed anew may go on when its client has left"
)
def _() -> Iterator[None]:
    begin_anew = method(Router, "_begin_anew")

    def renew(self: Router, event: Admit, request: Request, now: float) -> None:
        deadline, request.deadline = request.deadline, now + event.timeout_s
        begin_anew(self, event, request, now)
        request.deadline = deadline

    with swap(Router, "_begin_anew", renew):
        yield


@mutant("contents-under-way-are-a-set", "I11", "what is under way twice is forgotten when the first of it has ended")
def _() -> Iterator[None]:
    from_encode = method(Attempts, "from_encode")

    def drop(self: Attempts, rank: int, message: Message, now: float) -> None:
        from_encode(self, rank, message, now)
        if isinstance(message, EncodingEnded):
            self.ranks[rank].under_way.pop(message.digest, None)

    with swap(Attempts, "from_encode", drop):
        yield


# ---- ranks ----


@mutant("a-full-share-stops-the-queue", "I11", "items of other language ranks wait behind those of a silent one")
def _() -> Iterator[None]:
    fill = method(EncodeSessions, "_fill_places")

    def stop(self: EncodeSessions, now: float) -> None:
        share = self.limits.max_items if len(self.outlets) < 2 else -(-self.limits.max_items // 2)
        in_memory = self._in_memory()
        full = (n for n, key in enumerate(self.queue) if len(in_memory[self.items[key].language_rank]) >= share)
        place = next(full, len(self.queue))
        behind = self.queue[place:]
        del self.queue[place:]
        fill(self, now)
        self.queue += behind

    with swap(EncodeSessions, "_fill_places", stop):
        yield


@mutant("clips-take-all-places", "I12", "as many clips are encoded at a time as items")
def _() -> Iterator[None]:
    is_full = method(EncodeSessions, "_is_full")

    def only_items(
        self: EncodeSessions, dues: list[float], places: int, item: Any, clips: Sequence[float] = ()
    ) -> bool:
        most = self.limits.max_items if places == self.limits.max_clips else places
        return is_full(self, dues, most, item, clips)

    with swap(EncodeSessions, "_is_full", only_items):
        yield


@mutant("beats-show-no-gap", "I9", "that the last frame before a beat was lost goes unnoticed")
def _() -> Iterator[None]:
    take = method(LinkState, "take")

    def blind(self: LinkState, frame: Frame) -> bool | None:
        return False if type(frame.body) is Beat else take(self, frame)

    with swap(LinkState, "take", blind):
        yield


@mutant("failed-requests-keep-their-blocks", "I15", "the sessions are not told that a step has failed")
def _() -> Iterator[None]:
    hear = method(RequestBook, "hear")

    def silent(self: RequestBook, event: Said, now: float) -> None:
        to_sessions = self._to_sessions

        def all_but_ends(of_sessions: LanguageEvent) -> None:
            if not isinstance(of_sessions, Cancel):
                to_sessions(of_sessions)

        if isinstance(event, RequestFailed):
            self._to_sessions = all_but_ends
        hear(self, event, now)
        self._to_sessions = to_sessions

    with swap(RequestBook, "hear", silent):
        yield


@mutant(
    "preempted-still-misses-its-rows", "I17", "a preempted request is given up with its hub for rows it needs no more"
)
def _() -> Iterator[None]:
    preempted = method(RequestBook, "preempted")

    def keep(self: RequestBook, request_id: str) -> None:
        request = self.running.get(request_id)
        missing = set() if request is None else request.missing
        preempted(self, request_id)
        if request is not None:
            request.missing = missing

    with swap(RequestBook, "preempted", keep):
        yield
