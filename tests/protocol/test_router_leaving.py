"""The router when ranks leave on purpose, and where language ranks only run together."""

from __future__ import annotations

import pytest

from qwen3vl_disagg.core.errors import Failure, TransferError, UnavailableError
from qwen3vl_disagg.protocol.messages import (
    Assign,
    Cancel,
    ItemFailed,
    ItemReceived,
    Leaving,
    LinksUp,
    Stop,
    Submit,
)
from qwen3vl_disagg.protocol.router import Router
from qwen3vl_disagg.protocol.routing import Abandon, FromRank, RankDown, RankUp
from qwen3vl_disagg.protocol.session_events import Tick
from tests.support.routing import Script, admit

JOINED = 9


def with_joined(encode: int = 1, language: int = 2) -> Script:
    """A router with one encode rank more than the world has."""
    script = Script(encode=encode, language=language)
    script.do(RankUp("encode", JOINED))
    script.encode_says(JOINED, LinksUp(language_ranks=script.languages))
    return script


def start_on(script: Script, rank: int, prefix: str = "r") -> tuple[str, int]:
    """A request whose one item is encoded on this rank; its language rank."""
    for n in range(100):
        name = f"{prefix}{n}"
        language_rank = script.start(name, name)
        [assign] = script.assigned()
        if assign.encode_rank == rank:
            return name, language_rank
        script.language_says(language_rank, ItemReceived(request_id=name, item=0, attempt=1))
    raise AssertionError(f"nothing went to rank {rank}")


def test_one_that_leaves_gets_nothing_new_and_goes_when_its_last_item_has_arrived():
    script = with_joined()
    name, language_rank = start_on(script, JOINED)
    assert script.encode_says(JOINED, Leaving()) == []
    for n in range(20):
        script.start(f"later{n}", f"later{n}")
        assert {assign.encode_rank for assign in script.assigned()} == {0}
        assert not script.sent(Stop)
    script.language_says(language_rank, ItemReceived(request_id=name, item=0, attempt=1))
    assert [(send.role, send.rank) for send in script.sent(Stop)] == [("encode", JOINED)]
    script.do(Tick())
    assert not script.sent(Stop)
    script.do(RankDown("encode", JOINED))
    assert not script.actions
    assert len(script.router._requests) > 20


def test_one_with_nothing_to_do_goes_at_once():
    script = with_joined()
    script.encode_says(JOINED, Leaving())
    assert [send.rank for send in script.sent(Stop)] == [JOINED]


@pytest.mark.parametrize("end", ["failed", "abandoned", "dead"])
def test_an_item_that_ends_in_another_way_lets_it_go_too(end):
    script = with_joined()
    name, _ = start_on(script, JOINED)
    script.encode_says(JOINED, Leaving())
    match end:
        case "failed":
            failure = Failure.of(TransferError("?"))
            script.encode_says(JOINED, ItemFailed(request_id=name, item=0, attempt=1, failure=failure))
            assert [assign.encode_rank for assign in script.assigned()] == [0]  # tried again, and not here
        case "abandoned":
            script.do(Abandon(name))
        case "dead":
            script.do(RankDown("encode", JOINED))
            assert [assign.encode_rank for assign in script.assigned()] == [0]
            return
    assert [send.rank for send in script.sent(Stop)] == [JOINED]


def test_where_only_one_that_leaves_is_left_items_wait():
    script = Script(encode=1, language=1)
    script.encode_says(0, Leaving())
    assert script.router.linked_language_ranks == script.router.encode_ranks == set()
    script.start("a", "x")
    assert not script.assigned()
    script.do(RankUp("encode", JOINED))
    script.encode_says(JOINED, LinksUp(language_ranks=script.languages))
    assert [send.message.encode_rank for send in script.sent(Assign)] == [JOINED]


def test_one_that_comes_back_under_its_number_is_not_leaving():
    script = with_joined(encode=0, language=1)
    script.encode_says(JOINED, Leaving())
    script.do(RankUp("encode", JOINED))
    script.encode_says(JOINED, LinksUp(language_ranks=script.languages))
    script.start("a", "x")
    assert [assign.encode_rank for assign in script.assigned()] == [JOINED]


# ---- language ranks that only run together ----


def together() -> tuple[Router, Script]:
    script = Script(encode=1, language=3)
    script.router.required = frozenset(script.languages)
    return script.router, script


def test_nothing_is_admitted_before_all_are_there_and_the_first_missing_one_is_named():
    router = Router(required=[1, 2, 3])
    for rank, missing in [(2, 1), (1, 3), (3, None)]:
        router.handle(RankUp("language", rank), 0.0)
        [action] = router.handle(admit(f"r{rank}"), 0.0)
        if missing is None:
            assert isinstance(action.message, Submit)
        else:
            assert isinstance(action.error, UnavailableError)
            assert str(action.error) == f"language rank {missing} is missing"


def test_when_one_goes_every_request_ends_and_the_others_hear_of_it():
    router, script = together()
    homes = {script.start(name): name for name in "abc"}
    assert set(homes) == {1, 2, 3}
    script.do(RankDown("language", 2))
    assert {end.request_id for end in script.ends()} == {"a", "b", "c"}
    assert all(isinstance(end.error, UnavailableError) and "rank 2" in str(end.error) for end in script.ends())
    assert {(send.role, send.rank) for send in script.sent(Cancel)} == {("language", 1), ("language", 3)}
    assert router.num_requests == 0
    [end] = script.do(admit("d"))
    assert "language rank 2 is missing" in str(end.error)
    script.do(RankUp("language", 2))
    assert len(script.do(admit("e"))) == 1
    assert script.sent(Submit)


def test_one_that_was_not_there_takes_nothing_with_it():
    router, script = together()
    script.start("a")
    assert script.do(RankDown("language", 77)) == []
    assert router.handle(FromRank("encode", 0, LinksUp(language_ranks=[])), 0.0) == []
    assert router.num_requests == 1
