"""The router: named cases, and a state machine that plays random ranks and clients against it."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qwen3vl_disagg.core.errors import (
    DeadlineError,
    DisaggError,
    InputError,
    OverloadedError,
    TransferError,
    UnavailableError,
)
from qwen3vl_disagg.core.requests import RequestTimings, SamplingParams, VisualItem
from qwen3vl_disagg.disagg.messages import (
    Assign,
    Cancel,
    Decoded,
    EncodeItem,
    Finished,
    ItemFailed,
    ItemLost,
    ItemReceived,
    LinksUp,
    NeedItems,
    RequestFailed,
    Submit,
    Tokens,
)
from qwen3vl_disagg.disagg.router import Router, RouterLimits
from qwen3vl_disagg.disagg.routing import (
    Abandon,
    Action,
    Admit,
    Deliver,
    Drain,
    End,
    EndAll,
    FromRank,
    RankDown,
    RankUp,
    Send,
    Tick,
)


def visual(name: str, side: int = 8) -> VisualItem:
    return VisualItem(
        modality="image",
        digest=name,
        num_bytes=10,
        grid=(1, side, side),
        num_rows=side * side // 4,
        offset=3,
        param=f"messages[0].content[{name}]",
    )


def admit(request_id: str, *names: str, num_tokens: int = 100, timeout_s: float = 100.0) -> Admit:
    items = [visual(name) for name in names]
    return Admit(request_id, b"\0\0\0\0", num_tokens, items, SamplingParams(), timeout_s)


class Script:
    """A router with its answers sorted by kind. `now` stands still unless moved."""

    def __init__(self, encode: int = 2, language: int = 2, **limits: float) -> None:
        self.router = Router({"image": 7}, RouterLimits(**limits))  # type: ignore[arg-type]
        self.now = 0.0
        self.actions: list[Action] = []
        self.languages = list(range(encode, encode + language))
        for rank in self.languages:
            self.do(RankUp("language", rank))
        for rank in range(encode):
            self.do(RankUp("encode", rank))
            self.encode_says(rank, LinksUp(language_ranks=self.languages))

    def do(self, event) -> list[Action]:
        self.actions = self.router.handle(event, self.now)
        return self.actions

    def encode_says(self, rank: int, message) -> list[Action]:
        return self.do(FromRank("encode", rank, message))

    def language_says(self, rank: int, message) -> list[Action]:
        return self.do(FromRank("language", rank, message))

    def start(self, request_id: str, *names: str) -> int:
        """Admit, and let the language rank need all items. Returns that rank."""
        [send] = self.do(admit(request_id, *names))
        assert isinstance(send, Send)
        assert isinstance(send.message, Submit)
        if names:
            self.language_says(send.rank, NeedItems(request_id=request_id, items=list(range(len(names)))))
        return send.rank

    def sent(self, kind: type) -> list[Send]:
        return [a for a in self.actions if isinstance(a, Send) and isinstance(a.message, kind)]

    def ends(self) -> list[End]:
        return [a for a in self.actions if isinstance(a, End)]


def finished(request_id: str) -> Finished:
    return Finished(request_id=request_id, finish_reason="stop", timings=RequestTimings())


def names_where(router: Script, rank: int) -> str:
    """An item whose content belongs to `rank`."""
    for n in range(100):
        router.start(f"probe{n}", f"item{n}")
        [send] = router.sent(EncodeItem)
        router.do(Abandon(f"probe{n}"))
        if send.rank == rank:
            return f"item{n}"
    raise AssertionError("no item went there")


def test_a_request_goes_to_the_least_loaded_language_rank_and_equal_ones_in_turn():
    script = Script(language=3)
    assert [script.start(name) for name in "abc"] == [2, 3, 4]
    script.language_says(3, finished("b"))
    assert script.start("d") == 3
    script.do(admit("e", num_tokens=1))
    for n in range(5):  # small ones go where there is less
        script.do(admit(f"small{n}", num_tokens=10))
    loads = defaultdict(int)
    for request in script.router._requests.values():
        loads[request.language_rank] += request.num_tokens
    assert sorted(loads.values()) == [111, 120, 120]


def test_an_item_is_assigned_to_both_ends_with_the_same_attempt():
    script = Script()
    rank = script.start("a", "x")
    [assign], [encode] = script.sent(Assign), script.sent(EncodeItem)
    assert (assign.role, assign.rank) == ("language", rank)
    assert assign.message == Assign(request_id="a", item=0, attempt=1, encode_rank=encode.rank)
    assert encode.role == "encode"
    assert encode.message.language_rank == rank
    assert encode.message.visual_token_id == 7
    assert encode.message.timeout_s == 100.0
    # Asking again while it is on its way changes nothing.
    assert script.language_says(rank, NeedItems(request_id="a", items=[0])) == []


def test_the_same_content_goes_to_the_same_rank_while_it_is_idle():
    script = Script(encode=4)
    seen = defaultdict(set)
    for n in range(40):
        rank = script.start(f"r{n}", f"item{n % 10}")
        [send] = script.sent(EncodeItem)
        seen[n % 10].add(send.rank)
        script.language_says(rank, ItemReceived(request_id=f"r{n}", item=0, attempt=1))
    assert all(len(ranks) == 1 for ranks in seen.values())
    assert len({next(iter(ranks)) for ranks in seen.values()}) >= 3


def test_images_of_one_request_are_spread_over_idle_encode_ranks():
    script = Script(encode=4)
    for n in range(8):
        script.start(f"r{n}", *(f"item{n}-{k}" for k in range(4)))
        assert sorted(send.rank for send in script.sent(EncodeItem)) == [0, 1, 2, 3]
        script.do(Abandon(f"r{n}"))


def test_a_rank_without_a_link_to_the_language_rank_gets_nothing():
    script = Script()
    script.encode_says(0, LinksUp(language_ranks=[3]))
    for n in range(20):
        rank = script.start(f"r{n}", f"x{n}")
        [send] = script.sent(EncodeItem)
        assert rank == 3 or send.rank == 1


def test_a_failed_attempt_goes_to_another_rank_and_three_failures_end_the_request():
    script = Script(encode=3)
    rank = script.start("a", "x")
    used = []
    for attempt in (1, 2, 3):
        [send] = script.sent(EncodeItem)
        assert send.message.attempt == attempt
        used.append(send.rank)
        lost = ItemLost(request_id="a", item=0, attempt=attempt, reason="link")
        failed = ItemFailed(request_id="a", item=0, attempt=attempt, kind="failed", message="no")
        script.language_says(rank, lost) if attempt % 2 else script.encode_says(send.rank, failed)
    assert sorted(used) == [0, 1, 2]
    [end] = script.ends()
    assert isinstance(end.error, TransferError)
    assert [send.rank for send in script.sent(Cancel) if send.role == "language"] == [rank]


def test_bad_media_ends_the_request_with_its_place_and_is_not_tried_again():
    script = Script()
    rank = script.start("a", "x", "y")
    by_item = {send.message.item: send.rank for send in script.sent(EncodeItem)}
    script.encode_says(by_item[1], ItemFailed(request_id="a", item=1, attempt=1, kind="input", message="not an image"))
    [end] = script.ends()
    assert isinstance(end.error, InputError)
    assert end.error.param == "messages[0].content[y]"
    assert end.error.status == 400
    assert {(send.role, send.rank) for send in script.sent(Cancel)} == {
        ("language", rank),
        *(("encode", r) for r in by_item.values()),
    }


def test_a_dead_encode_rank_costs_no_request_even_if_it_is_the_only_one():
    script = Script(encode=1)
    ranks = {f"r{n}": script.start(f"r{n}", f"x{n}") for n in range(50)}
    assert script.do(RankDown("encode", 0)) == []
    script.now = 20.0
    assert script.do(Tick()) == []
    script.do(RankUp("encode", 0))
    script.encode_says(0, LinksUp(language_ranks=script.languages))
    again = script.sent(EncodeItem)
    assert sorted(send.message.request_id for send in again) == sorted(ranks)
    assert {send.message.attempt for send in again} == {2}
    assert {send.message.timeout_s for send in again} == {80.0}


def test_items_of_a_dead_rank_move_to_the_others_at_once():
    script = Script(encode=2)
    script.start("a", "x", "y")
    before = {send.message.item: send.rank for send in script.sent(EncodeItem)}
    script.do(RankDown("encode", before[0]))
    [send] = script.sent(EncodeItem)
    assert (send.rank, send.message.item, send.message.attempt) == (before[1], 0, 2)


def test_a_death_and_the_lost_link_before_it_count_once():
    script = Script(encode=1, max_attempts=3)
    rank = script.start("a", "x")
    for round_ in range(
        2
    ):  # each round: the language rank sees the end of its link first, then the hub that of the rank
        attempt = 2 * round_ + 1
        script.language_says(rank, ItemLost(request_id="a", item=0, attempt=attempt, reason="link"))
        assert script.sent(EncodeItem)
        assert script.do(RankDown("encode", 0)) == []
        script.do(RankUp("encode", 0))
        script.encode_says(0, LinksUp(language_ranks=script.languages))
        assert script.sent(EncodeItem)
    script.do(RankDown("encode", 0))  # the third rank that died on it
    assert isinstance(script.ends()[0].error, TransferError)


def test_without_an_encode_rank_text_goes_on_and_images_wait_for_a_while():
    script = Script(encode=1, encode_wait_s=30.0)
    script.do(RankDown("encode", 0))
    script.start("text")
    script.start("image", "x")
    script.now = 29.0
    assert script.do(Tick()) == []
    script.now = 30.0
    script.do(Tick())
    [end] = script.ends()
    assert end.request_id == "image"
    assert isinstance(end.error, UnavailableError)


def test_a_lost_language_rank_ends_its_requests_and_frees_the_encode_ranks():
    script = Script(encode=1, language=2)
    first, second = script.start("a", "x"), script.start("b", "y")
    assert first != second
    script.do(RankDown("language", first))
    [end] = script.ends()
    assert end.request_id == "a"
    assert isinstance(end.error, UnavailableError)
    assert script.sent(Cancel) == [Send("encode", 0, Cancel(request_id="a"))]
    script.language_says(second, finished("b"))
    assert script.router.num_requests == 0


def test_deadline_queue_bounds_and_drain():
    script = Script(max_waiting=2, max_waiting_tokens=250)
    script.do(admit("a", timeout_s=5.0))
    script.do(admit("b", num_tokens=200))
    assert isinstance(script.ends()[0].error, OverloadedError)  # too many tokens
    script.do(admit("b"))
    script.do(admit("c"))
    assert isinstance(script.ends()[0].error, OverloadedError)  # too many requests
    rank = script.router._requests["b"].language_rank
    script.language_says(rank, Tokens(request_id="b", index=0, token_ids=[5]))
    script.do(admit("c"))  # b no longer waits
    assert script.sent(Submit)
    script.now = 5.0
    script.do(Tick())
    assert [(end.request_id, type(end.error)) for end in script.ends()] == [("a", DeadlineError)]
    script.do(Drain())
    script.do(admit("d"))
    assert isinstance(script.ends()[0].error, UnavailableError)
    script.do(EndAll(UnavailableError("over")))
    assert sorted(end.request_id for end in script.ends()) == ["b", "c"]


def test_a_request_longer_than_the_bound_is_taken_when_nothing_waits():
    script = Script(max_waiting_tokens=10)
    script.do(admit("a", num_tokens=1000))
    assert script.sent(Submit)


def test_what_an_old_attempt_or_a_finished_request_says_changes_nothing():
    script = Script()
    rank = script.start("a", "x")
    [first] = script.sent(EncodeItem)
    script.language_says(rank, ItemLost(request_id="a", item=0, attempt=1, reason="link"))
    [second] = script.sent(EncodeItem)
    assert second.rank != first.rank
    stale = [
        (first.rank, Decoded(request_id="a", item=0, attempt=1)),
        (first.rank, ItemFailed(request_id="a", item=0, attempt=1, kind="input", message="bad")),
        (first.rank, ItemFailed(request_id="a", item=0, attempt=2, kind="input", message="not its attempt")),
        (second.rank, Decoded(request_id="a", item=9, attempt=2)),
    ]
    for sender, message in stale:
        assert script.encode_says(sender, message) == []
    assert script.language_says(rank, ItemReceived(request_id="a", item=0, attempt=1)) == []
    assert script.language_says(5 - rank, finished("a")) == []  # another rank's request
    assert script.encode_says(second.rank, Decoded(request_id="a", item=0, attempt=2)) != []
    assert script.encode_says(second.rank, Decoded(request_id="a", item=0, attempt=2)) == []
    script.language_says(rank, finished("a"))
    assert len(script.ends()) == 1
    assert script.language_says(rank, finished("a")) == []
    assert script.language_says(rank, Tokens(request_id="a", index=0, token_ids=[1])) == [
        Send("language", rank, Cancel(request_id="a"))
    ]
    assert script.do(RankDown("encode", second.rank)) == []


def test_tokens_never_repeat_and_never_skip():
    script = Script()
    rank = script.start("a")
    first = Tokens(request_id="a", index=0, token_ids=[1, 2])
    assert script.language_says(rank, first) == [Deliver("a", first)]
    assert script.language_says(rank, first) == []
    script.language_says(rank, Tokens(request_id="a", index=3, token_ids=[9]))
    assert isinstance(script.ends()[0].error, TransferError)


@pytest.mark.parametrize(
    ("status", "kind"), [(400, InputError), (413, InputError), (503, UnavailableError), (504, DeadlineError)]
)
def test_a_rank_s_failure_keeps_its_kind(status: int, kind: type[DisaggError]):
    script = Script()
    rank = script.start("a")
    script.language_says(rank, RequestFailed(request_id="a", code="x", message="why", status=status))
    [end] = script.ends()
    assert type(end.error) is kind
    assert getattr(end.error, "status", status) == status
    assert script.sent(Cancel) == []


NUM_ENCODE, NUM_LANGUAGE = 3, 2
LANGUAGES = range(NUM_ENCODE, NUM_ENCODE + NUM_LANGUAGE)
ENCODES = range(NUM_ENCODE)


class RouterMachine(RuleBasedStateMachine):
    """Ranks and clients that do anything, in any order; what the ranks were told is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = RouterLimits(max_waiting=6, encode_wait_s=10.0)
        self.router = Router({"image": 7}, self.limits)
        self.now = 0.0
        self.up: set[tuple[str, int]] = set()
        self.links: dict[int, set[int]] = {}
        self.live: dict[str, int] = {}  # admitted and not ended -> number of items
        self.ended: dict[str, DisaggError | None] = {}
        self.home: dict[str, int] = {}
        self.tokens: dict[str, int] = defaultdict(int)
        self.attempts: dict[tuple[str, int], list[int]] = defaultdict(list)  # encode rank of attempt 1, 2, ...
        self.decoded: set[tuple[str, int]] = set()
        self.counter = 0

    def do(self, event) -> None:
        actions = self.router.handle(event, self.now)
        encoded: dict[tuple[str, int], tuple[int, int]] = {}
        told: dict[tuple[str, int], tuple[int, int]] = {}
        for action in actions:
            match action:
                case Send(role, rank, message):
                    assert (role, rank) in self.up, "sent to a rank that is not there"
                    self.check_send(role, rank, message, encoded, told)
                case Deliver(request_id, message):
                    assert request_id in self.live, "delivered to a request that has ended"
                    if isinstance(message, Tokens):
                        assert message.index == self.tokens[request_id], "tokens repeated or lost"
                        self.tokens[request_id] += len(message.token_ids)
                    if isinstance(message, Decoded):
                        assert (request_id, message.item) not in self.decoded, "decoded twice"
                        self.decoded.add((request_id, message.item))
                        key = (request_id, message.item)
                        assert message.attempt == len(self.attempts[key]), "an old attempt was heard"
                case End(request_id, error):
                    assert request_id not in self.ended, "ended twice"
                    self.live.pop(request_id, None)
                    self.ended[request_id] = error
        assert encoded == told, "the two ends were told different things"

    def check_send(self, role, rank, message, encoded, told) -> None:
        if isinstance(message, Submit):
            self.home[message.request_id] = rank
        elif isinstance(message, EncodeItem):
            key = (message.request_id, message.item)
            assert role == "encode"
            assert message.language_rank == self.home[message.request_id]
            assert message.language_rank in self.links[rank], "assigned over a link that is not there"
            assert message.attempt == len(self.attempts[key]) + 1, "attempts must count up"
            self.attempts[key].append(rank)
            encoded[key] = (message.attempt, rank)
        elif isinstance(message, Assign):
            assert rank == self.home[message.request_id]
            told[message.request_id, message.item] = (message.attempt, message.encode_rank)

    # ---- clients ----

    @rule(num_items=st.integers(0, 3), timeout=st.sampled_from([5.0, 100.0, 100.0]), tokens=st.integers(1, 50))
    def submit(self, num_items: int, timeout: float, tokens: int) -> None:
        request_id = f"r{self.counter}"
        self.counter += 1
        self.live[request_id] = num_items
        names = [f"{request_id}-{k % 2}" for k in range(num_items)]
        self.do(admit(request_id, *names, num_tokens=tokens, timeout_s=timeout))
        if request_id in self.ended:
            assert isinstance(self.ended[request_id], OverloadedError | UnavailableError)

    def pick(self, data) -> str | None:
        """Mostly a live request, sometimes one that has ended."""
        known = sorted(self.live.keys() & self.home.keys())
        if not known or data.draw(st.integers(0, 4)) == 0:
            known = sorted(self.home)
        return data.draw(st.sampled_from(known)) if known else None

    @rule(data=st.data())
    def abandon(self, data) -> None:
        if (request_id := self.pick(data)) is not None:
            self.do(Abandon(request_id))
            assert request_id not in self.live

    # ---- ranks ----

    @rule(rank=st.sampled_from(ENCODES), links=st.sets(st.sampled_from(LANGUAGES)))
    def encode_up(self, rank: int, links: set[int]) -> None:
        self.up.add(("encode", rank))
        self.links[rank] = set()
        self.do(RankUp("encode", rank))
        self.links_up(rank, links)

    @precondition(lambda self: any(role == "encode" for role, _ in self.up))
    @rule(data=st.data(), links=st.sets(st.sampled_from(LANGUAGES)))
    def links_change(self, data, links: set[int]) -> None:
        self.links_up(data.draw(st.sampled_from(sorted(r for role, r in self.up if role == "encode"))), links)

    def links_up(self, rank: int, links: set[int]) -> None:
        self.links[rank] = links
        self.do(FromRank("encode", rank, LinksUp(language_ranks=sorted(links))))

    @rule(rank=st.sampled_from(LANGUAGES))
    def language_up(self, rank: int) -> None:
        self.up.add(("language", rank))
        self.do(RankUp("language", rank))
        self.check_orphans()

    @precondition(lambda self: self.up)
    @rule(data=st.data())
    def rank_down(self, data) -> None:
        role, rank = data.draw(st.sampled_from(sorted(self.up)))
        self.up.remove((role, rank))
        if role == "language":
            for links in self.links.values():
                links.discard(rank)
        self.do(RankDown(role, rank))
        self.check_orphans()

    def check_orphans(self) -> None:
        for request_id in self.live:
            assert ("language", self.home[request_id]) in self.up

    @initialize(links=st.lists(st.sets(st.sampled_from(LANGUAGES), min_size=1), max_size=NUM_ENCODE))
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
    )
    def item_event(self, data, kind: str, lag: int) -> None:
        """Mostly about the current attempt, sometimes about an older one, from the rank that made it."""
        live = sorted(key for key, made in self.attempts.items() if key[0] in self.live and len(made) > lag)
        request_id, item = data.draw(st.sampled_from(live or sorted(self.attempts)))
        made = list(self.attempts[request_id, item])
        attempt = len(made) - lag
        if attempt < 1:
            return
        fields = {"request_id": request_id, "item": item, "attempt": attempt}
        was_live = request_id in self.live
        if kind == "received":
            event = FromRank("language", self.home[request_id], ItemReceived(**fields))
        elif kind == "lost":
            event = FromRank("language", self.home[request_id], ItemLost(**fields, reason="?"))
        elif kind == "decoded":
            event = FromRank("encode", made[attempt - 1], Decoded(**fields))
        else:
            failure = "input" if kind == "input" else "failed"
            event = FromRank("encode", made[attempt - 1], ItemFailed(**fields, kind=failure, message="?"))
        self.do(event)
        if lag:
            assert (request_id in self.live) == was_live, "an old attempt ended a request"
            assert self.attempts[request_id, item] == made, "an old attempt was tried again"

    @rule(data=st.data(), back=st.sampled_from([0, 0, 0, 1]), count=st.integers(1, 3))
    def tokens_come(self, data, back: int, count: int) -> None:
        if (request_id := self.pick(data)) is not None:
            index = max(0, self.tokens[request_id] - back)
            message = Tokens(request_id=request_id, index=index, token_ids=[1] * count)
            self.do(FromRank("language", self.home[request_id], message))

    @rule(data=st.data(), is_error=st.booleans())
    def finish(self, data, is_error: bool) -> None:
        if (request_id := self.pick(data)) is not None:
            failed = RequestFailed(request_id=request_id, code="x", message="?", status=500)
            self.do(FromRank("language", self.home[request_id], failed if is_error else finished(request_id)))
            if ("language", self.home[request_id]) in self.up:
                assert request_id not in self.live

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0]))
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
        jobs = {(rank, key) for rank, state in router._encode.items() for key in state.jobs}
        expected = set()
        for request_id, request in router._requests.items():
            assert request_id in router._language[request.language_rank].requests
            for index, item in enumerate(request.items):
                assert item.failures < self.limits.max_attempts
                if item.state == "encoding":
                    expected.add((item.encode_rank, (request_id, index)))
                    assert request.language_rank in router._encode[item.encode_rank].links
                elif item.state == "waiting":
                    assert item.wait_until < math.inf
                    assert not any(request.language_rank in s.links for s in router._encode.values())
        assert jobs == expected
        assert sum(len(state.requests) for state in router._language.values()) == len(self.live)

    def teardown(self) -> None:
        """When the ranks are silent for ever, time alone ends every request."""
        self.now += 1000.0
        self.do(Tick())
        assert not self.live
        assert self.router.num_requests == 0
        for state in (*self.router._language.values(), *self.router._encode.values()):
            assert not getattr(state, "jobs", None)
            assert not getattr(state, "requests", None)


TestRouterMachine = RouterMachine.TestCase
TestRouterMachine.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
