"""What the router says, and does not say: each event has exactly those words for answer that it must have."""

from __future__ import annotations

import math
from typing import Any

from qwen3vl_disagg.core.due import PATIENCE, Prices
from qwen3vl_disagg.core.errors import MAX_RETRY_S, MIN_RETRY_S, DisaggError, InputError, OverloadedError
from qwen3vl_disagg.protocol.messages import (
    Adopt,
    Assign,
    Cancel,
    Decoded,
    Finished,
    LinksUp,
    Message,
    NeedItems,
    PromptLogprobs,
    RequestFailed,
    Submit,
    Tokens,
)
from qwen3vl_disagg.protocol.routing import (
    TOKEN_ID_BYTES,
    Abandon,
    Admit,
    AdmitTogether,
    Drain,
    EndAll,
    Event,
    FromRank,
    RankDown,
    RankUp,
    Send,
)
from qwen3vl_disagg.protocol.session_events import Tick
from tools.simulation.world import Violation

_MOMENT_S = 1e-6
_HALF_LIFE_S = 30.0
_QUIET = (Tick, FromRank)
"""Events that change nothing here where nothing is said."""


class WordChecks:
    """Of one incarnation of the hub."""

    def __init__(self, hub: Any) -> None:
        self.hub, self.world = hub, hub.world
        self.at: dict[str, int] = {}
        """Request -> its language rank."""
        self._language: set[int] = set()
        self._is_draining = False
        self._targets: dict[str, Admit] = {}
        self._prices = Prices()
        self._event: Event = Tick()
        self._cancels: list[tuple[int, Cancel]] = []
        self._ended: dict[str, tuple[int | None, DisaggError | None]] = {}
        self._delivered: list[Message] = []
        self._deaths: list[int] = []
        """Of what is given out by this event, in order."""
        self.did_say = False
        self._due: Message | None = None
        """What has to be passed on."""
        self.cuts_open_answer = False
        """What a client gives up now is one answer of several, which has not ended."""
        self._unknown: tuple[int, str] | None = None
        """A rank speaks of a request that is over."""

    # ---- what it hears ----

    def heard(self, event: Event) -> None:
        self._event, self._due, self._unknown = event, None, None
        if self.did_say:
            self.did_say = False
            for table in (self._cancels, self._ended, self._delivered, self._deaths):
                table.clear()
        if type(event) is Tick:
            return
        if type(event) is FromRank:
            if event.role == "language":
                self._heard_of_language(event.rank, event.message)
            elif type(event.message) is Decoded:
                self._heard_of_encode(event.rank, event.message)
            return
        match event:
            case RankDown(role="language"):
                self._language.discard(event.rank)
            case Admit():
                self._targets[event.request_id] = event
            case AdmitTogether():
                self._targets |= {one.request_id: one for one in event.admits}

    def _heard_of_encode(self, rank: int, message: Decoded) -> None:
        is_current = self.hub.counts.under_way((message.request_id, message.item)) == (message.attempt, rank)
        if is_current and message.item not in self.hub.cluster.clients[message.request_id].decoded:
            self._due = message

    def _heard_of_language(self, rank: int, message: Message) -> None:
        if rank not in self._language:
            return
        request_id = getattr(message, "request_id", "")
        if self.at.get(request_id) != rank:
            if isinstance(message, (NeedItems, PromptLogprobs, Tokens)):
                self._unknown = rank, request_id
            return
        client = self.hub.cluster.clients[request_id]
        match message:
            case Tokens() if message.token_ids and client.tokens.get(message.sample) == message.index:
                self._due = message
            case Finished() if message.sample in client.tokens:
                self._due = message
            case PromptLogprobs():
                self._due = message

    # ---- what it says ----

    def sent(self, action: Send) -> None:
        self.did_say, message = True, action.message
        match message:
            case Submit():
                self.at[message.request_id] = action.rank
                self._is_due(message)
            case Adopt():
                self.at[message.request_id] = action.rank
            case Cancel():
                self._cancels.append((action.rank, message))
            case Assign():
                digest = self.hub.cluster.clients[message.request_id].digests[message.item]
                self._deaths.append(self.hub.checks.num_deaths(digest))

    def _is_due(self, message: Submit) -> None:
        """I16: when the first token is due follows from what the client asks for, and from what it costs."""
        admit = self._targets[message.request_id]
        num_rows, num_prompt = sum(item.num_rows for item in message.items), len(message.token_ids) // TOKEN_ID_BYTES
        price_s = self._prices.of(num_rows, num_prompt)
        due_s = min(admit.target_s + PATIENCE * price_s, message.timeout_s / 2)
        said = (message.token_ids, message.items, message.sampling, message.keep_as)
        if said != (admit.token_ids, admit.items, admit.sampling, admit.keep_as):
            raise Violation("I14", f"{message} is begun, {admit} was asked for")
        if abs(message.due_s - due_s) > _MOMENT_S:
            raise Violation("I16", f"{message.request_id} is due in {message.due_s} s, should be in {due_s} s")

    def delivered(self, request_id: str, message: Message) -> None:
        self.did_say = True
        self._delivered.append(message)
        is_first = isinstance(message, Tokens) and message.timings is not None and message.sample == 0
        if is_first or (isinstance(message, Finished) and message.vector):
            num_prompt = len(self._targets[request_id].token_ids) // TOKEN_ID_BYTES
            self._prices.learn(num_prompt, message.timings)  # type: ignore[attr-defined]

    def ended(self, request_id: str, error: DisaggError | None) -> None:
        self.did_say = True
        self._ended[request_id] = self.at.pop(request_id, None), error
        self._targets.pop(request_id, None)
        if isinstance(error, InputError):
            params = {f"item {index}" for index in range(self.hub.cluster.clients[request_id].num_items)}
            if error.param not in params:
                raise Violation("I14", f"{request_id} ended with {error!r}, which speaks of {error.param}")

    # ---- what must hold ----

    def after(self, event: Event) -> None:
        kind = type(event)
        if not self.did_say and self._due is None and self._unknown is None and kind in _QUIET:
            return
        if self._delivered != ([] if self._due is None else [self._due]):
            raise Violation("I14", f"{self._delivered} is passed on after {event}, should be {self._due}")
        is_of_many = isinstance(event, (RankUp, RankDown)) or getattr(event, "message", None).__class__ is LinksUp
        if is_of_many and self._deaths != sorted(self._deaths):
            raise Violation("I11", f"what {self._deaths} ranks died over is given out in that order")
        self._who_is_told(event)
        match event:
            case RankUp(role="language"):
                self._language.add(event.rank)
            case Abandon():
                client = self.hub.cluster.clients[event.request_id]
                if client.is_abandoned and not client.is_ended:
                    raise Violation("I15", f"{event.request_id} goes on, and its client has left")
            case Drain():
                self._is_draining = True
            case EndAll():
                others = [error for _, error in self._ended.values() if error is not event.error]
                if self.at or others or self.hub.router.num_requests:
                    raise Violation("I15", f"{self.at.keys()} go on, {others} ended otherwise; all were to end")
            case Admit() if self._is_draining and event.request_id not in self._ended:
                raise Violation("I11", f"{event.request_id} is taken by a hub that takes no more")
            case AdmitTogether():
                refused = [one.request_id in self._ended for one in event.admits]
                if any(refused) != all(refused):
                    raise Violation("I14", f"of {len(refused)} requests that came together {sum(refused)} are refused")

    def _who_is_told(self, event: Event) -> None:
        """I15: a language rank is told, once, of what is over that it has, but for what it has said itself."""
        expected: list[tuple[int, str]] = []
        for request_id, (rank, _) in self._ended.items():
            message = event.message if isinstance(event, FromRank) else None
            is_own_word = isinstance(message, (Finished, RequestFailed)) and message.request_id == request_id
            is_back = isinstance(event, RankUp) and event.role == "language" and event.rank == rank
            if rank in self._language and not is_own_word and not is_back:
                expected.append((rank, request_id))
        if self._unknown is not None:
            expected.append(self._unknown)
        if isinstance(event, RankUp) and event.role == "language":
            expected += [(event.rank, request_id) for request_id in self.hub.checks.offered_twice]
        told = [(rank, cancel.request_id) for rank, cancel in self._cancels if cancel.sample is None]
        if sorted(told) != sorted(expected):
            raise Violation("I15", f"{told} are told that a request is over after {event}, should be {expected}")
        cuts = [(rank, cancel) for rank, cancel in self._cancels if cancel.sample is not None]
        wanted: list[tuple[int, Cancel]] = []
        if isinstance(event, Abandon) and self.cuts_open_answer and event.request_id in self.at:
            wanted = [(self.at[event.request_id], Cancel(request_id=event.request_id, sample=event.sample))]
        if cuts != wanted:
            raise Violation("I15", f"{cuts} are told after {event}, should be {wanted}")


class WaitingTime:
    """How long what is refused should wait: in which time how much was served, while something waited."""

    def __init__(self, hub: Any) -> None:
        self.hub, self.world = hub, hub.world
        self._waited_s = 0.0
        """Until `_since`; None where nothing waits."""
        self._since: float | None = None
        self._served: list[tuple[float, int]] = []

    def _waited(self) -> float:
        return self._waited_s + (0.0 if self._since is None else self.world.now - self._since)

    def served(self, cost: int) -> None:
        self._served.append((self._waited(), cost))

    def after(self) -> None:
        """Something was said, so that it may be others that wait."""
        clients, waited_s = self.hub.cluster.clients, self._waited()
        here = [clients[request_id] for request_id in self.hub.words.at]
        does_wait = any(not client.is_ended and 0 in client.tokens.values() for client in here)
        self._waited_s, self._since = waited_s, self.world.now if does_wait else None

    def refused(self, error: DisaggError | None, cost: int) -> None:
        """I11: as long as what waits takes at that rate. Where time is measured decides how much of it has faded."""
        if not isinstance(error, OverloadedError):
            return
        waited_s = self._waited()
        served = sum(cost * 0.5 ** ((waited_s - at) / _HALF_LIFE_S) for at, cost in self._served)
        faded_s = _HALF_LIFE_S / math.log(2) * (1 - 0.5 ** (waited_s / _HALF_LIFE_S))
        each = cost / served if served else 1.0
        least, most = (min(max(each * s, MIN_RETRY_S), MAX_RETRY_S) for s in (faded_s, waited_s))
        if not least - _MOMENT_S <= (error.retry_after or 0.0) <= most + _MOMENT_S:
            raise Violation("I11", f"to ask again after {error.retry_after} s, should be {least} to {most} s")
