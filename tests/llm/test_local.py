"""Both roles in one thread: every item through every pool, bit for bit, without a copy."""

from __future__ import annotations

import io
import math
from unittest.mock import Mock

import msgspec
import pytest
import torch
from PIL import Image

from qwen3vl_disagg.core.errors import MediaTimeout
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode.worker import EncodedItem, EncodeWorker
from qwen3vl_disagg.llm.local import ItemError, LocalTransfer
from qwen3vl_disagg.processing import ImageProcessor
from qwen3vl_disagg.processing.patches import PixelSettings
from qwen3vl_disagg.protocol.session_events import Recall
from qwen3vl_disagg.transport.buffers import Delivery
from qwen3vl_disagg.transport.links import InProcessLink
from tests.support.random_model import random_vision_model, small_config
from tests.support.transfer import make_receiver, make_visual

CONFIG = small_config()
HIDDEN, LEVELS = CONFIG.text.hidden_size, CONFIG.num_deepstack_levels
MODEL = random_vision_model(CONFIG, seed=1)
PROCESSOR = ImageProcessor(CONFIG.vision, PixelSettings(32 * 32, 32 * 32 * 100))
MAX_BLOCKS, BLOCK = 40, 2
ONE_BY_ONE = EncodeOptions(embedding_cache_mib=0, vision_batch_tokens=0)


class KeepingWorker(EncodeWorker):
    """Remembers what it encoded; each image runs through the tower once."""

    def __init__(self) -> None:
        super().__init__(MODEL, PROCESSOR, CONFIG)
        self.encoded: dict[tuple[int, int, int], EncodedItem] = {}
        self.num_encodings = 0

    def encode(self, batch, visual_token_ids):
        self.num_encodings += 1
        [pixels] = batch
        if pixels.grid not in self.encoded:
            [result] = super().encode(batch, visual_token_ids)
            if not isinstance(result, EncodedItem):
                return [result]
            self.encoded[pixels.grid] = result
        return [self.encoded[pixels.grid]]


WORKER = KeepingWorker()


class CountingLink(InProcessLink):
    """Rows of DeepStack and of embeddings in each payload."""

    def __init__(self) -> None:
        super().__init__()
        self.payloads: list[tuple[int, int, int]] = []
        """(aux, DeepStack rows, embedding rows)"""

    def send(self, tensors, timeout):
        counts = {8: 0, LEVELS * HIDDEN: 0, HIDDEN: 0}
        for tensor in tensors:
            width = tensor.shape[-1] if tensor.dtype in (torch.float32, torch.int64) else 0
            if width in counts:
                counts[width] += len(tensor) if tensor.dim() == 2 else 1
        self.payloads.append((counts[8], counts[LEVELS * HIDDEN], counts[HIDDEN]))
        super().send(tensors, timeout)


def make_image(rows: int) -> tuple[VisualItem, bytes]:
    """An image of one line of `rows` merged patches."""
    generator = torch.Generator().manual_seed(rows)
    pixels = torch.randint(0, 256, (32, 32 * rows, 3), generator=generator, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    visual = make_visual(CONFIG, PROCESSOR.grid(32 * rows, 32))
    assert visual.num_rows == rows
    return visual, file.getvalue()


IMAGES = {rows: make_image(rows) for rows in range(1, BLOCK * MAX_BLOCKS + 1)}


def make_transfer(blocks: int, deepstack_blocks: int, *, slots: int = 4) -> tuple[LocalTransfer, CountingLink]:
    receiver = make_receiver(
        CONFIG, rows=BLOCK * blocks, deepstack_rows=BLOCK * deepstack_blocks, slots=slots, block_size=BLOCK
    )
    transfer = LocalTransfer(WORKER, receiver, ONE_BY_ONE)
    transfer._link = link = CountingLink()
    return transfer, link


class Reader:
    """The engine: takes rows in the order of the items, copies them out, says that they are used."""

    def __init__(self, transfer: LocalTransfer, request_id: str, rows: list[int]) -> None:
        self.transfer, self.request_id, self.rows = transfer, request_id, rows
        self.main = [torch.full((n, HIDDEN), torch.nan) for n in rows]
        self.deepstack = [torch.full((n, LEVELS * HIDDEN), torch.nan) for n in rows]
        self.here: dict[int, Delivery] = {}
        self.item = 0
        visuals, media = zip(*[IMAGES[n] for n in rows], strict=True)
        transfer.need(request_id, list(visuals), list(range(len(rows))), list(media))

    @property
    def is_done(self) -> bool:
        return self.item == len(self.rows)

    def take(self, delivery: Delivery) -> None:
        assert delivery.item not in self.here, "rows came before the last ones were used"
        self.here[delivery.item] = delivery

    def read(self) -> bool:
        """Use up what is here; whether there was anything."""
        delivery = self.here.pop(self.item, None) if not self.is_done else None
        if delivery is None:
            return False
        rows, item = delivery.rows, self.item
        assert rows.start == 0 or not self.main[item][: rows.start].isnan().any(), "a gap"
        assert self.main[item][rows.start :].isnan().all(), "twice"
        here = slice(rows.start, rows.stop)
        rows.write(rows.start, rows.stop, self.main[item][here], self.deepstack[item][here])
        if rows.stop == self.rows[item]:
            self.item += 1
        self.transfer.consumed(self.request_id, item, rows.attempt, rows.stop)
        return True

    def check(self) -> None:
        for rows, main, deepstack in zip(self.rows, self.main, self.deepstack, strict=True):
            encoded = WORKER.encoded[IMAGES[rows][0].grid]
            assert torch.equal(main, encoded.main)
            assert torch.equal(deepstack, encoded.deepstack)


def run(transfer: LocalTransfer, readers: list[Reader]) -> list[Delivery]:
    """Until nothing moves any more."""
    deliveries = []
    while True:
        outcomes = transfer.run()
        for outcome in outcomes:
            assert isinstance(outcome, Delivery), outcome
            deliveries.append(outcome)
            next(r for r in readers if r.request_id == outcome.request_id).take(outcome)
        if not outcomes and sum(reader.read() for reader in readers) == 0:
            return deliveries


@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
@pytest.mark.parametrize("deepstack", ["larger than any item", "smaller than most"])
def test_every_item_passes_through_every_pool(blocks, deepstack):
    """Items of 1 to 40 blocks, the last one full or not. DeepStack once, or, when its pool is too small, by ranges."""
    deepstack_blocks = MAX_BLOCKS if deepstack == "larger than any item" else 2
    transfer, link = make_transfer(blocks, deepstack_blocks)
    for rows in range(1, BLOCK * MAX_BLOCKS + 1):
        request_id, item_blocks = str(rows), math.ceil(rows / BLOCK)
        link.payloads.clear()
        reader = Reader(transfer, request_id, [rows])
        deliveries = run(transfer, [reader])
        assert reader.is_done
        reader.check()
        is_ranged = item_blocks > deepstack_blocks
        step = BLOCK * min(blocks, deepstack_blocks if is_ranged else blocks)
        expected = [(start, min(start + step, rows)) for start in range(0, rows, step)]
        assert [(d.rows.start, d.rows.stop) for d in deliveries] == expected
        for number, ((start, stop), payload) in enumerate(zip(expected, link.payloads, strict=True)):
            deepstack_rows = stop - start if is_ranged else rows if number == 0 else 0
            assert payload == (number == 0, deepstack_rows, stop - start)
        assert deliveries[-1].timings.resumes == len(expected) - 1
        transfer.forget(request_id)
        assert transfer.run() == []
        assert transfer.is_idle


@pytest.mark.parametrize("deepstack_blocks", [2, MAX_BLOCKS])
def test_rows_are_the_encoders_own_memory(deepstack_blocks):
    transfer, _ = make_transfer(3, deepstack_blocks)
    for delivery in run(transfer, [Reader(transfer, "r", [33])]):
        encoded = WORKER.encoded[IMAGES[33][0].grid]
        for pieces, whole in ((delivery.rows.main, encoded.main), (delivery.rows.deepstack, encoded.deepstack)):
            for first, piece in pieces:
                assert piece.data_ptr() == whole[first].data_ptr(), "copied"
    assert not transfer.receiver.buffers.input_embeddings.any()
    assert not transfer.receiver.buffers.deepstack_embeddings.any()


@pytest.mark.parametrize(
    ("blocks", "deepstack_blocks", "slots"), [(1, 1, 1), (1, 20, 3), (2, 3, 2), (5, 4, 9), (30, 40, 9)]
)
def test_several_requests_of_several_items_share_the_pools(blocks, deepstack_blocks, slots):
    transfer, _ = make_transfer(blocks, deepstack_blocks, slots=slots)
    before = WORKER.num_encodings
    sizes = [[5, 16, 1], [7], [2, 3], [80, 1], [9, 9, 9, 9]]
    readers = [Reader(transfer, str(number), rows) for number, rows in enumerate(sizes)]
    deliveries = run(transfer, readers)
    assert all(reader.is_done for reader in readers)
    for reader in readers:
        reader.check()
    num_contents = len({rows for request in sizes for rows in request})
    assert num_contents <= WORKER.num_encodings - before <= sum(map(len, sizes)), "an item was encoded twice"
    assert all(delivery.rows.attempt == 1 for delivery in deliveries)
    for number in range(len(sizes)):
        transfer.forget(str(number))
    assert transfer.run() == []
    assert transfer.is_idle
    for table in (transfer._media, transfer._attempts, transfer._errors, transfer.receiver._items, transfer._encoded):
        assert not table


def test_times_and_bytes_are_told():
    transfer, _ = make_transfer(2, MAX_BLOCKS)
    last = run(transfer, [Reader(transfer, "r", [9])])[-1].timings
    sizes = transfer.receiver.buffers.row_sizes
    assert last.transfer_bytes == sizes.transfer_bytes(9, 9)
    assert min(last.preprocess, last.encode, last.transfer) > 0
    assert (last.resumes, last.encode_rank, last.attempts) == (2, 0, 1)


@pytest.mark.parametrize("fault", ["damaged", "slow", "not as announced", "not finite", "broken"])
def test_an_item_that_fails_leaves_nothing_behind(fault, monkeypatch):
    transfer, _ = make_transfer(4, 4)
    visual, data = IMAGES[4]
    slow = MediaTimeout("decoding the image takes too long")
    if fault == "damaged":
        data = data[:300]
    elif fault == "slow":
        monkeypatch.setattr(WORKER, "preprocess", Mock(side_effect=slow))
    elif fault == "not as announced":
        visual = msgspec.structs.replace(visual, size=(64, 64))
    elif fault == "broken":
        monkeypatch.setattr(WORKER.model.visual, "forward", Mock(side_effect=ZeroDivisionError))
        WORKER.encoded.pop((1, 2, 8), None)
    else:
        rows = torch.full((4, 32), torch.nan)
        monkeypatch.setattr(WORKER.model.visual, "forward", lambda *_: (rows, [rows, rows]))
        WORKER.encoded.pop((1, 2, 8), None)
    transfer.need("r", [visual], [0], [data])
    [outcome] = transfer.run()
    assert isinstance(outcome, ItemError)
    assert (outcome.request_id, outcome.item) == ("r", 0)
    expected = {"damaged": (400, "invalid_request"), "slow": (504, "media_timeout")}.get(fault, (500, "encode_error"))
    assert (outcome.error.param, outcome.error.status, outcome.error.code) == (visual.param, *expected)
    transfer.forget("r")
    assert transfer.run() == []
    assert transfer.is_idle
    monkeypatch.undo()
    reader = Reader(transfer, "next", [4])
    run(transfer, [reader])
    reader.check()


@pytest.mark.parametrize("read_first", [False, True])
def test_a_request_forgotten_half_way_gives_everything_back(read_first):
    transfer, _ = make_transfer(2, MAX_BLOCKS)
    reader, other = Reader(transfer, "r", [9, 4]), Reader(transfer, "other", [7])
    for outcome in transfer.run():
        assert isinstance(outcome, Delivery)
        reader.take(outcome)
    if read_first:
        reader.read()
        for outcome in transfer.run():
            assert isinstance(outcome, Delivery)
    transfer.forget("r")
    [recall] = transfer.run()  # the engine may be reading at this moment: nobody else gets the blocks yet
    assert recall == Recall("r", 0, 1)
    assert transfer.receiver.buffers.allocator.counts("rows") == (0, 0, 2)
    transfer.returned(recall)
    run(transfer, [other])
    other.check()
    transfer.forget("other")
    assert transfer.run() == []
    assert transfer.is_idle


def test_a_request_forgotten_before_anything_moved_was_never_there():
    transfer, link = make_transfer(2, 2)
    Reader(transfer, "r", [9, 4])
    transfer.forget("r")
    assert transfer.run() == []
    assert transfer.is_idle
    assert link.payloads == []


def test_a_model_without_levels_has_no_deepstack():
    config = small_config(levels=0)
    receiver = make_receiver(config, rows=4, deepstack_rows=0, block_size=2)
    worker = EncodeWorker(random_vision_model(config, seed=2), PROCESSOR, config)
    transfer = LocalTransfer(worker, receiver)
    visual, data = IMAGES[9]
    transfer.need("r", [visual], [0], [data])
    got = []
    while outcomes := transfer.run():
        for outcome in outcomes:
            assert isinstance(outcome, Delivery)
            assert outcome.rows.deepstack == ()
            out = torch.empty(outcome.rows.stop - outcome.rows.start, HIDDEN)
            outcome.rows.write(outcome.rows.start, outcome.rows.stop, out, torch.empty(len(out), 0))
            got.append(out)
            transfer.consumed("r", 0, 1, outcome.rows.stop)
    [encoded] = worker.encode([worker.preprocess(data, visual)], [60])
    assert torch.equal(torch.cat(got), encoded.main)
    transfer.forget("r")
    transfer.run()
    assert transfer.is_idle
