"""Transfers that begin in the middle of an item: the bytes that are sent, what is accepted, what comes out."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import TransferError
from qwen3vl_disagg.language.rank import LanguageRank
from qwen3vl_disagg.language.request_book import Running
from qwen3vl_disagg.protocol.allocator import Want
from qwen3vl_disagg.protocol.messages import Cancel, Grant, HubMessage, NeedItems, RankHello, Resume, Room
from qwen3vl_disagg.protocol.session_events import Consumed, Expect
from qwen3vl_disagg.transport.links import LinkBroken
from tests.language.test_receiver import CopyingLink, damaged, receive_over
from tests.support.link_scenarios import BLOCK, describe, expect_rows, make_image, run, running, until
from tests.support.random_model import small_config
from tests.support.transfer import Transfer, make_encoded, make_receiver, make_visual, split_payload

CONFIG = small_config()
GRIDS = {1: (1, 2, 2), 6: (1, 4, 6), 7: (1, 2, 14), 16: (1, 8, 8)}


def starting_at(first: int, transfer: Transfer) -> Transfer:
    transfer.session.need_from(first)
    return transfer


def grant(first: int, stop: int, total: int, kind: type[Room] = Grant) -> Room:
    item = {"visual": make_visual(CONFIG), "timeout_s": 30.0} if kind is Grant else {}
    return kind(
        **item,
        request_id="r",
        item=0,
        attempt=1,
        row_start=first,
        row_stop=stop,
        deepstack_start=first,
        deepstack_stop=total if kind is Grant else first,
        row_runs=[stop - first],
        deepstack_runs=[total - first] if kind is Grant else [],
    )


# ---- what is sent ----


@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize(("rows", "first"), [(1, 0), (6, 0), (6, 1), (6, 5), (7, 3), (16, 8), (16, 15)])
@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_an_item_of_r_rows_from_row_f_sends_r_minus_f(levels, rows, first, blocks):
    """Embeddings and DeepStack of the needed rows, each once, and aux once."""
    config = small_config(levels=levels)
    receiver = make_receiver(config, rows=4 * blocks, deepstack_rows=64, block_size=4)
    encoded = make_encoded(config, GRIDS[rows])
    transfer = starting_at(first, Transfer(receiver, encoded))
    num_bytes, main, deepstack = 0, [], []
    while not transfer.is_complete:
        asked = transfer.grant()
        payload = encoded.payload(asked)
        num_bytes += sum(tensor.nbytes for tensor in payload)
        aux, deepstack_parts, (main_parts, *_) = split_payload(asked, payload)
        assert len(aux) == (not main)
        main += main_parts
        deepstack += deepstack_parts
        transfer.receive()
        transfer.consume()
    assert num_bytes == receiver.buffers.row_sizes.transfer_bytes(rows - first, rows - first, aux=True)
    assert receiver.totals(("r", 0, 1))[0] == num_bytes
    assert torch.equal(torch.cat(main), encoded.main[first:])
    if levels:
        assert torch.equal(torch.cat(deepstack), encoded.deepstack[first:])


def test_the_kind_of_grant_says_whether_aux_comes_not_its_first_row():
    encoded = make_encoded(CONFIG)
    assert encoded.payload(grant(2, 4, 6))[0].dtype == torch.int64
    assert encoded.payload(grant(2, 4, 6, Resume))[0].dtype == torch.float32
    assert encoded.header(grant(2, 4, 6)).total_rows == 6


@pytest.mark.parametrize(
    ("first", "stop", "total"), [(6, 7, 6), (6, 6, 6), (9, 12, 12), (-1, 3, 6), (3, 3, 6), (4, 7, 7), (2, 6, 7)]
)
def test_rows_that_the_item_does_not_have_are_not_promised(first, stop, total):
    with pytest.raises(TransferError, match=rf"rows {first}\.\.|of no rows"):
        make_encoded(CONFIG).header(grant(first, stop, total))


# ---- what is received ----


@pytest.mark.parametrize("levels", [0, 2])
@given(data=st.data())
def test_needed_rows_come_out_bit_equal_from_scattered_blocks(levels, data):
    """From any row on, whatever the pools and however the free blocks lie; also after payloads that broke."""
    config = small_config(levels=levels)
    blocks = data.draw(st.integers(1, 6))
    receiver = make_receiver(
        config, rows=2 * blocks, deepstack_rows=2 * data.draw(st.integers(1, 9)), slots=3, block_size=2
    )
    allocator = receiver.buffers.allocator
    leases = [lease for lease in (allocator.grant("x", Want(rows=1)) for _ in range(blocks)) if lease]
    for number in data.draw(st.permutations(range(blocks))):
        allocator.free(leases[number][0])
    encoded = make_encoded(config, data.draw(st.sampled_from(list(GRIDS.values()))), seed=7)
    first = data.draw(st.integers(0, len(encoded.main) - 1))
    transfer = starting_at(first, Transfer(receiver, encoded))
    main, deepstack = torch.empty_like(encoded.main), torch.empty_like(encoded.deepstack)
    while not transfer.is_complete:
        if data.draw(st.booleans()):
            after = data.draw(st.integers(0, len(encoded.payload(transfer.grant())) - 1))
            with pytest.raises(LinkBroken):
                receive_over(CopyingLink(breaks_after=after), transfer)
        start = transfer.session.received
        rows = receive_over(CopyingLink(), transfer)
        assert rows.start == start
        rows.write(rows.start, rows.stop, main[rows.start : rows.stop], deepstack[rows.start : rows.stop])
        transfer.consume()
        receiver.buffers.input_embeddings[:] = torch.nan
    assert torch.equal(main[first:], encoded.main[first:])
    assert torch.equal(deepstack[first:], encoded.deepstack[first:])
    transfer.end()
    assert allocator.is_idle


@pytest.mark.parametrize("row", [2, 3, 5])
@pytest.mark.parametrize("name", ["main", "deepstack", "fill_ids", "positions"])
def test_runs_of_a_partial_item_are_checked(name, row):
    receiver = make_receiver(CONFIG)
    transfer = starting_at(2, Transfer(receiver, make_encoded(CONFIG)))
    asked = transfer.grant()
    aux, *_ = transfer.encoded.payload(asked)
    what = "DeepStack rows" if name == "deepstack" else "rows"
    with pytest.raises(TransferError, match=rf"digest of {what} 2\.\.6"):
        transfer.receive([aux, *damaged(transfer.encoded, name, row, 3).payload(asked)[1:]])


def test_rows_from_the_items_beginning_in_place_of_those_asked_for_are_refused():
    receiver = make_receiver(CONFIG)
    transfer = starting_at(2, Transfer(receiver, make_encoded(CONFIG)))
    asked = transfer.grant()
    wrong = msgspec.structs.replace(asked, row_start=0, row_stop=4, deepstack_start=0, deepstack_stop=4)
    with pytest.raises(TransferError, match=r"digest of DeepStack rows 2\.\.6"):
        transfer.receive(transfer.encoded.payload(wrong))
    digests = transfer.encoded.header(wrong)
    with pytest.raises(TransferError, match=r"digest of DeepStack rows 2\.\.6"):  # each row weighs what its place does
        transfer.receive(transfer.encoded.payload(wrong), deepstack_digests=digests.deepstack_digests)


def test_positions_are_those_of_the_rows_in_the_item():
    encoded = make_encoded(CONFIG)
    shifted = replace(encoded, positions=encoded.positions[[0, 1, 0, 1, 2, 3]].contiguous())
    transfer = starting_at(2, Transfer(make_receiver(CONFIG), shifted))
    with pytest.raises(TransferError, match="positions"):
        transfer.receive()


@pytest.mark.parametrize("first", [0, 2])
def test_the_digest_of_the_whole_item_is_checked_where_all_of_it_came(first):
    transfer = starting_at(first, Transfer(make_receiver(CONFIG), make_encoded(CONFIG)))
    payload = transfer.encoded.payload(transfer.grant())
    payload[0][-2] += 1
    if first:
        assert transfer.receive(payload).start == first
        return
    with pytest.raises(TransferError, match="digest of the item"):
        transfer.receive(payload)


def test_a_new_attempt_from_another_row_meets_nothing_of_the_one_before():
    receiver = make_receiver(CONFIG, rows=4, deepstack_rows=16)
    encoded = make_encoded(CONFIG)
    before = starting_at(1, Transfer(receiver, encoded))
    before.receive()
    for lease in (before.session.room, before.session.hold):
        receiver.buffers.allocator.free(lease)
    after = starting_at(0, Transfer(receiver, encoded, attempt=2))
    after.receive()
    assert list(receiver._items) == [("r", 0, 2)]
    after.consume()
    rows = after.receive()
    assert torch.equal(torch.cat([piece for _, piece in rows.deepstack]), encoded.deepstack)


@pytest.mark.parametrize("first", [0, 2])
def test_an_initial_transfer_that_comes_again_counts_once(first):
    """All of it came, but whoever received it broke before it was told."""
    receiver = make_receiver(CONFIG)
    transfer = starting_at(first, Transfer(receiver, make_encoded(CONFIG)))
    for _ in range(2):
        transfer.receive()
        transfer.session.received = first
    num_bytes = receiver.buffers.row_sizes.transfer_bytes(6 - first, 6 - first)
    assert receiver.totals(("r", 0, 1)) == (num_bytes, 1)


# ---- between ranks ----


@pytest.mark.parametrize("first_rows", [None, [], [0, 17]])
def test_what_a_rank_says_that_it_needs(first_rows):
    message = NeedItems(request_id="r", items=[0, 2], **({} if first_rows is None else {"first_rows": first_rows}))
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=HubMessage)
    assert again == message
    assert again.first_rows == (first_rows or [])


def test_a_language_rank_passes_on_what_its_engine_needs():
    async def scenario():
        events = []
        links = SimpleNamespace(handle=events.append)
        hello = RankHello(token="t", role="language", rank=0, pid=1, fingerprint={})
        rank = LanguageRank(Mock(), links, hello, ("", 0))  # type: ignore[arg-type]
        items = [make_visual(CONFIG, GRIDS[rows]) for rows in (6, 7)]
        requests = rank._requests
        requests.book.running["r"] = Running(items, 60.0, {0})
        requests.on_events(
            [NeedItems(request_id="r", items=[1], first_rows=[3]), NeedItems(request_id="r", items=[0, 1])]
        )
        assert events == [Expect("r", items, [1], 60.0, [3]), Expect("r", items, [0, 1], 60.0, [])]

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["gloo", "in-process"])
def test_needed_rows_cross_a_link_and_more_of_them_when_they_are_needed_again(kind):
    async def scenario():
        async with running(blocks=1, deepstack_blocks=8, kind=kind) as system:
            await system.start_encode_rank()
            engine = system.engine
            engine.is_holding = True
            data = make_image(3, (160, 96))  # 15 rows
            visual, expected = describe(data), expect_rows(data)
            system.hub.media[visual.digest] = data
            system.visuals["r"] = [visual]

            async def check(first: int, attempt: int) -> None:
                system.links.handle(Expect("r", [visual], [0], time.monotonic() + 60, [first]))
                system.assign("r", attempt=attempt)
                system.make_link.sent.clear()
                for start in range(first, 15, BLOCK):
                    await until(lambda: engine.held)
                    delivery = engine.held.pop()
                    rows, stop = delivery.rows, min(15, start + BLOCK)
                    assert (rows.attempt, rows.start, rows.stop) == (attempt, start, stop)
                    main, deepstack = torch.empty(stop - start, 32), torch.empty(stop - start, expected.shape[1] - 32)
                    rows.write(start, stop, main, deepstack)
                    assert torch.equal(torch.cat([main, deepstack], dim=1), expected[start:stop])
                    system.links.handle(Consumed("r", 0, attempt, stop))
                sizes = system.receiver.buffers.row_sizes
                assert sum(system.make_link.sent) == sizes.transfer_bytes(15 - first, 15 - first)

            await check(6, 1)
            await check(0, 2)
            await check(14, 3)
            system.links.handle(Expect("r", [visual], [0], time.monotonic() + 60, [2]))
            system.assign("r", attempt=4)
            await until(lambda: engine.held)
            system.links.handle(Expect("r", [visual], [], time.monotonic() + 60))  # preempted while it reads
            assert [(recall.item, recall.attempt) for recall in engine.recalls] == [(0, 4)]
            assert system.links.sessions.allocator.is_idle
            assert engine.arrived[-1].attempt == 4
            system.links.handle(Cancel(request_id="r"))

    run(scenario)
