"""Which requests go on when their frontend dies, what the next one hears of them, and when they are over."""

from __future__ import annotations

import pytest

from qwen3vl_disagg.core.errors import Failure, UnavailableError
from qwen3vl_disagg.core.requests import RequestTimings, SamplingParams
from qwen3vl_disagg.language.kept_answers import KEEP_S
from qwen3vl_disagg.language.request_book import RequestBook
from qwen3vl_disagg.protocol.allocator import BlockAllocator
from qwen3vl_disagg.protocol.language_sessions import LanguageSessions
from qwen3vl_disagg.protocol.layout import RowSizes
from qwen3vl_disagg.protocol.messages import (
    Adopt,
    Assign,
    Cancel,
    Finished,
    ItemReceived,
    Message,
    NeedItems,
    RequestFailed,
    Submit,
    Tokens,
)
from qwen3vl_disagg.protocol.session_events import Consumed, Expect, LanguageEvent, Prolong, Tick
from tests.support.routing import visual


class Desk:
    """A book, and what it said to whom."""

    def __init__(self) -> None:
        self.cancelled: list[tuple[str, int | None]] = []
        self.sessions: list[LanguageEvent] = []
        self.told: list[Message] = []
        self.book = RequestBook(
            lambda name, sample: self.cancelled.append((name, sample)), self.sessions.append, self.told.append
        )

    def begin(self, name: str, *images: str, keep_as: str = "", n: int = 1, at: float = 0.0) -> None:
        items = [visual(image) for image in images]
        submit = Submit(
            request_id=name,
            token_ids=b"",
            items=items,
            sampling=SamplingParams(n=n),
            timeout_s=100.0,
            due_s=5.0,
            keep_as=keep_as,
        )
        assert self.book.begin(submit, at) == at + 5.0

    def offers(self) -> list[str]:
        return [offer.name for offer in self.book.offer(0)]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def finished(name: str, sample: int = 0) -> Finished:
    return Finished(request_id=name, finish_reason="stop", timings=RequestTimings(), sample=sample)


def tokens(name: str, index: int, sample: int = 0) -> Tokens:
    return Tokens(request_id=name, index=index, token_ids=[index], sample=sample)


def received(name: str, item: int) -> ItemReceived:
    return ItemReceived(request_id=name, item=item, attempt=1)


def test_what_is_not_kept_and_what_lacks_rows_is_forgotten_with_its_frontend(desk):
    desk.begin("plain")
    desk.begin("lacks", "a", "b", keep_as="lacks")
    desk.begin("whole", "a", "b", keep_as="whole")
    for name in ("lacks", "whole"):
        desk.book.hear(NeedItems(request_id=name, items=[0, 1]), 1.0)
        desk.book.of_sessions(received(name, 1), 2.0)
    desk.book.of_sessions(received("whole", 0), 2.0)
    desk.book.hub_lost(3.0)
    assert desk.cancelled == [("plain", None), ("lacks", None)]
    assert desk.offers() == ["whole"]
    assert list(desk.book.running) == ["whole"]


def test_what_is_all_in_the_cache_or_waits_for_its_turn_lacks_nothing(desk):
    """The engine has not asked for anything."""
    desk.begin("cached", "a", "b", keep_as="cached")
    desk.book.hub_lost(1.0)
    assert desk.offers() == ["cached"]


def test_what_is_in_the_cache_in_part_lacks_what_was_asked_for(desk):
    desk.begin("r", "a", "b", keep_as="r")
    desk.book.hear(NeedItems(request_id="r", items=[1], first_rows=[3]), 1.0)
    desk.book.of_sessions(received("r", 1), 2.0)
    desk.book.hub_lost(3.0)
    assert desk.offers() == ["r"]


def test_what_was_preempted_goes_on_until_it_needs_rows(desk):
    desk.begin("r", "a", keep_as="r")
    desk.book.hear(NeedItems(request_id="r", items=[0]), 1.0)
    desk.book.preempted("r")
    assert isinstance(desk.sessions[-1], Expect)
    desk.book.hub_lost(2.0)
    assert desk.offers() == ["r"]
    desk.told.clear()
    desk.book.hear(NeedItems(request_id="r", items=[0]), 3.0)
    assert not desk.told
    assert not desk.offers()
    assert desk.sessions[-1] == Cancel(request_id="r")


def test_it_is_told_to_nobody_and_then_all_of_it_and_what_follows(desk):
    desk.begin("r", keep_as="r")
    desk.book.hear(tokens("r", 0), 1.0)
    desk.book.hub_lost(2.0)
    desk.book.hear(tokens("r", 1), 3.0)
    assert desk.told == [tokens("r", 0)]
    desk.book.adopt(Adopt(request_id="r", timeout_s=50.0), 4.0)
    assert desk.told[1:] == [tokens("r", 0), tokens("r", 1)]
    desk.book.hear(tokens("r", 2), 5.0)
    desk.book.hear(finished("r"), 5.0)
    assert desk.told[3:] == [tokens("r", 2), finished("r")]


def test_who_adopts_gives_it_the_time_that_it_has(desk):
    desk.begin("r", "a", keep_as="r")
    desk.book.hub_lost(90.0)
    desk.book.adopt(Adopt(request_id="r", timeout_s=50.0), 95.0)
    assert desk.book.running["r"].deadline == 145.0
    assert desk.sessions[-1] == Prolong("r", 145.0)


def test_the_sessions_keep_the_new_time():
    allocator = BlockAllocator(num_blocks=4, num_deepstack_blocks=4, num_slots=4)
    sessions = LanguageSessions(allocator, 8, RowSizes(4, 4, 12, 64, 4))
    sessions.handle(Expect("r", [visual("a")], [0], 100.0), 0.0)
    sessions.handle(Prolong("r", 145.0), 95.0)
    sessions.handle(Prolong("another", 145.0), 95.0)
    assert not sessions.handle(Tick(), 144.0)
    [tell] = sessions.handle(Tick(), 145.0)
    assert tell.message.request_id == "r"
    assert sessions.is_idle


def test_what_is_over_is_offered_with_the_attempts_that_there_were(desk):
    """It may be gone when somebody asks, and begin anew under its id: no attempt at it may come twice."""
    allocator = BlockAllocator(num_blocks=4, num_deepstack_blocks=4, num_slots=4)
    sessions = LanguageSessions(allocator, 8, RowSizes(4, 4, 12, 64, 4))
    desk.begin("r", "a", keep_as="r")
    sessions.handle(Expect("r", [visual("a")], [0], 100.0), 0.0)
    sessions.handle(Assign(request_id="r", item=0, attempt=2, encode_rank=1), 0.0)
    desk.book.hear(finished("r"), 1.0)
    sessions.handle(Cancel(request_id="r"), 1.0)
    desk.book.hub_lost(2.0)
    [offer] = desk.book.offer(sessions.last_attempt)
    assert offer.last_attempt == 2


def test_what_nobody_adopts_is_over_in_time(desk):
    desk.begin("r", "a", keep_as="r")
    desk.book.hub_lost(2.0)
    assert desk.book.look(1.9 + KEEP_S)
    assert not desk.book.look(2.0 + KEEP_S)
    assert not desk.book.running
    assert desk.cancelled == [("r", None)]
    desk.told.clear()
    desk.book.adopt(Adopt(request_id="r", timeout_s=50.0), 3.0 + KEEP_S)
    [failed] = desk.told
    assert isinstance(failed, RequestFailed)


def test_an_answer_that_is_cut_ends_the_request_with_the_others(desk):
    desk.begin("r", keep_as="r", n=2)
    desk.book.forget_answer("r", 0, 1.0)
    assert desk.cancelled == [("r", 0)]
    desk.book.hear(finished("r", 1), 2.0)
    assert not desk.book.running
    assert desk.offers() == ["r"]
    assert not desk.book.look(2.0 + KEEP_S)


def test_the_last_answer_that_is_cut_leaves_what_the_others_said(desk):
    desk.begin("r", keep_as="r", n=2)
    desk.book.hear(finished("r", 1), 2.0)
    desk.book.forget_answer("r", 0, 3.0)
    assert desk.cancelled == [("r", None)]
    assert not desk.book.running
    desk.book.forget_answer("r", 1, 3.0)
    desk.told.clear()
    desk.book.adopt(Adopt(request_id="r", timeout_s=50.0), 4.0)
    assert desk.told == [finished("r", 1)]


def test_what_fails_unheard_is_told_to_nobody(desk):
    for name in ("by-engine", "by-sessions", "by-rank"):
        desk.begin(name, keep_as=name)
    desk.book.hub_lost(1.0)
    failure = Failure.of(UnavailableError("no"))
    desk.book.hear(RequestFailed(request_id="by-engine", failure=failure), 2.0)
    desk.book.of_sessions(RequestFailed(request_id="by-sessions", failure=failure), 2.0)
    desk.book.fail("by-rank", failure)
    assert (desk.told, desk.offers(), list(desk.book.running)) == ([], [], [])


def test_what_the_engine_says_of_others_changes_nothing(desk):
    desk.book.hear(Consumed("gone", 0, 1, 3), 1.0)
    desk.book.hear(NeedItems(request_id="gone", items=[0]), 1.0)
    desk.book.preempted("gone")
    assert (desk.sessions, desk.told) == ([], [])


def test_what_the_engine_says_before_it_has_heard_of_the_end_is_not_of_the_next_request_of_that_name(desk):
    """An answer that was kept too long is given up, and begun anew under its id; a step was under way."""
    desk.begin("a", "image", keep_as="a")
    desk.book.hear(tokens("a", 0), 1.0)
    desk.book.hub_lost(2.0)
    desk.book.look(2.0 + KEEP_S)
    assert desk.cancelled == [("a", None)]
    desk.begin("a", "image", keep_as="a", at=70.0)
    desk.told.clear()
    desk.sessions.clear()
    for late in (NeedItems(request_id="a", items=[0]), Consumed("a", 0, 1, 3), tokens("a", 1), finished("a")):
        desk.book.hear(late, 71.0)
    desk.book.preempted("a")
    assert not desk.told
    assert not desk.sessions
    desk.book.left("a")
    desk.book.hear(tokens("a", 0), 72.0)
    desk.book.hear(finished("a"), 73.0)
    assert desk.told == [tokens("a", 0), finished("a")]


def test_one_that_is_given_up_twice_is_left_twice(desk):
    desk.begin("a")
    desk.book.forget("a")
    desk.begin("a")
    desk.book.of_sessions(RequestFailed(request_id="a", failure=Failure.of(UnavailableError("x"))), 1.0)
    desk.begin("a")
    desk.told.clear()
    desk.book.left("a")
    desk.book.hear(tokens("a", 0), 2.0)
    assert not desk.told
    desk.book.left("a")
    desk.book.hear(tokens("a", 0), 2.0)
    assert desk.told == [tokens("a", 0)]
