"""What must hold of the router, from what it hears and says: a ledger of its own, and clocks beside the router's."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

from qwen3vl_disagg.core.errors import DeadlineError, DisaggError, InputError, OverloadedError, UnavailableError
from qwen3vl_disagg.protocol.messages import (
    Adopt,
    Assign,
    EncodingBegun,
    EncodingEnded,
    ItemFailed,
    ItemLost,
    Leaving,
    Message,
    RequestFailed,
    Stop,
    Submit,
)
from qwen3vl_disagg.protocol.routing import Admit, AdmitTogether, Event, FromRank, RankDown, RankUp, Send
from qwen3vl_disagg.protocol.session_events import Tick
from tools.simulation.stays import Stays
from tools.simulation.world import Violation

_NO_FAILURE_OF_AN_ITEM = (InputError, DeadlineError, UnavailableError, OverloadedError)

Key = tuple[str, int]
"""(request id, item)"""
Worker = tuple[int, int]
"""(encode rank, its incarnation)"""

_NEWS: tuple[type, ...] = (EncodingBegun, EncodingEnded, ItemFailed, ItemLost, Leaving)
"""Of what ranks say."""
LOOK_S = 1.0
UNHEARD_S = 9.0
"""How long the news that an attempt is over may be under way, if nothing before it is."""


class HubChecks:
    """Of one incarnation of the hub."""

    def __init__(self, hub: Any) -> None:
        self.hub, self.world = hub, hub.world
        self._incarnations: dict[int, int] = {}
        self._attempts: dict[Key, tuple[int, Worker]] = {}
        """The attempt that was given out last, and to whom."""
        self._failed: dict[Key, set[int]] = defaultdict(set)
        """Attempts at an item that failed, but for those that a death ended."""
        self._lost_with: dict[tuple[Key, Worker], int] = {}
        """The last of them whose link was lost, which may turn out to be a death."""
        self._under_way_at: dict[int, Counter[str]] = {}
        """Contents that each encode rank says it works on."""
        self._suspects: dict[str, tuple[int, float]] = {}
        """Contents that were under way at deaths -> deaths at which nothing else was, and until when that counts."""
        self._leaving: set[Worker] = set()
        self._told_to_go: set[Worker] = set()
        self._language: set[int] = set()
        self._given: dict[int, set[str]] = {}
        """To each language rank since it is here: requests."""
        self._offers: dict[str, tuple[int, str]] = {}
        """Name -> the language rank that has such a request, and the request."""
        self.offered_twice: list[str] = []
        """By the rank that came last, under names that were taken."""
        self._names: set[str] = set()
        """Under which something was ever offered."""
        self._adopting: set[str] = set()
        """Of which their language rank has said nothing yet."""
        self._gone: str | None = None
        """One of them that has to begin anew."""
        self._failed_on: dict[Key, set[Worker]] = defaultdict(set)
        self._event: Event = Tick()
        self._waits: dict[str, float] = {}
        """How long each request has waited for encode ranks, at the last look."""
        self._waiting, self._unserved, self._unattended, self._staying = (Stays(self.world) for _ in range(4))

    # ---- the ledger ----

    def heard(self, event: Event) -> None:
        self._event = event
        if isinstance(event, FromRank) and event.role == "language" and event.rank in self._given:
            self._heard_of_language(event.rank, event.message)
        kind = type(event)
        if kind is FromRank:
            if type(event.message) in _NEWS:  # type: ignore[union-attr]
                self._news(event.rank, event.message)  # type: ignore[union-attr]
        elif kind is not Tick:
            self._heard_otherwise(event)

    def _heard_otherwise(self, event: Event) -> None:
        match event:
            case RankUp(role="encode"):
                self._down(event.rank)
                self._incarnations[event.rank] = self._incarnations.get(event.rank, 0) + 1
                self._under_way_at[event.rank] = Counter()
            case RankDown(role="encode"):
                self._down(event.rank)
            case RankUp(role="language"):
                self._language_down(event.rank)
                self._language.add(event.rank)
                self._given[event.rank] = set()
                self._offered(event)
            case RankDown(role="language"):
                self._language_down(event.rank)

    def _news(self, rank: int, message: Message) -> None:
        match message:
            case EncodingBegun():
                self._under_way_at[rank][message.digest] += 1
            case EncodingEnded():
                self._under_way_at[rank] -= Counter({message.digest: 1})
                if message.is_well:
                    self._suspects.pop(message.digest, None)
            case ItemFailed() | ItemLost():
                key = (message.request_id, message.item)
                attempt, worker = self._attempts.get(key, (0, (-1, 0)))
                if attempt == message.attempt:
                    is_lost = isinstance(message, ItemLost) and message.dead_epoch > 0
                    if is_lost and attempt not in self._failed[key]:
                        self._lost_with[key, worker] = attempt
                    if (self.hub.counts.under_way(key) or (0, 0))[0] == attempt:
                        self._failed[key].add(attempt)
                    if self._is_encoding(key, attempt):
                        self._failed_on[key].add(worker)
            case Leaving():
                self._leaving.add(self._worker(rank))

    def _offered(self, event: RankUp) -> None:
        """The first under a name stays."""
        self.offered_twice = []
        for kept in event.kept:
            offer = (event.rank, kept.request_id)
            if self._offers.setdefault(kept.name, offer) != offer:
                self.offered_twice.append(kept.request_id)
            self._names.add(kept.name)

    def _down(self, rank: int) -> None:
        """A death is nobody's failure, also when the news of a lost link came before. What was under way is suspected;
        one that leaves was killed by nothing."""
        for key, (attempt, worker) in self._attempts.items():
            if worker == self._worker(rank) and self._is_encoding(key, attempt):
                self._failed_on[key].add(worker)
        under_way = +self._under_way_at.pop(rank, Counter())
        for digest in under_way if self._worker(rank) not in self._leaving else ():
            until = self.world.now + self.hub.router.limits.suspect_s
            deaths = self.num_deaths(digest) + (len(under_way) == 1)
            self._suspects.pop(digest, None)
            self._suspects[digest] = deaths, until
        while len(self._suspects) > self.hub.router.limits.max_suspects:  # the oldest is forgotten
            del self._suspects[next(iter(self._suspects))]
        self._leaving.discard(self._worker(rank))
        for (key, worker), attempt in list(self._lost_with.items()):
            if worker == self._worker(rank):
                self._failed[key].discard(attempt)
                del self._lost_with[key, worker]

    def num_deaths(self, digest: str) -> int:
        return self._num_deaths(digest) or 0

    def is_suspect(self, digest: str) -> bool:
        return self._num_deaths(digest) is not None

    def is_staying(self, rank: int) -> bool:
        """An encode rank that is here, and does not want to leave."""
        return rank in self._under_way_at and self._worker(rank) not in self._leaving

    def _num_deaths(self, digest: str) -> int | None:
        """Of encode ranks that worked on nothing else; None for what is not suspected, or no longer."""
        deaths, until = self._suspects.get(digest, (0, -math.inf))
        return deaths if self.world.now < until else None

    def _heard_of_language(self, rank: int, message: Message) -> None:
        """I17: of what it was given, or is adopted; and what turns out to be gone begins anew."""
        request_id = getattr(message, "request_id", None)
        if request_id is not None and request_id not in self._given[rank]:
            raise Violation("I17", f"{type(message).__name__} of {request_id}, which was not adopted")
        if request_id in self._adopting:
            self._adopting.discard(request_id)
            if isinstance(message, RequestFailed) and request_id in self.hub.router._requests:
                self._gone = request_id

    def _is_encoding(self, key: Key, attempt: int) -> bool:
        request = self.hub.router._requests.get(key[0])
        item = None if request is None else request.items[key[1]]
        return item is not None and item.state == "encoding" and item.attempt == attempt

    def _language_down(self, rank: int) -> None:
        self._language.discard(rank)
        self._given.pop(rank, None)
        self._offers = {name: offer for name, offer in self._offers.items() if offer[0] != rank}

    def _worker(self, rank: int) -> Worker:
        return rank, self._incarnations.get(rank, 0)

    def sent(self, action: Send) -> None:
        message = action.message
        if isinstance(message, Assign):
            key, worker = (message.request_id, message.item), self._worker(message.encode_rank)
            digest = self.hub.cluster.clients[message.request_id].digests[message.item]
            number, _ = self._attempts.get(key, (0, worker))
            if message.attempt <= number:
                raise Violation("I10", f"attempt {message.attempt} at {key} follows attempt {number}")
            if worker in self._leaving:
                raise Violation("I15", f"{key} is given to encode rank {message.encode_rank}, which wants to leave")
            if message.is_alone != (self._num_deaths(digest) is not None):
                raise Violation("I11", f"{key} is tried alone: {message.is_alone}; suspected are {self._suspects}")
            self._is_fresh(key, worker, action.rank)
            self._attempts[key] = (message.attempt, worker)
            self.hub.cluster.issued_at[(*key, message.attempt)] = self.world.now
        elif isinstance(message, Submit):
            if message.request_id in self._given[action.rank] and self._gone != message.request_id:
                raise Violation("I14", f"{message.request_id} is begun once more, and nobody said that it is gone")
            left_s = self.hub.cluster.clients[message.request_id].deadline - self.world.now
            if message.timeout_s > left_s + 1e-6:
                raise Violation(
                    "I11", f"{message.request_id} may take {message.timeout_s} s, its client has {left_s} s"
                )
            self._given[action.rank].add(message.request_id)
            if self._gone == message.request_id:  # what another rank has offered meanwhile under its name stays
                self._gone = None
                return
            offer = self._offers.pop(message.keep_as, None)
            if offer is not None and self.hub.cluster.languages[offer[0]].kept_checks.has(offer[1]):
                raise Violation("I17", f"{message.request_id} is computed again; language rank {offer[0]} has it")
        elif isinstance(message, Adopt):
            self._given[action.rank].add(message.request_id)
            self._adopted(message.request_id, self.hub.cluster.languages[action.rank])
            self._adopting.add(message.request_id)
        elif isinstance(message, Stop):
            under_way = self._under_way(action.rank)
            if self._worker(action.rank) in self._told_to_go:
                raise Violation("I15", f"encode rank {action.rank} is told once more that it may go")
            self._told_to_go.add(self._worker(action.rank))
            if self._worker(action.rank) not in self._leaving or under_way:
                raise Violation("I13", f"encode rank {action.rank} may go, and {under_way} are still to come from it")

    def _adopted(self, request_id: str, language: Any) -> None:
        """I10: attempts at its items go on behind those that its language rank knows."""
        if (language.rank, request_id) not in self._offers.values():
            raise Violation(
                "I17", f"{request_id} is adopted from language rank {language.rank}, which has not offered it"
            )
        self._offers = {name: offer for name, offer in self._offers.items() if offer[1] != request_id}
        for key, assign in language.ledger.assigned.items():
            if key[0] == request_id:
                self._attempts[key] = (assign.attempt, (-1, 0))

    def failed_on(self, key: Key) -> set[int]:
        """Encode ranks that are here and have failed on an item."""
        return {rank for rank, incarnation in self._failed_on[key] if self._incarnations.get(rank) == incarnation}

    def _is_fresh(self, key: Key, worker: Worker, language_rank: int) -> None:
        """I11: another try is another encode rank's, if there is one."""
        if worker in self._failed_on[key]:
            others = {self._worker(rank) for rank in self.hub.counts.linked(language_rank)}
            if others - self._failed_on[key]:
                raise Violation("I11", f"{key} goes to {worker}, which has failed on it, and not to {others}")

    def after(self, event: Event) -> None:
        """I17: what is offered is what those offer that are here.

        I11: without a rank that has a part of the experts nothing runs; what a dead encode rank had to do is at
        another one, or waits for one."""
        kind = type(event)
        if kind is Tick or (kind is FromRank and type(event.message) is not RequestFailed):  # type: ignore[union-attr]
            if self._gone is not None:
                raise Violation("I17", f"{self._gone} is gone, and is not begun anew")
            return
        router = self.hub.router
        admits = (event,) if isinstance(event, Admit) else event.admits if isinstance(event, AdmitTogether) else ()
        for one in admits:
            deaths = max((self.num_deaths(visual.digest) for visual in one.items), default=0)
            if self.hub.cluster.clients[one.request_id].error is None and deaths >= router.limits.max_deaths:
                raise Violation("I11", f"{one.request_id} is taken, and encode ranks died over its image")
        if self._gone is not None:
            raise Violation("I17", f"{self._gone} is gone, and is not begun anew")
        for name in self._names:
            if router.kept_id(name) != self._offers.get(name, (0, None))[1]:
                raise Violation("I17", f"{router.kept_id(name)} is called {name}, offered are {self._offers}")
        missing = router.required - self._language
        if missing and router.num_requests:
            raise Violation("I11", f"{router.num_requests} requests run without language ranks {missing}")
        if isinstance(event, RankUp) and event.role == "language":
            for request_id, request in router._requests.items():
                if request_id not in self._given[request.language_rank]:
                    raise Violation("I11", f"{request_id} is awaited from a language rank that has never had it")
        if isinstance(event, (RankUp, RankDown)) and event.role == "encode":
            for request_id, request in router._requests.items():
                for index, item in enumerate(request.items):
                    state = router._attempts.ranks.get(item.encode_rank)
                    deaths = self._num_deaths(item.visual.digest) or 0
                    if item.state in ("waiting", "encoding") and deaths >= router.limits.max_deaths:
                        raise Violation("I11", f"{request_id} goes on, and {deaths} encode ranks died over its image")
                    if item.state == "encoding" and (state is None or (request_id, index) not in state.jobs):
                        raise Violation("I11", f"{(request_id, index)} is awaited from a dead encode rank")

    def _has_heard(self, language_rank: int, since: float) -> bool:
        """Whether what that rank said at `since` has arrived: delays add up, as nothing overtakes."""
        channel = self.hub.cluster.languages[language_rank].hub
        return channel is not None and (channel.is_through or channel.heard_at > since)

    def _under_way(self, rank: int) -> list[Key]:
        requests = self.hub.router._requests
        keys = [key for key, (_, worker) in self._attempts.items() if worker == self._worker(rank)]
        return [key for key in keys if key[0] in requests and requests[key[0]].items[key[1]].state == "encoding"]

    def ended(self, request_id: str, error: DisaggError | None) -> None:
        """I11: a request is given up only for as many failures as there were."""
        failures = [len(self._failed[key]) for key in self._attempts if key[0] == request_id]
        if isinstance(error, InputError) and error.code == "harmful_media":
            digests = self.hub.cluster.clients[request_id].digests
            if isinstance(self._event, AdmitTogether):  # none of them is taken
                digests = [item.digest for one in self._event.admits for item in one.items]
            lacks = [self.hub.counts.lacks((request_id, index)) for index in range(len(digests))]
            deaths = max((self.num_deaths(d) for d, lack in zip(digests, lacks, strict=True) if lack), default=0)
            if deaths < self.hub.router.limits.max_deaths:
                raise Violation("I11", f"{request_id} is refused after {deaths} deaths that it was alone with")
        if isinstance(error, DeadlineError) and self.world.now < self.hub.cluster.clients[request_id].deadline:
            raise Violation("I11", f"{request_id} is late before its deadline")
        waited_s = self._waits.get(request_id, 0.0)
        is_unserved = isinstance(error, UnavailableError) and isinstance(self._event, Tick)
        if is_unserved and waited_s < self.hub.router.limits.encode_wait_s - 2 * LOOK_S:
            raise Violation("I11", f"{request_id} ended with {error!r} after {waited_s} s")
        is_rank_s_word = isinstance(self._event, FromRank) and isinstance(self._event.message, RequestFailed)
        is_given_up = error is not None and not is_rank_s_word and not isinstance(error, _NO_FAILURE_OF_AN_ITEM)
        if is_given_up and max(failures, default=0) < self.hub.router.limits.max_attempts:
            raise Violation("I11", f"{request_id} ended with {error!r} after {failures} failures of its items")
        for key in [key for key in self._attempts if key[0] == request_id]:
            del self._attempts[key]
            self._failed.pop(key, None)
            self._failed_on.pop(key, None)
        self._adopting.discard(request_id)

    # ---- the clocks ----

    def on_time(self) -> None:
        """I11, after each tick: requests end by their deadlines; no item waits too long for an encode rank, or for
        one that is not at it."""
        now, hub = self.world.now, self.hub
        for request_id in hub.words.at:
            client = hub.cluster.clients[request_id]
            if not client.is_ended and now >= client.deadline:
                raise Violation("I11", f"{request_id} goes on after its deadline")
        if not hub.router._requests and not self._leaving:  # nothing waits, nothing is awaited
            for stays in (self._waiting, self._unattended, self._unserved, self._staying):
                stays.forget()
            self._waits = {}
            return
        limits = hub.router.limits
        waiting, unattended, unserved = (s.look(now) for s in (self._waiting, self._unattended, self._unserved))
        self._waits = {}
        for request_id, request in hub.router._requests.items():
            for index, item in enumerate(request.items):
                key = (request_id, index, item.attempt)
                if item.state == "waiting":
                    self._waits[request_id] = max(self._waits.get(request_id, 0.0), waiting.stay(key))
                    if self._waits[request_id] > limits.encode_wait_s:
                        raise Violation("I11", f"{key} waits for an encode rank without end")
                    if hub.router._attempts.linked(request.language_rank) and unserved.stay(key) > 0:
                        raise Violation("I11", f"{key} waits for an encode rank, and there is one")
                if item.failures != len(failed := self._failed.get(key[:2], ())):
                    raise Violation("I11", f"{item.failures} failures of {key}, there were {failed}")
                if item.state != "encoding" or hub.cluster.is_at_work(key):
                    continue
                stay = unattended.stay(key)
                if stay > UNHEARD_S and self._has_heard(request.language_rank, now - stay):
                    raise Violation("I11", f"{key} is awaited from encode rank {item.encode_rank}, which is not at it")
        staying = self._staying.look(now)
        for worker in self._leaving - self._told_to_go:
            if not self._under_way(worker[0]) and staying.stay(worker) > 0:
                raise Violation("I15", f"encode rank {worker[0]} wants to leave, and is not told that it may")
        staying.done()
        waiting.done()
        unserved.done()
        unattended.done()
