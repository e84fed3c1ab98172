"""How long payloads may take: follows their size and what their link has moved lately."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.protocol.layout import RowSizes
from qwen3vl_disagg.protocol.messages import HeaderOk
from qwen3vl_disagg.protocol.payload_time import FLOOR_RATE, KNOWN_BYTES, LATELY_BYTES, SLOWER, LinkPace, moving_s
from qwen3vl_disagg.protocol.session import RECEIVING
from qwen3vl_disagg.protocol.session_events import BreakLink, Encoded, SendPayload
from tests.properties import encode_side
from tests.properties.encode_side import A
from tests.properties.language_side import Side, bodies
from tests.properties.session_parts import LIMITS, ids

SIZE = st.integers(0, 1 << 31)
RATE = st.floats(FLOOR_RATE, 1e11)


def paced(*moved: tuple[int, float]) -> LinkPace:
    pace = LinkPace()
    for num_bytes, seconds in moved:
        pace.learn(num_bytes, seconds)
    return pace


@given(st.lists(st.tuples(SIZE, st.floats(-1, 1e5)), max_size=30), SIZE, SIZE)
def test_whatever_was_seen_it_is_finite_grows_with_the_size_and_never_asks_for_less_than_the_floor(moved, one, more):
    pace = paced(*moved)
    assert 0 <= moving_s(one, pace) <= moving_s(one + more, pace) <= moving_s(one + more) == (one + more) / FLOOR_RATE


@given(RATE, st.floats(0, LIMITS.payload_s), st.lists(SIZE, min_size=1, max_size=60))
def test_a_link_that_is_as_slow_as_ever_is_never_given_up(rate, else_s, sizes):
    """Each payload takes what its bytes take at that rate, and something else as long as is allowed for it."""
    pace = LinkPace()
    for num_bytes in sizes:
        seconds = num_bytes / rate + else_s
        assert seconds <= (LIMITS.payload_s + moving_s(num_bytes, pace)) * (1 + 1e-9)
        pace.learn(num_bytes, seconds)


@given(RATE, st.integers(KNOWN_BYTES, 1 << 30), st.integers(1, 1 << 30))
def test_the_faster_a_link_is_the_sooner_is_noticed_that_it_stands(rate, seen, size):
    known = moving_s(size, paced((seen, seen / rate)))
    assert abs(known - min(size / FLOOR_RATE, SLOWER * size / rate)) <= 1e-6 * known
    assert moving_s(size, paced((KNOWN_BYTES - 1, (KNOWN_BYTES - 1) / rate))) == size / FLOOR_RATE


@given(RATE, RATE)
def test_what_was_long_ago_does_not_count(before, now):
    pace = paced((1 << 30, (1 << 30) / before))
    for _ in range(40):
        pace.learn(LATELY_BYTES, LATELY_BYTES / now)
    floor = max(FLOOR_RATE, now / SLOWER)
    assert abs(pace.least_rate - floor) <= 0.01 * floor


LARGE = RowSizes(1 << 24, 4, 12, 64, 0)
"""16 MiB a row."""


def test_a_link_that_has_shown_its_rate_is_told_so_at_both_ends():
    """Two blocks of 2 rows, one after another; the second after 32 MiB in 4 s, so that 1 MiB a second are asked."""
    side = Side(blocks=1, row_sizes=LARGE)
    side.expect("r", 4)
    side.assign("r")
    first, job = side.header("r")
    unknown = LIMITS.payload_s + moving_s(LARGE.transfer_bytes(2, 0))
    assert first.frame.body.payload_s == job.payload_s == unknown
    assert side["r", 0].deadline == side.now + 2 * unknown
    side.now += 4.0
    side.payload("r")
    side.consume("r")
    [ok] = bodies(side.header("r"))
    assert ok.payload_s == pytest.approx(LIMITS.payload_s + 32, rel=1e-3)
    side.tick(2 * ok.payload_s - 0.1)
    assert side["r", 0].state == RECEIVING
    assert side.tick(0.2) == [BreakLink(0, 1, "a payload did not come")]
    side.payload("r", error="gone", is_broken=True)
    side.up(0)
    assert bodies(side.header("r"))[0].payload_s == pytest.approx(unknown, rel=1e-3), "of the new link nothing is known"


@pytest.mark.parametrize(("said", "held"), [(0.0, LIMITS.payload_s), (100.0, 100.0), (0.5, LIMITS.payload_s)])
def test_who_sends_does_as_it_is_told_but_for_its_own_least(said, held):
    side = encode_side.Side()
    side.grant(A)
    side.do(Encoded(A))
    ok = HeaderOk(**ids(A), row_start=0, payload_s=said)
    assert side.frame(ok) == [SendPayload(0, 1, encode_side.grant_of(A), held)]
    assert side.tick(2 * held - 0.1) == []
    assert isinstance(side.tick(0.2)[0], BreakLink)


@pytest.mark.parametrize("said", [LIMITS.payload_s, 100.0])
def test_who_has_sent_waits_for_the_answer_as_long_as_the_bytes_may_still_be_on_their_way(said):
    """What was handed to the network is not there yet: a long payload over a slow link has its time once more."""
    side = encode_side.Side()
    side.grant(A)
    side.do(Encoded(A))
    side.frame(HeaderOk(**ids(A), row_start=0, payload_s=said))
    side.sent(A)
    patience = LIMITS.answer_s + said - LIMITS.payload_s
    assert side.tick(patience - 0.1) == []
    assert isinstance(side.tick(0.2)[0], BreakLink)
