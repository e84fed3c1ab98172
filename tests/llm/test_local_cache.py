"""Both roles in one thread, with items that are equal or can go through the tower together."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
import torch

from qwen3vl_disagg.core.errors import InputError, ServerError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode.batches import tower_cost
from qwen3vl_disagg.encode.worker import EncodedItem, EncodeWorker
from qwen3vl_disagg.llm.local import ItemError, LocalTransfer
from qwen3vl_disagg.transport.buffers import Delivery
from tests.support.link_scenarios import CONFIG, MODEL, PROCESSOR, describe, make_image
from tests.support.transfer import make_receiver

OFF = EncodeOptions(embedding_cache_mib=0, vision_batch_tokens=0)
SIZE = (64, 64)
IMAGES = [make_image(number, SIZE) for number in range(6)]
COST = tower_cost((1, 4, 4), CONFIG.vision)


class CountingWorker(EncodeWorker):
    """Batches that went through the tower, as (grids, token ids)."""

    def __init__(self) -> None:
        super().__init__(MODEL, PROCESSOR, CONFIG)
        self.batches: list[list[int]] = []
        self.num_decoded = 0

    def preprocess(self, data, visual, stop=None):
        self.num_decoded += 1
        return super().preprocess(data, msgspec.structs.replace(visual, modality="image"), stop)

    def encode(self, batch, visual_token_ids):
        self.batches.append(list(visual_token_ids))
        return super().encode(batch, visual_token_ids)


def make(options: EncodeOptions | None = None, *, blocks: int = 64) -> tuple[LocalTransfer, CountingWorker]:
    worker = CountingWorker()
    receiver = make_receiver(CONFIG, rows=4 * blocks, deepstack_rows=4 * blocks, slots=12, block_size=4)
    return LocalTransfer(worker, receiver, options), worker


def need(transfer: LocalTransfer, name: str, images: list[bytes], visuals: list[VisualItem] | None = None) -> None:
    transfer.need(name, visuals or list(map(describe, images)), list(range(len(images))), images)


def take(transfer: LocalTransfer) -> tuple[dict[tuple[str, int], torch.Tensor], list[Delivery], list[ItemError]]:
    """(all rows of each item, the last delivery of each, failures)."""
    rows: dict[tuple[str, int], list[torch.Tensor]] = {}
    last: dict[tuple[str, int], Delivery] = {}
    errors = []
    while outcomes := transfer.run():
        for outcome in outcomes:
            if isinstance(outcome, ItemError):
                errors.append(outcome)
                continue
            assert isinstance(outcome, Delivery)
            name, part = (outcome.request_id, outcome.item), outcome.rows
            main, deepstack = torch.empty(part.stop - part.start, 32), torch.empty(part.stop - part.start, 64)
            part.write(part.start, part.stop, main, deepstack)
            rows.setdefault(name, []).append(torch.cat([main, deepstack], dim=1))
            last[name] = outcome
            transfer.consumed(*name, part.attempt, part.stop)
    return {name: torch.cat(parts) for name, parts in rows.items()}, [last[name] for name in sorted(last)], errors


def end(transfer: LocalTransfer, *names: str) -> None:
    for name in names:
        transfer.forget(name)
    assert transfer.run() == []
    assert transfer.is_idle
    assert not transfer._encoded
    assert not transfer._to_start
    assert transfer.cache.num_pinned_bytes == 0


def test_the_second_time_the_rows_are_there_with_the_same_bits():
    transfer, worker = make()
    first, told, _ = take_one(transfer, "a")
    again, told_again, _ = take_one(transfer, "b")
    assert torch.equal(first, again)
    assert worker.num_decoded == len(worker.batches) == 1
    assert (told.cached, told.batch) == (False, 1)
    assert min(told.encode, told.preprocess) > 0
    assert (told_again.cached, told_again.batch, told_again.encode, told_again.preprocess) == (True, 0, 0.0, 0.0)
    assert (transfer.cache.num_hits, transfer.cache.num_misses) == (1, 1)


def take_one(transfer: LocalTransfer, name: str):
    need(transfer, name, IMAGES[:1])
    rows, [delivery], errors = take(transfer)
    end(transfer, name)
    return rows[name, 0], delivery.timings, errors


def test_with_everything_off_each_is_encoded_alone_and_nothing_is_kept():
    transfer, worker = make(OFF)
    for name in "ab":
        assert not take_one(transfer, name)[1].cached
    need(transfer, "c", IMAGES[:3])
    take(transfer)
    end(transfer, "c")
    assert list(map(len, worker.batches)) == [1] * 5
    assert len(transfer.cache) == 0


@pytest.mark.parametrize("options", [EncodeOptions(), OFF], ids=["cache", "off"])
@pytest.mark.parametrize("blocks", [64, 1])
def test_equal_items_that_start_together_are_encoded_once(options, blocks):
    transfer, worker = make(options, blocks=blocks)
    need(transfer, "a", [IMAGES[0], IMAGES[1], IMAGES[0]])
    need(transfer, "b", [IMAGES[0]])
    rows, deliveries, _ = take(transfer)
    assert torch.equal(rows["a", 0], rows["a", 2])
    assert torch.equal(rows["a", 0], rows["b", 0])
    if blocks == 64:  # otherwise each starts when the one before is through
        assert worker.num_decoded == 2
        assert not any(delivery.timings.cached for delivery in deliveries)
    else:
        assert worker.num_decoded == (2 if options is not OFF else 4)
    end(transfer, "a", "b")


def test_items_that_start_together_go_through_the_tower_in_batches():
    transfer, worker = make(EncodeOptions(vision_batch_tokens=int(2 * COST) + 1))
    visuals = [msgspec.structs.replace(describe(IMAGES[i]), modality="video" if i == 1 else "image") for i in range(5)]
    need(transfer, "a", IMAGES[:5], visuals)
    rows, deliveries, _ = take(transfer)
    assert worker.batches == [[60, 61], [60, 60], [60]]
    assert [delivery.timings.batch for delivery in deliveries] == [1, 1, 2, 2, 3]
    for number in range(5):
        [alone] = EncodeWorker(MODEL, PROCESSOR, CONFIG).encode(
            [worker.preprocess(IMAGES[number], visuals[number])], [60]
        )
        assert isinstance(alone, EncodedItem)
        expected = torch.cat([alone.main, alone.deepstack], dim=1)
        assert torch.linalg.vector_norm(rows["a", number] - expected) < 1e-6 * torch.linalg.vector_norm(expected)
    end(transfer, "a")


def test_a_bad_item_fails_for_all_who_wanted_it_and_for_nobody_else():
    transfer, worker = make()
    damaged = IMAGES[0][:200]
    bad = msgspec.structs.replace(describe(IMAGES[0]), digest=hashlib.sha256(damaged).hexdigest())
    need(transfer, "a", [damaged], [bad])
    need(transfer, "b", [damaged], [bad])
    need(transfer, "c", [IMAGES[1]])
    rows, _, errors = take(transfer)
    assert list(rows) == [("c", 0)]
    assert [error.request_id for error in errors] == ["a", "b"]
    assert all(isinstance(error.error, InputError) and error.error.param == "messages[0]" for error in errors)
    assert worker.batches == [[60]]
    end(transfer, "a", "b", "c")


def test_rows_that_are_not_finite_fail_one_item_of_a_batch(monkeypatch):
    transfer, worker = make()
    tower = MODEL.visual.forward

    def broken(patches, grids):
        main, levels = tower(patches, grids)
        main[5] = torch.nan
        return main, levels

    monkeypatch.setattr(MODEL.visual, "forward", broken)
    need(transfer, "a", IMAGES[:1])
    need(transfer, "b", IMAGES[1:2])
    rows, _, errors = take(transfer)
    assert worker.batches == [[60, 60]]
    assert list(rows) == [("a", 0)]
    [error] = errors
    assert error.request_id == "b"
    assert isinstance(error.error, ServerError)
    end(transfer, "a", "b")
    assert len(transfer.cache) == 1


def test_the_cache_of_a_small_budget_forgets_what_was_used_longest_ago():
    transfer, worker = make()
    take_one(transfer, "first")
    transfer.cache.max_bytes = 2 * transfer.cache.num_bytes
    for number, image in enumerate([1, 0, 2, 1, 0]):
        need(transfer, str(number), [IMAGES[image]])
        take(transfer)
        end(transfer, str(number))
    assert (transfer.cache.num_hits, transfer.cache.num_evictions) == (1, 3)
    assert worker.num_decoded == 5
