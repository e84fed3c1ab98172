"""What the router counts, counted once more from what it hears and says: answers that wait and their cost, the load of
ranks, links, contents under way, and what is taken from a slow rank."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from qwen3vl_disagg.core.errors import OverloadedError
from qwen3vl_disagg.protocol.messages import (
    Adopt,
    Assign,
    EncodingBegun,
    EncodingEnded,
    ItemFailed,
    ItemLost,
    ItemReceived,
    LinksUp,
    Submit,
)
from qwen3vl_disagg.protocol.routing import TOKEN_ID_BYTES, Admit, Event, FromRank, RankDown, RankUp, Send
from tools.simulation.world import Violation

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
        self._is_too_much = False
        """Whether the request that comes now has to be refused."""

    # ---- the ledger ----

    def heard(self, event: Event) -> None:
        match event:
            case Admit():
                self._admitting(event)
            case RankUp(role="encode") | RankDown(role="encode"):
                self._encode_down(event.rank)
                if isinstance(event, RankUp):
                    self._links[event.rank], self._under_way[event.rank] = {}, Counter()
            case FromRank(message=LinksUp(language_ranks=ranks, epochs=epochs)):
                self._links[event.rank] = dict(zip(ranks, epochs, strict=True))
            case FromRank(message=EncodingBegun(digest=digest)):
                self._under_way[event.rank][digest] += 1
            case FromRank(message=EncodingEnded(digest=digest)):
                self._under_way[event.rank] -= Counter((digest,))
            case FromRank(message=ItemFailed() | ItemLost() | ItemReceived() as message):
                key = (message.request_id, message.item)
                number, encode_rank = self._at.get(key, (0, -1))
                if number == message.attempt:
                    del self._at[key]
                    if isinstance(message, ItemLost):
                        self._lost(encode_rank, event.rank, message.dead_epoch)

    def _encode_down(self, rank: int) -> None:
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

    def _admitting(self, event: Admit) -> None:
        """I12: how many answers wait, and what they cost together."""
        n, limits, clients = event.sampling.n, self.hub.router.limits, self.hub.cluster.clients
        num_prompt = len(event.token_ids) // TOKEN_ID_BYTES
        num_output = event.num_tokens - num_prompt
        self._costs[event.request_id] = [num_prompt + num_output] + [num_output] * (n - 1)
        self._tokens[event.request_id] = num_prompt + n * num_output
        waiting = [
            self._costs[request_id][answer]
            for request_id, client in clients.items()
            if not client.is_ended and request_id != event.request_id
            for answer, count in client.tokens.items()
            if not count
        ]
        cost = sum(waiting) + sum(self._costs[event.request_id])
        self._is_too_much = bool(waiting) and (
            len(waiting) + n > limits.max_waiting or cost > limits.max_waiting_tokens
        )

    def sent(self, action: Send) -> None:
        message = action.message
        if isinstance(message, Submit):
            if message.request_id not in self._placed:
                self._has_least_to_do(message, action.rank)
            self._placed.add(message.request_id)
        elif isinstance(message, Adopt):
            self._placed.add(message.request_id)
        elif isinstance(message, Assign):
            key = (message.request_id, message.item)
            if key in self._at:
                self._relieves(key, message.encode_rank)
            if message.encode_rank in self._relieved[key]:
                self._is_only_choice(key, action.rank)
            self._at[key] = (message.attempt, message.encode_rank)

    def _has_least_to_do(self, message: Submit, rank: int) -> None:
        """I11: a request goes to the language rank that has the least to do, with images to one that has links."""
        router = self.hub.router
        candidates = (router.linked_language_ranks if message.items else set()) or router.language_ranks
        loads = dict.fromkeys(router.language_ranks, 0)
        for request_id, request in router._requests.items():
            if request_id != message.request_id:
                loads[request.language_rank] += self._tokens[request_id]
        if rank not in candidates or loads[rank] > min(loads[other] for other in candidates):
            raise Violation("I11", f"{message.request_id} goes to language rank {rank} of {candidates}, loads {loads}")

    def _relieves(self, key: Key, to: int) -> None:
        """I11: what is under way is taken away only from a slow rank, for an idle one, and never back."""
        number, rank = self._at[key]
        stay, relief_s = self.world.now - self.hub.cluster.issued_at[(*key, number)], self.hub.router.limits.relief_s
        busy = {at[1] for other, at in self._at.items() if other != key}
        self._relieved[key].add(rank)
        if stay < relief_s - 1e-6 or to in busy or to in self._relieved[key]:
            slow = self._relieved[key]
            raise Violation("I11", f"{key} is taken from {rank} after {stay} s, for {to}; busy {busy}, slow {slow}")

    def _is_only_choice(self, key: Key, language_rank: int) -> None:
        """I11: nor does it come back when the next rank fails, if there is another one that is not known to be bad."""
        known = self._relieved[key] | self.hub.checks.failed_on(key)
        if others := self.hub.router._attempts.linked(language_rank).keys() - known:
            raise Violation("I11", f"{key} goes back to a rank that was too slow with it, and not to {others}")

    def ended(self, request_id: str, num_items: int) -> None:
        for table in (self._at, self._relieved):
            for item in range(num_items):
                table.pop((request_id, item), None)

    # ---- what must hold ----

    def after(self, event: Event) -> None:
        """I11, I12: nobody is refused while there is place, and nobody is taken without."""
        if isinstance(event, Admit):
            client = self.hub.cluster.clients[event.request_id]
            is_refused = isinstance(client.error, OverloadedError)
            if is_refused and not self._is_too_much:
                raise Violation("I11", f"{event.request_id} was refused for overload, and there was place")
            if self._is_too_much and client.error is None:
                raise Violation("I12", f"{event.request_id} was taken, and there was no place")
        elif isinstance(event, FromRank) and isinstance(event.message, ItemLost | LinksUp):
            for rank, links in self._links.items():
                if (known := self.hub.router._attempts.ranks[rank].links) != links.keys():
                    raise Violation("I11", f"encode rank {rank} has links to {links}, the router knows {known}")

    def on_time(self) -> None:
        """I15: what is over counts nowhere. I11: what is under way is known, as a death would be the work of that."""
        for rank, state in self.hub.router._attempts.ranks.items():
            jobs = {key for key, (_, at) in self._at.items() if at == rank}
            if jobs != state.jobs.keys():
                raise Violation("I15", f"encode rank {rank} counts as busy with {state.jobs.keys()}; it has {jobs}")
            if +state.under_way != +self._under_way[rank]:
                raise Violation("I11", f"encode rank {rank} works on {self._under_way[rank]}, known {state.under_way}")
