"""The encode server with equal items: the cache, and one encoding for all who want it at the same time."""

from __future__ import annotations

import pytest

from qwen3vl_disagg.core.errors import InputError, ServerError, TransferError
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode import server as encode_server
from qwen3vl_disagg.encode.embedding_cache import ContentKey
from qwen3vl_disagg.protocol.messages import Header, ItemFailed, Resume
from tests.support.encode_items import ITEM, Source, decoded, receive, want
from tests.support.link_peers import VISUAL, encode_side, make_grant
from tests.support.link_scenarios import CONFIG, run, running, until
from tests.support.link_scenarios import make_image as make_picture
from tests.support.transfer import make_encoded

OFF = EncodeOptions(embedding_cache_mib=0)


def key_of(content: str) -> ContentKey:
    return ContentKey("image", content, VISUAL.grid, (), False, "", CONFIG.image_token_id)


def item_bytes() -> int:
    """What the cache counts for one item: rows, DeepStack, ids, positions, and the sums of each row."""
    rows, hidden, levels = 6, CONFIG.text.hidden_size, CONFIG.num_deepstack_levels
    return rows * (4 * hidden * (1 + levels) + 4 + 12 + 8 + 8)


def test_what_was_encoded_before_is_neither_fetched_nor_decoded_nor_encoded():
    async def scenario():
        source = Source()
        async with encode_side(pull=source) as side:
            peer, cache = await side.link(), side.server.pipeline.cache
            await want(side, peer, "a")
            first = await receive(peer, "a")
            assert (first.cached, first.batch, first.preprocess_ms, first.encode_ms) == (False, 1, 1.0, 2.0)
            side.worker.seed = 1  # what would be encoded from now on
            await want(side, peer, "b")
            again = await receive(peer, "b")
            assert (again.cached, again.batch, again.preprocess_ms, again.encode_ms) == (True, 0, 0.0, 0.0)
            assert (again.row_digests, again.deepstack_digests) == (first.row_digests, first.deepstack_digests)
            assert (source.pulled, side.worker.decoded, side.worker.num_encoded) == (["x"], [b"x"], 1)
            assert decoded(side) == ["a", "b"], "a streamed answer may begin"
            assert (cache.num_hits, cache.num_misses, cache.num_bytes) == (1, 1, item_bytes())
            await until(lambda: cache.num_pinned_bytes == 0)

    run(scenario)


def test_another_image_is_not_in_the_cache():
    async def scenario():
        async with encode_side() as side:
            peer = await side.link()
            for number, content in enumerate("xyz"):
                side.worker.seed = number
                await want(side, peer, content, content)
                await receive(peer, content, make_encoded(CONFIG, seed=number))
            for number, content in enumerate("xyz"):
                await want(side, peer, content, content, attempt=2)
                await receive(peer, content, make_encoded(CONFIG, seed=number), attempt=2)
            assert side.worker.num_encoded == 3

    run(scenario)


@pytest.mark.parametrize("options", [EncodeOptions(), OFF], ids=["cache", "off"])
@pytest.mark.parametrize("when", ["pull", "decode", "tower"])
def test_equal_items_at_once_are_encoded_once(options, when):
    async def scenario():
        source = Source()
        async with encode_side(pull=source, options=options) as side:
            peer = await side.link()
            gates = {"pull": source.gate, "decode": side.worker.decode_gate, "tower": side.worker.gate}
            reached = {"pull": source.pulled, "decode": side.worker.decoded, "tower": side.worker.batches}
            gates[when].clear()
            for name in "abc":
                await want(side, peer, name)
                await until(lambda name=name: reached[when] and (name, 0, 1) in side.server._tasks)
            assert side.server.pipeline.num_encodings == (when == "tower")
            gates[when].set()
            headers = [await receive(peer, name) for name in "abc"]
            assert (source.pulled, side.worker.decoded, side.worker.num_encoded) == (["x"], [b"x"], 1)
            assert sorted(decoded(side)) == ["a", "b", "c"]
            assert [(h.cached, h.batch, h.encode_ms) for h in headers] == [(False, 1, 2.0)] * 3, "they waited for it"
            assert side.server.pipeline.num_encodings == 1
            await want(side, peer, "d")
            assert (await receive(peer, "d")).cached is (options is not OFF)
            assert side.worker.num_encoded == 1 + (options is OFF)

    run(scenario)


def test_with_the_cache_off_nothing_is_kept():
    async def scenario():
        async with encode_side(options=OFF) as side:
            peer, cache = await side.link(), side.server.pipeline.cache
            for number in range(3):
                await want(side, peer, str(number))
                assert len(cache) == 0
                await receive(peer, str(number))
            assert side.worker.num_encoded == 3
            assert (len(cache), cache.num_bytes, cache.num_hits) == (0, 0, 0)
            assert not side.server.pipeline._encodings

    run(scenario)


@pytest.mark.parametrize("by", ["language rank", "time"])
@pytest.mark.parametrize("when", ["pull", "decode", "tower"])
def test_the_others_get_their_rows_when_the_first_is_given_up(when, by):
    async def scenario():
        source = Source()
        async with encode_side(pull=source) as side:
            peer = await side.link()
            gates = {"pull": source.gate, "decode": side.worker.decode_gate, "tower": side.worker.gate}
            reached = {"pull": source.pulled, "decode": side.worker.decoded, "tower": side.worker.batches}
            gates[when].clear()
            await want(side, peer, "a", timeout_s=0.3 if by == "time" else 30)
            await until(lambda: reached[when])
            await want(side, peer, "b")
            await until(lambda: ("b", 0, 1) in side.server._tasks)
            if by == "language rank":
                await side.cancel(peer, "a")
            await until(lambda: ("a", 0, 1) not in side.server.sessions.items, 3)
            gates[when].set()
            await receive(peer, "b")
            assert (source.pulled, side.worker.decoded, side.worker.num_encoded) == (["x"], [b"x"], 1)
            assert [m.request_id for m in side.said(ItemFailed)] == (["a"] if by == "time" else [])

    run(scenario)


@pytest.mark.parametrize("when", ["pull", "decode"])
def test_what_nobody_waits_for_any_more_does_not_go_into_the_tower(when):
    async def scenario():
        source = Source()
        async with encode_side(pull=source) as side:
            peer, gate = await side.link(), source.gate if when == "pull" else side.worker.decode_gate
            gate.clear()
            for name in "ab":
                await want(side, peer, name)
            reached = source.pulled if when == "pull" else side.worker.decoded
            await until(lambda: reached and ("b", 0, 1) in side.server._tasks)
            for name in "ab":
                await side.cancel(peer, name)
            await until(lambda: not side.leftovers(), 2, side.leftovers)
            await until(lambda: not side.server.pipeline._encodings)
            side.worker.seed = 1
            await want(side, peer, "c")  # it starts anew
            gate.set()
            await receive(peer, "c", make_encoded(CONFIG, seed=1))
            assert len(source.pulled) == 2
            assert side.worker.num_encoded == 1

    run(scenario)


@pytest.mark.parametrize("options", [EncodeOptions(), OFF], ids=["cache", "off"])
def test_who_comes_back_takes_up_what_is_in_the_tower_still(options):
    """A client hangs up and asks again; an attempt is lost and the next one comes here."""

    async def scenario():
        async with encode_side(options=options) as side:
            peer = await side.link()
            side.worker.gate.clear()
            await want(side, peer, "a")
            await until(lambda: side.worker.batches)
            await side.cancel(peer, "a")
            await until(lambda: not side.server._tasks)
            await want(side, peer, "a", attempt=2)
            await until(lambda: ("a", 0, 2) in side.server._tasks)
            side.worker.gate.set()
            await receive(peer, "a", attempt=2)
            assert side.worker.num_encoded == 1

    run(scenario)


@pytest.mark.parametrize("options", [EncodeOptions(), OFF], ids=["cache", "off"])
def test_what_comes_out_of_the_tower_for_nobody_is_kept_if_there_is_a_cache(options):
    async def scenario():
        async with encode_side(options=options) as side:
            peer, cache = await side.link(), side.server.pipeline.cache
            side.worker.gate.clear()
            await want(side, peer, "a")
            await until(lambda: side.worker.batches)
            await side.cancel(peer, "a")
            side.worker.gate.set()
            await until(lambda: not side.server.pipeline._encodings)
            assert (len(cache), cache.num_pinned_bytes) == (int(options is not OFF), 0)
            await want(side, peer, "b")
            assert (await receive(peer, "b")).cached is (options is not OFF)

    run(scenario)


@pytest.mark.parametrize(
    ("where", "error", "kind"),
    [
        ("pull", TransferError("the media store does not have the item"), "transfer"),
        ("decode", InputError("the image is damaged"), "input"),
        ("tower", ServerError("the vision tower's rows hold NaN or infinity"), "internal"),
        ("tower", ZeroDivisionError("x"), "internal"),
    ],
)
def test_a_failure_is_told_to_each_who_waits_and_to_no_other(where, error, kind, capsys):
    async def scenario():
        source = Source()
        source.gate.clear()
        failures = [error]

        async def pull(digest, num_bytes):
            await source(digest, num_bytes)
            if where == "pull" and failures and digest == "x":
                raise failures.pop()
            return digest.encode()

        def preprocess(data, visual, stop):
            if where == "decode" and failures and data == b"x":
                raise failures.pop()
            return data

        async with encode_side(pull=pull) as side:
            side.worker.preprocess = preprocess
            if where == "tower":
                side.worker.faults[b"x"] = error
            peer = await side.link()
            for name, content in [("a", "x"), ("b", "x"), ("c", "y")]:
                await want(side, peer, name, content)
            await until(lambda: len(side.server._tasks) == 3)
            source.gate.set()
            await receive(peer, "c")
            await until(lambda: len(side.said(ItemFailed)) == 2)
            assert {(m.request_id, m.failure.kind) for m in side.said(ItemFailed)} == {("a", kind), ("b", kind)}
            expected = "could not be encoded" if isinstance(error, ZeroDivisionError) else str(error)
            assert all(expected in m.failure.message for m in side.said(ItemFailed))
            side.worker.faults.clear()
            await want(side, peer, "d")  # a failure is not kept
            assert not (await receive(peer, "d")).cached

    run(scenario)


def test_rows_in_use_stay_while_others_push_into_the_cache():
    async def scenario():
        async with encode_side() as side:
            peer, cache = await side.link(), side.server.pipeline.cache
            cache.max_bytes = item_bytes()
            await peer.say(make_grant("a", content="x", stop=4))
            assert (await peer.hear(Header)).row_stop == 4
            await peer.take(make_grant("a", stop=4), ITEM)  # and wants the rest later
            side.worker.seed = 1
            await want(side, peer, "b", "y")
            await receive(peer, "b", make_encoded(CONFIG, seed=1))
            await until(lambda: cache.num_pinned_bytes == item_bytes())
            assert key_of("x") in cache
            assert key_of("y") not in cache, "it was not in use any more"
            await peer.say(make_grant("a", start=4, kind=Resume))
            assert (await peer.hear(Header)).row_start == 4
            await peer.take(make_grant("a", start=4, kind=Resume), ITEM)
            await until(lambda: cache.num_pinned_bytes == 0)
            assert cache.num_bytes == item_bytes()
            await want(side, peer, "c", "y")
            assert not (await receive(peer, "c", make_encoded(CONFIG, seed=1))).cached
            assert (cache.num_evictions, len(cache)) == (2, 1)

    run(scenario)


def test_rows_in_use_by_two_stay_until_both_are_done():
    async def scenario():
        async with encode_side() as side:
            peer, cache = await side.link(), side.server.pipeline.cache
            cache.max_bytes = item_bytes()
            for name in "ab":
                await want(side, peer, name)
            await receive(peer, "a")
            header = await peer.hear(Header)
            assert header.request_id == "b"
            assert cache.num_pinned_bytes == item_bytes(), "b has them still"
            await peer.take(make_grant("b"), ITEM)
            await until(lambda: cache.num_pinned_bytes == 0)

    run(scenario)


def test_an_item_larger_than_the_cache_is_sent_and_not_kept():
    async def scenario():
        async with encode_side() as side:
            peer, cache = await side.link(), side.server.pipeline.cache
            cache.max_bytes = item_bytes() - 1
            for name in "ab":
                await want(side, peer, name)
                assert not (await receive(peer, name)).cached
            assert (len(cache), side.worker.num_encoded) == (0, 2)

    run(scenario)


def test_a_fault_between_rows_and_header_leaves_nothing_pinned(monkeypatch, capsys):
    faults = ["encoded"]

    def fail(point):
        if point in faults:
            faults.remove(point)
            raise RuntimeError("on purpose")

    monkeypatch.setattr(encode_server, "fault_point", fail)

    async def scenario():
        async with encode_side() as side:
            peer = await side.link()
            await want(side, peer, "a")
            await until(lambda: side.said(ItemFailed))
            assert side.server.pipeline.cache.num_pinned_bytes == 0
            await want(side, peer, "a", attempt=2)
            assert (await receive(peer, "a", attempt=2)).cached

    run(scenario)


def test_rows_that_were_let_go_come_from_the_cache_with_the_same_bits():
    """Sessions drop parked rows when their lease ends; the next attempt costs no tower."""
    options = EncodeOptions(vision_batch_tokens=0)

    async def scenario():
        async with running(kind="in-process", blocks=2) as system:
            await system.start_encode_rank(options=options)
            picture = make_picture(1, (128, 128))
            took = []
            for number in range(3):
                system.submit(f"r{number}", picture)
                took += await system.check(f"r{number}", picture)
            assert [timings.cached for timings in took] == [False, True, True]
            assert [timings.batch for timings in took] == [1, 0, 0]
            assert all(timings.encode == timings.preprocess == 0 for timings in took[1:])
            assert all(timings.resumes for timings in took)
            assert system.workers[0].num_encoded == 1
            cache = system.ranks[0].server.pipeline.cache
            await until(lambda: cache.num_pinned_bytes == 0)

    run(scenario)
