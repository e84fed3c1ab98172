"""Who is to blame when an encode rank dies: only what it worked on, and only what it worked on alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.protocol.messages import (
    Assign,
    EncodingBegun,
    EncodingEnded,
    ItemLost,
    ItemReceived,
    Leaving,
    LinksUp,
    NeedItems,
    Submit,
)
from qwen3vl_disagg.protocol.router import Router, RouterLimits
from qwen3vl_disagg.protocol.routing import Abandon, End, FromRank, RankDown, RankUp, Send
from qwen3vl_disagg.protocol.suspects import Suspects
from tests.support.routing import Script, admit, finished

MAX_DEATHS = RouterLimits().max_deaths


@dataclass
class Rank:
    """An encode rank as the pipeline is: first come, first served, and some alone."""

    queue: list[Assign] = field(default_factory=list)
    inside: list[Assign] = field(default_factory=list)

    @property
    def can_begin(self) -> bool:
        return bool(self.queue) and not (self.inside and (self.queue[0].is_alone or self.inside[0].is_alone))


class Fleet:
    """Encode ranks that do what the router says, one language rank, and contents of which some are poison."""

    def __init__(self, num_ranks: int, poison: set[str]) -> None:
        self.router = Router(RouterLimits(max_waiting=1000))
        self.language, self.poison = num_ranks, poison
        self.ranks = [Rank() for _ in range(num_ranks)]
        self.left: dict[str, set[int]] = {}
        self.digests: dict[tuple[str, int], str] = {}
        self.errors: dict[str, Exception | None] = {}
        self.deaths_alone: Counter[str] = Counter()
        self.num_deaths = 0
        self.do(RankUp("language", self.language))
        for rank in range(num_ranks):
            self.start(rank)

    def do(self, event) -> None:
        for action in self.router.handle(event, 0.0):
            if isinstance(action, End):
                self.errors[action.request_id] = action.error
                for rank in self.ranks:
                    rank.queue = [item for item in rank.queue if item.request_id != action.request_id]
            elif isinstance(action, Send) and isinstance(action.message, Submit):
                indices = list(range(len(action.message.items)))
                self.left[action.message.request_id] = set(indices)
                self.digests |= {(action.message.request_id, i): v.digest for i, v in enumerate(action.message.items)}
                self.language_says(NeedItems(request_id=action.message.request_id, items=indices))
            elif isinstance(action, Send) and isinstance(action.message, Assign):
                self.ranks[action.message.encode_rank].queue.append(action.message)

    def language_says(self, message) -> None:
        self.do(FromRank("language", self.language, message))

    def digest(self, item: Assign) -> str:
        return self.digests[item.request_id, item.item]

    def start(self, rank: int) -> None:
        self.do(RankUp("encode", rank))
        self.do(FromRank("encode", rank, LinksUp(language_ranks=[self.language])))

    def begin(self, rank: int) -> None:
        item = self.ranks[rank].queue.pop(0)
        self.ranks[rank].inside.append(item)
        self.do(FromRank("encode", rank, EncodingBegun(digest=self.digest(item))))

    def finish(self, rank: int) -> None:
        item = self.ranks[rank].inside[0]
        if self.digest(item) in self.poison:
            self.die(rank)
            return
        del self.ranks[rank].inside[0]
        self.do(FromRank("encode", rank, EncodingEnded(digest=self.digest(item), is_well=True)))
        self.deaths_alone.pop(self.digest(item), None)
        if item.request_id in self.errors:
            return
        self.language_says(ItemReceived(request_id=item.request_id, item=item.item, attempt=item.attempt))
        self.left[item.request_id].discard(item.item)
        if not self.left[item.request_id]:
            self.language_says(finished(item.request_id))

    def die(self, rank: int) -> None:
        self.num_deaths += 1
        contents = {self.digest(item) for item in self.ranks[rank].inside}
        if len(contents) == 1:
            self.deaths_alone.update(contents)
        self.ranks[rank] = Rank()
        self.do(RankDown("encode", rank))
        self.start(rank)

    def run(self, choose=lambda options: options[0]) -> None:
        for _ in range(5000):
            options = [(self.begin, rank) for rank, state in enumerate(self.ranks) if state.can_begin]
            options += [(self.finish, rank) for rank, state in enumerate(self.ranks) if state.inside]
            if not options:
                return
            step, rank = choose(options)
            step(rank)
        raise AssertionError("it does not come to an end")


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_poisoned_image_beside_twenty_good_ones_fails_alone(num_ranks):
    fleet = Fleet(num_ranks, {"poison"})
    for n in range(20):
        fleet.do(admit(f"r{n}", f"good {n}"))
        if n == 7:
            fleet.do(admit("bad", "also good", "poison"))
    fleet.run(lambda options: max(options, key=lambda option: option[0] == fleet.begin))
    assert {name for name, error in fleet.errors.items() if error is not None} == {"bad"}
    error = fleet.errors["bad"]
    assert isinstance(error, InputError)
    assert (error.status, error.code, error.param) == (400, "harmful_media", "messages[0].content[poison]")
    assert fleet.num_deaths <= 2 + MAX_DEATHS
    fleet.do(admit("again", "poison"))  # in another request, and at once
    assert isinstance(fleet.errors["again"], InputError)
    assert fleet.num_deaths <= 2 + MAX_DEATHS
    fleet.do(admit("next", "good 3"))
    fleet.run()
    assert fleet.errors["next"] is None


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_only_what_was_alone_at_deaths_is_charged(seed):
    """Any order of beginnings, ends, kills from outside and clients that leave."""
    random = Random(seed)
    num, num_ranks = random.randint(1, 8), random.randint(1, 3)
    poison = {f"c{n}" for n in range(num) if random.random() < 0.2}
    num_kills = random.choice([0, 0, 3, 30])
    fleet = Fleet(num_ranks, poison)
    contents_of: dict[str, set[str]] = {}
    for n in range(num):
        contents = [f"c{n}", *(f"c{random.randrange(num)}" for _ in range(random.randint(0, 2)))]
        contents_of[f"r{n}"] = set(contents)
        fleet.do(admit(f"r{n}", *contents))
    left: set[str] = set()

    def choose(options):
        nonlocal num_kills
        what = random.random()
        if num_kills and what < 0.1:
            num_kills -= 1
            return fleet.die, random.randrange(num_ranks)
        if what > 0.97 and (running := sorted(fleet.left.keys() - fleet.errors.keys())):
            name = random.choice(running)
            left.add(name)
            return lambda _: fleet.do(Abandon(name)), 0
        return random.choice(options)

    fleet.run(choose)
    assert fleet.errors.keys() == contents_of.keys()
    for name, error in fleet.errors.items():
        if error is None:
            assert name in left or not contents_of[name] & poison, "poison was answered"
            continue
        assert isinstance(error, InputError), error
        digest = (error.param or "")[len("messages[0].content[") : -1]
        assert fleet.deaths_alone[digest] >= MAX_DEATHS, f"{digest} is told to be harmful"
    for digest in poison:  # others may have begun it by then
        assert fleet.deaths_alone[digest] < MAX_DEATHS + num_ranks, "a condemned image came to a rank again"


def test_a_death_with_nothing_under_way_charges_nothing_however_often():
    script = Script(encode=1)
    script.start("a", "x", "y")
    for _ in range(20):
        script.do(RankDown("encode", 0))
        assert not script.ends()
        script.do(RankUp("encode", 0))
        script.encode_says(0, LinksUp(language_ranks=script.languages))
        assert [assign.is_alone for assign in script.assigned()] == [False, False]


def test_what_was_encoded_is_not_under_way_any_more():
    script = Script(encode=1)
    script.start("a", "x", "y")
    for _ in range(MAX_DEATHS):
        for name in "xy":
            script.encode_says(0, EncodingBegun(digest=name))
        script.encode_says(0, EncodingEnded(digest="y", is_well=True))
        script.do(RankDown("encode", 0))  # x was alone
        script.do(RankUp("encode", 0))
        script.encode_says(0, LinksUp(language_ranks=script.languages))
    assert script.router._attempts._suspects.is_condemned("x", 0.0)
    assert not script.router._attempts._suspects.is_suspect("y", 0.0)


def test_a_client_that_leaves_takes_no_blame_with_it():
    """Poison that is cancelled as soon as it is under way is charged, and nobody else is."""
    script = Script(encode=1)
    for n in range(MAX_DEATHS):
        script.start(f"a{n}", "poison")
        script.encode_says(0, EncodingBegun(digest="poison"))
        script.do(Abandon(f"a{n}"))
        script.start(f"b{n}", "good")
        script.do(RankDown("encode", 0))
        script.do(RankUp("encode", 0))
        script.encode_says(0, LinksUp(language_ranks=script.languages))
        assert not script.router._attempts._suspects.is_suspect("good", 0.0)
    script.do(admit("c", "poison"))
    assert isinstance(script.ends()[0].error, InputError)


def test_a_rank_that_leaves_on_purpose_with_items_under_way_blames_nobody():
    script = Script(encode=1)
    script.start("a", "x")
    script.encode_says(0, EncodingBegun(digest="x"))
    script.encode_says(0, Leaving())
    script.do(RankDown("encode", 0))
    assert not script.router._attempts._suspects.is_suspect("x", 0.0)


def test_the_lost_link_before_a_death_is_not_charged_besides():
    """Its language rank may see the end of a link before the hub sees that of the rank."""
    script = Script(encode=1, language=1)
    rank = script.start("a", "x")
    for attempt in range(1, 10):
        lost = ItemLost(request_id="a", item=0, attempt=attempt, reason="link", dead_epoch=attempt)
        script.language_says(rank, lost)
        assert not script.ends()
        script.do(RankDown("encode", 0))
        script.do(RankUp("encode", 0))
        script.encode_says(0, LinksUp(language_ranks=[rank], epochs=[attempt + 1]))
        assert [assign.attempt for assign in script.assigned()] == [attempt + 1]


def test_a_condemned_image_ends_every_request_that_waits_for_it():
    script = Script(encode=1)
    for n in range(3):
        script.start(f"a{n}", "good", "poison")
    script.start("b", "good")
    for _ in range(MAX_DEATHS):
        script.encode_says(0, EncodingBegun(digest="poison"))
        script.do(RankDown("encode", 0))
        ends = script.ends()
        script.do(RankUp("encode", 0))
        script.encode_says(0, LinksUp(language_ranks=script.languages))
    assert sorted(end.request_id for end in ends) == ["a0", "a1", "a2"]
    assert script.router.num_requests == 1


def test_an_image_that_was_condemned_while_its_request_was_preempted_is_not_tried_again():
    script = Script(encode=1)
    rank = script.start("a", "poison")
    for attempt in range(1, MAX_DEATHS + 1):
        script.encode_says(0, EncodingBegun(digest="poison"))
        if attempt == MAX_DEATHS:  # it gives up what it has
            script.language_says(rank, ItemReceived(request_id="a", item=0, attempt=attempt))
        script.do(RankDown("encode", 0))
        script.do(RankUp("encode", 0))
        script.encode_says(0, LinksUp(language_ranks=script.languages))
    assert script.router.num_requests == 1
    script.language_says(rank, NeedItems(request_id="a", items=[0]))
    [end] = script.ends()
    assert (end.request_id, end.error.code, end.error.param) == ("a", "harmful_media", "messages[0].content[poison]")
    assert not script.assigned()


def test_what_is_remembered_is_bounded_in_number_and_in_time():
    suspects = Suspects(max_deaths=2, memory_s=10.0, max_remembered=3)
    assert suspects.died(["a"], 0.0) == []
    assert suspects.died(["a"], 1.0) == ["a"]
    assert suspects.is_condemned("a", 10.9)
    assert not suspects.is_condemned("a", 11.0)
    assert suspects.num_deaths("a", 11.0) == 0
    assert suspects.died(["a"], 12.0) == []  # it begins anew
    for n in range(3):
        assert suspects.died([f"b{n}", f"c{n}"], 13.0) == []
    assert len(suspects._records) == 3
    assert not suspects.is_suspect("a", 13.0)
    assert suspects.is_suspect("c2", 13.0)
    suspects.cleared("c2")
    assert not suspects.is_suspect("c2", 13.0)


def test_a_condemned_image_is_tried_again_after_a_while():
    script = Script(encode=1)
    script.start("a", "x")
    for _ in range(MAX_DEATHS):
        script.encode_says(0, EncodingBegun(digest="x"))
        script.do(RankDown("encode", 0))
        script.do(RankUp("encode", 0))
        script.encode_says(0, LinksUp(language_ranks=script.languages))
    script.now = RouterLimits().suspect_s - 1
    script.do(admit("b", "x"))
    assert isinstance(script.ends()[0].error, InputError)
    script.now += 2
    script.do(admit("c", "x"))
    assert script.sent(Submit)


@pytest.mark.parametrize("how", ["down", "up again"])
def test_every_kind_of_end_of_a_rank_counts(how):
    """Its end is noticed, or its next incarnation comes before that."""
    script = Script(encode=1)
    script.start("a", "x")
    script.encode_says(0, EncodingBegun(digest="x"))
    if how == "down":
        script.do(RankDown("encode", 0))
    script.do(RankUp("encode", 0))
    script.encode_says(0, LinksUp(language_ranks=script.languages))
    assert [assign.is_alone for assign in script.assigned()] == [True]
