"""Both roles in one process: every item through every pool, bit for bit, without a copy."""

from __future__ import annotations

import hashlib
import io
import math
import os
import threading
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import msgspec
import pytest
import torch
from PIL import Image

from qwen3vl_disagg.core.errors import MediaTimeout
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode import server
from qwen3vl_disagg.encode.worker import EncodedItem, EncodeWorker
from qwen3vl_disagg.language import link_server
from qwen3vl_disagg.llm.transfer import LocalTransfer
from qwen3vl_disagg.processing import ImageProcessor
from qwen3vl_disagg.processing.patches import PixelSettings
from qwen3vl_disagg.protocol.session_events import SessionLimits
from qwen3vl_disagg.transport import links
from qwen3vl_disagg.transport.links import InProcessLink
from tests.support.local import Caller, calling, comes
from tests.support.random_model import random_vision_model, small_config
from tests.support.transfer import make_receiver, make_visual

CONFIG = small_config()
HIDDEN, LEVELS = CONFIG.text.hidden_size, CONFIG.num_deepstack_levels
MODEL = random_vision_model(CONFIG, seed=1)
PROCESSOR = ImageProcessor(CONFIG.vision, PixelSettings(32 * 32, 32 * 32 * 100))
MAX_BLOCKS, BLOCK = 40, 2
SIZES = [*range(1, 18), 31, 32, 33, 50, 63, 79, 80]
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
    """Rows of DeepStack and of embeddings in each payload, as (aux, DeepStack rows, embedding rows)."""

    def __init__(self, payloads: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.payloads = payloads

    def send(self, tensors, timeout):
        counts = {8: 0, LEVELS * HIDDEN: 0, HIDDEN: 0}
        for tensor in tensors:
            width = tensor.shape[-1] if tensor.dtype in (torch.float32, torch.int64) else 0
            if width in counts:
                counts[width] += len(tensor) if tensor.dim() == 2 else 1
        self.payloads.append((counts[8], counts[LEVELS * HIDDEN], counts[HIDDEN]))
        super().send(tensors, timeout)


@pytest.fixture
def payloads(monkeypatch) -> list[tuple[int, int, int]]:
    seen: list[tuple[int, int, int]] = []
    monkeypatch.setattr(links, "InProcessLink", lambda: CountingLink(seen))
    return seen


def make_image(rows: int) -> tuple[VisualItem, bytes]:
    """An image of one line of `rows` merged patches."""
    generator = torch.Generator().manual_seed(rows)
    pixels = torch.randint(0, 256, (32, 32 * rows, 3), generator=generator, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    data, visual = file.getvalue(), make_visual(CONFIG, PROCESSOR.grid(32 * rows, 32))
    assert visual.num_rows == rows
    digest = hashlib.sha256(data).hexdigest()
    return msgspec.structs.replace(visual, digest=digest, num_bytes=len(data)), data


IMAGES = {rows: make_image(rows) for rows in SIZES}


def local(blocks: int, deepstack_blocks: int, *, slots: int = 4) -> AbstractContextManager[Caller]:
    receiver = make_receiver(
        CONFIG, rows=BLOCK * blocks, deepstack_rows=BLOCK * deepstack_blocks, slots=slots, block_size=BLOCK
    )
    return calling(WORKER, receiver, ONE_BY_ONE)


def need(caller: Caller, name: str, rows: list[int]) -> None:
    visuals, media = zip(*[IMAGES[n] for n in rows], strict=True)
    caller.need(name, list(visuals), list(media))


def check(caller: Caller, name: str, rows: list[int]) -> None:
    """What the engine has of the request are the encoder's rows, bit for bit."""
    for item, count in enumerate(rows):
        encoded = WORKER.encoded[IMAGES[count][0].grid]
        main, deepstack = caller.rows[name, item]
        assert torch.equal(main, encoded.main)
        assert torch.equal(deepstack, encoded.deepstack)


@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
@pytest.mark.parametrize("deepstack", ["larger than any item", "smaller than most"])
def test_every_item_passes_through_every_pool(blocks, deepstack, payloads):
    """Items of 1 to 40 blocks, the last one full or not. DeepStack once, or, when its pool is too small, by ranges."""
    deepstack_blocks = MAX_BLOCKS if deepstack == "larger than any item" else 2
    with local(blocks, deepstack_blocks) as caller:
        for rows in SIZES:
            name, item_blocks = str(rows), math.ceil(rows / BLOCK)
            payloads.clear()
            caller.deliveries.clear()
            need(caller, name, [rows])
            caller.run()
            check(caller, name, [rows])
            is_ranged = item_blocks > deepstack_blocks
            step = BLOCK * min(blocks, deepstack_blocks if is_ranged else blocks)
            expected = [(start, min(start + step, rows)) for start in range(0, rows, step)]
            assert [(part.start, part.stop) for _, part in caller.deliveries] == expected
            for number, ((start, stop), payload) in enumerate(zip(expected, payloads, strict=True)):
                deepstack_rows = stop - start if is_ranged else rows if number == 0 else 0
                assert payload == (number == 0, deepstack_rows, stop - start)
            assert caller.timings[name, 0].resumes == len(expected) - 1
            caller.end()


@pytest.mark.parametrize("deepstack_blocks", [2, MAX_BLOCKS])
def test_rows_are_the_encoders_own_memory(deepstack_blocks):
    with local(3, deepstack_blocks) as caller:
        need(caller, "r", [33])
        caller.run()
        encoded = WORKER.encoded[IMAGES[33][0].grid]
        for _, part in caller.deliveries:
            for pieces, whole in ((part.main, encoded.main), (part.deepstack, encoded.deepstack)):
                for first, piece in pieces:
                    assert piece.data_ptr() == whole[first].data_ptr(), "copied"
        assert not caller.receiver.buffers.input_embeddings.any()
        assert not caller.receiver.buffers.deepstack_embeddings.any()
        caller.end()


@pytest.mark.parametrize(
    ("blocks", "deepstack_blocks", "slots"), [(1, 1, 1), (1, 20, 3), (2, 3, 2), (5, 4, 9), (30, 40, 9)]
)
def test_several_requests_of_several_items_share_the_pools(blocks, deepstack_blocks, slots):
    before, sizes = WORKER.num_encodings, [[5, 16, 1], [7], [2, 3], [80, 1], [9, 9, 9, 9]]
    with local(blocks, deepstack_blocks, slots=slots) as caller:
        for number, rows in enumerate(sizes):
            need(caller, str(number), rows)
        caller.run()
        for number, rows in enumerate(sizes):
            check(caller, str(number), rows)
        num_contents = len({rows for request in sizes for rows in request})
        assert num_contents <= WORKER.num_encodings - before <= sum(map(len, sizes)), "an item was encoded twice"
        assert all(part.attempt == 1 for _, part in caller.deliveries)
        caller.end()


@pytest.mark.parametrize("deepstack_blocks", [2, MAX_BLOCKS])
@pytest.mark.parametrize("first", [0, 1, 7, 31])
def test_needed_rows_alone_are_brought(first, deepstack_blocks, payloads):
    with local(3, deepstack_blocks) as caller:
        (visual, data), (other, other_data) = IMAGES[32], IMAGES[5]
        caller.need("r", [other, visual], [other_data, data], [1], [first])
        caller.run()
        encoded, (main, deepstack) = WORKER.encoded[visual.grid], caller.rows["r", 1]
        assert caller.deliveries[0][1].start == first
        assert torch.equal(main[first:], encoded.main[first:])
        assert torch.equal(deepstack[first:], encoded.deepstack[first:])
        assert [sum(counts) for counts in zip(*payloads, strict=True)] == [1, 32 - first, 32 - first]
        caller.end()


def test_rows_are_brought_once_more_from_another_row():
    """Preempted after some rows, without its rows for a while, then from another row on: a new attempt."""
    with local(3, MAX_BLOCKS) as caller:
        caller.holds = True
        visual, data = IMAGES[9]
        caller.need("r", [visual], [data], [0], [4])
        caller.run(lambda: caller.deliveries)
        [(_, part)] = caller.deliveries
        assert (part.attempt, part.start, part.stop) == (1, 4, 9)
        caller.preempt("r")
        caller.run(lambda: caller.recalls == [("r", 0)])
        assert comes(lambda: caller.receiver.buffers.allocator.is_idle)
        caller.holds = False
        caller.need_again("r", [0], [1])
        caller.run()
        assert torch.equal(caller.rows["r", 0][0][1:], WORKER.encoded[visual.grid].main[1:])
        assert (caller.deliveries[1][1].attempt, caller.deliveries[1][1].start) == (2, 1)
        caller.end()


def test_times_and_bytes_are_told():
    with local(2, MAX_BLOCKS) as caller:
        need(caller, "r", [9])
        caller.run()
        last, sizes = caller.timings["r", 0], caller.receiver.buffers.row_sizes
        assert last.transfer_bytes == sizes.transfer_bytes(9, 9)
        assert min(last.preprocess, last.encode, last.transfer) > 0
        assert (last.resumes, last.encode_rank, last.attempts) == (2, 0, 1)
        caller.end()


@pytest.mark.parametrize("fault", ["damaged", "slow", "not as announced", "not finite", "broken"])
def test_an_item_that_fails_leaves_nothing_behind(fault, monkeypatch):
    """What another try cannot mend fails at once, what it might after three."""
    visual, data = IMAGES[4]
    WORKER.encoded.pop((1, 2, 8), None)
    decode = Mock(side_effect=WORKER.preprocess)
    if fault == "damaged":
        data = data[:300]
        visual = msgspec.structs.replace(visual, num_bytes=len(data))
    elif fault == "slow":
        decode.side_effect = MediaTimeout("decoding the image takes too long")
    elif fault == "not as announced":
        visual = msgspec.structs.replace(visual, size=(64, 64))
    elif fault == "broken":
        monkeypatch.setattr(WORKER.model.visual, "forward", Mock(side_effect=ZeroDivisionError))
    else:
        rows = torch.full((4, 32), torch.nan)
        monkeypatch.setattr(WORKER.model.visual, "forward", lambda *_: (rows, [rows, rows]))
    monkeypatch.setattr(WORKER, "preprocess", decode)
    with local(4, 4) as caller:
        caller.need("r", [visual], [data])
        caller.run()
        error = caller.errors["r"]
        named = {"damaged": (400, "invalid_request"), "slow": (504, "media_timeout")}
        expected = named.get(fault, (500, "encode_error"))
        assert (error.param, error.status, error.code) == (visual.param, *expected)
        assert decode.call_count == (1 if fault in named else 3)
        caller.end()
        monkeypatch.undo()
        need(caller, "next", [4])
        caller.run()
        check(caller, "next", [4])
        caller.end()


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("where", ["decoder", "tower", "receiver"])
def test_what_fails_once_or_twice_is_tried_again(where, nth, monkeypatch):
    with local(4, 4) as caller:
        target, name = {
            "decoder": (WORKER, "preprocess"),
            "tower": (WORKER, "encode"),
            "receiver": (caller.receiver, "receive"),
        }[where]
        faults = [ZeroDivisionError] * nth
        real = getattr(target, name)
        monkeypatch.setattr(target, name, lambda *a: real(*a) if not faults else (_ for _ in ()).throw(faults.pop()))
        need(caller, "r", [4])
        caller.run()
        check(caller, "r", [4])
        assert not caller.errors
        assert caller.deliveries[-1][1].attempt == (1 if where == "receiver" else nth + 1)  # a link heals an attempt
        caller.end()


def test_a_request_forgotten_half_way_gives_everything_back():
    with local(2, MAX_BLOCKS) as caller:
        caller.holds = True
        need(caller, "r", [9, 4])
        caller.run(lambda: caller.deliveries)
        caller.forget("r")
        allocator = caller.receiver.buffers.allocator
        # The engine may be reading at this moment: nobody else gets the blocks before it says that it does not.
        assert comes(lambda: allocator.counts("rows") == (0, 0, 2))
        caller.holds = False
        need(caller, "other", [7])
        caller.run()
        assert caller.recalls == [("r", 0)]
        check(caller, "other", [7])
        caller.end()


def test_a_request_forgotten_before_anything_moved_was_never_there(payloads):
    with local(2, 2) as caller:
        need(caller, "r", [9, 4])
        caller.forget("r")
        caller.end()
        assert payloads == []


def test_a_model_without_levels_has_no_deepstack():
    config = small_config(levels=0)
    receiver = make_receiver(config, rows=4, deepstack_rows=0, block_size=2)
    worker = EncodeWorker(random_vision_model(config, seed=2), PROCESSOR, config)
    visual, data = IMAGES[9]
    with calling(worker, receiver) as caller:
        caller.need("r", [visual], [data])
        caller.run()
        assert all(part.deepstack == () for _, part in caller.deliveries)
        [encoded] = worker.encode([worker.preprocess(data, visual)], [60])
        assert torch.equal(caller.rows["r", 0][0], encoded.main)
        caller.end()


def test_nobody_listens_and_nothing_is_left_when_it_ends():
    before = {thread.ident for thread in threading.enumerate()}
    num_files = len(os.listdir("/proc/self/fd"))
    with local(4, 4) as caller:
        need(caller, "r", [4])
        caller.run()
        inodes = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if exists(fd)}
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        assert not [line for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in inodes]
        caller.end()
    assert comes(lambda: {thread.ident for thread in threading.enumerate()} <= before)
    assert len(os.listdir("/proc/self/fd")) <= num_files


def exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_its_thread_sleeps_while_nothing_is_wanted():
    with local(4, 4) as caller:
        need(caller, "r", [4])
        caller.run()
        assert comes(lambda: caller.transfer._loop.is_running())
        caller.end()
        assert comes(lambda: not caller.transfer._loop.is_running())
        need(caller, "again", [4])
        caller.run()
        check(caller, "again", [4])
        caller.end()


def test_whoever_steps_may_pause_for_longer_than_a_rank_waits(monkeypatch):
    """Before the tower runs, and while rows wait for blocks that nobody uses up."""
    for module in (link_server, server):
        monkeypatch.setattr(module, "SessionLimits", partial(SessionLimits, grant_s=0.2, lease_s=0.2))
    with local(2, MAX_BLOCKS) as caller:
        caller.holds = True
        need(caller, "r", [9])
        time.sleep(0.8)
        caller.run(lambda: caller.deliveries)
        time.sleep(0.8)
        caller.holds = False
        caller.read()
        caller.run()
        check(caller, "r", [9])
        assert not caller.errors
        assert {part.attempt for _, part in caller.deliveries} == {1}
        caller.end()


def test_a_request_may_come_before_the_thread_runs(monkeypatch):
    gate, run = threading.Event(), LocalTransfer._run

    def late(transfer: LocalTransfer) -> None:
        gate.wait(10)
        run(transfer)

    monkeypatch.setattr(LocalTransfer, "_run", late)
    with local(4, 4) as caller:
        need(caller, "r", [4])
        gate.set()
        caller.run()
        assert not caller.errors
        check(caller, "r", [4])
        caller.end()
