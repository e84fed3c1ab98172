"""Bytes -> patches -> rows, and how rows are cut for a grant."""

from __future__ import annotations

import io
from dataclasses import replace

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen3vl_disagg.core.errors import InputError, ServerError, TransferError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.encode.worker import EncodedItem, EncodeWorker
from qwen3vl_disagg.processing import ImageProcessor, item_positions
from qwen3vl_disagg.processing.patches import PixelSettings
from qwen3vl_disagg.protocol.layout import AUX_FIELDS
from qwen3vl_disagg.protocol.messages import Grant, Resume, Room
from qwen3vl_disagg.transport.digest import add_digests
from tests.support.claims import Claims
from tests.support.random_model import IMAGE_TOKEN, random_vision_model, small_config
from tests.support.transfer import make_encoded, make_visual, split_payload

CONFIG = small_config()
MODEL = random_vision_model(CONFIG, seed=1)
PROCESSOR = ImageProcessor(CONFIG.vision, PixelSettings(32 * 32, 256 * 256))
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
) -> Room:
    item = {} if start else {"visual": make_visual(CONFIG), "timeout_s": 30.0}
    grant = (Resume if start else Grant)(
        **item,
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


def encode_one(data: bytes, size: tuple[int, int], token_id: int = IMAGE_TOKEN) -> EncodedItem:
    [encoded] = WORKER.encode([WORKER.preprocess(data, visual_of(size))], [token_id])
    assert isinstance(encoded, EncodedItem), encoded
    return encoded


def check_close(rows: torch.Tensor, alone: torch.Tensor) -> None:
    """Within the rounding of float32: another shape of a matrix product adds up in another order."""
    error = torch.linalg.vector_norm(rows - alone) / torch.linalg.vector_norm(alone)
    assert error < 1e-6, error


def test_items_of_a_batch_are_the_items_alone():
    pixels = [WORKER.preprocess(make_image(i, size), visual_of(size)) for i, size in enumerate(SIZES)]
    together = WORKER.encode(pixels, [IMAGE_TOKEN] * len(pixels))
    for size, entry, encoded in zip(SIZES, pixels, together, strict=True):
        [alone] = WORKER.encode([entry], [IMAGE_TOKEN])
        assert isinstance(encoded, EncodedItem)
        assert isinstance(alone, EncodedItem)
        check_close(encoded.main, alone.main)
        check_close(encoded.deepstack, alone.deepstack)
        for name in ("fill_ids", "positions"):
            assert torch.equal(getattr(encoded, name), getattr(alone, name))
        with torch.inference_mode():
            features = MODEL.get_image_feature(entry.patches, [entry.grid])
        assert torch.equal(torch.cat([alone.main, alone.deepstack], dim=1), features)
        assert len(alone.main) == visual_of(size).num_rows
        assert alone.grid == PROCESSOR.grid(*size)
        assert encoded.encode_ms == together[0].encode_ms, "the time of the batch"


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([(32, 32), (64, 32), (64, 64), (96, 64), (160, 96)]), min_size=2, max_size=6),
    seed=st.integers(0, 9),
)
def test_any_neighbours_change_an_item_by_rounding_only(sizes, seed):
    pixels = [WORKER.preprocess(make_image(seed + i, size), visual_of(size)) for i, size in enumerate(sizes)]
    tokens = [IMAGE_TOKEN + i % 2 for i in range(len(sizes))]
    for entry, token, encoded in zip(pixels, tokens, WORKER.encode(pixels, tokens), strict=True):
        [alone] = WORKER.encode([entry], [token])
        check_close(encoded.main, alone.main)
        check_close(encoded.deepstack, alone.deepstack)
        assert torch.equal(encoded.fill_ids, alone.fill_ids)


def test_each_item_of_a_batch_has_its_own_fill_ids():
    pixels = [WORKER.preprocess(make_image(i, (64, 64)), visual_of((64, 64))) for i in range(3)]
    image, video, other = WORKER.encode(pixels, [60, 61, 60])
    assert [set(e.fill_ids.tolist()) for e in (image, video, other)] == [{60}, {61}, {60}]


@pytest.mark.parametrize("levels", [0, 2])
def test_no_item_of_a_batch_keeps_the_others_memory(levels):
    """Also where rows of one item are contiguous in what comes out of the tower: one row, or no DeepStack beside it."""
    config = small_config(levels=levels)
    worker = EncodeWorker(random_vision_model(config, seed=1), PROCESSOR, config)
    pixels = [worker.preprocess(make_image(i, size), visual_of(size)) for i, size in enumerate(SIZES)]
    for encoded in worker.encode(pixels, [IMAGE_TOKEN] * len(pixels)):
        for name in ("main", "deepstack", "fill_ids", "positions"):
            tensor = getattr(encoded, name)
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_fill_ids_and_positions_say_what_and_where():
    encoded = encode_one(make_image(0, (96, 64)), (96, 64), 61)
    assert encoded.fill_ids.tolist() == [61] * 6
    assert encoded.fill_ids.dtype == encoded.positions.dtype == torch.int32
    assert encoded.positions.tolist() == [[0, y, x] for y in range(2) for x in range(3)]
    assert torch.equal(encoded.positions.T, item_positions((1, 4, 6), 2))


def test_an_image_that_is_not_as_announced_is_refused():
    visual = msgspec.structs.replace(visual_of((64, 96)), size=(64, 96))
    WORKER.preprocess(make_image(0, (96, 64)), visual)
    with pytest.raises(ServerError, match=r"96 x 64.*\(64, 96\)"):
        WORKER.preprocess(make_image(0, (64, 96)), visual)


@pytest.mark.parametrize("data", [b"", b"not an image", make_image(0, (64, 64))[:300]], ids=["empty", "text", "cut"])
def test_a_damaged_image_is_an_input_error_without_internals(data):
    with pytest.raises(InputError) as caught:
        WORKER.preprocess(data, visual_of((64, 64)))
    assert "0x" not in caught.value.message
    assert "/" not in caught.value.message


@pytest.mark.parametrize("part", ["main", "deepstack"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_item_whose_rows_are_not_finite_is_refused_and_its_neighbours_are_not(monkeypatch, part, value, which):
    tower = MODEL.visual.forward

    def broken(patches, grids):
        main, levels = tower(patches, grids)
        rows, column = (main, 3) if part == "main" else (levels[-1], -1)
        rows[4 * which + 2, column] = value
        return main, levels

    pixels = [WORKER.preprocess(make_image(i, (64, 64)), visual_of((64, 64))) for i in range(3)]
    expected = WORKER.encode(pixels, [IMAGE_TOKEN] * 3)
    monkeypatch.setattr(WORKER.model.visual, "forward", broken)
    results = WORKER.encode(pixels, [IMAGE_TOKEN] * 3)
    for number, (result, whole) in enumerate(zip(results, expected, strict=True)):
        if number == which:
            assert isinstance(result, ServerError)
            assert "NaN or infinity" in str(result)
        else:
            assert torch.equal(result.main, whole.main)
            assert torch.equal(result.deepstack, whole.deepstack)


def test_an_image_over_which_the_tower_fails_fails_alone(monkeypatch):
    tower, calls = MODEL.visual.forward, []

    def broken(patches, grids):
        calls.append(len(grids))
        if (1, 4, 6) in grids or len(grids) > 3:
            raise RuntimeError("out of memory")
        return tower(patches, grids)

    pixels = [WORKER.preprocess(make_image(i, size), visual_of(size)) for i, size in enumerate(SIZES)]
    monkeypatch.setattr(WORKER.model.visual, "forward", broken)
    results = WORKER.encode(pixels, [IMAGE_TOKEN] * 4)
    assert [type(result) for result in results] == [EncodedItem, RuntimeError, EncodedItem, EncodedItem]
    assert calls == [4, 1, 1, 1, 1]


def test_finite_rows_whose_sum_overflows_are_accepted(monkeypatch):
    rows = torch.full((4, 32), 3e38)
    monkeypatch.setattr(WORKER.model.visual, "forward", lambda patches, grids: (rows, [rows, rows]))
    assert encode_one(make_image(0, (64, 64)), (64, 64)).main.max() == rows.max()


def test_a_batch_of_nothing_is_nothing():
    assert WORKER.encode([], []) == []


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


def test_cores_are_claimed_before_each_block_and_given_back_whatever_happens(monkeypatch):
    config, claims = small_config(), Claims()
    worker = EncodeWorker(random_vision_model(config, seed=1), PROCESSOR, config, cores=claims)
    pixels = worker.preprocess(make_image(0, (64, 64)), visual_of((64, 64)))
    [whole] = worker.encode([pixels], [IMAGE_TOKEN])
    assert not isinstance(whole, Exception)
    assert claims.said == ["claim"] * config.vision.depth + ["release"]
    monkeypatch.setattr(worker.model.visual.merger, "forward", lambda *_: 1 / 0)
    [broken] = worker.encode([pixels], [IMAGE_TOKEN])
    assert isinstance(broken, Exception)
    assert claims.said[-1] == "release"
