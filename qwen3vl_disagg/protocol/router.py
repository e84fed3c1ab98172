"""Who does what: the one place that assigns requests to language ranks and items to encode ranks.

Pure: `handle(event, now)` changes the tables and returns actions; no clock, socket or random number inside. The hub
carries the actions out. Ranks never choose for themselves. Requests and language ranks are here, items and encode ranks
in `Attempts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qwen3vl_disagg.core.due import Prices, allowance
from qwen3vl_disagg.core.errors import DisaggError, ServerError, UnavailableError, late
from qwen3vl_disagg.protocol.admission import Admission
from qwen3vl_disagg.protocol.attempts import Attempts
from qwen3vl_disagg.protocol.messages import (
    Adopt,
    Cancel,
    Finished,
    ItemLost,
    ItemReceived,
    KeptRequest,
    Message,
    NeedItems,
    PromptLogprobs,
    RequestFailed,
    Submit,
    Tokens,
)
from qwen3vl_disagg.protocol.placement import LanguageRankState, choose_language_rank
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
)
from qwen3vl_disagg.protocol.session_events import Tick


class Router:
    """The tables and the rules.

    `required`: language ranks that only run together, because each holds a part of the experts. Without one of them
    nothing is admitted, and when one goes all requests end. The others come and go, and only their own requests end.
    """

    def __init__(self, limits: RouterLimits | None = None, *, required: Iterable[int] = ()) -> None:
        self.limits = limits or RouterLimits()
        self.required = frozenset(required)
        self.is_draining = False
        self._requests: dict[str, Request] = {}
        self._language: dict[int, LanguageRankState] = {}
        self._kept: dict[str, tuple[int, KeptRequest]] = {}
        """Name -> language rank, and what it has kept."""
        self._num_submitted = 0
        self._admission, self._prices = Admission(self.limits), Prices()
        self._now = 0.0
        self._actions: list[Action] = []
        self._attempts = Attempts(self.limits, self._requests, self._actions, self._end)

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def encode_ranks(self) -> set[int]:
        """Encode ranks that take items for some language rank."""
        return {rank for language_rank in self._language for rank in self._attempts.linked(language_rank)}

    @property
    def language_ranks(self) -> set[int]:
        return set(self._language)

    @property
    def linked_language_ranks(self) -> set[int]:
        """Language ranks that some encode rank can send to."""
        return {rank for rank in self._language if self._attempts.linked(rank)}

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event in; `now` is in seconds on any clock that does not go back."""
        self._now = now
        match event:
            case FromRank(role="encode") if event.rank in self._attempts.ranks:
                self._attempts.from_encode(event.rank, event.message, now)
            case FromRank(role="language") if event.rank in self._language:
                self._from_language(event.rank, event.message, now)
            case Tick():
                self._tick(now)
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
            case Drain():
                self.is_draining = True
            case EndAll():
                for request_id in list(self._requests):
                    self._end(request_id, event.error)
        self._attempts.dismiss()
        actions = list(self._actions)
        self._actions.clear()
        return actions

    def kept_id(self, name: str) -> str | None:
        """What the request that was kept under this name is called; None where there is none."""
        return self._kept[name][1].request_id if name in self._kept else None

    # ---- requests ----

    def _admit(self, events: Sequence[Admit], now: float) -> None:
        """All of them or none."""
        costs = [Admission.costs(len(e.token_ids) // TOKEN_ID_BYTES, e.num_tokens, e.sampling.n) for e in events]
        num_new, cost = sum(map(len, costs)), sum(map(sum, costs))
        error = next((error for e in events if (error := self._attempts.refusal(e.items, now))), None)
        if error := error or self.refusal(now, cost=cost, num_new=num_new):
            self._actions += [End(event.request_id, error) for event in events]
            return
        for event, of_answers in zip(events, costs, strict=True):
            self._begin(event, now)
            self._admission.add(event.request_id, of_answers, now)

    def _begin(self, event: Admit, now: float) -> None:
        kept = self._take_kept(event)
        # For images, a rank that some encode rank can send to, if there is one.
        reachable = self.linked_language_ranks if event.items else set()
        rank = kept[0] if kept else choose_language_rank(self._language, reachable or self.language_ranks)
        self._num_submitted += 1
        self._language[rank].last_used = self._num_submitted
        num_prompt = len(event.token_ids) // TOKEN_ID_BYTES
        num_output = event.num_tokens - num_prompt
        num_tokens = event.num_tokens + (event.sampling.n - 1) * num_output
        self._language[rank].add(event.request_id, num_tokens)
        items, received = [Item(visual) for visual in event.items], dict.fromkeys(range(event.sampling.n), 0)
        deadline = now + event.timeout_s
        self._requests[event.request_id] = Request(rank, items, num_tokens, deadline, received, num_prompt)
        if not kept:
            self._submit(event, rank, event.timeout_s)
            return
        self._requests[event.request_id].again = event
        for item in items:
            item.state, item.attempt = "received", kept[1].last_attempt
        self._actions.append(Send("language", rank, Adopt(request_id=event.request_id, timeout_s=event.timeout_s)))

    def _submit(self, event: Admit, rank: int, timeout_s: float) -> None:
        num_prompt = len(event.token_ids) // TOKEN_ID_BYTES
        price_s = self._prices.of(sum(visual.num_rows for visual in event.items), num_prompt)
        submit = Submit(
            request_id=event.request_id,
            token_ids=event.token_ids,
            items=event.items,
            sampling=event.sampling,
            timeout_s=timeout_s,
            due_s=allowance(event.target_s, price_s, timeout_s),
            keep_as=event.keep_as,
        )
        self._actions.append(Send("language", rank, submit))

    def _take_kept(self, event: Admit) -> tuple[int, KeptRequest] | None:
        """The rank that has this request already, with what it said of it."""
        if self.kept_id(event.keep_as) != event.request_id:
            return None
        return self._kept.pop(event.keep_as)

    def refusal(self, now: float, *, cost: int = 0, num_coming: int = 0, num_new: int = 1) -> DisaggError | None:
        """Why `num_new` answers of this cost would not be taken. `num_coming`: how many will be admitted before."""
        kv_tokens = sum(rank.kv_tokens for rank in self._language.values())
        return self._absence() or self._admission.refusal(
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
        self._attempts.release(request_id, request)
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
        self._attempts.relieve(now)

    # ---- ranks ----

    def _rank_up(self, event: RankUp, now: float) -> None:
        self._rank_down(RankDown(event.role, event.rank), now)
        if event.role == "encode":
            self._attempts.rank_up(event.rank)
        else:
            self._language[event.rank] = LanguageRankState(event.kv_tokens)
            for kept in event.kept:
                self._offer(event.rank, kept)

    def _offer(self, rank: int, kept: KeptRequest) -> None:
        """A rank has kept this. The second under a name is told at once that nobody will ask for it: who asked again
        while its first rank was away was served by another."""
        if kept.name in self._kept:
            self._actions.append(Send("language", rank, Cancel(request_id=kept.request_id)))
        else:
            self._kept[kept.name] = rank, kept

    def _rank_down(self, event: RankDown, now: float) -> None:
        if event.role == "encode":
            self._attempts.rank_down(event.rank, now)
            return
        # Links are what the encode ranks say: they may outlive this rank's connection with the hub, or come before it.
        language = self._language.pop(event.rank, None)
        if language is None:
            return
        self._kept = {name: kept for name, kept in self._kept.items() if kept[0] != event.rank}
        if event.rank in self.required:
            for request_id in list(self._requests):
                self._end(request_id, UnavailableError(f"language rank {event.rank} was lost"))
        for request_id in list(language.requests):
            self._end(request_id, UnavailableError("the rank that ran the request was lost"))

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
        again, request.again = request.again, None
        if again is not None and isinstance(message, RequestFailed):
            self._begin_anew(again, request, now)
            return
        match message:
            case NeedItems() | ItemLost() | ItemReceived():
                self._attempts.from_language(rank, message, now)
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

    def _begin_anew(self, event: Admit, request: Request, now: float) -> None:
        """Its language rank has it no longer, after all; attempts at its items are counted on."""
        for item in request.items:
            item.state = "idle"
        self._submit(event, request.language_rank, request.deadline - now)

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
