"""Bytes -> patches -> rows, and how rows are cut for a grant."""

from __future__ import annotations

import io
from dataclasses import replace

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen3vl_disagg.core.errors import InputError, TransferError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.disagg.digest import add_digests
from qwen3vl_disagg.disagg.encode_worker import EncodeWorker
from qwen3vl_disagg.disagg.layout import AUX_FIELDS
from qwen3vl_disagg.disagg.messages import Grant, Resume
from qwen3vl_disagg.processing import ImageProcessor, item_positions
from tests.support.random_model import IMAGE_TOKEN, random_vision_model, small_config
from tests.support.transfer import make_encoded, make_visual, split_payload

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


def grant_for(
    runs: list[int], deepstack_runs: list[int], *, start: int = 0, deepstack_start: int = 0, **changed: int
) -> Grant:
    grant = (Resume if start else Grant)(
        request_id="r",
        item=0,
        attempt=3,
        row_start=start,
        row_stop=start + sum(runs),
        deepstack_start=deepstack_start,
        deepstack_stop=deepstack_start + sum(deepstack_runs),
        row_runs=runs,
        deepstack_runs=deepstack_runs,
    )
    return msgspec.structs.replace(grant, **changed)


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


@pytest.mark.parametrize("part", ["main", "deepstack"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_refused(monkeypatch, part, value):
    features = MODEL.get_image_feature

    def broken(patches, grids):
        rows = features(patches, grids).clone()
        rows[2, 3 if part == "main" else -1] = value
        return rows

    monkeypatch.setattr(WORKER.model, "get_image_feature", broken)
    with pytest.raises(TransferError, match="NaN or infinity"):
        WORKER.encode([WORKER.preprocess(make_image(0, (64, 64)), visual_of((64, 64)))], IMAGE_TOKEN)


def test_finite_rows_whose_sum_overflows_are_accepted(monkeypatch):
    rows = torch.full((4, 96), 3e38)
    monkeypatch.setattr(WORKER.model, "get_image_feature", lambda patches, grids: rows)
    [encoded] = WORKER.encode([WORKER.preprocess(make_image(0, (64, 64)), visual_of((64, 64)))], IMAGE_TOKEN)
    assert encoded.main.max() == rows.max()


@st.composite
def cuts(draw, rows: int):
    """Lengths that add up to `rows`."""
    edges = sorted(draw(st.sets(st.integers(1, rows - 1), max_size=4)))
    return [b - a for a, b in zip([0, *edges], [*edges, rows], strict=True)]


@pytest.mark.parametrize("levels", [0, 1, 3])
@given(data=st.data())
def test_any_grants_cut_the_item_into_views_whose_digests_add_up(levels, data):
    """DeepStack once with the first grant, or ranged with each; runs are cut anywhere."""
    config = small_config(levels=levels)
    grid = data.draw(st.sampled_from([(1, 4, 6), (1, 2, 4), (1, 6, 10)]))
    encoded = make_encoded(config, grid, seed=1)
    total, is_ranged = len(encoded.main), data.draw(st.booleans())
    digests, start, main, deepstack = [], 0, [], []
    for length in data.draw(cuts(total)):
        runs = data.draw(cuts(length)) if length > 1 else [length]
        sent = (length if is_ranged else total if start == 0 else 0) if levels else 0
        deepstack_runs = (data.draw(cuts(sent)) if sent > 1 else [sent]) if sent else []
        grant = grant_for(runs, deepstack_runs, start=start, deepstack_start=start if is_ranged or not sent else 0)
        header, payload = encoded.header(grant), encoded.payload(grant)
        assert (header.row_start, header.row_stop, header.total_rows) == (start, start + length, total)
        assert (header.deepstack_start, header.deepstack_stop) == (grant.deepstack_start, grant.deepstack_stop)
        assert (len(header.row_digests), len(header.deepstack_digests)) == (len(runs), len(deepstack_runs))
        digests += [*header.row_digests, *header.deepstack_digests]
        aux, pieces, parts = split_payload(grant, payload)
        assert len(aux) == (start == 0)
        assert [len(piece) for piece in pieces] == deepstack_runs
        assert all([len(piece) for piece in part] == runs for part in parts)
        for whole, views in ((encoded.deepstack, pieces), (encoded.main, parts[0])):
            for view in views:
                assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr(), "copied"
                assert view.is_contiguous()
        main.append([torch.cat(part) for part in parts])
        deepstack += pieces
        start += length
    assert add_digests(*digests) == encoded.digest
    for part, whole in zip(zip(*main, strict=True), (encoded.main, encoded.fill_ids, encoded.positions), strict=True):
        assert torch.equal(torch.cat(part), whole)
    if levels:
        assert torch.equal(torch.cat(deepstack), encoded.deepstack)


@pytest.mark.parametrize("levels", [0, 2])
def test_the_first_transfer_begins_with_aux(levels):
    encoded = make_encoded(small_config(levels=levels))
    grant = grant_for([4], [6] if levels else [])
    aux = dict(zip(AUX_FIELDS, encoded.payload(grant)[0].tolist(), strict=True))
    sizes = {"rows": 6, "frames": 1, "height": 4, "width": 6, "levels": levels, "hidden": 32}
    assert aux == {**sizes, "digest": encoded.digest, "attempt": 3}


WRONG_GRANTS = {
    "beyond the end": grant_for([7], [6]),
    "before the start": grant_for([3], [], start=-1),
    "a resume beyond the end": grant_for([3], [], start=4),
    "no rows": grant_for([], [], row_stop=0),
    "runs too short": grant_for([4, 1], [6], row_stop=6),
    "runs too long": grant_for([4, 3], [6], row_stop=6),
    "rows without runs": grant_for([], [6], row_stop=6),
    "DeepStack beyond the end": grant_for([6], [7]),
    "DeepStack before the start": grant_for([6], [6], deepstack_start=-1),
    "DeepStack runs too short": grant_for([6], [5], deepstack_stop=6),
    "DeepStack rows without runs": grant_for([6], [], deepstack_stop=6),
}


@pytest.mark.parametrize("grant", [pytest.param(grant, id=name) for name, grant in WRONG_GRANTS.items()])
def test_grants_that_the_item_cannot_fill_are_refused(grant):
    with pytest.raises(TransferError, match="of an item of 6"):
        make_encoded(CONFIG).header(grant)


def test_the_digest_covers_each_buffer():
    encoded = make_encoded(CONFIG)
    for name in ("main", "deepstack", "fill_ids", "positions"):
        changed = getattr(encoded, name).clone()
        changed[2] += 1
        assert replace(encoded, **{name: changed}).digest != encoded.digest, name
