"""The router under random ranks and clients. What the ranks were told is the model."""

from __future__ import annotations

import math
from collections import defaultdict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qwen3vl_disagg.core.errors import (
    DisaggError,
    Failure,
    InputError,
    OverloadedError,
    ServerError,
    UnavailableError,
)
from qwen3vl_disagg.protocol.messages import (
    Assign,
    Decoded,
    ItemFailed,
    ItemLost,
    ItemReceived,
    LinksUp,
    NeedItems,
    RequestFailed,
    Submit,
    Tokens,
)
from qwen3vl_disagg.protocol.router import Router, RouterLimits
from qwen3vl_disagg.protocol.routing import (
    Abandon,
    Deliver,
    End,
    FromRank,
    RankDown,
    RankUp,
    Send,
)
from qwen3vl_disagg.protocol.session_events import Tick
from tests.support.routing import admit, finished

NUM_ENCODE, NUM_LANGUAGE = 3, 2
LANGUAGES = range(NUM_ENCODE, NUM_ENCODE + NUM_LANGUAGE)
ENCODES = range(NUM_ENCODE)


class RouterMachine(RuleBasedStateMachine):
    """Ranks and clients that do anything, in any order; what the ranks were told is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = RouterLimits(max_waiting=6, encode_wait_s=10.0)
        self.router = Router(self.limits)
        self.now = 0.0
        self.up: set[tuple[str, int]] = set()
        self.links: dict[int, set[int]] = {}
        self.live: dict[str, int] = {}  # admitted and not ended -> number of items
        self.ended: dict[str, DisaggError | None] = {}
        self.home: dict[str, int] = {}
        self.tokens: dict[tuple[str, int], int] = defaultdict(int)
        self.open: dict[str, set[int]] = {}  # answers that have not ended
        self.attempts: dict[tuple[str, int], list[int]] = defaultdict(list)  # encode rank of attempt 1, 2, ...
        self.decoded: set[tuple[str, int]] = set()
        self.counter = 0

    def do(self, event) -> None:
        actions = self.router.handle(event, self.now)
        for action in actions:
            match action:
                case Send(role, rank, message):
                    assert (role, rank) in self.up, "sent to a rank that is not there"
                    self.check_send(role, rank, message)
                case Deliver(request_id, message):
                    assert request_id in self.live, "delivered to a request that has ended"
                    if isinstance(message, Tokens):
                        assert message.sample in self.open[request_id], "tokens of an answer that has ended"
                        assert message.index == self.tokens[request_id, message.sample], "tokens repeated or lost"
                        self.tokens[request_id, message.sample] += len(message.token_ids)
                    if isinstance(message, Decoded):
                        assert (request_id, message.item) not in self.decoded, "decoded twice"
                        self.decoded.add((request_id, message.item))
                        key = (request_id, message.item)
                        assert message.attempt == len(self.attempts[key]), "an old attempt was heard"
                case End(request_id, error):
                    assert request_id not in self.ended, "ended twice"
                    self.live.pop(request_id, None)
                    self.ended[request_id] = error

    def check_send(self, role, rank, message) -> None:
        if isinstance(message, Submit):
            self.home[message.request_id] = rank
        elif isinstance(message, Assign):
            key = (message.request_id, message.item)
            assert (role, rank) == ("language", self.home[message.request_id])
            assert rank in self.links[message.encode_rank], "assigned over a link that is not there"
            assert message.attempt == len(self.attempts[key]) + 1, "attempts must count up"
            self.attempts[key].append(message.encode_rank)

    # ---- clients ----

    @rule(
        num_items=st.sampled_from([2, 1, 3, 0]),
        timeout=st.sampled_from([100.0, 100.0, 100.0, 5.0]),
        tokens=st.integers(1, 50),
        needs=st.sampled_from([True, True, False]),
        n=st.sampled_from([1, 1, 3]),
    )
    def submit(self, num_items: int, timeout: float, tokens: int, needs: bool, n: int) -> None:
        request_id = f"r{self.counter}"
        self.counter += 1
        self.live[request_id] = num_items
        self.open[request_id] = set(range(n))
        names = [f"{request_id}-{k % 2}" for k in range(num_items)]
        self.do(admit(request_id, *names, num_tokens=tokens, timeout_s=timeout, n=n))
        if request_id in self.ended:
            assert isinstance(self.ended[request_id], OverloadedError | UnavailableError)
        elif needs:
            self.do(FromRank("language", self.home[request_id], NeedItems(request_id=request_id, items=[0, 1, 2])))

    def pick(self, data) -> str | None:
        """Mostly a live request, sometimes one that has ended."""
        known = sorted(self.live.keys() & self.home.keys())
        if not known or data.draw(st.integers(0, 4)) == 0:
            known = sorted(self.home)
        return data.draw(st.sampled_from(known)) if known else None

    # ---- ranks ----

    @rule(rank=st.sampled_from(ENCODES), links=st.sets(st.sampled_from(LANGUAGES), min_size=1))
    def encode_up(self, rank: int, links: set[int]) -> None:
        self.up.add(("encode", rank))
        self.links[rank] = set()
        self.do(RankUp("encode", rank))
        self.links_up(rank, links)

    @rule(rank=st.sampled_from(ENCODES), links=st.sets(st.sampled_from(LANGUAGES)))
    def links_change(self, rank: int, links: set[int]) -> None:
        if ("encode", rank) in self.up:
            self.links_up(rank, links)

    def links_up(self, rank: int, links: set[int]) -> None:
        self.links[rank] = set(links)
        self.do(FromRank("encode", rank, LinksUp(language_ranks=sorted(links))))

    def language_up(self, rank: int) -> None:
        self.up.add(("language", rank))
        self.do(RankUp("language", rank))
        self.check_orphans()

    @rule(
        who=st.sampled_from([("encode", rank) for rank in ENCODES] * 3 + [("language", rank) for rank in LANGUAGES]),
        is_back=st.booleans(),
    )
    def rank_dies(self, who: tuple[str, int], is_back: bool) -> None:
        """Its end is noticed, or its next incarnation comes before that."""
        role, rank = who
        if role == "encode":
            self.links[rank] = set()
        if not is_back:
            self.up.discard(who)
            self.do(RankDown(role, rank))
            self.check_orphans()
        elif role == "language":
            self.language_up(rank)
        else:
            self.encode_up(rank, set(LANGUAGES))

    def check_orphans(self) -> None:
        for request_id in self.live:
            assert ("language", self.home[request_id]) in self.up

    @initialize(links=st.lists(st.sets(st.sampled_from(LANGUAGES), min_size=1), min_size=1, max_size=NUM_ENCODE))
    def start_ranks(self, links: list[set[int]]) -> None:
        for rank in LANGUAGES:
            self.language_up(rank)
        for rank in range(len(links)):
            self.encode_up(rank, links[rank])

    @rule(data=st.data(), items=st.lists(st.integers(-1, 3), max_size=4) | st.just([0, 1, 2]))
    def need(self, data, items: list[int]) -> None:
        if (request_id := self.pick(data)) is not None:
            message = NeedItems(request_id=request_id, items=items)
            self.do(FromRank("language", self.home[request_id], message))

    @precondition(lambda self: self.attempts)
    @rule(
        data=st.data(),
        kind=st.sampled_from(["decoded", "received", "lost", "failed", "failed", "input"]),
        lag=st.sampled_from([0, 0, 0, 0, 1, 2]),
        is_link_dead=st.booleans(),
    )
    def item_event(self, data, kind: str, lag: int, is_link_dead: bool) -> None:
        """Mostly about the current attempt, sometimes about an older one, from the rank that made it."""
        live = sorted(key for key, made in self.attempts.items() if key[0] in self.live and len(made) > lag)
        encoding = [key for key in live if self.router._requests[key[0]].items[key[1]].state == "encoding"]
        request_id, item = data.draw(st.sampled_from(encoding or live or sorted(self.attempts)))
        made = list(self.attempts[request_id, item])
        attempt = len(made) - lag
        if attempt < 1:
            return
        fields = {"request_id": request_id, "item": item, "attempt": attempt}
        was_live = request_id in self.live
        if kind == "received":
            event = FromRank("language", self.home[request_id], ItemReceived(**fields))
        elif kind == "lost":
            home = self.home[request_id]
            event = FromRank("language", home, ItemLost(**fields, reason="?", dead_epoch=int(is_link_dead)))
            if is_link_dead and not lag and (request_id, item) in encoding:
                self.links[made[-1]].discard(home)  # until the encode rank says that there is a new one
        elif kind == "decoded":
            event = FromRank("encode", made[attempt - 1], Decoded(**fields))
        else:
            failure = Failure.of(InputError("?") if kind == "input" else ServerError("?"))
            event = FromRank("encode", made[attempt - 1], ItemFailed(**fields, failure=failure))
        self.do(event)
        if lag:
            assert (request_id in self.live) == was_live, "an old attempt ended a request"
            assert self.attempts[request_id, item] == made, "an old attempt was tried again"

    @rule(data=st.data(), back=st.sampled_from([0, 0, 0, 1]), count=st.integers(1, 3))
    def tokens_come(self, data, back: int, count: int) -> None:
        if (request_id := self.pick(data)) is not None:
            sample = data.draw(st.integers(0, 2))
            index = max(0, self.tokens[request_id, sample] - back)
            message = Tokens(request_id=request_id, index=index, token_ids=[1] * count, sample=sample)
            self.do(FromRank("language", self.home[request_id], message))

    @rule(data=st.data(), how=st.sampled_from(["not", "not", "not", "abandoned", "finished", "failed"]))
    def end(self, data, how: str) -> None:
        request_id = self.pick(data)
        if request_id is None or how == "not":
            return
        failed = RequestFailed(request_id=request_id, failure=Failure.of(ServerError("?", code="x")))
        sample = (
            None if how == "failed" else data.draw(st.sampled_from([0, 1, 2, *([None] if how != "finished" else [])]))
        )
        is_heard = how == "abandoned" or ("language", self.home[request_id]) in self.up
        if is_heard and sample is not None and how == "abandoned":  # nothing of it may come any more
            self.open[request_id].discard(sample)
        if how == "abandoned":
            self.do(Abandon(request_id, sample))
        else:
            said = failed if sample is None else finished(request_id, sample)
            self.do(FromRank("language", self.home[request_id], said))
        if is_heard and sample is not None:
            self.open[request_id].discard(sample)
        if is_heard:
            assert (request_id in self.live) <= bool(sample is not None and self.open[request_id])

    @rule(seconds=st.sampled_from([0.1, 0.1, 0.1, 1.0, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.do(Tick())
        for request_id in self.live:
            assert self.router._requests[request_id].deadline > self.now

    # ---- what always holds ----

    @invariant()
    def tables_agree(self) -> None:
        router = self.router
        assert set(router._requests) == set(self.live)
        jobs = {(rank, key) for rank, state in router._attempts.ranks.items() for key in state.jobs}
        expected = set()
        for request_id, request in router._requests.items():
            assert request_id in router._language[request.language_rank].requests
            for index, item in enumerate(request.items):
                assert item.failures < self.limits.max_attempts
                assert (item.wait_until < math.inf) == (item.state == "waiting")
                if item.state == "encoding":
                    expected.add((item.encode_rank, (request_id, index)))
                    # Its link may be gone: the language rank waits for it, and says when it gives up.
                elif item.state == "waiting":
                    assert not any(request.language_rank in s.links for s in router._attempts.ranks.values())
        assert jobs == expected
        assert sum(len(state.requests) for state in router._language.values()) == len(self.live)
        assert all(state.load == sum(state.requests.values()) for state in router._language.values())

    def teardown(self) -> None:
        """When the ranks are silent for ever, time alone ends every request."""
        self.now += 1000.0
        self.do(Tick())
        assert not self.live
        assert self.router.num_requests == 0
        for state in (*self.router._language.values(), *self.router._attempts.ranks.values()):
            assert not getattr(state, "jobs", None)
            assert not getattr(state, "requests", None)


TestRouterMachine = RouterMachine.TestCase
TestRouterMachine.settings = settings(max_examples=max(150, settings().max_examples), deadline=None)
