"""The order in which requests are due, on both sides of the sessions: who gets room, whose items are encoded."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.protocol.encode_sessions import ENCODING, QUEUED, EncodeSessions
from qwen3vl_disagg.protocol.messages import Abort, Frame
from qwen3vl_disagg.protocol.session_events import Encoded, FrameIn, LinkUp, SessionLimits, StartEncode
from tests.properties.encode_side import grant_of
from tests.properties.language_side import Side, bodies, granted
from tests.properties.session_parts import ids

# ---- room on the language side ----


def test_room_is_given_as_requests_are_due_and_then_as_they_came():
    side = Side(blocks=1)
    for name, due in (("first", 5.0), ("late", 50.0), ("soon", 30.0), ("soon, too", 30.0), ("urgent", 10.0)):
        side.expect(name, 2, due=due)
    order = granted(side.assign("first"))
    for name in ("late", "soon", "soon, too", "urgent"):
        assert side.assign(name) == []
    for _ in range(4):
        side.receive(order[-1][0])
        order += granted(side.consume(order[-1][0]))
    assert [name for name, *_ in order] == ["first", "urgent", "soon", "soon, too", "late"]


def test_what_has_begun_comes_before_whoever_is_due_before_it():
    side = Side(blocks=1)
    side.expect("begun", 4, due=50.0)
    side.assign("begun")
    side.expect("urgent", 2, due=10.0)
    side.assign("urgent")
    side.receive("begun")
    assert granted(side.consume("begun")) == [("begun", 0, 2, 4)]


def test_a_grant_says_how_long_it_is_until_the_request_is_due_and_a_request_keeps_its_due_time():
    side = Side()
    side.expect("r", 2, due=12.0)
    side.expect("no target", 2)
    side.now = 5.0
    [grant] = bodies(side.assign("r"))
    [other] = bodies(side.assign("no target"))
    assert (grant.due_s, other.due_s) == (7.0, FIRST_COME)
    side.now = 20.0
    side.expect("r", 2, due=12.0)  # it was preempted, and is back
    [again] = bodies(side.assign("r", attempt=2))
    assert again.due_s == -8.0


# ---- places on the encode side ----


class Encoder:
    """Linked to some language ranks. `begun`: attempts in the order in which they were started."""

    def __init__(self, num_language: int = 1, **limits: int) -> None:
        self.sessions, self.now = EncodeSessions(SessionLimits(**limits)), 0.0
        self.seqs = dict.fromkeys(range(num_language), 0)
        self.begun: list[str] = []
        for rank in self.seqs:
            self.do(LinkUp(rank, 1))

    def do(self, event) -> None:
        for action in self.sessions.handle(event, self.now):
            if isinstance(action, StartEncode):
                self.begun.append(action.attempt[0])
                assert action.due == self.sessions.items[action.attempt].due

    def want(self, name: str, due: float, rank: int = 0, *, item: int = 0, modality: str = "image") -> None:
        grant = grant_of((name, item, 1), 0, 6)
        visual = msgspec.structs.replace(grant.visual, modality=modality)
        self._say(rank, msgspec.structs.replace(grant, visual=visual, due_s=due - self.now))

    def give_up(self, name: str, rank: int = 0, *, item: int = 0) -> None:
        self._say(rank, Abort(**ids((name, item, 1)), reason="no longer wanted"))

    def _say(self, rank: int, body) -> None:
        self.seqs[rank] += 1
        self.do(FrameIn(rank, Frame(epoch=1, seq=self.seqs[rank], body=body)))


def test_eight_images_of_one_request_do_not_stand_before_the_only_one_of_another():
    encoder = Encoder()
    for number in range(10):
        encoder.want(f"many {number}", 40.0)
    assert len(encoder.begun) == 8
    encoder.want("only", 3.0)
    assert encoder.begun[8:] == ["only"], "there is a place for what is more urgent"
    encoder.want("as many", 40.0)
    encoder.give_up("many 0")
    encoder.give_up("many 1")
    encoder.give_up("many 2")
    encoder.give_up("many 3")
    assert encoder.begun[9:] == ["many 8", "many 9", "as many"]


@pytest.mark.parametrize("transit_s", [0.001, -0.001])
def test_all_items_of_a_request_are_due_at_once_however_long_their_frames_take(transit_s):
    encoder = Encoder()
    for item in range(12):
        encoder.now = item
        encoder.want("many", 40.0 + transit_s * item, item=item)
        encoder.want("no target", FIRST_COME, item=item)
        encoder.give_up("no target", item=item)
    assert encoder.begun.count("many") == 8, "they would be as urgent as one another"
    assert encoder.begun.count("no target") == 12
    assert {item.due for item in encoder.sessions.items.values()} == {40.0}


def test_an_urgent_clip_does_not_wait_for_clips_and_takes_no_place_from_images():
    encoder = Encoder()
    for number in range(6):
        encoder.want(f"clip {number}", 40.0, modality="video")
    assert encoder.begun == [f"clip {number}" for number in range(4)]
    for number in range(6):
        encoder.want(f"urgent {number}", 30.0, modality="video")
    assert encoder.begun[4:] == [f"urgent {number}" for number in range(4)]
    for number in range(6):
        encoder.want(f"image {number}", 50.0)
    assert encoder.begun[8:] == [f"image {number}" for number in range(4)], "all have their places, and no more"


def test_clips_of_one_language_rank_give_another_no_more_than_its_share():
    encoder = Encoder(num_language=2, max_items=4, max_urgent=1, max_clips=1)
    for name, due, rank, modality in (
        ("image 0", 1.0, 0, "image"),
        ("image 1", 1.0, 0, "image"),
        ("image 2", 3.0, 1, "image"),
        ("clip", 6.0, 1, "video"),
        ("waits", 7.0, 0, "image"),
    ):
        encoder.want(name, due, rank, modality=modality)
        encoder.do(Encoded(("image 0", 0, 1)))  # its rows stay: nobody answers the header
    assert encoder.begun == ["image 0", "image 1", "image 2", "clip"], "half of the places are one rank's"
    encoder.want("urgent clip", 5.0, 1, modality="video")
    encoder.do(Encoded(("image 2", 0, 1)))
    assert encoder.begun[4:] == ["urgent clip"]
    encoder.give_up("image 1")
    assert encoder.begun[5:] == ["waits"]


def test_a_clip_above_the_number_leaves_no_place_to_what_is_due_before_it():
    """It takes none from images that are due behind it, and counts for nothing with those before it."""
    encoder = Encoder(max_items=2, max_urgent=1, max_clips=1)
    encoder.want("image", 1.0)
    encoder.want("clip", 6.0, modality="video")
    encoder.want("before", 2.0)
    assert encoder.begun == ["image", "clip", "before"]
    encoder = Encoder(max_items=2, max_urgent=2, max_clips=1)
    encoder.want("clip", 6.0, modality="video")
    encoder.want("urgent clip", 5.0, modality="video")
    encoder.want("behind", 7.0)
    encoder.want("behind, too", 7.0)
    assert encoder.begun == ["clip", "urgent clip", "behind"]


def test_where_places_are_gone_the_most_urgent_has_the_next():
    encoder = Encoder(max_items=1, max_urgent=1)
    for name, due in (("a", 40.0), ("b", 30.0), ("c", 35.0), ("d", 20.0), ("e", 20.0), ("f", 50.0)):
        encoder.want(name, due)
    assert encoder.begun == ["a", "b"]
    for place in range(2, 7):
        if encoder.sessions.items:
            encoder.give_up(encoder.begun[place - 2])
    assert encoder.begun == ["a", "b", "d", "e", "c", "f"]


def test_a_silent_language_rank_has_no_more_than_its_share_and_what_is_urgent():
    """It grants, more and more urgently, and never answers a header: what is encoded stays."""
    encoder = Encoder(num_language=2)
    for number in range(40):
        encoder.want(str(number), 100.0 - number)
        for item in [i for i in encoder.sessions.items.values() if i.state == ENCODING]:
            encoder.do(Encoded(item.attempt))
    assert len(encoder.begun) == 4 + 4
    encoder.want("other", 200.0, rank=1)
    assert encoder.begun[8:] == ["other"]


DUES = st.sampled_from([FIRST_COME, 1.0, 2.0, 3.0, 4.0])


@given(
    st.lists(st.one_of(DUES, st.integers(0, 20)), max_size=30),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_no_item_waits_behind_a_less_urgent_one_and_places_are_bounded(events, num_language, places, more):
    """A due time: a grant. A number: the end of one of those that are encoded."""
    encoder = Encoder(num_language, max_items=places, max_urgent=more)
    ranks: dict[str, int] = {}
    for number, event in enumerate(events):
        items = encoder.sessions.items
        encoding = [item for item in items.values() if item.state == ENCODING]
        if isinstance(event, float):
            ranks[str(number)] = number % num_language
            encoder.want(str(number), event, ranks[str(number)])
        elif encoding:
            item = encoding[event % len(encoding)]
            encoder.give_up(item.attempt[0], item.language_rank)
        dues = sorted(item.due for item in items.values() if item.state == ENCODING)
        assert len(dues) <= places + more
        queued = sorted((item for item in items.values() if item.state == QUEUED), key=lambda item: item.due)
        assert encoder.sessions.queue == [item.attempt for item in queued]
        of_ranks = Counter(item.language_rank for item in items.values() if item.state == ENCODING)
        share = places if num_language < 2 else -(-places // 2)
        for item in items.values():
            if item.state == QUEUED and of_ranks[item.language_rank] == 0:
                assert bisect_right(dues, item.due) >= places or len(dues) == places + more, "it could have begun"
        assert all(count <= share + more for count in of_ranks.values())


@pytest.mark.parametrize("is_later", [False, True])
def test_without_targets_items_are_encoded_as_they_came(is_later):
    encoder = Encoder(max_items=1)
    for number in range(5):
        encoder.now += is_later
        encoder.want(str(number), FIRST_COME)
        assert encoder.begun == ["0"]
    for number in range(4):
        encoder.give_up(str(number))
    assert encoder.begun == list("01234")
