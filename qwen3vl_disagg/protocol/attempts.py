"""Which encode rank works on which item, and what happens when it fails: the router's part that knows encode ranks.

An item of a request goes through: idle -> (the language rank needs it) waiting -> encoding -> received, back to
waiting when the encode rank or the transfer fails. Each encoding is an attempt with a number of its own; what carries
an older number, or belongs to a request that has ended, changes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from qwen3vl_disagg.core.errors import DisaggError, TransferError, late
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.protocol.messages import (
    Assign,
    Decoded,
    EncodingBegun,
    EncodingEnded,
    ItemFailed,
    ItemLost,
    ItemReceived,
    Leaving,
    LinksUp,
    Message,
    NeedItems,
    Stop,
)
from qwen3vl_disagg.protocol.placement import EncodeRankState, choose_encode_rank
from qwen3vl_disagg.protocol.routing import Action, Deliver, Item, Request, RouterLimits, Send, harmful
from qwen3vl_disagg.protocol.suspects import Suspects


class Attempts:
    """The encode ranks and their jobs.

    `requests` and `actions` are the router's own: one is read (but for the items in it), the other one added to. `end`
    ends a request that cannot go on; it takes the request out, and its items back by `release`.
    """

    def __init__(
        self,
        limits: RouterLimits,
        requests: Mapping[str, Request],
        actions: list[Action],
        end: Callable[[str, DisaggError], None],
    ) -> None:
        self.ranks: dict[int, EncodeRankState] = {}
        self._limits, self._requests, self._actions, self._end = limits, requests, actions, end
        self._suspects = Suspects(limits.max_deaths, limits.suspect_s, limits.max_suspects)
        self._num_incarnations = 0

    def linked(self, language_rank: int) -> dict[int, EncodeRankState]:
        """Encode ranks that take items for this language rank."""
        return {rank: state for rank, state in self._staying.items() if language_rank in state.links}

    @property
    def _staying(self) -> dict[int, EncodeRankState]:
        return {rank: state for rank, state in self.ranks.items() if not state.is_leaving}

    def refusal(self, items: Iterable[VisualItem], now: float) -> DisaggError | None:
        """Why a request with these would not be taken."""
        return next((harmful(visual) for visual in items if self._suspects.is_condemned(visual.digest, now)), None)

    def release(self, request_id: str, request: Request) -> None:
        """The request has ended: nobody has to encode anything for it."""
        for index, item in enumerate(request.items):
            self._take_back(request_id, index, item)

    def dismiss(self) -> None:
        """Tell the encode ranks that want to leave and have nothing left to do that they may."""
        for rank, state in self.ranks.items():
            if state.is_leaving and not state.jobs and not state.is_dismissed:
                state.is_dismissed = True
                self._actions.append(Send("encode", rank, Stop()))

    # ---- ranks ----

    def rank_up(self, rank: int) -> None:
        self._num_incarnations += 1
        self.ranks[rank] = EncodeRankState(self._num_incarnations)

    def rank_down(self, rank: int, now: float) -> None:
        """Its items are tried again, however often that happens: only what it worked on at that moment is suspected."""
        state = self.ranks.pop(rank, None)
        if state is None:
            return
        worker = (rank, state.incarnation)
        if not state.is_leaving:
            for digest in self._suspects.died(state.under_way.keys(), now):
                self._condemn(digest)
        for request in self._requests.values():
            for item in request.items:
                # The news of a lost link came before that of the death behind it.
                item.failures -= worker in item.lost_with
                item.lost_with.discard(worker)
        for request_id, index in self._innocent_first(list(state.jobs), now):
            self._try_again(request_id, index, worker, now)

    def _condemn(self, digest: str) -> None:
        for request_id, request in list(self._requests.items()):
            for item in request.items:
                if item.visual.digest == digest and item.state != "received":
                    self._end(request_id, harmful(item.visual))

    def _innocent_first(self, keys: Iterable[tuple[str, int]], now: float) -> list[tuple[str, int]]:
        """What has brought down a rank alone comes after all others."""

        def deaths(key: tuple[str, int]) -> int:
            request = self._requests.get(key[0])
            return 0 if request is None else self._suspects.num_deaths(request.items[key[1]].visual.digest, now)

        return sorted(keys, key=deaths)

    # ---- what ranks say ----

    def _current(self, message: Decoded | ItemFailed | ItemLost | ItemReceived) -> Item | None:
        """The item that the message speaks of, if its attempt is the one under way."""
        request = self._requests.get(message.request_id)
        if request is None or not 0 <= message.item < len(request.items):
            return None
        item = request.items[message.item]
        return item if item.state == "encoding" and item.attempt == message.attempt else None

    def from_encode(self, rank: int, message: Message, now: float) -> None:
        """A message of an encode rank that is up."""
        match message:
            case LinksUp():
                self.ranks[rank].epochs = dict(zip(message.language_ranks, message.epochs, strict=False))
                self._links_up(rank, set(message.language_ranks), now)
            case Leaving():
                self.ranks[rank].is_leaving = True
            case EncodingBegun():
                self.ranks[rank].under_way[message.digest] += 1
            case EncodingEnded():
                self.ranks[rank].under_way -= Counter({message.digest: 1})  # drops what is at 0
                if message.is_well:
                    self._suspects.cleared(message.digest)
            case Decoded():
                item = self._current(message)
                if item is not None and item.encode_rank == rank and not item.is_decoded:
                    item.is_decoded = True
                    self._actions.append(Deliver(message.request_id, message))
            case ItemFailed():
                item = self._current(message)
                if item is None or item.encode_rank != rank:
                    return
                error = message.failure.error()
                if message.failure.is_final:
                    self._end(message.request_id, error.at(item.visual.param))
                else:
                    self._failed(message.request_id, message.item, self._worker(item), error, now)

    def from_language(self, rank: int, message: NeedItems | ItemLost | ItemReceived, now: float) -> None:
        """Of the language rank that has the request."""
        request = self._requests[message.request_id]
        match message:
            case NeedItems():
                for index in message.items:
                    if 0 <= index < len(request.items) and request.items[index].state in ("idle", "received"):
                        self._wait(request.items[index], now)
                        self._assign(message.request_id, index, now)
            case ItemLost():
                item = self._current(message)
                if item is not None:
                    # The other end may not have noticed, or may be dead itself: nothing goes that way before it says
                    # that there is a new link.
                    encode = self.ranks[item.encode_rank]
                    if message.dead_epoch >= encode.epochs.get(rank, 1):
                        encode.links.discard(rank)
                    worker = self._worker(item)
                    if message.dead_epoch > 0:
                        item.lost_with.add(worker)
                    self._failed(message.request_id, message.item, worker, TransferError(message.reason), now)
            case ItemReceived():
                item = self._current(message)
                if item is not None:
                    self._take_back(message.request_id, message.item, item)
                    self.ranks[item.encode_rank].learn(now - item.assigned_at, item.work_ahead)
                    item.state = "received"

    def relieve(self, now: float) -> None:
        """What a rank is too slow with goes to one that has nothing to do: no failure, and never back."""
        paces = [state.pace for state in self._staying.values() if state.pace is not None]
        if not paces:
            return
        limits, fastest = self._limits, min(paces)
        for request_id, request in list(self._requests.items()):
            for index, item in enumerate(request.items):
                late_at = item.assigned_at + max(limits.relief_s, limits.relief_factor * fastest * item.work_ahead)
                if item.state != "encoding" or now < late_at or self._suspects.is_suspect(item.visual.digest, now):
                    continue
                worker, linked = self._worker(item), self.linked(request.language_rank)
                shunned = {worker} | item.relieved | item.failed_on
                idle = {r: s for r, s in linked.items() if not s.jobs and (r, s.incarnation) not in shunned}
                if idle:
                    self._take_back(request_id, index, item)
                    item.relieved.add(worker)
                    self._give(request_id, index, idle, now)

    def _links_up(self, rank: int, links: set[int], now: float) -> None:
        # An attempt whose link is gone may be resumed when it is back: its language rank says when it is lost.
        self.ranks[rank].links = links
        for request_id, index in self._innocent_first(self._waiting(), now):
            self._assign(request_id, index, now)

    # ---- items ----

    def _waiting(self) -> Iterator[tuple[str, int]]:
        for request_id, request in list(self._requests.items()):
            for index, item in enumerate(request.items):
                if item.state == "waiting":
                    yield request_id, index

    def _worker(self, item: Item) -> tuple[int, int]:
        return item.encode_rank, self.ranks[item.encode_rank].incarnation

    def _take_back(self, request_id: str, index: int, item: Item) -> None:
        if item.state == "encoding" and item.encode_rank in self.ranks:
            self.ranks[item.encode_rank].jobs.pop((request_id, index), None)

    def _failed(self, request_id: str, index: int, worker: tuple[int, int], error: DisaggError, now: float) -> None:
        """The item's attempt on `worker` is over without rows: try again, or give the request up with the error."""
        item = self._requests[request_id].items[index]
        item.failures += 1
        if item.failures >= self._limits.max_attempts and now < self._requests[request_id].deadline:
            self._end(request_id, error.at(item.visual.param))
        else:
            self._try_again(request_id, index, worker, now)

    def _try_again(self, request_id: str, index: int, worker: tuple[int, int], now: float) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return
        item = request.items[index]
        self._take_back(request_id, index, item)
        item.failed_on.add(worker)
        if now >= request.deadline:
            item.state = "waiting"
            self._end(request_id, late())
            return
        self._wait(item, now)
        self._assign(request_id, index, now)

    def _wait(self, item: Item, now: float) -> None:
        item.state = "waiting"
        item.wait_until = now + self._limits.encode_wait_s

    def _assign(self, request_id: str, index: int, now: float) -> None:
        """Give a waiting item to an encode rank; without one it goes on waiting. What was condemned while nobody wanted
        it (its request was preempted) ends its request now."""
        request = self._requests.get(request_id)
        if request is None:
            return
        item = request.items[index]
        if self._suspects.is_condemned(item.visual.digest, now):
            self._end(request_id, harmful(item.visual))
            return
        linked = self.linked(request.language_rank)
        fresh = {rank: s for rank, s in linked.items() if (rank, s.incarnation) not in item.failed_on}
        quick = {rank: s for rank, s in fresh.items() if (rank, s.incarnation) not in item.relieved}
        if not linked:
            return
        self._give(request_id, index, quick or fresh or linked, now)

    def _give(self, request_id: str, index: int, candidates: Mapping[int, EncodeRankState], now: float) -> None:
        """A new attempt at the item, on one of these."""
        request = self._requests[request_id]
        item = request.items[index]
        rank = choose_encode_rank(item.visual.digest, item.work, candidates)
        item.attempt += 1
        item.state, item.encode_rank, item.wait_until = "encoding", rank, math.inf
        self.ranks[rank].jobs[request_id, index] = item.work
        item.assigned_at, item.work_ahead = now, self.ranks[rank].work
        is_alone = self._suspects.is_suspect(item.visual.digest, now)
        assign = Assign(request_id=request_id, item=index, attempt=item.attempt, encode_rank=rank, is_alone=is_alone)
        self._actions.append(Send("language", request.language_rank, assign))
