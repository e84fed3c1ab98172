"""The router of a frontend that comes after another one: what language ranks kept is taken up where it was."""

from __future__ import annotations

from dataclasses import replace

from qwen3vl_disagg.protocol.messages import (
    Adopt,
    Assign,
    Cancel,
    KeptRequest,
    NeedItems,
    RequestFailed,
    Submit,
    Tokens,
)
from qwen3vl_disagg.protocol.routing import Deliver, RankDown, RankUp
from tests.support.routing import BAD_KEPT, Script, admit, finished

KEPT = KeptRequest(name="order", request_id="old-1", last_attempt=4)


def after_a_death() -> Script:
    """Language ranks 2 and 3, of which 3 has kept a request with two images."""
    script = Script()
    script.do(RankUp("language", 3, kept=[KEPT]))
    return script


def adopted() -> Script:
    script = after_a_death()
    assert script.router.kept_id("order") == "old-1"
    script.do(replace(admit("old-1", "a", "b"), keep_as="order"))
    return script


def test_it_goes_to_its_rank_and_is_not_submitted_again():
    script = adopted()
    assert [(send.rank, send.message) for send in script.sent(Adopt)] == [
        (3, Adopt(request_id="old-1", timeout_s=100.0))
    ]
    assert not script.sent(Submit)
    script.language_says(3, Tokens(request_id="old-1", index=0, token_ids=[5, 6]))
    assert [action for action in script.actions if isinstance(action, Deliver)]
    script.language_says(3, finished("old-1"))
    assert [end.error for end in script.ends()] == [None]
    assert script.router.kept_id("order") is None


def test_its_items_are_here_and_are_counted_on_where_they_are_needed_again():
    script = adopted()
    script.language_says(3, NeedItems(request_id="old-1", items=[0, 1]))
    assert [(assign.item, assign.attempt) for assign in script.assigned()] == [(0, 5), (1, 5)]
    assert {send.rank for send in script.sent(Assign)} == {3}


def test_another_name_or_none_is_a_new_request():
    script = after_a_death()
    for name in ("", "another"):
        assert script.router.kept_id(name) is None
        script.do(replace(admit(f"new{name}", "a"), keep_as=name))
        [send] = script.sent(Submit)
        assert send.message.keep_as == name
    assert script.router.kept_id("order") == "old-1"


def test_what_a_rank_kept_goes_with_it_and_what_it_says_next_counts():
    script = after_a_death()
    script.do(RankDown("language", 2))
    assert script.router.kept_id("order") == "old-1"
    script.do(RankDown("language", 3))
    assert script.router.kept_id("order") is None
    script.do(RankUp("language", 3, kept=[KEPT]))
    script.do(RankUp("language", 3, kept=[]))
    assert script.router.kept_id("order") is None


def test_of_two_ranks_that_have_kept_one_name_the_second_is_told_that_nobody_wants_it():
    script = after_a_death()
    second, other = KeptRequest(name="order", request_id="old-2"), KeptRequest(name="other", request_id="old-3")
    script.do(RankUp("language", 2, kept=[second, other]))
    assert [(send.rank, send.message) for send in script.sent(Cancel)] == [(2, Cancel(request_id="old-2"))]
    assert (script.router.kept_id("order"), script.router.kept_id("other")) == ("old-1", "old-3")
    script.do(RankDown("language", 2))
    assert script.router.kept_id("order") == "old-1"
    script.do(replace(admit("old-1", "a", "b"), keep_as="order"))
    assert [send.rank for send in script.sent(Adopt)] == [3]


def test_one_that_is_gone_begins_anew_once():
    script = adopted()
    script.now = 10.0
    gone = RequestFailed(request_id="old-1", failure=BAD_KEPT)
    script.language_says(3, gone)
    [send] = script.sent(Submit)
    assert (send.rank, send.message.keep_as, send.message.timeout_s) == (3, "order", 90.0)
    assert not script.ends()
    script.language_says(3, NeedItems(request_id="old-1", items=[1]))
    assert [(assign.item, assign.attempt) for assign in script.assigned()] == [(1, 5)]
    script.language_says(3, gone)
    assert [end.error.status for end in script.ends()] == [503]
    assert not script.sent(Cancel)


def test_one_that_has_said_something_and_fails_has_failed():
    script = adopted()
    script.language_says(3, Tokens(request_id="old-1", index=0, token_ids=[5]))
    script.language_says(3, RequestFailed(request_id="old-1", failure=BAD_KEPT))
    assert [end.error.status for end in script.ends()] == [503]
    assert not script.sent(Submit)
