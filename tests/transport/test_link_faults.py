"""The link server against encode ranks that a test plays by hand: late answers, stale attempts, second incarnations."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from qwen3vl_disagg.protocol import payload_time
from qwen3vl_disagg.protocol.messages import Abort, Ack, Cancel, Frame, Goodbye, Grant, HeaderOk, Nack, Resume, Stale
from qwen3vl_disagg.protocol.session_events import Consumed
from qwen3vl_disagg.transport.control import ConnectionLost
from qwen3vl_disagg.transport.links import InProcessLink
from tests.support.link_peers import language, make_grant
from tests.support.link_scenarios import CONFIG, LIMITS, run, until
from tests.support.transfer import make_encoded


@pytest.fixture
def like_a_process_group(monkeypatch) -> None:
    """Closing a link does not end a `receive` that waits in it."""
    monkeypatch.setattr(InProcessLink, "close", lambda _: None)


def lost(it) -> list[tuple[str, int, int]]:
    return [(event.request_id, event.item, event.attempt) for event in it.engine.lost]


def test_grants_follow_the_order_of_requests_and_room():
    async def scenario():
        async with language() as it:  # room for one item
            peer = await it.connect(0)
            for name in "abc":
                it.expect(name)
            for seed, name in enumerate("abc"):
                grant = await peer.hear(Grant)
                assert (grant.request_id, grant.attempt) == (name, 1)
                await it.has_rows(name, await peer.deliver(grant, seed))
            assert it.engine.shortages == [True, False]
            assert not it.engine.lost

    run(scenario)


def test_the_next_part_is_asked_for_when_rows_were_consumed():
    async def scenario():
        async with language(blocks=1) as it:
            peer = await it.connect(0)
            it.engine.is_holding = True
            it.expect("a")
            grant = await peer.hear(Grant)
            assert (grant.row_start, grant.row_stop, grant.deepstack_stop) == (0, 4, 6)
            await peer.deliver(grant)
            await until(lambda: it.engine.held)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(peer.hear(Resume), 0.1)
            it.engine.consume(it.engine.held[0])
            resume = await peer.hear(Resume)
            assert (resume.row_start, resume.row_stop, resume.deepstack_runs) == (4, 6, [])
            encoded = await peer.deliver(resume)
            await until(lambda: it.engine.held)
            it.engine.consume(it.engine.held[0])
            await it.has_rows("a", encoded)
            it.server.handle(Consumed("a", 0, 1, 6))  # twice changes nothing

    run(scenario)


def test_a_bad_header_is_refused_and_the_link_goes_on():
    async def scenario():
        async with language() as it:
            peer = await it.connect(0)
            it.expect("a")
            grant = await peer.hear(Grant)
            header = make_encoded(CONFIG).header(grant)
            await peer.say(msgspec.structs.replace(header, total_rows=5))
            assert "expected 6, got 5" in (await peer.hear(Nack)).reason
            await until(lambda: it.engine.lost)
            assert lost(it) == [("a", 0, 1)]
            assert it.counts() == (0, 2, 0), "the item keeps its room for the next attempt"
            it.expect("a", attempt=2)
            encoded = await peer.deliver(await peer.hear(Grant))
            assert await it.has_rows("a", encoded) == 2

    run(scenario)


def test_rows_that_are_not_the_announced_ones_are_refused_and_the_link_goes_on():
    async def scenario():
        async with language() as it:
            peer = await it.connect(0)
            it.expect("a")
            grant = await peer.hear(Grant)
            await peer.say(make_encoded(CONFIG).header(grant))
            await peer.hear(HeaderOk)
            peer.link.send(make_encoded(CONFIG, seed=1).payload(grant), 1)
            assert "digest" in (await peer.hear(Nack)).reason
            await until(lambda: it.engine.lost)
            assert lost(it) == [("a", 0, 1)]
            assert it.engine.lost[0].dead_epoch == 0
            assert it.counts() == (0, 2, 0), "the item keeps its room for the next attempt"
            it.expect("a", attempt=2)
            encoded = await peer.deliver(await peer.hear(Grant))
            assert await it.has_rows("a", encoded) == 2

    run(scenario)


def test_frames_of_an_attempt_that_ended_change_nothing():
    async def scenario():
        async with language() as it:
            peer = await it.connect(0)
            it.expect("a")
            old = await peer.hear(Grant)
            it.expect("a", attempt=2)
            assert (await peer.hear(Abort)).attempt == 1
            new = await peer.hear(Grant)
            await peer.say(make_encoded(CONFIG).header(old))
            assert (await peer.hear(Nack)).attempt == 1
            await peer.say(Abort(request_id="a", item=0, attempt=1, reason="late"))
            await peer.say(Nack(request_id="z", item=0, attempt=1, reason="never known"))
            assert await it.has_rows("a", await peer.deliver(new)) == 2
            assert not it.engine.lost

    run(scenario)


def test_a_request_cancelled_in_mid_payload_gives_nothing_and_leaves_nothing():
    async def scenario():
        async with language() as it:
            peer = await it.connect(0)
            it.expect("a")
            it.expect("b")
            grant = await peer.hear(Grant)
            encoded = make_encoded(CONFIG)
            await peer.say(encoded.header(grant))
            await peer.hear(HeaderOk)
            it.server.handle(Cancel(request_id="a"))
            await peer.hear(Abort)
            await asyncio.sleep(0.1)
            assert it.counts() == (0, 0, 2), "not in quarantine"
            peer.link.send(encoded.payload(grant), 1)
            follower = await peer.hear(Grant)
            assert follower.request_id == "b"
            await it.has_rows("b", await peer.deliver(follower, seed=1))
            assert [d.request_id for d in it.engine.deliveries] == ["b"]

    run(scenario)


def test_a_payload_that_does_not_come_ends_the_link_and_is_asked_for_again():
    async def scenario():
        async with language(limits=msgspec.structs.replace(LIMITS, payload_s=0.3)) as it:
            peer, other = await it.connect(0), await it.connect(2)
            it.expect("a")
            grant = await peer.hear(Grant)
            await peer.say(make_encoded(CONFIG).header(grant))
            await peer.hear(HeaderOk)
            await peer.ended()
            again = await it.connect(0)
            assert again.epoch > other.epoch > peer.epoch, "one count for all links"
            repeated = await again.hear(Grant)
            assert msgspec.structs.replace(repeated, timeout_s=grant.timeout_s) == grant
            assert await it.has_rows("a", await again.deliver(repeated)) == 1
            assert not other.control.is_closed
            assert not it.engine.lost

    run(scenario)


def test_a_payload_that_is_large_for_its_link_has_more_time(monkeypatch):
    """3 KiB at 2 KiB a second, where other things may take 0.3 s."""
    monkeypatch.setattr(payload_time, "FLOOR_RATE", 2048.0)

    async def scenario():
        async with language(limits=msgspec.structs.replace(LIMITS, payload_s=0.3)) as it:
            peer, encoded = await it.connect(0), make_encoded(CONFIG)
            it.expect("a")
            grant = await peer.hear(Grant)
            await peer.say(encoded.header(grant))
            ok = await peer.hear(HeaderOk)
            num_bytes = sum(tensor.nbytes for tensor in encoded.payload(grant))
            assert ok.payload_s == 0.3 + num_bytes / 2048
            await asyncio.sleep(min(1.0, ok.payload_s - 0.2))
            peer.link.send(encoded.payload(grant), 1)
            await peer.hear(Ack)
            assert await it.has_rows("a", encoded) == 1
            assert not peer.control.is_closed

    run(scenario)


def test_blocks_of_a_payload_under_way_are_not_given_to_others_when_its_link_dies(like_a_process_group):
    async def scenario():
        async with language(limits=msgspec.structs.replace(LIMITS, payload_s=0.5)) as it:
            peer = await it.connect(0)
            it.expect("a")
            await peer.say(make_encoded(CONFIG).header(await peer.hear(Grant)))
            await peer.hear(HeaderOk)
            peer.control.abort()
            again = await it.connect(0)
            it.expect("b")
            it.server.handle(Cancel(request_id="a"))
            assert it.counts() == (0, 0, 2), "not in quarantine"
            assert (await again.hear(Abort)).request_id == "a"
            started = time.monotonic()
            grant = await again.hear(Grant)
            assert grant.request_id == "b"
            assert time.monotonic() - started > 0.2
            await it.has_rows("b", await again.deliver(grant))

    run(scenario)


def test_a_lost_link_loses_its_items_and_no_others():
    async def scenario():
        async with language(blocks=8, limits=msgspec.structs.replace(LIMITS, suspend_s=0.2)) as it:
            first, second = await it.connect(0), await it.connect(2)
            it.expect("a")
            it.expect("b", encode_rank=2)
            await first.hear(Grant)
            grant = await second.hear(Grant)
            first.control.abort()
            await until(lambda: it.engine.lost)
            assert lost(it) == [("a", 0, 1)]
            assert it.engine.lost[0].dead_epoch == first.epoch
            await it.has_rows("b", await second.deliver(grant))

    run(scenario)


def test_a_rank_that_says_goodbye_is_waited_for_like_a_lost_one():
    async def scenario():
        async with language() as it:
            peer = await it.connect(0)
            it.expect("a")
            await peer.hear(Grant)
            await peer.control.send(Goodbye())
            await peer.ended()
            again = await it.connect(0)
            await it.has_rows("a", await again.deliver(await again.hear(Grant)))
            assert not it.engine.lost

    run(scenario)


@pytest.mark.parametrize("token", ["", "secre", "secret ", "sécret"])
def test_a_wrong_token_is_named_but_not_told(token):
    async def scenario():
        async with language() as it:
            with pytest.raises(ConnectionLost, match=r"^token$"):
                await it.connect(0, token=token)

    run(scenario)


def test_a_second_incarnation_ends_the_first_ones_connection():
    async def scenario():
        async with language() as it:
            first = await it.connect(0)
            it.expect("a")
            await first.hear(Grant)
            second = await it.connect(0)
            await first.ended()
            await it.has_rows("a", await second.deliver(await second.hear(Grant)))

    run(scenario)


def test_an_attempt_that_was_replaced_is_not_lost_later():
    async def scenario():
        async with language(limits=msgspec.structs.replace(LIMITS, suspend_s=0.1)) as it:
            first, second = await it.connect(0), await it.connect(2)
            it.expect("a")
            await first.hear(Grant)
            it.expect("a", attempt=2, encode_rank=2)  # the router gave it to another rank
            await it.has_rows("a", await second.deliver(await second.hear(Grant)))
            first.control.abort()
            await asyncio.sleep(0.5)
            assert not it.engine.lost

    run(scenario)


def test_a_frame_that_is_missing_ends_the_link_and_one_that_comes_twice_changes_nothing():
    async def scenario():
        async with language() as it:
            peer = await it.connect(0)
            it.expect("a")
            grant = await peer.hear(Grant)
            header = peer.frame(make_encoded(CONFIG).header(grant))
            await peer.control.send(header)
            await peer.hear(HeaderOk)
            await peer.control.send(header)
            peer.link.send(make_encoded(CONFIG).payload(grant), 1)
            await peer.hear(Ack)
            peer.frame(None)
            await peer.say(Abort(request_id="a", item=0, attempt=1, reason="after a gap"))
            await peer.ended()
            await it.has_rows("a", make_encoded(CONFIG))
            assert not it.engine.lost

    run(scenario)


def test_a_frame_of_an_old_epoch_changes_nothing_and_is_answered_with_the_current_one():
    async def scenario():
        async with language() as it:
            await it.connect(0)
            peer = await it.connect(0)
            it.expect("a")
            grant = await peer.hear(Grant)
            abort = Abort(request_id="a", item=0, attempt=1, reason="old")
            await peer.control.send(Frame(epoch=peer.epoch - 1, seq=1, body=abort))
            assert (await peer.hear(Stale)).epoch == peer.epoch
            await peer.control.send(Frame(epoch=peer.epoch + 1, seq=1, body=abort))
            await it.has_rows("a", await peer.deliver(grant))
            assert not it.engine.lost

    run(scenario)


def test_frames_that_only_a_language_rank_says_change_nothing():
    async def scenario():
        async with language() as it:
            peer = await it.connect(0)
            it.expect("a")
            grant = await peer.hear(Grant)
            await peer.say(make_grant("a"))
            await peer.say(Ack(request_id="a", item=0, attempt=1, received=6))
            await peer.say(HeaderOk(request_id="a", item=0, attempt=1, row_start=0))
            await it.has_rows("a", await peer.deliver(grant))

    run(scenario)


def test_a_request_out_of_time_is_told_once_and_leaves_nothing():
    async def scenario():
        async with language() as it:
            peer = await it.connect(0)
            it.expect("a", timeout_s=0.4)
            it.expect("b")
            await peer.hear(Grant)
            await peer.hear(Abort)
            grant = await peer.hear(Grant)
            assert grant.request_id == "b"
            await it.has_rows("b", await peer.deliver(grant))
            assert [event.request_id for event in it.engine.expired] == ["a"]
            assert not it.engine.lost

    run(scenario)


def test_closing_while_a_payload_is_under_way_waits_for_nobody_and_keeps_its_blocks_apart(like_a_process_group):
    async def scenario():
        async with language(limits=msgspec.structs.replace(LIMITS, payload_s=0.5)) as it:
            peer = await it.connect(0)
            it.expect("a")
            await peer.say(make_encoded(CONFIG).header(await peer.hear(Grant)))
            await peer.hear(HeaderOk)
            started = time.monotonic()
            await it.server.close()
            assert time.monotonic() - started < 0.4
            assert isinstance(await peer.control.receive(1), Goodbye)
            it.server.handle(Cancel(request_id="a"))
            assert it.counts() == (0, 0, 2), "not in quarantine"

    run(scenario)


def test_a_payload_that_was_given_up_before_its_turn_leaves_nothing():
    async def scenario():
        async with language(blocks=4) as it:
            peer = await it.connect(0)
            grants, encoded = {}, make_encoded(CONFIG)
            for name in "ab":
                it.expect(name)
                grants[name] = await peer.hear(Grant)
                await peer.say(encoded.header(grants[name]))
                await peer.hear(HeaderOk)
            it.server.handle(Cancel(request_id="b"))
            await peer.hear(Abort)
            for grant in grants.values():
                peer.link.send(encoded.payload(grant), 1)
            await peer.hear(Ack)
            await it.has_rows("a", encoded)

    run(scenario)


def test_what_the_engine_answers_at_once_is_said_after_what_was_decided_before():
    async def scenario():
        async with language(blocks=4) as it:
            peer = await it.connect(0)
            it.engine.is_holding = True
            it.expect("a", num_items=2)
            it.expect("b")
            it.expect("c")
            held, _ = await peer.hear(Grant), await peer.hear(Grant)
            await peer.deliver(held)
            await until(lambda: it.engine.held)
            it.server.handle(
                Cancel(request_id="a")
            )  # frees one item's blocks at once, the other's when the engine gives them back
            assert (await peer.hear(Abort)).item == 1
            assert [(await peer.hear(Grant)).request_id for _ in "bc"] == ["b", "c"]

    run(scenario)
