"""Planted bugs: what is kept when the frontend dies, and who takes it up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from qwen3vl_disagg.core.errors import UnavailableError
from qwen3vl_disagg.language.kept_answers import KeptAnswers
from qwen3vl_disagg.language.request_book import RequestBook, Running
from qwen3vl_disagg.protocol.language_sessions import LanguageSessions
from qwen3vl_disagg.protocol.messages import KeptRequest, Message, NeedItems, Submit
from qwen3vl_disagg.protocol.placement import choose_language_rank
from qwen3vl_disagg.protocol.router import Router
from qwen3vl_disagg.protocol.routing import Admit, RankDown, Request
from qwen3vl_disagg.protocol.session_events import Expect
from tools.simulation.mutants import method, mutant, swap


@mutant("kept-is-told-to-any-hub", "I17", "what nobody adopted is told to the next hub, too")
def _() -> Iterator[None]:
    note = method(KeptAnswers, "note")

    def tell(self: KeptAnswers, message: Any, now: float) -> bool:
        note(self, message, now)
        return True

    with swap(KeptAnswers, "note", tell):
        yield


@mutant("adopted-hears-only-what-follows", "I17", "who adopts a request is not told what it has said before")
def _() -> Iterator[None]:
    adopt = method(KeptAnswers, "adopt")

    def forget(self: KeptAnswers, request_id: str) -> list[Message] | None:
        said = adopt(self, request_id)
        return None if said is None else []

    with swap(KeptAnswers, "adopt", forget):
        yield


@mutant("kept-waits-for-rows-without-a-hub", "I17", "a request whose rows are on their way outlives the hub")
def _() -> Iterator[None]:
    hub_lost = method(RequestBook, "hub_lost")

    def lax(self: RequestBook, now: float) -> None:
        for request in self.running.values():
            request.missing = set()
        hub_lost(self, now)

    with swap(RequestBook, "hub_lost", lax):
        yield


@mutant("kept-dies-with-its-hub", "I17", "what runs is forgotten with the hub, also what is kept")
def _() -> Iterator[None]:
    def unhear(self: KeptAnswers, request_id: str, now: float) -> bool:
        return False

    with swap(KeptAnswers, "unhear", unhear):
        yield


@mutant("cached-items-count-as-missing", "I17", "items that the engine found in its cache are waited for")
def _() -> Iterator[None]:
    begin, need = method(RequestBook, "begin"), method(RequestBook, "_need")

    def all_of_them(self: RequestBook, message: Submit, now: float) -> float:
        due = begin(self, message, now)
        self.running[message.request_id].missing = set(range(len(message.items)))
        return due

    def those_too(self: RequestBook, event: NeedItems, request: Running) -> None:
        missing = request.missing
        need(self, event, request)
        request.missing |= missing

    with swap(RequestBook, "begin", all_of_them), swap(RequestBook, "_need", those_too):
        yield


@mutant("cut-answers-are-waited-for", "I17", "what is kept does not end while an answer is open that was cut")
def _() -> Iterator[None]:
    forget_answer = method(RequestBook, "forget_answer")

    def lax(self: RequestBook, request_id: str, sample: int, now: float) -> None:
        kept = self.kept._kept.get(request_id)
        is_open = kept is not None and sample in kept.open
        until = math.inf if kept is None else kept.until
        forget_answer(self, request_id, sample, now)
        if kept is not None and is_open:
            kept.open.add(sample)
            kept.until = until

    with swap(RequestBook, "forget_answer", lax):
        yield


@mutant("kept-for-half-the-time", "I17", "what runs unheard is given up after half of its time")
def _() -> Iterator[None]:
    unhear = method(KeptAnswers, "unhear")

    def hasty(self: KeptAnswers, request_id: str, now: float) -> bool:
        is_kept = unhear(self, request_id, now)
        if is_kept:
            self._kept[request_id].until -= self._keep_s / 2
        return is_kept

    with swap(KeptAnswers, "unhear", hasty):
        yield


@mutant("adopted-is-silent", "I17", "after what was said before, who adopts a request hears nothing more")
def _() -> Iterator[None]:
    adopt = method(KeptAnswers, "adopt")

    def deaf(self: KeptAnswers, request_id: str) -> list[Message] | None:
        said = adopt(self, request_id)
        if said is not None:
            self._kept[request_id].is_heard = False
        return said

    with swap(KeptAnswers, "adopt", deaf):
        yield


@mutant("adopted-is-given-up-all-the-same", "I17", "the time in which somebody had to ask goes on for what is adopted")
def _() -> Iterator[None]:
    adopt = method(KeptAnswers, "adopt")

    def keep_until(self: KeptAnswers, request_id: str) -> list[Message] | None:
        until = self._kept[request_id].until if request_id in self._kept else 0.0
        said = adopt(self, request_id)
        if said is not None:
            self._kept[request_id].until = until
        return said

    with swap(KeptAnswers, "adopt", keep_until):
        yield


@mutant("kept-asks-for-rows-unheard", "I17", "a request that nobody hears asks the next hub for rows")
def _() -> Iterator[None]:
    def ask(self: RequestBook, event: NeedItems, request: Running) -> None:
        needed = event.items, request.deadline, event.first_rows, request.due
        self._to_sessions(Expect(event.request_id, request.items, *needed))
        request.missing = set(event.items)
        self._tell(event)

    with swap(RequestBook, "_need", ask):
        yield


@mutant("adopted-has-the-time-of-before", "I11", "the deadline of the client that left ends what another one adopted")
def _() -> Iterator[None]:
    with swap(LanguageSessions, "_prolonged", lambda self, event, now: None):
        yield


@mutant("adopted-counts-attempts-anew", "I10", "the next hub does not hear which attempts there were")
def _() -> Iterator[None]:
    offer = method(RequestBook, "offer")

    def without(self: RequestBook, last_attempt: int) -> list[KeptRequest]:
        return offer(self, 0)

    with swap(RequestBook, "offer", without):
        yield


@mutant("offers-outlive-their-rank", "I17", "what a language rank has kept is looked for when that rank is gone")
def _() -> Iterator[None]:
    rank_down = method(Router, "_rank_down")

    def remember(self: Router, event: RankDown, now: float) -> None:
        kept = dict(self._kept)
        rank_down(self, event, now)
        self._kept = kept

    with swap(Router, "_rank_down", remember):
        yield


@mutant("adopted-elsewhere", "I17", "a kept request is looked for at whatever language rank has the least to do")
def _() -> Iterator[None]:
    take = method(Router, "_take_kept")

    def anywhere(self: Router, event: Admit) -> tuple[int, KeptRequest] | None:
        kept = take(self, event)
        return None if kept is None else (choose_language_rank(self._language, self._language.keys()), kept[1])

    with swap(Router, "_take_kept", anywhere):
        yield


@mutant("what-is-gone-is-not-begun-anew", "I17", "who asks for a kept request that is gone is sent away")
def _() -> Iterator[None]:
    def give_up(self: Router, event: Admit, request: Request, now: float) -> None:
        self._end(event.request_id, UnavailableError("it is gone"), by_language_rank=True)

    with swap(Router, "_begin_anew", give_up):
        yield
