"""Who does what: the one place that assigns requests to language ranks and items to encode ranks.

Pure: `handle(event, now)` changes the tables and returns actions; no clock, socket or random number inside. The hub
carries the actions out. Ranks never choose for themselves.

An item of a request goes through: idle -> (the language rank needs it) waiting -> encoding -> received, back to
waiting when the encode rank or the transfer fails. Each encoding is an attempt with a number of its own; what carries
an older number, or belongs to a request that has ended, changes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from qwen3vl_disagg.core.due import Prices, allowance
from qwen3vl_disagg.core.errors import (
    DisaggError,
    ServerError,
    TransferError,
    UnavailableError,
    late,
)
from qwen3vl_disagg.protocol.admission import Admission
from qwen3vl_disagg.protocol.messages import (
    Assign,
    Cancel,
    Decoded,
    EncodingBegun,
    EncodingEnded,
    Finished,
    ItemFailed,
    ItemLost,
    ItemReceived,
    Leaving,
    LinksUp,
    Message,
    NeedItems,
    PromptLogprobs,
    RequestFailed,
    Stop,
    Submit,
    Tokens,
)
from qwen3vl_disagg.protocol.placement import (
    EncodeRankState,
    LanguageRankState,
    choose_encode_rank,
    choose_language_rank,
)
from qwen3vl_disagg.protocol.routing import (
    TOKEN_ID_BYTES,
    Abandon,
    Action,
    Admit,
    AdmitTogether,
    Deliver,
    Drain,
    End,
    EndAll,
    Event,
    FromRank,
    Item,
    RankDown,
    RankUp,
    Request,
    RouterLimits,
    Send,
    harmful,
)
from qwen3vl_disagg.protocol.session_events import Tick
from qwen3vl_disagg.protocol.suspects import Suspects


class Router:
    """The tables and the rules.

    `required`: language ranks that only run together, because each holds a part of the experts. Without one of them
    nothing is admitted, and when one goes all requests end. The others come and go, and only their own requests end.
    """

    def __init__(
        self,
        limits: RouterLimits | None = None,
        *,
        required: Iterable[int] = (),
    ) -> None:
        self.limits = limits or RouterLimits()
        self.required = frozenset(required)
        self.is_draining = False
        self._requests: dict[str, Request] = {}
        self._encode: dict[int, EncodeRankState] = {}
        self._language: dict[int, LanguageRankState] = {}
        self._suspects = Suspects(self.limits.max_deaths, self.limits.suspect_s, self.limits.max_suspects)
        self._num_incarnations = 0
        self._num_submitted = 0
        self._admission, self._prices = Admission(self.limits), Prices()
        self._now = 0.0
        self._actions: list[Action] = []

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def encode_ranks(self) -> set[int]:
        """Encode ranks that take items for some language rank."""
        return {rank for rank, state in self._staying.items() if state.links & self._language.keys()}

    @property
    def language_ranks(self) -> set[int]:
        return set(self._language)

    @property
    def linked_language_ranks(self) -> set[int]:
        """Language ranks that some encode rank can send to."""
        return {rank for rank in self._language if any(rank in state.links for state in self._staying.values())}

    @property
    def _staying(self) -> dict[int, EncodeRankState]:
        return {rank: state for rank, state in self._encode.items() if not state.is_leaving}

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event in; `now` is in seconds on any clock that does not go back."""
        self._now = now
        match event:
            case Admit():
                self._admit([event], now)
            case AdmitTogether():
                self._admit(event.admits, now)
            case Abandon():
                self._abandon(event)
            case RankUp():
                self._rank_up(event, now)
            case RankDown():
                self._rank_down(event, now)
            case FromRank(role="encode") if event.rank in self._encode:
                self._from_encode(event.rank, event.message, now)
            case FromRank(role="language") if event.rank in self._language:
                self._from_language(event.rank, event.message, now)
            case Tick():
                self._tick(now)
            case Drain():
                self.is_draining = True
            case EndAll():
                for request_id in list(self._requests):
                    self._end(request_id, event.error)
        self._dismiss()
        actions, self._actions = self._actions, []
        return actions

    # ---- requests ----

    def _admit(self, events: Sequence[Admit], now: float) -> None:
        """All of them or none."""
        costs = [Admission.costs(len(e.token_ids) // TOKEN_ID_BYTES, e.num_tokens, e.sampling.n) for e in events]
        num_new, cost = sum(map(len, costs)), sum(map(sum, costs))
        error = next((error for e in events if (error := self._condemned(e, now))), None)
        if error := error or self.refusal(now, cost=cost, num_new=num_new):
            self._actions += [End(event.request_id, error) for event in events]
            return
        for event, of_answers in zip(events, costs, strict=True):
            self._begin(event, now)
            self._admission.add(event.request_id, of_answers, now)

    def _begin(self, event: Admit, now: float) -> None:
        # For images, a rank that some encode rank can send to, if there is one.
        reachable = self.linked_language_ranks if event.items else set()
        rank = choose_language_rank(self._language, reachable or self.language_ranks)
        self._num_submitted += 1
        self._language[rank].last_used = self._num_submitted
        num_prompt = len(event.token_ids) // TOKEN_ID_BYTES
        num_output = event.num_tokens - num_prompt
        num_tokens = event.num_tokens + (event.sampling.n - 1) * num_output
        self._language[rank].add(event.request_id, num_tokens)
        items, received = [Item(visual) for visual in event.items], dict.fromkeys(range(event.sampling.n), 0)
        deadline = now + event.timeout_s
        self._requests[event.request_id] = Request(rank, items, num_tokens, deadline, received, num_prompt)
        price_s = self._prices.of(sum(visual.num_rows for visual in event.items), num_prompt)
        submit = Submit(
            request_id=event.request_id,
            token_ids=event.token_ids,
            items=event.items,
            sampling=event.sampling,
            timeout_s=event.timeout_s,
            due_s=allowance(event.target_s, price_s, event.timeout_s),
        )
        self._actions.append(Send("language", rank, submit))

    def _condemned(self, event: Admit, now: float) -> DisaggError | None:
        for visual in event.items:
            if self._suspects.is_condemned(visual.digest, now):
                return harmful(visual)
        return None

    def refusal(self, now: float, *, cost: int = 0, num_coming: int = 0, num_new: int = 1) -> DisaggError | None:
        """Why `num_new` answers of this cost would not be taken. `num_coming`: how many will be admitted before."""
        kv_tokens = self._kv_tokens
        refusal = self._absence()
        return refusal or self._admission.refusal(
            now, kv_tokens=kv_tokens, cost=cost, num_coming=num_coming, num_new=num_new
        )

    def _absence(self) -> DisaggError | None:
        """Why nothing is taken at all."""
        if self.is_draining:
            return UnavailableError("the server is shutting down")
        if missing := self.required - self._language.keys():
            return UnavailableError(f"language rank {min(missing)} is missing")
        if not self._language:
            return UnavailableError("no language rank is ready")
        return None

    @property
    def _kv_tokens(self) -> int:
        return sum(rank.kv_tokens for rank in self._language.values())

    def _abandon(self, event: Abandon) -> None:
        """The last answer that is wanted takes its request with it."""
        request = self._requests.get(event.request_id)
        if request is None:
            return
        if event.sample is None or request.num_received.keys() == {event.sample}:
            self._end(event.request_id)
        elif event.sample in request.num_received:
            self._close(event.request_id, request, event.sample)
            cancel = Cancel(request_id=event.request_id, sample=event.sample)
            self._actions.append(Send("language", request.language_rank, cancel))

    def _close(self, request_id: str, request: Request, sample: int) -> None:
        """Nothing more comes of this answer."""
        del request.num_received[sample]
        self._admission.leave(request_id, self._now, sample=sample, is_served=False)

    def _end(self, request_id: str, error: DisaggError | None = None, *, by_language_rank: bool = False) -> None:
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        self._admission.leave(request_id, self._now, is_served=False)
        for index in range(len(request.items)):
            self._take_from_encode_rank(request_id, index, request.items[index])
        if request.language_rank in self._language:
            self._language[request.language_rank].remove(request_id)
            if not by_language_rank:
                self._actions.append(Send("language", request.language_rank, Cancel(request_id=request_id)))
        self._actions.append(End(request_id, error))

    def _tick(self, now: float) -> None:
        for request_id, request in list(self._requests.items()):
            if now >= request.deadline:
                self._end(request_id, late())
            elif any(now >= item.wait_until for item in request.items):
                self._end(request_id, UnavailableError("no encode rank is available"))

    # ---- ranks ----

    def _rank_up(self, event: RankUp, now: float) -> None:
        self._rank_down(RankDown(event.role, event.rank), now)
        if event.role == "encode":
            self._num_incarnations += 1
            self._encode[event.rank] = EncodeRankState(self._num_incarnations)
        else:
            self._language[event.rank] = LanguageRankState(event.kv_tokens)

    def _rank_down(self, event: RankDown, now: float) -> None:
        if event.role == "encode":
            state = self._encode.pop(event.rank, None)
            if state is not None:
                self._encode_rank_died(event.rank, state, now)
            return
        # Links are what the encode ranks say: they may outlive this rank's connection with the hub, or come before it.
        language = self._language.pop(event.rank, None)
        if language is None:
            return
        if event.rank in self.required:
            for request_id in list(self._requests):
                self._end(request_id, UnavailableError(f"language rank {event.rank} was lost"))
        for request_id in list(language.requests):
            self._end(request_id, UnavailableError("the rank that ran the request was lost"))

    def _encode_rank_died(self, rank: int, state: EncodeRankState, now: float) -> None:
        """Its items are tried again, however often that happens: only what it worked on at that moment is suspected."""
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

    def _dismiss(self) -> None:
        """Tell the encode ranks that want to leave and have nothing left to do that they may."""
        for rank, state in self._encode.items():
            if state.is_leaving and not state.jobs and not state.is_dismissed:
                state.is_dismissed = True
                self._actions.append(Send("encode", rank, Stop()))

    # ---- items ----

    def _current(self, message: Decoded | ItemFailed | ItemLost | ItemReceived) -> Item | None:
        """The item that the message speaks of, if its attempt is the one under way."""
        request = self._requests.get(message.request_id)
        if request is None or not 0 <= message.item < len(request.items):
            return None
        item = request.items[message.item]
        return item if item.state == "encoding" and item.attempt == message.attempt else None

    def _from_encode(self, rank: int, message: Message, now: float) -> None:
        match message:
            case LinksUp():
                self._encode[rank].epochs = dict(zip(message.language_ranks, message.epochs, strict=False))
                self._links_up(rank, set(message.language_ranks), now)
            case Leaving():
                self._encode[rank].is_leaving = True
            case EncodingBegun():
                self._encode[rank].under_way[message.digest] += 1
            case EncodingEnded():
                self._encoding_ended(self._encode[rank], message)
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
                    self._attempt_failed(message.request_id, message.item, self._worker(item), error, now)

    def _links_up(self, rank: int, links: set[int], now: float) -> None:
        # An attempt whose link is gone may be resumed when it is back: its language rank says when it is lost.
        self._encode[rank].links = links
        for request_id, index in self._innocent_first(self._waiting(), now):
            self._assign(request_id, index, now)

    def _encoding_ended(self, state: EncodeRankState, message: EncodingEnded) -> None:
        state.under_way -= Counter({message.digest: 1})  # drops what is at 0
        if message.is_well:
            self._suspects.cleared(message.digest)

    def _waiting(self) -> Iterator[tuple[str, int]]:
        for request_id, request in list(self._requests.items()):
            for index, item in enumerate(request.items):
                if item.state == "waiting":
                    yield request_id, index

    def _worker(self, item: Item) -> tuple[int, int]:
        return item.encode_rank, self._encode[item.encode_rank].incarnation

    def _take_from_encode_rank(self, request_id: str, index: int, item: Item) -> None:
        if item.state == "encoding" and item.encode_rank in self._encode:
            self._encode[item.encode_rank].jobs.pop((request_id, index), None)

    def _attempt_failed(
        self, request_id: str, index: int, worker: tuple[int, int], error: DisaggError, now: float
    ) -> None:
        """The item's attempt on `worker` is over without rows: try again, or give the request up with the error."""
        item = self._requests[request_id].items[index]
        item.failures += 1
        if item.failures >= self.limits.max_attempts and now < self._requests[request_id].deadline:
            self._end(request_id, error.at(item.visual.param))
        else:
            self._try_again(request_id, index, worker, now)

    def _try_again(self, request_id: str, index: int, worker: tuple[int, int], now: float) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return
        item = request.items[index]
        self._take_from_encode_rank(request_id, index, item)
        item.failed_on.add(worker)
        if now >= request.deadline:
            item.state = "waiting"
            self._end(request_id, late())
            return
        self._wait(item, now)
        self._assign(request_id, index, now)

    def _wait(self, item: Item, now: float) -> None:
        item.state = "waiting"
        item.wait_until = now + self.limits.encode_wait_s

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
        linked = {rank: state for rank, state in self._staying.items() if request.language_rank in state.links}
        fresh = {rank: s for rank, s in linked.items() if (rank, s.incarnation) not in item.failed_on}
        if not linked:
            return
        rank = choose_encode_rank(item.visual.digest, item.work, fresh or linked)
        item.attempt += 1
        item.state, item.encode_rank, item.wait_until = "encoding", rank, math.inf
        self._encode[rank].jobs[request_id, index] = item.work
        is_alone = self._suspects.is_suspect(item.visual.digest, now)
        assign = Assign(request_id=request_id, item=index, attempt=item.attempt, encode_rank=rank, is_alone=is_alone)
        self._actions.append(Send("language", request.language_rank, assign))

    def _from_language(self, rank: int, message: Message, now: float) -> None:
        if not isinstance(
            message, (NeedItems, ItemLost, ItemReceived, PromptLogprobs, Tokens, Finished, RequestFailed)
        ):
            return
        request = self._requests.get(message.request_id)
        if request is None or request.language_rank != rank:
            # Ended here, or before this process was born: the rank may not know.
            if isinstance(message, (NeedItems, PromptLogprobs, Tokens)):
                self._actions.append(Send("language", rank, Cancel(request_id=message.request_id)))
            return
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
                    encode = self._encode[item.encode_rank]
                    if message.dead_epoch >= encode.epochs.get(rank, 1):
                        encode.links.discard(rank)
                    worker = self._worker(item)
                    if message.dead_epoch > 0:
                        item.lost_with.add(worker)
                    error = TransferError(message.reason)
                    self._attempt_failed(message.request_id, message.item, worker, error, now)
            case ItemReceived():
                item = self._current(message)
                if item is not None:
                    self._take_from_encode_rank(message.request_id, message.item, item)
                    item.state = "received"
            case PromptLogprobs():
                self._actions.append(Deliver(message.request_id, message))
            case Tokens():
                self._tokens(request, message)
            case Finished() if message.sample in request.num_received:
                # One without tokens is served now.
                if message.vector:
                    self._prices.learn(request.num_prompt, message.timings)
                self._admission.leave(message.request_id, self._now, sample=message.sample, is_served=True)
                self._actions.append(Deliver(message.request_id, message))
                self._close(message.request_id, request, message.sample)
                if not request.num_received:
                    self._end(message.request_id, by_language_rank=True)
            case RequestFailed():
                self._end(message.request_id, message.failure.error(), by_language_rank=True)

    def _tokens(self, request: Request, message: Tokens) -> None:
        """Pass on what continues the answer; a repetition is dropped, a gap ends the request."""
        num_received = request.num_received.get(message.sample)
        if num_received is None:  # nobody wants that answer any more
            return
        if message.index > num_received:
            self._end(message.request_id, ServerError("part of the answer was lost"))
        elif message.index == num_received and message.token_ids:
            if message.timings is not None and message.sample == 0:
                self._prices.learn(request.num_prompt, message.timings)
            request.num_received[message.sample] += len(message.token_ids)
            self._admission.leave(message.request_id, self._now, sample=message.sample, is_served=True)
            self._actions.append(Deliver(message.request_id, message))
