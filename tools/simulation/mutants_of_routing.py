"""Planted bugs of the router: who gets what, how often, and until when."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

from qwen3vl_disagg.core.errors import DisaggError
from qwen3vl_disagg.protocol.admission import Admission
from qwen3vl_disagg.protocol.attempts import Attempts
from qwen3vl_disagg.protocol.messages import Decoded, Stop, Tokens
from qwen3vl_disagg.protocol.placement import EncodeRankState
from qwen3vl_disagg.protocol.router import Router
from qwen3vl_disagg.protocol.routing import Deliver, Item, RankDown, Request, Send
from qwen3vl_disagg.protocol.suspects import Suspects
from tools.simulation.mutants import method, mutant, swap


@mutant("router-never-ticks", "I11", "the router does nothing when time has passed")
def _() -> Iterator[None]:
    with swap(Router, "_tick", lambda self, now: None):
        yield


@mutant("waits-for-an-encode-rank-for-ever", "I11", "an item waits without end for an encode rank that is away")
def _() -> Iterator[None]:
    wait = method(Attempts, "_wait")

    def endless(self: Attempts, item: Item, now: float) -> None:
        wait(self, item, now)
        item.wait_until = math.inf

    with swap(Attempts, "_wait", endless):
        yield


@mutant(
    "items-of-a-dead-rank-are-awaited",
    "I11",
    "what a dead encode rank had to do is given to no other",
    stands_for="F10",
)
def _() -> Iterator[None]:
    rank_down = method(Attempts, "rank_down")

    def forget(self: Attempts, rank: int, now: float) -> None:
        if rank in self.ranks:
            self.ranks[rank].jobs.clear()
        rank_down(self, rank, now)

    with swap(Attempts, "rank_down", forget):
        yield


@mutant("deaths-are-charged", "I11", "a lost link counts as a failure though the death behind it is known")
def _() -> Iterator[None]:
    rank_down = method(Attempts, "rank_down")

    def unforgiving(self: Attempts, rank: int, now: float) -> None:
        for request in self._requests.values() if rank in self.ranks else ():
            for item in request.items:
                item.lost_with.clear()
        rank_down(self, rank, now)

    with swap(Attempts, "rank_down", unforgiving):
        yield


@mutant("one-failure-counts-twice", "I11", "each failure of an item counts as two")
def _() -> Iterator[None]:
    failed = method(Attempts, "_failed")

    def twice(
        self: Attempts, request_id: str, index: int, worker: tuple[int, int], error: DisaggError, now: float
    ) -> None:
        self._requests[request_id].items[index].failures += 1
        failed(self, request_id, index, worker, error, now)

    with swap(Attempts, "_failed", twice):
        yield


@mutant("neighbours-are-condemned", "I11", "whatever was under way when encode ranks died is refused")
def _() -> Iterator[None]:
    died = method(Suspects, "died")

    def all_of_them(self: Suspects, under_way: Collection[str], now: float) -> list[str]:
        return [condemned for digest in under_way for condemned in died(self, [digest], now)]

    with swap(Suspects, "died", all_of_them):
        yield


@mutant("harmful-media-go-on", "I11", "an item that ends every encode rank is tried for ever")
def _() -> Iterator[None]:
    died = method(Suspects, "died")

    def none_of_them(self: Suspects, under_way: Collection[str], now: float) -> list[str]:
        died(self, under_way, now)
        return []

    with (
        swap(Suspects, "died", none_of_them),
        swap(Suspects, "is_condemned", lambda self, digest, now: False),
    ):
        yield


@mutant("suspects-are-tried-together", "I11", "what was under way at a death is tried again in company")
def _() -> Iterator[None]:
    with swap(Suspects, "is_suspect", lambda self, digest, now: False):
        yield


@mutant("news-of-older-attempts-count", "I11", "what is said of an attempt is taken for news of the one after it")
def _() -> Iterator[None]:
    def any_of_it(self: Attempts, message: Any) -> Item | None:
        request = self._requests.get(message.request_id)
        if request is None or not 0 <= message.item < len(request.items):
            return None
        item = request.items[message.item]
        return item if item.state == "encoding" else None

    with swap(Attempts, "_current", any_of_it):
        yield


@mutant("attempts-are-not-counted", "I10", "another try at an item has the number of the one before")
def _() -> Iterator[None]:
    assign = method(Attempts, "_assign")

    def again(self: Attempts, request_id: str, index: int, now: float) -> None:
        request = self._requests.get(request_id)
        if request is not None and request.items[index].attempt:
            request.items[index].attempt -= 1
        assign(self, request_id, index, now)

    with swap(Attempts, "_assign", again):
        yield


@mutant("a-good-image-is-told-twice", "I14", "each attempt says anew that the image is good")
def _() -> Iterator[None]:
    from_encode = method(Attempts, "from_encode")

    def twice(self: Attempts, rank: int, message: Any, now: float) -> None:
        item = self._current(message) if isinstance(message, Decoded) else None
        if item is not None:
            item.is_decoded = False
        from_encode(self, rank, message, now)

    with swap(Attempts, "from_encode", twice):
        yield


@mutant("leaving-ranks-get-more", "I15", "an encode rank that wants to leave is given items")
def _() -> Iterator[None]:
    def all_of_them(self: Attempts) -> dict[int, EncodeRankState]:
        return dict(self.ranks)

    with swap(Attempts, "_staying", property(all_of_them)):
        yield


@mutant("leaving-ranks-go-at-once", "I13", "an encode rank that wants to leave goes with rows that are to be sent")
def _() -> Iterator[None]:
    def at_once(self: Attempts) -> None:
        for rank, state in self.ranks.items():
            if state.is_leaving and not state.is_dismissed:
                state.is_dismissed = True
                self._actions.append(Send("encode", rank, Stop()))

    with swap(Attempts, "dismiss", at_once):
        yield


@mutant("leaving-ranks-hear-nothing", "I15", "an encode rank that wants to leave is not told that it may")
def _() -> Iterator[None]:
    with swap(Attempts, "dismiss", lambda self: None):
        yield


@mutant("experts-may-be-missing", "I11", "requests are admitted though a rank with a part of the experts is away")
def _() -> Iterator[None]:
    refusal = method(Router, "refusal")

    def lax(self: Router, now: float, *, cost: int = 0, num_coming: int = 0, num_new: int = 1) -> Any:
        required, self.required = self.required, frozenset()
        error = refusal(self, now, cost=cost, num_coming=num_coming, num_new=num_new)
        self.required = required
        return error

    with swap(Router, "refusal", lax):
        yield


@mutant("requests-outlive-the-experts", "I11", "requests go on when a rank with a part of the experts is lost")
def _() -> Iterator[None]:
    rank_down = method(Router, "_rank_down")

    def go_on(self: Router, event: RankDown, now: float) -> None:
        required, self.required = self.required, frozenset()
        rank_down(self, event, now)
        self.required = required

    with swap(Router, "_rank_down", go_on):
        yield


@mutant("queue-without-bound", "I12", "any number of requests may wait")
def _() -> Iterator[None]:
    def lax(
        self: Admission, now: float, *, kv_tokens: int, cost: int = 0, num_coming: int = 0, num_new: int = 1
    ) -> None:
        return None

    with swap(Admission, "refusal", lax):
        yield


@mutant("places-in-the-queue-are-kept", "I11", "a request that waits no more keeps its place in the queue")
def _() -> Iterator[None]:
    with swap(Admission, "leave", _keep):
        yield


def _keep(self: Admission, request_id: str, now: float, *, is_served: bool, sample: int | None = None) -> None:
    return None


@mutant("the-first-answer-ends-the-request", "I14", "a request is over when the first of its answers is")
def _() -> Iterator[None]:
    close = method(Router, "_close")

    def close_all(self: Router, request_id: str, request: Request, sample: int) -> None:
        close(self, request_id, request, sample)
        request.num_received.clear()

    with swap(Router, "_close", close_all):
        yield


@mutant("answers-go-on-after-their-end", "I14", "tokens of an answer that nobody wants any more are passed on")
def _() -> Iterator[None]:
    tokens = method(Router, "_tokens")

    def pass_on(self: Router, request: Request, message: Tokens) -> None:
        if message.sample not in request.num_received:
            self._actions.append(Deliver(message.request_id, message))
        tokens(self, request, message)

    with swap(Router, "_tokens", pass_on):
        yield
