"""What an encode rank's canary refuses: a fault in each part of the way from a picture to its rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from qwen3vl_disagg.checkpoint import load_vision_model, read_config
from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.core import faults
from qwen3vl_disagg.core.errors import CanaryFailed
from qwen3vl_disagg.encode.canary import check_tower
from qwen3vl_disagg.encode.embedding_cache import EmbeddingCache
from qwen3vl_disagg.encode.worker import EncodedItem, EncodeWorker
from qwen3vl_disagg.processing import ImageProcessor

FOLDER = resolve_model_folder(None)
CONFIG = read_config(FOLDER)
HIDDEN = CONFIG.text.hidden_size


def make_worker(dtype: torch.dtype = torch.float32) -> EncodeWorker:
    processor = ImageProcessor.from_folder(FOLDER, CONFIG.vision)
    return EncodeWorker(load_vision_model(FOLDER, dtype=dtype), processor, CONFIG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_good_rank_passes_with_the_rows_of_the_picture(dtype):
    worker = make_worker(dtype)
    checked = check_tower(worker, FOLDER)
    assert len(checked.item.main) == checked.visual.num_rows > 1
    assert checked.item.main.dtype == dtype


def with_rows(change: Callable[[EncodedItem], EncodedItem]) -> Callable[[EncodeWorker, pytest.MonkeyPatch], None]:
    """Rows are right in the tower, and then become others."""

    def plant(worker: EncodeWorker, patch: pytest.MonkeyPatch) -> None:
        encode = worker.encode
        patch.setattr(worker, "encode", lambda *args: [change(item) for item in encode(*args)])

    return plant


def level(item: EncodedItem, number: int) -> slice:
    return slice(number * HIDDEN, (number + 1) * HIDDEN)


def lost(item: EncodedItem) -> EncodedItem:
    deepstack = item.deepstack.clone()
    deepstack[:, level(item, 1)] = 0
    return dataclasses.replace(item, deepstack=deepstack)


def swapped(item: EncodedItem) -> EncodedItem:
    parts = item.deepstack.split(HIDDEN, dim=1)
    return dataclasses.replace(item, deepstack=torch.cat([parts[0], parts[2], parts[1]], dim=1))


def other_tower(worker: EncodeWorker, _: pytest.MonkeyPatch) -> None:
    block = worker.model.visual.blocks[2]
    block.mlp.linear_fc1.weight.data += 0.01 * torch.randn_like(block.mlp.linear_fc1.weight)


def lost_merger(worker: EncodeWorker, _: pytest.MonkeyPatch) -> None:
    worker.model.visual.deepstack_merger_list[1].linear_fc2.weight.data.zero_()


def stale_step(worker: EncodeWorker, patch: pytest.MonkeyPatch) -> None:
    """As a compiled block of another model."""
    tower = worker.model.visual
    patch.setattr(tower, "step", lambda block, x_PD, *rest: tower.blocks[0](x_PD, *rest))


def other_pixels(worker: EncodeWorker, patch: pytest.MonkeyPatch) -> None:
    preprocess = worker.preprocess

    def shifted(*args):
        pixels = preprocess(*args)
        return dataclasses.replace(pixels, patches=pixels.patches.roll(1, 0))

    patch.setattr(worker, "preprocess", shifted)


def forgetful_cache(_: EncodeWorker, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EmbeddingCache, "put", lambda *_: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("plant", "part", "why"),
    [
        (with_rows(lost), "DeepStack level 1", "its weights are as in the files"),
        (with_rows(swapped), "DeepStack level 1", "they are DeepStack level 2"),
        (with_rows(lambda item: dataclasses.replace(item, main=item.main.flip(0))), "main rows", "its weights are"),
        (lost_merger, "vision tower", "visual.deepstack_merger_list.1.linear_fc2.weight is not as in"),
        (other_tower, "vision tower", "visual.blocks.2.mlp.linear_fc1.weight is not as in the checkpoint's files"),
        (stale_step, "vision tower", "its weights are as in the files"),
        (other_pixels, "preprocessing", "other patches"),
        (forgetful_cache, "cache", "was not found"),
    ],
    ids=["lost", "swapped", "main", "merger", "tower", "stale", "pixels", "cache"],
)
def test_a_fault_is_named(plant, part, why, dtype, monkeypatch):
    worker = make_worker(dtype)
    plant(worker, monkeypatch)
    with pytest.raises(CanaryFailed, match=f"canary: {part}: .*{why}"):
        check_tower(worker, FOLDER)


def test_it_passes_no_point_where_a_fault_was_asked_for(monkeypatch):
    """Those are counted from the first request on."""
    monkeypatch.setattr(faults, "_plan", faults.FaultPlan("in-tower", 1, "raise"))
    monkeypatch.setattr(faults, "_passages", type(faults._passages)())
    check_tower(make_worker(), FOLDER)
    assert not faults._passages
    with pytest.raises(faults.InjectedFault):
        faults.fault_point("in-tower")
