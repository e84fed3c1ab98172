"""What is accepted of a payload, what is refused, and how the rows come out again."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from unittest.mock import Mock

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import TransferError
from qwen3vl_disagg.encode.worker import EncodedItem
from qwen3vl_disagg.protocol.allocator import Want
from qwen3vl_disagg.protocol.layout import AUX_FIELDS
from qwen3vl_disagg.transport.buffers import VisualRows
from qwen3vl_disagg.transport.digest import run_sums, sums_digest
from qwen3vl_disagg.transport.links import InProcessLink, LinkBroken
from tests.support.random_model import small_config
from tests.support.transfer import Transfer, make_encoded, make_receiver, split_payload

CONFIG = small_config()
GRIDS = [(1, 2, 2), (1, 4, 6), (1, 2, 14), (1, 8, 8), (2, 6, 6)]


class CopyingLink(InProcessLink):
    """What a wire does: the bytes land in the given tensors; and they may not all come."""

    def __init__(self, breaks_after: int | None = None) -> None:
        super().__init__()
        self.breaks_after = breaks_after

    def receive(self, tensors, timeout):
        for number, (target, source) in enumerate(zip(tensors, super().receive(tensors, timeout), strict=True)):
            if number == self.breaks_after:
                raise LinkBroken("the peer is gone")
            target.copy_(source)
            yield target


def receive_over(link: InProcessLink, transfer: Transfer) -> VisualRows:
    job = transfer.job()
    link.send(transfer.encoded.payload(job.grant), 1)
    rows = transfer.receiver.receive(link, job, 1)
    transfer.session.received = rows.stop
    return rows


def check_that_the_next_item_passes(receiver) -> None:
    encoded = make_encoded(receiver.config, seed=99)
    main, deepstack = Transfer(receiver, encoded, request_id="next").run()
    assert torch.equal(main, encoded.main)
    assert torch.equal(deepstack, encoded.deepstack)


@pytest.mark.parametrize("levels", [0, 1, 3])
@given(data=st.data())
def test_rows_come_out_bit_equal_from_scattered_blocks(levels, data):
    """Whatever the pools, and however the free blocks lie; DeepStack at once or ranged; over a wire."""
    config = small_config(levels=levels)
    blocks = data.draw(st.integers(1, 8))
    receiver = make_receiver(
        config, rows=4 * blocks, deepstack_rows=4 * data.draw(st.integers(1, 8)), slots=3, block_size=4
    )
    allocator = receiver.buffers.allocator
    leases = [lease for lease in (allocator.grant("x", Want(rows=1)) for _ in range(blocks)) if lease]
    for number in data.draw(st.permutations(range(blocks))):  # free, in any order: the next grants are scattered
        allocator.free(leases[number][0])
    encoded = make_encoded(config, data.draw(st.sampled_from(GRIDS)), seed=7)
    transfer = Transfer(receiver, encoded)
    main, deepstack = torch.empty_like(encoded.main), torch.empty_like(encoded.deepstack)
    while not transfer.is_complete:
        rows = receive_over(CopyingLink(), transfer)
        rows.write(rows.start, rows.stop, main[rows.start : rows.stop], deepstack[rows.start : rows.stop])
        transfer.consume()
        receiver.buffers.input_embeddings[:] = torch.nan  # nobody reads them any more
    assert torch.equal(main, encoded.main)
    assert torch.equal(deepstack, encoded.deepstack)
    transfer.end()
    assert allocator.is_idle


def test_bytes_and_transfers_are_counted():
    receiver = make_receiver(CONFIG, rows=4)
    transfer = Transfer(receiver, make_encoded(CONFIG))
    sizes = receiver.buffers.row_sizes
    transfer.receive()
    assert receiver.totals(("r", 0, 1)) == (sizes.transfer_bytes(4, 4), 1)  # 6 rows do not fit the DeepStack pool
    transfer.consume()
    transfer.receive()
    assert receiver.totals(("r", 0, 1)) == (sizes.transfer_bytes(4, 4) + sizes.transfer_bytes(2, 2, aux=False), 2)
    assert receiver.totals(("r", 0, 2)) == (0, 0)
    receiver.forget("r", 1)
    assert receiver.totals(("r", 0, 1))[1] == 2
    receiver.forget("r", 0)
    assert receiver.totals(("r", 0, 1)) == (0, 0)


# ---- what is refused ----


def damaged(encoded: EncodedItem, name: str, row: int, value: float) -> EncodedItem:
    changed = getattr(encoded, name).clone()
    changed.view(len(changed), -1)[row, -1] = value
    return replace(encoded, **{name: changed})


@pytest.mark.parametrize("column", range(len(AUX_FIELDS)), ids=AUX_FIELDS)
def test_aux_is_checked_field_by_field(column):
    receiver = make_receiver(CONFIG)
    transfer = Transfer(receiver, make_encoded(CONFIG))
    payload = transfer.encoded.payload(transfer.grant())
    payload[0][column] += 1
    name = "digest of the item" if AUX_FIELDS[column] == "digest" else f"aux {AUX_FIELDS[column]}: expected"
    with pytest.raises(TransferError, match=name):
        transfer.receive(payload)
    transfer.end()
    check_that_the_next_item_passes(receiver)


@pytest.mark.parametrize("row", [0, 3, 4, 5])
@pytest.mark.parametrize("name", ["main", "deepstack", "fill_ids", "positions"])
def test_rows_damaged_on_the_way_do_not_have_their_runs_digest(name, row):
    receiver = make_receiver(CONFIG)
    transfer = Transfer(receiver, make_encoded(CONFIG))
    grant = transfer.grant()
    aux, *_ = transfer.encoded.payload(grant)
    payload = [aux, *damaged(transfer.encoded, name, row, 3).payload(grant)[1:]]
    what = "DeepStack rows" if name == "deepstack" else "rows"
    with pytest.raises(TransferError, match=f"digest of {what} 0..6"):
        transfer.receive(payload)
    transfer.end()
    check_that_the_next_item_passes(receiver)


@pytest.mark.parametrize("field", ["row_digests", "deepstack_digests"])
@pytest.mark.parametrize("run", [0, 1, 2])
def test_each_runs_digest_is_checked(field, run):
    """Blocks 0, 2 and 4: three runs."""
    receiver = make_receiver(CONFIG, rows=24)
    for name in ("rows", "deepstack"):
        receiver.buffers.allocator._free[name][:] = [5, 3, 1, 4, 2, 0]
    transfer = Transfer(receiver, make_encoded(CONFIG, (1, 4, 10)))
    assert transfer.grant().row_runs == transfer.grant().deepstack_runs == [4, 4, 2]
    digests = getattr(transfer.encoded.header(transfer.grant()), field)
    digests[run] += 1
    what = "DeepStack rows" if field == "deepstack_digests" else "rows"
    with pytest.raises(TransferError, match=rf"digest of {what} {4 * run}\.\.{min(10, 4 * run + 4)}: expected"):
        transfer.receive(**{field: digests})


def test_another_requests_rows_of_the_same_shape_are_refused():
    receiver = make_receiver(CONFIG)
    transfer, strange = Transfer(receiver, make_encoded(CONFIG, seed=1)), make_encoded(CONFIG, seed=2)
    with pytest.raises(TransferError, match="digest of DeepStack rows"):
        transfer.receive(strange.payload(transfer.grant()))


BAD_ROWS = {
    "another placeholder": ("fill_ids", 2, CONFIG.video_token_id, "fill_ids are not all 60"),
    "positions of another grid": ("positions", 4, 7, r"positions do not follow the grid \(1, 4, 6\)"),
    "embeddings that are not a number": ("main", 2, torch.nan, r"rows 0\.\.\d hold NaN or infinity"),
    "infinite embeddings of a resume": ("main", 5, -torch.inf, r"rows \d\.\.6 hold NaN or infinity"),
    "infinite DeepStack rows": ("deepstack", 5, torch.inf, r"DeepStack rows 0\.\.6 hold NaN or infinity"),
}


@pytest.mark.parametrize(("name", "row", "value", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_cannot_be_right_are_refused(name, row, value, reason):
    """Their digest is right: only the check of the rows themselves can refuse them. Also on a resume."""
    for rows in (16, 4):
        receiver = make_receiver(CONFIG, rows=rows, deepstack_rows=16)
        transfer = Transfer(receiver, damaged(make_encoded(CONFIG), name, row, value))
        if rows == 4 and row >= 4 and name != "deepstack":  # which comes first, whole
            transfer.receive()
            transfer.consume()
        with pytest.raises(TransferError, match=reason):
            transfer.receive()
        transfer.end()
        check_that_the_next_item_passes(receiver)


def test_positions_of_a_resume_are_those_of_its_rows():
    """Rows 4 and 5 of the grid, not 0 and 1."""
    receiver = make_receiver(CONFIG, rows=4, deepstack_rows=16)
    encoded = make_encoded(CONFIG)
    transfer = Transfer(receiver, replace(encoded, positions=encoded.positions[[0, 1, 2, 3, 0, 1]].contiguous()))
    transfer.receive()
    transfer.consume()
    with pytest.raises(TransferError, match="positions"):
        transfer.receive()


def test_a_video_has_the_videos_placeholder():
    receiver = make_receiver(CONFIG)
    encoded = make_encoded(CONFIG)
    transfer = Transfer(receiver, replace(encoded, fill_ids=torch.full_like(encoded.fill_ids, CONFIG.video_token_id)))
    transfer.session.visual = msgspec.structs.replace(transfer.session.visual, modality="video")
    transfer.receive()


def test_rows_that_come_in_another_grant_than_their_own_are_refused():
    """Each run is what its header says, but together they are not the item: rows 4, 5 are those of another item."""
    receiver = make_receiver(CONFIG, rows=4, deepstack_rows=16)
    mine, other = make_encoded(CONFIG, seed=1), make_encoded(CONFIG, seed=2)
    transfer = Transfer(receiver, mine)
    transfer.receive()
    transfer.consume()
    transfer.encoded = other
    with pytest.raises(TransferError, match="digest of the item: expected"):
        transfer.receive()
    transfer.end()
    check_that_the_next_item_passes(receiver)


def test_a_payload_that_does_not_come_breaks_the_link():
    receiver = make_receiver(CONFIG)
    transfer = Transfer(receiver, make_encoded(CONFIG))
    with pytest.raises(LinkBroken):
        receiver.receive(InProcessLink(), transfer.job(), 0.05)
    transfer.end()
    check_that_the_next_item_passes(receiver)


def test_the_rest_of_a_refused_payload_is_taken_off_the_link():
    receiver, link = make_receiver(CONFIG), CopyingLink()
    transfer = Transfer(receiver, make_encoded(CONFIG))
    header = transfer.job().header
    wrong = Transfer(receiver, make_encoded(CONFIG, seed=2)).encoded
    link.send(wrong.payload(transfer.grant()), 1)
    with pytest.raises(TransferError, match="digest"):
        receiver.receive(link, transfer.job(header), 1)
    assert torch.equal(receive_over(link, transfer).main[0][1], transfer.encoded.main)


# ---- what comes again ----


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.sampled_from([1, 6]))
def test_a_payload_that_breaks_and_comes_again_does_not_disturb_the_item(breaks, deepstack_blocks):
    """At every grant, breaks after that many tensors; what had been checked of the broken one does not count twice."""
    receiver = make_receiver(CONFIG, rows=12, deepstack_rows=4 * deepstack_blocks, block_size=4)
    receiver.buffers.allocator._free["rows"][:] = [2, 0, 1]
    encoded = make_encoded(CONFIG, (1, 8, 8), seed=3)
    transfer = Transfer(receiver, encoded)
    main, deepstack = torch.empty_like(encoded.main), torch.empty_like(encoded.deepstack)
    pending = iter(breaks)
    while not transfer.is_complete:
        number = next(pending, None)
        if number is not None and number < len(encoded.payload(transfer.grant())):
            with pytest.raises(LinkBroken):
                receive_over(CopyingLink(breaks_after=number), transfer)
        rows = receive_over(CopyingLink(), transfer)
        rows.write(rows.start, rows.stop, main[rows.start : rows.stop], deepstack[rows.start : rows.stop])
        transfer.consume()
    assert torch.equal(main, encoded.main)
    assert torch.equal(deepstack, encoded.deepstack)


def test_a_refused_attempt_leaves_nothing_to_the_next():
    receiver = make_receiver(CONFIG, rows=4, deepstack_rows=16)
    encoded = make_encoded(CONFIG)
    first = Transfer(receiver, encoded)
    first.receive()
    first.consume()
    with pytest.raises(TransferError):
        first.receive(row_digests=[1])
    for lease in (first.session.room, first.session.hold):
        receiver.buffers.allocator.free(lease)
    second = Transfer(receiver, encoded, attempt=2)
    assert torch.equal(second.run()[0], encoded.main)


def test_items_and_requests_do_not_meet():
    """Three items at once, by turns, each with its own digest and DeepStack."""
    receiver = make_receiver(CONFIG, rows=16, deepstack_rows=64, block_size=4)
    transfers = [
        Transfer(receiver, make_encoded(CONFIG, (1, 4, 10), seed=seed), request_id=name, item=item)
        for seed, (name, item) in enumerate([("a", 0), ("a", 1), ("b", 0)])
    ]
    while not all(transfer.is_complete for transfer in transfers):
        for transfer in transfers:
            if transfer.is_complete:
                continue
            others = receiver.buffers.allocator.grant("others", Want(rows=3))
            rows = receive_over(CopyingLink(), transfer)
            assert rows.stop - rows.start <= 4
            deepstack = torch.cat([piece for _, piece in rows.deepstack])
            assert torch.equal(deepstack, transfer.encoded.deepstack)
            transfer.consume()
            receiver.buffers.allocator.free(others[0])


def test_one_attempt_can_be_forgotten_alone():
    """A receiving thread may come to a payload after its request was forgotten: its attempt is forgotten again."""
    receiver = make_receiver(CONFIG)
    transfer = Transfer(receiver, make_encoded(CONFIG))
    job = transfer.job()
    receiver.forget("r")
    link = InProcessLink()
    link.send(transfer.encoded.payload(job.grant), 1)
    receiver.receive(link, job, 1)
    attempt = (job.grant.request_id, job.grant.item, job.grant.attempt)
    assert receiver.totals(attempt)[1] == 1
    receiver.forget_attempt(attempt)
    assert receiver.totals(attempt) == (0, 0)


# ---- rows as the engine reads them ----


@given(st.integers(1, 12), st.sets(st.integers(1, 11)), st.sets(st.integers(1, 11)), st.data())
def test_any_range_of_rows_can_be_written_also_across_pieces(total, main_cuts, deepstack_cuts, data):
    main, deepstack = torch.randn(total, 4), torch.randn(total, 6)

    def pieces(rows, cuts):
        edges = [0, *sorted(cut for cut in cuts if cut < total), total]
        return tuple((a, rows[a:b]) for a, b in pairwise(edges))

    first = data.draw(st.integers(0, total - 1))
    rows = VisualRows(1, first, total, pieces(main, main_cuts), pieces(deepstack, deepstack_cuts))
    start = data.draw(st.integers(first, total - 1))
    stop = data.draw(st.integers(start, total))
    main_out, deepstack_out = torch.full((stop - start, 4), torch.nan), torch.full((stop - start, 6), torch.nan)
    rows.write(start, stop, main_out, deepstack_out)
    assert torch.equal(main_out, main[start:stop])
    assert torch.equal(deepstack_out, deepstack[start:stop])
    rows.write(start, stop, main_out.zero_(), None)
    assert torch.equal(main_out, main[start:stop])


@pytest.mark.parametrize("which", ["main", "deepstack"])
@pytest.mark.parametrize("gap", [0, 2, 5])
def test_rows_that_are_not_here_are_not_made_up(which, gap):
    """DeepStack of a row missing while its embedding is here, or the other way round (I5)."""
    parts = {"main": torch.randn(6, 4), "deepstack": torch.randn(6, 4)}
    pieces = {name: tuple((i, rows[i : i + 1]) for i in range(6)) for name, rows in parts.items()}
    pieces[which] = tuple(piece for piece in pieces[which] if piece[0] != gap)
    rows = VisualRows(1, 0, 6, pieces["main"], pieces["deepstack"])
    with pytest.raises(ValueError, match=r"5 of rows 0\.\.6 are here"):
        rows.write(0, 6, torch.empty(6, 4), torch.empty(6, 4))


def test_rows_are_converted_to_what_the_engine_computes_in():
    rows = VisualRows(1, 0, 2, ((0, torch.ones(2, 4, dtype=torch.bfloat16)),), ((0, torch.ones(2, 0)),))
    out = torch.zeros(2, 4)
    rows.write(0, 2, out, torch.empty(2, 0))
    assert (out == 1).all()


@pytest.mark.parametrize("forget", ["request", "attempt"])
def test_rows_are_handed_to_the_engine_once_and_not_when_they_are_forgotten(forget):
    receiver, engine = make_receiver(CONFIG), Mock()
    transfer = Transfer(receiver, make_encoded(CONFIG))
    rows, attempt = transfer.receive(), transfer.session.key
    receiver.hand_over(attempt, engine)
    [call] = engine.provide_rows.call_args_list
    assert call.args[:3] == (*attempt[:2], rows)
    assert receiver.hand_over(attempt, engine) == []
    transfer = Transfer(receiver, make_encoded(CONFIG, seed=1))
    transfer.receive()
    if forget == "request":
        receiver.forget(attempt[0])
    else:
        receiver.forget_attempt(attempt)
    assert receiver.hand_over(attempt, engine) == []
    engine.provide_rows.assert_called_once()


def test_a_delivery_says_what_it_took():
    receiver = make_receiver(CONFIG, rows=4, deepstack_rows=16)
    transfer = Transfer(receiver, make_encoded(CONFIG), attempt=3)
    said = {"preprocess_ms": 2.0, "encode_ms": 3.0, "cached": True, "batch": 7, "note": "cut"}
    rows = [transfer.receive(**said)]
    transfer.consume()
    rows.append(transfer.receive(**said))
    delivery = receiver.delivery(transfer.session.key)
    assert delivery is not None
    assert (delivery.request_id, delivery.item, delivery.rows) == ("r", 0, rows[1])
    timings, (num_bytes, _) = delivery.timings, receiver.totals(transfer.session.key)
    assert (timings.preprocess, timings.encode, timings.transfer_bytes) == (2.0, 3.0, num_bytes)
    assert (timings.encode_rank, timings.rows, timings.resumes, timings.attempts) == (0, 6, 1, 3)
    assert (timings.cached, timings.batch, timings.note) == (True, 7, "cut")
    assert timings.transfer > 0


def test_the_digest_of_a_run_is_that_of_the_buffers_it_lies_in():
    receiver = make_receiver(CONFIG)
    transfer = Transfer(receiver, make_encoded(CONFIG))
    receive_over(CopyingLink(), transfer)
    assert transfer.session.room is not None
    [views] = receiver.buffers.row_views(transfer.session.room.rows, [6])
    assert sums_digest(run_sums(*views)) == transfer.encoded.header(transfer.grant()).row_digests[0]
    _, _, parts = split_payload(transfer.grant(), transfer.encoded.payload(transfer.grant()))
    assert all(torch.equal(view, part[0]) for view, part in zip(views, parts, strict=True))
