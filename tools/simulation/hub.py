"""The frontend's process: the production router between clients and ranks, and what clients have seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qwen3vl_disagg.core.errors import DisaggError
from qwen3vl_disagg.protocol.messages import Decoded, Finished, Message, PromptLogprobs, Tokens
from qwen3vl_disagg.protocol.router import Router
from qwen3vl_disagg.protocol.routing import Deliver, End, Event, Send
from qwen3vl_disagg.protocol.session_events import Tick
from tools.simulation.count_checks import CountChecks
from tools.simulation.hub_checks import HubChecks
from tools.simulation.word_checks import WaitingTime, WordChecks
from tools.simulation.world import Channel, Violation


@dataclass
class Client:
    """What one client has seen of its request."""

    num_items: int
    num_tokens: int
    """Of each answer."""
    has_bad_image: bool
    """Or one that ends the process that encodes it."""
    sent_at: float
    deadline: float
    digests: tuple[str, ...] = ()
    lacks_vector: bool = False
    """It wants one, and has none yet."""
    tokens: dict[int, int] = field(default_factory=lambda: {0: 0})
    """Of each answer that has not ended."""
    has_prompt: bool = False
    """It was told how likely its prompt's tokens are."""
    decoded: set[int] = field(default_factory=set)
    """Items that were said to be good images."""
    is_ended: bool = False
    error: DisaggError | None = None
    is_abandoned: bool = False
    ask_again: Callable[[DisaggError], bool] | None = None
    """Of one that does; whether it will, after this error."""
    asks_again: bool = False

    def end(self, error: DisaggError | None) -> None:
        self.is_ended, self.error = True, error
        if error is not None and self.ask_again is not None and not self.is_abandoned:
            self.asks_again = self.ask_again(error)


class SimHub:
    """One incarnation of the frontend."""

    def __init__(self, cluster: Any) -> None:
        self.cluster, self.world = cluster, cluster.world
        self.is_dead, self.frozen_until, self.slowness = False, 0.0, 1.0
        sizes = cluster.sizes
        required = range(sizes.num_language) if sizes.are_language_ranks_required else ()
        self.router = Router(sizes.router_limits, required=required)
        self.connections: dict[tuple[str, int], Channel] = {}
        """From each rank that it takes for being there."""
        self.checks, self.counts = HubChecks(self), CountChecks(self)
        self.words, self.waits = WordChecks(self), WaitingTime(self)
        self.world.at(1.0, self, self._tick)

    def take(self, event: Event) -> None:
        self.checks.heard(event)
        self.counts.heard(event)
        self.words.heard(event)
        for action in self.router.handle(event, self.world.now):
            kind = type(action)
            if kind is Send:
                self._send(action)  # type: ignore[arg-type]
            elif kind is Deliver:
                self._deliver(action.request_id, action.message)  # type: ignore[union-attr]
            elif kind is End:
                self._end(action.request_id, action.error)  # type: ignore[union-attr]
        self.checks.after(event)
        self.words.after(event)
        self.counts.after(event)
        if self.words.did_say:
            self.waits.after()

    def _send(self, action: Send) -> None:
        self.checks.sent(action)
        self.counts.sent(action)
        self.words.sent(action)
        ranks: list[Any] = self.cluster.encodes if action.role == "encode" else self.cluster.languages
        rank = ranks[action.rank]
        if not rank.is_dead and rank.hub is not None and rank.hub.is_open:
            rank.from_hub_channel.send(action.message)

    def _deliver(self, request_id: str, message: Message) -> None:
        client = self.cluster.clients[request_id]
        if client.is_ended:
            raise Violation("I14", f"{request_id} got {type(message).__name__} after its end")
        if isinstance(message, (Tokens, Finished)) and message.sample not in client.tokens:
            raise Violation(
                "I14", f"{request_id} got {type(message).__name__} of answer {message.sample} after its end"
            )
        self.words.delivered(request_id, message)
        if isinstance(message, Tokens):
            num_before = client.tokens[message.sample]
            if message.token_ids != list(range(num_before, num_before + len(message.token_ids))):
                raise Violation("I14", f"{request_id} got tokens {message.token_ids} after {num_before}")
            client.tokens[message.sample] += len(message.token_ids)
            if not num_before:
                self.waits.served(self.counts.cost_of(request_id, message.sample))
        elif isinstance(message, Finished):
            if bool(message.vector) != client.lacks_vector:
                raise Violation("I14", f"{request_id} ended with {len(message.vector)} bytes of a vector")
            num_tokens = client.tokens.pop(message.sample)
            if num_tokens != client.num_tokens:
                raise Violation("I14", f"answer {message.sample} of {request_id} ended well after {num_tokens} tokens")
            if client.lacks_vector:
                self.waits.served(self.counts.cost_of(request_id, message.sample))
            client.lacks_vector = False
        elif isinstance(message, PromptLogprobs):
            if client.has_prompt or any(client.tokens.values()):
                raise Violation("I14", f"{request_id} got its prompt's log probabilities again, or late")
            client.has_prompt = True
        elif isinstance(message, Decoded):
            if message.item in client.decoded:
                raise Violation("I14", f"{request_id} heard twice that item {message.item} is good")
            client.decoded.add(message.item)

    def _end(self, request_id: str, error: DisaggError | None) -> None:
        client = self.cluster.clients[request_id]
        if client.is_ended:
            raise Violation("I14", f"{request_id} ended twice")
        client.end(error)
        is_whole = not client.tokens and not client.lacks_vector
        if error is None and not client.is_abandoned and not is_whole:
            raise Violation("I14", f"{request_id} ended well, and answers {[*client.tokens]} did not")
        self.checks.ended(request_id, error)
        self.counts.ended(request_id, client.num_items)
        self.words.ended(request_id, error)

    def _tick(self) -> None:
        self.take(Tick())
        self.checks.on_time()
        self.counts.on_time()
        self.world.at(1.0, self, self._tick)
