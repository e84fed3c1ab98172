"""The router, case by case."""

from __future__ import annotations

from collections import defaultdict

import pytest

from qwen3vl_disagg.core.errors import (
    DeadlineError,
    DisaggError,
    Failure,
    InputError,
    OverloadedError,
    ServerError,
    TransferError,
    UnavailableError,
)
from qwen3vl_disagg.protocol.messages import (
    Assign,
    Cancel,
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
from qwen3vl_disagg.protocol.routing import (
    Abandon,
    AdmitTogether,
    Deliver,
    Drain,
    End,
    EndAll,
    RankDown,
    RankUp,
    Send,
)
from qwen3vl_disagg.protocol.session_events import Tick
from tests.support.routing import Script, admit, finished

BAD = Failure.of(InputError("bad"))
ERRORS: list[DisaggError] = [
    InputError("why", status=413, code="x"),
    OverloadedError("why"),
    UnavailableError("why"),
    DeadlineError("why"),
    TransferError("why"),
    ServerError("why", code="engine_error"),
]


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


def test_its_language_rank_alone_hears_who_makes_an_item():
    script = Script()
    rank = script.start("a", "x")
    [send] = script.actions
    assert (send.role, send.rank) == ("language", rank)
    assert send.message == Assign(request_id="a", item=0, attempt=1, encode_rank=send.message.encode_rank)
    assert send.message.encode_rank in (0, 1)
    # Asking again while it is on its way changes nothing.
    assert script.language_says(rank, NeedItems(request_id="a", items=[0])) == []


def test_the_same_content_goes_to_the_same_rank_while_it_is_idle():
    script = Script(encode=4)
    seen = defaultdict(set)
    for n in range(40):
        rank = script.start(f"r{n}", f"item{n % 10}")
        [assign] = script.assigned()
        seen[n % 10].add(assign.encode_rank)
        script.language_says(rank, ItemReceived(request_id=f"r{n}", item=0, attempt=1))
    assert all(len(ranks) == 1 for ranks in seen.values())
    assert len({next(iter(ranks)) for ranks in seen.values()}) >= 3


def test_images_of_one_request_are_spread_over_idle_encode_ranks():
    script = Script(encode=4)
    for n in range(8):
        script.start(f"r{n}", *(f"item{n}-{k}" for k in range(4)))
        assert sorted(assign.encode_rank for assign in script.assigned()) == [0, 1, 2, 3]
        script.do(Abandon(f"r{n}"))


def test_a_rank_without_a_link_to_the_language_rank_gets_nothing():
    script = Script()
    script.encode_says(0, LinksUp(language_ranks=[3]))
    for n in range(20):
        rank = script.start(f"r{n}", f"x{n}")
        [assign] = script.assigned()
        assert rank == 3 or assign.encode_rank == 1


def test_a_failed_attempt_goes_to_another_rank_and_three_failures_end_the_request():
    script = Script(encode=3)
    rank = script.start("a", "x")
    used = []
    for attempt in (1, 2, 3):
        [assign] = script.assigned()
        assert assign.attempt == attempt
        used.append(assign.encode_rank)
        lost = ItemLost(request_id="a", item=0, attempt=attempt, reason="link")
        failed = ItemFailed(request_id="a", item=0, attempt=attempt, failure=Failure.of(TransferError("no")))
        script.language_says(rank, lost) if attempt % 2 else script.encode_says(assign.encode_rank, failed)
    assert sorted(used) == [0, 1, 2]
    [end] = script.ends()
    assert isinstance(end.error, TransferError)
    assert [send.rank for send in script.sent(Cancel) if send.role == "language"] == [rank]


def test_bad_media_ends_the_request_with_its_place_and_is_not_tried_again():
    script = Script()
    rank = script.start("a", "x", "y")
    by_item = {assign.item: assign.encode_rank for assign in script.assigned()}
    failure = Failure.of(InputError("not an image", status=413, code="x"))
    script.encode_says(by_item[1], ItemFailed(request_id="a", item=1, attempt=1, failure=failure))
    [end] = script.ends()
    assert isinstance(end.error, InputError)
    assert end.error.param == "messages[0].content[y]"
    assert (end.error.status, end.error.code, end.error.message) == (413, "x", "not an image")
    assert script.sent(Cancel) == [Send("language", rank, Cancel(request_id="a"))]


def test_a_dead_encode_rank_costs_no_request_even_if_it_is_the_only_one():
    script = Script(encode=1)
    ranks = {f"r{n}": script.start(f"r{n}", f"x{n}") for n in range(50)}
    assert script.do(RankDown("encode", 0)) == []
    script.now = 20.0
    assert script.do(Tick()) == []
    script.do(RankUp("encode", 0))
    script.encode_says(0, LinksUp(language_ranks=script.languages))
    again = script.assigned()
    assert sorted(assign.request_id for assign in again) == sorted(ranks)
    assert {assign.attempt for assign in again} == {2}


def test_items_of_a_dead_rank_move_to_the_others_at_once():
    script = Script(encode=2)
    script.start("a", "x", "y")
    before = {assign.item: assign.encode_rank for assign in script.assigned()}
    script.do(RankDown("encode", before[0]))
    [assign] = script.assigned()
    assert (assign.encode_rank, assign.item, assign.attempt) == (before[1], 0, 2)


def test_an_attempt_outlives_its_link_until_the_language_rank_gives_it_up():
    script = Script(encode=2, language=1)
    rank = script.start("a", "x")
    [first] = script.assigned()
    script.encode_says(first.encode_rank, LinksUp(language_ranks=[rank], epochs=[1]))
    assert script.encode_says(first.encode_rank, LinksUp(language_ranks=[], epochs=[])) == []
    assert script.encode_says(first.encode_rank, LinksUp(language_ranks=[rank], epochs=[2])) == []
    received = ItemReceived(request_id="a", item=0, attempt=1)
    script.language_says(rank, received)  # resumed over the new link
    assert script.language_says(rank, ItemLost(request_id="a", item=0, attempt=1, reason="late")) == []
    script.start("b", "x")
    [first] = script.assigned()
    assert script.encode_says(first.encode_rank, LinksUp(language_ranks=[], epochs=[])) == []
    script.language_says(rank, ItemLost(request_id="b", item=0, attempt=1, reason="no link", dead_epoch=2))
    [second] = script.assigned()
    assert (second.encode_rank, second.attempt) == (1 - first.encode_rank, 2)


def test_a_request_that_ends_with_its_encode_rank_says_nothing_to_it():
    script = Script(encode=1)
    rank = script.start("a", "x", "y")
    script.now = 100.0  # its time is up
    script.do(RankDown("encode", 0))
    assert script.actions[0] == Send("language", rank, Cancel(request_id="a"))
    assert len(script.actions) == 2
    assert script.ends()


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


def test_links_reported_before_the_language_rank_is_known_count():
    """As when a new frontend hears from the encode rank first."""
    script = Script(encode=1, language=0)
    script.encode_says(0, LinksUp(language_ranks=[1]))
    script.do(RankUp("language", 1))
    script.start("a", "x")
    assert script.assigned()


def test_a_lost_language_rank_ends_its_requests_and_frees_the_encode_ranks():
    script = Script(encode=1, language=2)
    first, second = script.start("a", "x"), script.start("b", "y")
    assert first != second
    script.do(RankDown("language", first))
    [end] = script.ends()
    assert end.request_id == "a"
    assert isinstance(end.error, UnavailableError)
    assert script.sent(Cancel) == []
    assert script.router._attempts.ranks[0].jobs.keys() == {("b", 0)}
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


def test_prompts_of_one_request_are_refused_together_or_not_at_all():
    script = Script(max_waiting=1, max_waiting_tokens=300)
    script.do(AdmitTogether([admit("a"), admit("a2", num_tokens=300)]))
    assert len(script.router._requests) == 2
    script.do(admit("b"))
    assert isinstance(script.ends()[0].error, OverloadedError)
    rank = script.router._requests["a2"].language_rank
    script.language_says(rank, Tokens(request_id="a2", index=0, token_ids=[5]))
    script.do(Abandon("a"))
    assert script.router.refusal(0.0) is None
    script = Script(max_waiting_tokens=300)
    script.do(admit("a"))
    script.do(AdmitTogether([admit("b"), admit("b2", num_tokens=101)]))
    assert [(end.request_id, type(end.error)) for end in script.ends()] == [
        ("b", OverloadedError),
        ("b2", OverloadedError),
    ]
    script.do(AdmitTogether([admit("b"), admit("b2")]))
    assert [send.message.request_id for send in script.sent(Submit)] == ["b", "b2"]
    script.do(Drain())
    script.do(AdmitTogether([admit("c"), admit("c2")]))
    assert [type(end.error) for end in script.ends()] == [UnavailableError] * 2


def test_a_request_ends_with_the_last_of_its_answers():
    script = Script(max_waiting=3)
    script.do(admit("a", n=3))
    [submit] = script.sent(Submit)
    rank = script.router._requests["a"].language_rank
    assert submit.message.sampling.n == 3
    # 4 bytes of a prompt are one token; three answers of 99 besides
    assert script.router._language[rank].requests == {"a": 1 + 3 * 99}
    assert script.router.refusal(0.0) is not None
    said = [Tokens(request_id="a", index=0, token_ids=[5], sample=sample) for sample in (2, 0)]
    for message in said:
        assert script.language_says(rank, message) == [Deliver("a", message)]
        assert script.language_says(rank, message) == []
    assert script.router.refusal(0.0, num_new=2) is None
    assert script.language_says(rank, finished("a", 2)) == [Deliver("a", finished("a", 2))]
    assert script.language_says(rank, finished("a", 2)) == []
    assert script.do(Abandon("a", 0)) == [Send("language", rank, Cancel(request_id="a", sample=0))]
    assert script.do(Abandon("a", 0)) == []
    late = Tokens(request_id="a", index=1, token_ids=[5], sample=0)
    assert script.language_says(rank, late) == []
    assert script.do(Abandon("a", 1)) == [Send("language", rank, Cancel(request_id="a")), End("a")]
    assert not script.router.num_requests


def test_part_of_an_answer_that_is_lost_ends_all_of_its_request():
    script = Script()
    script.do(admit("a", n=2))
    rank = script.router._requests["a"].language_rank
    script.language_says(rank, Tokens(request_id="a", index=0, token_ids=[5], sample=1))
    script.language_says(rank, Tokens(request_id="a", index=1, token_ids=[5], sample=0))
    [end] = script.ends()
    assert isinstance(end.error, ServerError)
    assert script.sent(Cancel)


def test_what_an_old_attempt_or_a_finished_request_says_changes_nothing():
    script = Script()
    rank = script.start("a", "x")
    [first] = script.assigned()
    script.language_says(rank, ItemLost(request_id="a", item=0, attempt=1, reason="link"))
    [second] = script.assigned()
    assert second.encode_rank != first.encode_rank
    stale = [
        (first.encode_rank, Decoded(request_id="a", item=0, attempt=1)),
        (first.encode_rank, ItemFailed(request_id="a", item=0, attempt=1, failure=BAD)),
        (first.encode_rank, ItemFailed(request_id="a", item=0, attempt=2, failure=BAD)),
        (second.encode_rank, Decoded(request_id="a", item=9, attempt=2)),
    ]
    for sender, message in stale:
        assert script.encode_says(sender, message) == []
    assert script.language_says(rank, ItemReceived(request_id="a", item=0, attempt=1)) == []
    assert script.language_says(5 - rank, finished("a")) == []  # another rank's request
    assert script.encode_says(second.encode_rank, Decoded(request_id="a", item=0, attempt=2)) != []
    assert script.encode_says(second.encode_rank, Decoded(request_id="a", item=0, attempt=2)) == []
    script.language_says(rank, finished("a"))
    assert len(script.ends()) == 1
    assert script.language_says(rank, finished("a")) == []
    assert script.language_says(rank, Tokens(request_id="a", index=0, token_ids=[1])) == [
        Send("language", rank, Cancel(request_id="a"))
    ]
    assert script.do(RankDown("encode", second.encode_rank)) == []


def test_tokens_never_repeat_and_never_skip():
    script = Script()
    rank = script.start("a")
    first = Tokens(request_id="a", index=0, token_ids=[1, 2])
    assert script.language_says(rank, first) == [Deliver("a", first)]
    assert script.language_says(rank, first) == []
    script.language_says(rank, Tokens(request_id="a", index=3, token_ids=[9]))
    assert isinstance(script.ends()[0].error, ServerError)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.code)
def test_a_rank_s_failure_keeps_its_kind(error: DisaggError):
    script = Script()
    rank = script.start("a")
    script.language_says(rank, RequestFailed(request_id="a", failure=Failure.of(error)))
    [end] = script.ends()
    assert type(end.error) is type(error)
    assert (end.error.status, end.error.code, str(end.error)) == (error.status, error.code, str(error))
    assert script.sent(Cancel) == []


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.code)
def test_an_item_s_failure_keeps_its_kind(error: DisaggError):
    """What is final ends the request at once, all else after the last try; with the item's place."""
    script = Script(encode=1)
    script.start("a", "x")
    failure = Failure.of(error)
    for attempt in range(1, 2 if failure.is_final else 4):
        assert not script.ends()
        script.encode_says(0, ItemFailed(request_id="a", item=0, attempt=attempt, failure=failure))
    [end] = script.ends()
    assert type(end.error) is type(error)
    assert (end.error.status, end.error.code, str(end.error)) == (error.status, error.code, str(error))
    assert end.error.param == "messages[0].content[x]"


@pytest.mark.parametrize("news", ["failed", "lost", "death"])
def test_an_attempt_that_fails_when_the_time_is_up_is_a_deadline(news: str):
    """Whatever comes first, the tick or the news."""
    script = Script(encode=1, language=1)
    script.do(admit("a", "x", timeout_s=5.0))
    script.language_says(1, NeedItems(request_id="a", items=[0]))
    script.now = 5.0
    ids = {"request_id": "a", "item": 0, "attempt": 1}
    if news == "failed":
        script.encode_says(0, ItemFailed(**ids, failure=Failure.of(TransferError("no"))))
    elif news == "lost":
        script.language_says(1, ItemLost(**ids, reason="link"))
    else:
        script.do(RankDown("encode", 0))
    [end] = script.ends()
    assert type(end.error) is DeadlineError


def test_nothing_goes_over_a_dead_link_before_a_new_one_is_there():
    """The language rank hears of an encode rank's death first; until the hub knows too, trying again is in vain."""
    script = Script(encode=1, language=1)
    script.encode_says(0, LinksUp(language_ranks=[1], epochs=[3]))
    script.do(admit("a", "x"))
    script.language_says(1, NeedItems(request_id="a", items=[0]))
    assert any(isinstance(action.message, Assign) for action in script.actions)
    script.language_says(1, ItemLost(request_id="a", item=0, attempt=1, reason="gone", dead_epoch=3))
    assert script.actions == []
    script.encode_says(0, LinksUp(language_ranks=[1], epochs=[4]))
    assert [a.message.attempt for a in script.actions if isinstance(a.message, Assign)] == [2]
    # News of an older link do not touch the new one.
    script.language_says(1, ItemLost(request_id="a", item=0, attempt=2, reason="late", dead_epoch=3))
    assert [a.message.attempt for a in script.actions if isinstance(a.message, Assign)] == [3]
