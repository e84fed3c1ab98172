"""What the router counts, counted once more from what it hears and says: answers that wait and their cost, the load of
ranks, links, contents under way, and what is taken from a slow rank."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from qwen3vl_disagg.core.errors import OverloadedError, UnavailableError
from qwen3vl_disagg.protocol.messages import (
    Adopt,
    Assign,
    EncodingBegun,
    EncodingEnded,
    ItemFailed,
    ItemLost,
    ItemReceived,
    LinksUp,
    Message,
    NeedItems,
    Submit,
)
from qwen3vl_disagg.protocol.routing import (
    TOKEN_ID_BYTES,
    Admit,
    AdmitTogether,
    Event,
    FromRank,
    RankDown,
    RankUp,
    Send,
)
from qwen3vl_disagg.protocol.session_events import Tick
from tools.simulation.world import Violation

MAX_OUTPUT = 1024
"""Of an answer's length, so much counts among what waits."""

_NEWS: tuple[type, ...] = (LinksUp, EncodingBegun, EncodingEnded, ItemFailed, ItemLost, ItemReceived, NeedItems)
"""Of what ranks say."""

Key = tuple[str, int]
"""(request id, item)"""


class CountChecks:
    """Of one incarnation of the hub. The tables that it looks into are the router's own."""

    def __init__(self, hub: Any) -> None:
        self.hub, self.world = hub, hub.world
        self._costs: dict[str, list[int]] = {}
        """Request -> what each of its answers costs until it has a token."""
        self._tokens: dict[str, int] = {}
        """Request -> what its language rank has to do."""
        self._placed: set[str] = set()
        """Requests that have a language rank."""
        self._links: dict[int, dict[int, int]] = {}
        """Encode rank -> language rank -> epoch of the link between them that is there, as far as was told."""
        self._under_way: dict[int, Counter[str]] = {}
        self._at: dict[Key, tuple[int, int]] = {}
        """Of each attempt under way: its number, and the encode rank."""
        self._relieved: dict[Key, set[int]] = defaultdict(set)
        """Encode ranks that were too slow with an item, and have not been away since."""
        self._admits: dict[str, Admit] = {}
        self._kv_tokens: dict[int, int] = {}
        """Of each language rank that is here."""
        self._used_at: dict[int, int] = {}
        self._num_given = 0
        self._since: dict[Key, tuple[float, int]] = {}
        """Of what is under way: since when, and the work of its encode rank then, with its own."""
        self._paces: dict[int, float] = {}
        self._received: set[Key] = set()
        """Items of which all rows are where they are needed."""
        self._relievable: dict[Key, tuple[tuple[int, int], set[int]]] = {}
        self._favourites: dict[str, dict[tuple[int, int], bool]] = {}
        """Content -> of two encode ranks: whether it goes to the first where both would do."""
        self.waiting_cost = 0
        self._is_too_much = False
        """Whether the request that comes now has to be refused."""

    # ---- the ledger ----

    def heard(self, event: Event) -> None:
        kind = type(event)
        if kind is Tick:
            self._looking()
        elif kind is FromRank:
            if type(event.message) in _NEWS:  # type: ignore[union-attr]
                self._news(event.rank, event.message)  # type: ignore[union-attr]
        else:
            self._heard_otherwise(event)

    def _heard_otherwise(self, event: Event) -> None:
        match event:
            case Admit():
                self._admitting([event])
            case AdmitTogether():
                self._admitting(event.admits)
            case RankUp(role="encode") | RankDown(role="encode"):
                self._encode_down(event.rank)
                if isinstance(event, RankUp):
                    self._links[event.rank], self._under_way[event.rank] = {}, Counter()
            case RankUp(role="language"):
                self._kv_tokens[event.rank] = event.kv_tokens
                self._used_at.pop(event.rank, None)
            case RankDown(role="language"):
                self._kv_tokens.pop(event.rank, None)
                self._used_at.pop(event.rank, None)

    def _news(self, rank: int, message: Message) -> None:
        match message:
            case LinksUp(language_ranks=ranks, epochs=epochs):
                self._links[rank] = dict(zip(ranks, epochs, strict=True))
            case EncodingBegun(digest=digest):
                self._under_way[rank][digest] += 1
            case EncodingEnded(digest=digest):
                self._under_way[rank] -= Counter((digest,))
            case NeedItems(request_id=request_id, items=items):
                self._received -= {(request_id, item) for item in items}
            case ItemFailed() | ItemLost() | ItemReceived():
                key = (message.request_id, message.item)
                number, encode_rank = self._at.get(key, (0, -1))
                if number == message.attempt:
                    del self._at[key]
                    if isinstance(message, ItemReceived):
                        self._received.add(key)
                        self._learn(key, encode_rank)
                    if isinstance(message, ItemLost):
                        self._lost(encode_rank, rank, message.dead_epoch)

    def _learn(self, key: Key, rank: int) -> None:
        """How long an encode rank took for a unit of work."""
        since, ahead = self._since[key]
        pace = (self.world.now - since) / max(1, ahead)
        before = self._paces.setdefault(rank, pace)
        self._paces[rank] = before + 0.2 * (pace - before)

    def _encode_down(self, rank: int) -> None:
        self._paces.pop(rank, None)
        self._links.pop(rank, None)
        self._under_way.pop(rank, None)
        self._at = {key: at for key, at in self._at.items() if at[1] != rank}
        for ranks in self._relieved.values():
            ranks.discard(rank)

    def _lost(self, encode_rank: int, language_rank: int, epoch: int) -> None:
        """What was lost with a link says that this link is gone, and nothing of a later one."""
        links = self._links.get(encode_rank, {})
        if language_rank in links and epoch >= links[language_rank]:
            del links[language_rank]

    def _admitting(self, events: Sequence[Admit]) -> None:
        """I12: how many answers wait, and what they cost together."""
        limits, clients, coming = self.hub.router.limits, self.hub.cluster.clients, {e.request_id for e in events}
        for event in events:
            num_prompt = len(event.token_ids) // TOKEN_ID_BYTES
            num_output, n = event.num_tokens - num_prompt, event.sampling.n
            num_counted = min(num_output, MAX_OUTPUT)
            self._costs[event.request_id] = [num_prompt + num_counted] + [num_counted] * (n - 1)
            self._tokens[event.request_id] = num_prompt + n * num_output
            self._admits[event.request_id] = event
        waiting = [
            self._costs[request_id][answer]
            for request_id, client in clients.items()
            if not client.is_ended and request_id not in coming
            for answer, count in client.tokens.items()
            if not count
        ]
        num_new, cost = sum(e.sampling.n for e in events), sum(sum(self._costs[e.request_id]) for e in events)
        self.waiting_cost = sum(waiting)
        most = max(limits.max_waiting_tokens, limits.max_waiting_fills * sum(self._kv_tokens.values()))
        is_dear = bool(waiting) and self.waiting_cost + cost > most
        self._is_too_much = is_dear or (bool(waiting) and len(waiting) + num_new > limits.max_waiting)
        for num_coming in (1, 3):
            error = self.hub.router.refusal(self.world.now, cost=cost, num_coming=num_coming, num_new=num_new)
            is_too_much = is_dear or len(waiting) + num_coming + num_new > limits.max_waiting
            if not isinstance(error, UnavailableError) and (error is not None) != is_too_much:
                raise Violation("I12", f"{num_coming} come before {num_new}, {len(waiting)} wait: {error!r}")

    def cost_of(self, request_id: str, answer: int) -> int:
        return self._costs[request_id][answer]

    def lacks(self, key: Key) -> bool:
        return key not in self._received

    def under_way(self, key: Key) -> tuple[int, int] | None:
        """The attempt at an item that is under way, and its encode rank."""
        return self._at.get(key)

    def linked(self, language_rank: int) -> set[int]:
        """Encode ranks that are here, stay, and have said that they have a link to it."""
        return {
            rank for rank, links in self._links.items() if language_rank in links and self.hub.checks.is_staying(rank)
        }

    def sent(self, action: Send) -> None:
        message = action.message
        if isinstance(message, Submit):
            if message.request_id not in self._placed:
                self._has_least_to_do(message, action.rank)
                self._used(action.rank)
            self._placed.add(message.request_id)
        elif isinstance(message, Adopt):
            self._placed.add(message.request_id)
            self._used(action.rank)
        elif isinstance(message, Assign):
            key = (message.request_id, message.item)
            if message.encode_rank not in self.linked(action.rank):
                raise Violation("I11", f"{key} is given to encode rank {message.encode_rank}, which cannot send it")
            if key in self._at:
                self._relieves(key, message.encode_rank)
            if message.encode_rank in self._relieved[key]:
                self._is_only_choice(key, action.rank)
            self._goes_where_it_should(key, message.encode_rank)
            self._at[key] = (message.attempt, message.encode_rank)
            self._since[key] = self.world.now, self._load(message.encode_rank)

    def _used(self, rank: int) -> None:
        self._num_given += 1
        self._used_at[rank] = self._num_given

    def _work(self, key: Key) -> int:
        """In patches: those of the tower, and those of all frames that have to be decoded."""
        visual = self._admits[key[0]].items[key[1]]
        frames, height, width = visual.grid
        num_decoded = 1
        if visual.modality == "video":
            num_decoded = len(visual.frames) or frames
            if visual.frames and not visual.is_frame_list:
                num_decoded = max(visual.frames) + 1
        return (frames + num_decoded) * height * width

    def _load(self, rank: int) -> int:
        return sum(self._work(key) for key, (_, at) in self._at.items() if at == rank)

    def _goes_where_it_should(self, key: Key, rank: int) -> None:
        """I11: an item goes where its content went before, unless that rank has so much more to do than another one
        that it would be done sooner there; and then to the rank that has the least to do."""
        before = self._at.pop(key, None)  # of what is taken from there
        language_rank = self.hub.words.at[key[0]]
        known = self.hub.checks.failed_on(key)
        linked = self.linked(language_rank)
        candidates = (linked - known - self._relieved[key]) or (linked - known) or linked
        if before is not None:
            candidates = {r for r in candidates if not any(at == r for _, at in self._at.values())} - {before[1]}
        loads = {other: self._load(other) for other in candidates}
        if rank not in loads:
            raise Violation("I11", f"{key} is given to encode rank {rank}, not to one of {loads}")
        digest, work = self._admits[key[0]].items[key[1]].digest, self._work(key)
        least = min(loads.values())
        if loads[rank] > least and loads[rank] - least >= work:
            raise Violation("I11", f"{key}, work {work}, is given to encode rank {rank}; loads are {loads}")
        favourites = self._favourites.setdefault(digest, {})
        if all(load - least < work for load in loads.values()):  # each of them would do
            for other in loads:
                if favourites.get((rank, other)) is False:
                    raise Violation("I11", f"{key} goes to encode rank {rank}; its content went to {other} before")
                if other != rank:
                    favourites[rank, other], favourites[other, rank] = True, False

    def _has_least_to_do(self, message: Submit, rank: int) -> None:
        """I11: a request goes to the language rank that has the least to do, with images to one that has links."""
        here = self._kv_tokens.keys()
        linked = {other for other in here if self.linked(other)}
        loads = dict.fromkeys(here, 0)
        for request_id, at in self.hub.words.at.items():
            if request_id != message.request_id:
                loads[at] += self._tokens[request_id]
        order = {other: (loads[other], self._used_at.get(other, 0)) for other in (message.items and linked) or here}
        if rank not in order or order[rank] > min(order.values()):
            raise Violation("I11", f"{message.request_id} goes to language rank {rank}; (load, last used) are {order}")

    def _relieves(self, key: Key, to: int) -> None:
        """I11: what is under way is taken away only from a slow rank, for an idle one, and never back."""
        _, rank = self._at[key]
        stay, relief_s = self.world.now - self._since[key][0], self._late_after(key)
        busy = {at[1] for other, at in self._at.items() if other != key}
        self._relieved[key].add(rank)
        if stay < relief_s - 1e-6 or to in busy or to in self._relieved[key]:
            slow = self._relieved[key]
            raise Violation("I11", f"{key} is taken from {rank} after {stay} s, for {to}; busy {busy}, slow {slow}")

    def _late_after(self, key: Key) -> float:
        """How long an item may be at an encode rank before an idle one gets it."""
        paces = [pace for rank, pace in self._paces.items() if self.hub.checks.is_staying(rank)]
        if not paces:
            return math.inf
        limits = self.hub.router.limits
        return max(limits.relief_s, limits.relief_factor * min(paces) * self._since[key][1])

    def _looking(self) -> None:
        """I11: what can be taken from a slow rank now, for one that has nothing to do."""
        if self._relievable:
            self._relievable = {}
        if not self._at:
            return
        busy = {at for _, at in self._at.values()}
        if len(busy) == len(self._links):
            return
        for key, (number, rank) in self._at.items():
            visual = self._admits[key[0]].items[key[1]]
            known = self._relieved[key] | self.hub.checks.failed_on(key) | busy | {rank}
            idle = self.linked(self.hub.words.at[key[0]]) - known
            is_late = self.world.now >= self._since[key][0] + self._late_after(key) + 1e-6
            if idle and is_late and not self.hub.checks.is_suspect(visual.digest):
                self._relievable[key] = (number, rank), idle

    def _is_relieved(self) -> None:
        if not self._relievable:
            return
        busy = {at for _, at in self._at.values()}
        for key, (before, idle) in self._relievable.items():
            if self._at.get(key) == before and idle - busy:
                raise Violation("I11", f"{key} stays at slow encode rank {before[1]}, and {idle - busy} are idle")

    def _is_only_choice(self, key: Key, language_rank: int) -> None:
        """I11: nor does it come back when the next rank fails, if there is another one that is not known to be bad."""
        known = self._relieved[key] | self.hub.checks.failed_on(key)
        if others := self.linked(language_rank) - known:
            raise Violation("I11", f"{key} goes back to a rank that was too slow with it, and not to {others}")

    def ended(self, request_id: str, num_items: int) -> None:
        self._received -= {(request_id, item) for item in range(num_items)}
        for table in (self._at, self._relieved, self._since):
            for item in range(num_items):
                table.pop((request_id, item), None)

    # ---- what must hold ----

    def after(self, event: Event) -> None:
        """I11, I12: nobody is refused while there is place, and nobody is taken without."""
        kind = type(event)
        if kind is Tick:
            self._is_relieved()
        elif kind is FromRank:
            if isinstance(event.message, (ItemLost, LinksUp)):  # type: ignore[union-attr]
                self._are_links_known()
        elif isinstance(event, (Admit, AdmitTogether)):
            for one in (event,) if isinstance(event, Admit) else event.admits:
                client = self.hub.cluster.clients[one.request_id]
                is_refused = isinstance(client.error, OverloadedError)
                if is_refused and not self._is_too_much:
                    raise Violation("I11", f"{one.request_id} was refused for overload, and there was place")
                if self._is_too_much and client.error is None:
                    raise Violation("I12", f"{one.request_id} was taken, and there was no place")
                self.hub.waits.refused(client.error, self.waiting_cost)

    def _are_links_known(self) -> None:
        for rank, links in self._links.items():
            if (known := self.hub.router._attempts.ranks[rank].links) != links.keys():
                raise Violation("I11", f"encode rank {rank} has links to {links}, the router knows {known}")

    def on_time(self) -> None:
        """I15: what is over counts nowhere. I11: what is under way is known, as a death would be the work of that."""
        for rank, state in self.hub.router._attempts.ranks.items():
            if not self._at and not state.jobs and not state.under_way and not self._under_way[rank]:
                continue
            jobs = {key for key, (_, at) in self._at.items() if at == rank}
            if jobs != state.jobs.keys():
                raise Violation("I15", f"encode rank {rank} counts as busy with {state.jobs.keys()}; it has {jobs}")
            if +state.under_way != +self._under_way[rank]:
                raise Violation("I11", f"encode rank {rank} works on {self._under_way[rank]}, known {state.under_way}")
