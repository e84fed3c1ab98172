"""Bytes -> patches -> rows, and how rows are cut for a grant."""

from __future__ import annotations

import io
from dataclasses import replace

import msgspec
import pytest
import torch
from PIL import Image

from qwen3vl_disagg.core.errors import InputError, TransferError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.disagg.buffers import MultimodalDataBuffers
from qwen3vl_disagg.disagg.encode_worker import EncodeWorker
from qwen3vl_disagg.disagg.layout import AUX_FIELDS
from qwen3vl_disagg.disagg.local import LocalTransfer
from qwen3vl_disagg.disagg.messages import Grant
from qwen3vl_disagg.disagg.receiver import LanguageReceiver
from qwen3vl_disagg.processing import ImageProcessor, item_positions
from tests.support.random_model import IMAGE_TOKEN, random_vision_model, small_config
from tests.support.transfer import make_encoded, make_visual

CONFIG = small_config()
MODEL = random_vision_model(CONFIG, seed=1)
PROCESSOR = ImageProcessor(CONFIG.vision, min_pixels=32 * 32, max_pixels=256 * 256)
WORKER = EncodeWorker(MODEL, PROCESSOR, CONFIG)
SIZES = [(64, 64), (96, 64), (64, 96), (32, 32)]


def make_image(seed: int, size: tuple[int, int]) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


def visual_of(size: tuple[int, int]) -> VisualItem:
    return make_visual(CONFIG, PROCESSOR.grid(*size))


def grant_for(rows: int, runs: list[int], deepstack_runs: list[int] | None = None) -> Grant:
    return Grant(
        request_id="r",
        item=0,
        attempt=3,
        row_start=0,
        row_stop=rows,
        deepstack_start=0,
        deepstack_stop=rows,
        row_runs=runs,
        deepstack_runs=runs if deepstack_runs is None else deepstack_runs,
    )


def test_items_of_a_batch_are_the_items_alone():
    pixels = [WORKER.preprocess(make_image(i, size), visual_of(size)) for i, size in enumerate(SIZES)]
    together = WORKER.encode(pixels, IMAGE_TOKEN)
    for size, entry, encoded in zip(SIZES, pixels, together, strict=True):
        [alone] = WORKER.encode([entry], IMAGE_TOKEN)
        torch.testing.assert_close(encoded.main, alone.main, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(encoded.deepstack, alone.deepstack, rtol=1e-5, atol=1e-5)
        with torch.inference_mode():
            features = MODEL.get_image_feature(entry.patches, [entry.grid])
        assert torch.equal(torch.cat([alone.main, alone.deepstack], dim=1), features)
        assert len(alone.main) == visual_of(size).num_rows
        assert alone.grid == PROCESSOR.grid(*size)


def test_fill_ids_and_positions_say_what_and_where():
    [encoded] = WORKER.encode([WORKER.preprocess(make_image(0, (96, 64)), visual_of((96, 64)))], 61)
    assert encoded.fill_ids.tolist() == [61] * 6
    assert encoded.fill_ids.dtype == encoded.positions.dtype == torch.int32
    assert encoded.positions.tolist() == [[0, y, x] for y in range(2) for x in range(3)]
    assert torch.equal(encoded.positions.T, item_positions((1, 4, 6), 2))


def test_an_image_that_is_not_as_announced_is_refused():
    with pytest.raises(TransferError, match=r"\(1, 4, 6\).*\(1, 6, 4\)"):
        WORKER.preprocess(make_image(0, (96, 64)), visual_of((64, 96)))


@pytest.mark.parametrize("data", [b"", b"not an image", make_image(0, (64, 64))[:-300]], ids=["empty", "text", "cut"])
def test_a_damaged_image_is_an_input_error_without_internals(data):
    with pytest.raises(InputError) as caught:
        WORKER.preprocess(data, visual_of((64, 64)))
    assert "0x" not in caught.value.message
    assert "/" not in caught.value.message


@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize("runs", [[6], [4, 2], [1, 2, 3]])
def test_a_payload_is_cut_where_the_grant_says(levels, runs):
    config = small_config(levels=levels)
    encoded = make_encoded(config)
    deepstack_runs = list(reversed(runs)) if levels else []
    grant = grant_for(6, runs, deepstack_runs)
    pieces, n = encoded.payload(grant), len(runs)
    parts = [pieces[:n], pieces[n : 2 * n], pieces[2 * n : 3 * n]]
    for part, whole in zip(parts, (encoded.main, encoded.fill_ids, encoded.positions), strict=True):
        assert [len(piece) for piece in part] == runs
        assert torch.equal(torch.cat(part), whole)
    aux = dict(zip(AUX_FIELDS, pieces[3 * n].tolist(), strict=True))
    header = encoded.header(grant)
    assert aux == {
        "rows": 6,
        "frames": 1,
        "height": 4,
        "width": 6,
        "levels": levels,
        "hidden": 32,
        "digest": header.digest,
        "attempt": 3,
    }
    assert [len(piece) for piece in pieces[3 * n + 1 :]] == deepstack_runs
    if levels:
        assert torch.equal(torch.cat(pieces[3 * n + 1 :]), encoded.deepstack)
    assert all(piece.is_contiguous() for piece in pieces)


@pytest.mark.parametrize(("runs", "deepstack_runs"), [([5], [6]), ([6], [5]), ([6, 1], [6]), ([6], [])])
def test_runs_that_do_not_add_up_are_refused(runs, deepstack_runs):
    with pytest.raises(TransferError, match="6 rows"):
        make_encoded(CONFIG).payload(grant_for(6, runs, deepstack_runs))


@pytest.mark.parametrize("change", [{"row_stop": 5}, {"row_start": 1}, {"deepstack_stop": 5}, {"deepstack_start": 1}])
def test_a_grant_for_another_number_of_rows_is_refused(change):
    with pytest.raises(TransferError, match="of 6"):
        make_encoded(CONFIG).header(msgspec.structs.replace(grant_for(6, [6]), **change))


def local_transfer(*, rows: int = 64) -> LocalTransfer:
    buffers = MultimodalDataBuffers(CONFIG, num_rows=rows, block_size=4, dtype=torch.float32)
    return LocalTransfer(WORKER, LanguageReceiver(buffers, CONFIG))


def test_the_local_transfer_gives_the_rows_of_the_tower():
    transfer = local_transfer()
    for i, size in enumerate(SIZES):
        data = make_image(i, size)
        received, timings = transfer.run("r", i, 1, visual_of(size), data)
        patches, grid = PROCESSOR.pixels(data)
        with torch.inference_mode():
            features = MODEL.get_image_feature(patches, [grid])
        assert torch.equal(torch.cat([received.main, received.deepstack], dim=1), features)
        assert timings.rows == len(features)
        assert timings.transfer_bytes == len(features) * (32 * 4 + 4 + 12 + 64 * 4) + 64
        assert min(timings.preprocess, timings.encode, timings.transfer) > 0
    assert transfer.receiver.is_idle


@pytest.mark.parametrize("fault", ["damaged", "too large", "not as announced"])
def test_a_local_transfer_that_fails_leaves_nothing_behind(fault):
    transfer = local_transfer(rows=8)
    data, size = make_image(0, (64, 64)), (64, 64)
    visual = visual_of((256, 256) if fault == "too large" else size)
    if fault == "not as announced":
        visual = replace_grid(visual, (1, 2, 8))
    with pytest.raises(TransferError if fault == "not as announced" else InputError):
        transfer.run("r", 0, 1, visual, data[:-300] if fault == "damaged" else data)
    assert transfer.receiver.is_idle
    received, _ = transfer.run("r", 0, 2, visual_of(size), data)
    assert len(received.main) == 4


def replace_grid(visual: VisualItem, grid: tuple[int, int, int]) -> VisualItem:
    return msgspec.structs.replace(visual, grid=grid)


def test_the_digest_covers_each_buffer():
    encoded = make_encoded(CONFIG)
    for name in ("main", "deepstack", "fill_ids", "positions"):
        changed = getattr(encoded, name).clone()
        changed[2] += 1
        assert replace(encoded, **{name: changed}).digest != encoded.digest, name
