"""The encode server with different items at once: batches through the tower."""

from __future__ import annotations

import pytest

from qwen3vl_disagg.core.errors import ServerError
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode.batches import tower_cost
from qwen3vl_disagg.protocol.messages import ItemFailed
from tests.support.encode_items import decoded, receive, want
from tests.support.link_peers import VISUAL, encode_side
from tests.support.link_scenarios import CONFIG, run, until

COST = tower_cost(VISUAL.grid, CONFIG.vision)


def test_items_that_wait_for_the_tower_go_through_it_together():
    async def scenario():
        async with encode_side(options=EncodeOptions(vision_batch_tokens=int(2 * COST) + 1)) as side:
            peer = await side.link()
            side.worker.gate.clear()
            names = "abcdef"
            for name in names:
                await want(side, peer, name, name)
                await until(lambda name=name: name in decoded(side))  # while the tower is busy
            side.worker.gate.set()
            headers = [await receive(peer, name) for name in names]
            assert side.worker.batches == [[b"a"], [b"b", b"c"], [b"d", b"e"], [b"f"]]
            assert [header.batch for header in headers] == [1, 2, 2, 3, 3, 4]
            assert (side.server.pipeline.num_batches, side.server.pipeline.num_encodings) == (4, 6)

    run(scenario)


@pytest.mark.parametrize("fault", [ServerError("NaN"), RuntimeError("out of memory")])
def test_an_item_that_fails_in_a_batch_fails_alone(fault, capsys):
    async def scenario():
        async with encode_side() as side:
            peer = await side.link()
            side.worker.gate.clear()
            side.worker.faults[b"c"] = fault
            for name in "abcd":
                await want(side, peer, name, name)
                await until(lambda name=name: name in decoded(side))
            side.worker.gate.set()
            for name in "abd":
                await receive(peer, name)
            assert side.worker.batches == [[b"a"], [b"b", b"c", b"d"]]
            await until(lambda: side.said(ItemFailed))
            assert [(m.request_id, m.failure.kind) for m in side.said(ItemFailed)] == [("c", "internal")]

    run(scenario)


def test_a_tower_that_breaks_fails_its_batch_and_takes_the_next(capsys):
    async def scenario():
        async with encode_side() as side:
            peer = await side.link()
            side.worker.gate.clear()
            for name in "abc":
                await want(side, peer, name, name)
                await until(lambda name=name: name in decoded(side))
            encode, calls = side.worker.encode, []

            def broken(batch, ids):
                calls.append(batch)
                raise RuntimeError("the tower is broken")

            side.worker.encode = broken
            side.worker.gate.set()
            await receive(peer, "a")
            await until(lambda: len(side.said(ItemFailed)) == 2)
            side.worker.encode = encode
            await want(side, peer, "b", "b", attempt=2)
            await receive(peer, "b", attempt=2)
            assert calls == [[b"b", b"c"]]

    run(scenario)
