"""The encode server against a language rank that a test plays by hand."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from qwen3vl_disagg.core.errors import Failure, InputError, MediaTimeout, ServerError
from qwen3vl_disagg.protocol.messages import (
    Decoded,
    Frame,
    Goodbye,
    Header,
    HeaderOk,
    ItemFailed,
    LinksUp,
    Nack,
    Resume,
)
from qwen3vl_disagg.transport.links import LinkBroken
from tests.support.link_peers import encode_side, make_grant
from tests.support.link_scenarios import CONFIG, LIMITS, run, until
from tests.support.transfer import make_encoded

ITEM = make_encoded(CONFIG)
ENCODE_FAILURE = Failure("internal", "an image or clip could not be encoded", "encode_error", 500)


def ids(name: str, attempt: int = 1) -> dict[str, object]:
    return {"request_id": name, "item": 0, "attempt": attempt}


async def receive(peer, grant, encoded=ITEM) -> None:
    header = await peer.hear(Header)
    assert (header.attempt, header.row_start, header.row_stop) == (grant.attempt, grant.row_start, grant.row_stop)
    await peer.take(grant, encoded)


def test_an_item_comes_with_its_grant_and_a_resume_of_what_is_not_here_is_refused():
    async def scenario():
        async with encode_side() as side:
            peer = await side.link()
            await peer.say(make_grant("b", start=4, kind=Resume))
            assert (await peer.hear(Nack)).reason == "gone"
            await peer.say(make_grant("a"))
            await receive(peer, make_grant("a"))
            assert side.worker.num_encoded == 1
            assert [message.attempt for message in side.said(Decoded)] == [1]

    run(scenario)


def test_payloads_follow_one_another_in_the_order_of_their_headers():
    async def scenario():
        async with encode_side() as side:
            peer = await side.link()
            for name in "abc":
                await peer.say(make_grant(name))
            for name in "abc":
                assert (await peer.hear(Header)).request_id == name
                with pytest.raises(TimeoutError):  # not before this one is on its way
                    await asyncio.wait_for(peer.hear(), 0.05)
                await peer.take(make_grant(name), ITEM)

    run(scenario)


@pytest.mark.parametrize("when", ["before the header", "after the header", "after the payload"])
def test_a_link_that_dies_is_resumed_with_the_same_rows(when):
    async def scenario():
        async with encode_side() as side:
            peer, grant = await side.link(), make_grant("a", stop=4)
            side.worker.gate.clear()
            await peer.say(grant)
            await until(lambda: side.worker.num_encoded)
            if when != "before the header":
                side.worker.gate.set()
                await peer.hear(Header)
            if when == "after the payload":
                await peer.say(HeaderOk(**ids("a"), row_start=0))
                await until(lambda: not peer.link._sent.empty())
            peer.control.abort()
            again = await side.link()
            side.worker.gate.set()
            await again.say(grant)
            await receive(again, grant)
            rest = make_grant("a", start=4, kind=Resume)
            await again.say(rest)
            await receive(again, rest)
            assert side.worker.num_encoded == 1
            assert not side.said(ItemFailed)
            assert [message.epochs for message in side.said(LinksUp)] == [[1], [], [2]]

    run(scenario)


def test_rows_for_a_rank_that_stays_away_are_let_go_when_their_lease_ends():
    def wrap(make):
        def once(*key):
            if key[3] > 1:
                raise LinkBroken("no more")
            return make(*key)

        return once

    async def scenario():
        async with encode_side(wrap=wrap, limits=msgspec.structs.replace(LIMITS, lease_s=0.3)) as side:
            peer = await side.link()
            await peer.say(make_grant("a"))
            await peer.hear(Header)
            peer.control.abort()
            await until(lambda: side.server.sessions.num_parked)
            await until(lambda: not side.leftovers(), 2, side.leftovers)
            assert not side.said(ItemFailed)

    run(scenario)


def test_what_is_given_up_before_the_tower_runs_does_not_go_through_it():
    async def scenario():
        async with encode_side() as side:
            peer = await side.link()
            side.worker.gate.clear()
            for name in "abcd":
                await peer.say(make_grant(name))
            await until(lambda: len(side.said(Decoded)) == 4)
            assert side.worker.num_encoded == 1
            for name in "abcd":
                await side.cancel(peer, name)
            side.worker.gate.set()
            await peer.say(make_grant("e"))
            await receive(peer, make_grant("e"))
            assert side.worker.num_encoded == 2

    run(scenario)


def test_an_item_that_nobody_takes_fails_when_its_time_is_up():
    async def scenario():
        async with encode_side() as side:
            peer = await side.link()
            side.worker.gate.clear()
            await peer.say(make_grant("a", timeout_s=0.3))
            await until(lambda: side.worker.num_encoded)
            peer.control.abort()
            await until(lambda: side.said(ItemFailed))
            assert [(m.request_id, m.attempt, m.failure.kind) for m in side.said(ItemFailed)] == [("a", 1, "deadline")]

    run(scenario)


def test_a_header_that_is_not_answered_in_time_ends_the_link():
    """The answer may only be late: then the peer waits for this payload and would take the next one for it."""

    async def scenario():
        async with encode_side(limits=msgspec.structs.replace(LIMITS, answer_s=0.2)) as side:
            peer, grant = await side.link(), make_grant("a")
            await peer.say(grant)
            await peer.hear(Header)
            await peer.ended()
            again = await side.link()
            await again.say(grant)
            await receive(again, grant)
            assert side.worker.num_encoded == 1

    run(scenario)


def test_a_payload_that_cannot_be_sent_ends_the_link():
    def wrap(make):
        def broken(*key):
            link = make(*key)
            if key[3] == 1:
                link.send = fail
            return link

        return broken

    def fail(tensors, timeout):
        raise LinkBroken("on purpose")

    async def scenario():
        async with encode_side(wrap=wrap) as side:
            peer, grant = await side.link(), make_grant("a")
            await peer.say(grant)
            await peer.hear(Header)
            await peer.say(HeaderOk(**ids("a"), row_start=0))
            started = time.monotonic()
            await peer.ended()
            assert time.monotonic() - started < LIMITS.payload_s
            again = await side.link()
            await again.say(grant)
            await receive(again, grant)
            assert side.worker.num_encoded == 1

    run(scenario)


@pytest.mark.parametrize("change", [{"row_stop": 7, "row_runs": [7]}, {"row_runs": [4]}, {"deepstack_stop": 7}])
def test_a_grant_that_cannot_be_ends_the_link_and_not_the_item(change):
    async def scenario():
        async with encode_side() as side:
            peer, grant = await side.link(), make_grant("a")
            await peer.say(msgspec.structs.replace(grant, **change))
            await peer.ended()
            again = await side.link()
            await again.say(grant)
            await receive(again, grant)

    run(scenario)


def test_a_frame_that_is_missing_ends_the_link():
    async def scenario():
        async with encode_side() as side:
            peer = await side.link()
            await peer.control.send(Frame(epoch=peer.epoch, seq=2, body=make_grant("a")))
            await peer.ended()
            again = await side.link()
            await again.say(make_grant("a"))
            await receive(again, make_grant("a"))

    run(scenario)


def test_a_payload_follows_also_when_its_item_was_given_up_after_the_header():
    async def scenario():
        async with encode_side() as side:
            peer = await side.link()
            await peer.say(make_grant("a"))
            await peer.hear(Header)
            await side.cancel(peer, "a")
            assert side.server._encoded, "the payload may still have to follow"
            await peer.say(make_grant("b"))
            await peer.take(make_grant("a"), ITEM)
            await receive(peer, make_grant("b"))

    run(scenario)


def test_a_result_that_comes_after_its_attempt_has_ended_is_dropped():
    async def scenario():
        async with encode_side() as side:
            peer = await side.link()
            side.worker.gate.clear()
            await peer.say(make_grant("a"))
            await until(lambda: side.worker.num_encoded == 1)
            await side.cancel(peer, "a")
            await until(lambda: not side.leftovers(), 2, side.leftovers)
            side.worker.seed = 1  # of what is encoded from now on
            await peer.say(make_grant("a", attempt=2, content="another image"))
            await until(lambda: side.server._tasks)
            side.worker.gate.set()
            await receive(peer, make_grant("a", attempt=2), make_encoded(CONFIG, seed=1))
            assert not side.said(ItemFailed)

    run(scenario)


def test_a_later_attempt_takes_the_place_of_one_that_is_under_way():
    async def scenario():
        async with encode_side() as side:
            peer = await side.link()
            side.worker.gate.clear()
            await peer.say(make_grant("a"))
            await until(lambda: side.worker.num_encoded == 1)
            side.worker.seed = 1
            await peer.say(make_grant("a", attempt=2, content="another image"))
            side.worker.gate.set()
            await receive(peer, make_grant("a", attempt=2), make_encoded(CONFIG, seed=1))

    run(scenario)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (InputError("not an image", status=413, code="x"), Failure("input", "not an image", "x", 413)),
        # Another rank may have it.
        (InputError("no library", code="not_installed"), Failure("unavailable", "no library", "unavailable", 503)),
        (MediaTimeout("too long"), Failure("deadline", "too long", "media_timeout", 504)),
        (ServerError("killed", code="decoder_killed"), Failure("internal", "killed", "decoder_killed", 500)),
        (LinkBroken("no store"), Failure("transfer", "no store", "transfer_failed", 503)),
        (ZeroDivisionError("x"), ENCODE_FAILURE),
        (TimeoutError(), ENCODE_FAILURE),  # not that of the request
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_item_that_cannot_be_made_fails_alone(error, failure, capsys):
    failures = [error]

    async def pull(digest, num_bytes):
        if failures:
            raise failures.pop()
        return b""

    async def scenario():
        async with encode_side(pull=pull) as side:
            peer = await side.link()
            for name in "ab":
                await peer.say(make_grant(name))
            await receive(peer, make_grant("b"))
            [failed] = side.said(ItemFailed)
            assert (failed.request_id, failed.failure) == ("a", failure)

    run(scenario)


@pytest.mark.parametrize("error", [LinkBroken("no group"), RuntimeError("no thread"), OSError("no route")])
def test_a_group_that_cannot_be_made_is_tried_again(error):
    failures = [error]

    def wrap(make):
        def failing(*key):
            if failures:
                raise failures.pop()
            return make(*key)

        return failing

    async def scenario():
        async with encode_side(wrap=wrap) as side:
            await asyncio.wait_for(side.peers.get(), 5)
            peer = await side.link()
            await peer.say(make_grant("a"))
            await receive(peer, make_grant("a"))

    run(scenario)


def test_closing_says_goodbye_and_ends_the_connection():
    async def scenario():
        async with encode_side() as side:
            peer = await side.link()
            [link] = side.server._links._links.values()
            await side.server.close()
            assert link.control.is_closed
            assert isinstance(await peer.control.receive(5), Goodbye)
            await peer.ended()

    run(scenario)
