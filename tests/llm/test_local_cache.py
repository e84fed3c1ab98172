"""Both roles in one process, with items that are equal or can go through the tower together."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
import torch

from qwen3vl_disagg.core.errors import InputError, ServerError
from qwen3vl_disagg.core.requests import ItemTimings, VisualItem
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode.batches import tower_cost
from qwen3vl_disagg.encode.worker import EncodedItem, EncodeWorker
from tests.support.link_scenarios import CONFIG, MODEL, PROCESSOR, describe, make_image
from tests.support.local import Caller, calling
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
        self.slow_first_s = 0.0
        """How much longer the first one takes to be decoded."""

    def preprocess(self, data, visual, stop=None):
        self.num_decoded += 1
        if self.num_decoded == 1:
            time.sleep(self.slow_first_s)
        return super().preprocess(data, msgspec.structs.replace(visual, modality="image"), stop)

    def encode(self, batch, visual_token_ids):
        self.batches.append(list(visual_token_ids))
        return super().encode(batch, visual_token_ids)


@contextmanager
def local(options: EncodeOptions | None = None, *, blocks: int = 64) -> Iterator[tuple[Caller, CountingWorker]]:
    worker = CountingWorker()
    receiver = make_receiver(CONFIG, rows=4 * blocks, deepstack_rows=4 * blocks, slots=12, block_size=4)
    with calling(worker, receiver, options) as caller:
        yield caller, worker


def need(caller: Caller, name: str, images: list[bytes], visuals: list[VisualItem] | None = None) -> None:
    caller.need(name, visuals or list(map(describe, images)), images)


def rows_of(caller: Caller, name: str, item: int = 0) -> torch.Tensor:
    return torch.cat(caller.rows[name, item], dim=1)


def take_one(caller: Caller, name: str, image: bytes = IMAGES[0]) -> tuple[torch.Tensor, ItemTimings]:
    need(caller, name, [image])
    caller.run()
    caller.end()
    return rows_of(caller, name), caller.timings[name, 0]


def test_the_second_time_the_rows_are_there_with_the_same_bits():
    with local() as (caller, worker):
        first, told = take_one(caller, "a")
        again, told_again = take_one(caller, "b")
        cache = caller.transfer.pipeline.cache
    assert torch.equal(first, again)
    assert worker.num_decoded == len(worker.batches) == 1
    assert (told.cached, told.batch) == (False, 1)
    assert min(told.encode, told.preprocess) > 0
    assert (told_again.cached, told_again.batch, told_again.encode, told_again.preprocess) == (True, 0, 0.0, 0.0)
    assert (cache.num_hits, cache.num_misses) == (1, 1)


def test_with_everything_off_each_is_encoded_alone_and_nothing_is_kept():
    with local(OFF) as (caller, worker):
        for name in "ab":
            assert not take_one(caller, name)[1].cached
        need(caller, "c", IMAGES[:3])
        caller.run()
        caller.end()
        assert list(map(len, worker.batches)) == [1] * 5
        assert len(caller.transfer.pipeline.cache) == 0


@pytest.mark.parametrize("options", [EncodeOptions(), OFF], ids=["cache", "off"])
@pytest.mark.parametrize("blocks", [64, 1])
def test_equal_items_that_start_together_are_encoded_once(options, blocks):
    with local(options, blocks=blocks) as (caller, worker):
        need(caller, "a", [IMAGES[0], IMAGES[1], IMAGES[0]])
        need(caller, "b", [IMAGES[0]])
        caller.run()
        assert torch.equal(rows_of(caller, "a", 0), rows_of(caller, "a", 2))
        assert torch.equal(rows_of(caller, "a", 0), rows_of(caller, "b"))
        if blocks == 64:  # otherwise each starts when the one before is through
            assert worker.num_decoded == 2
            assert not any(timings.cached for timings in caller.timings.values())
        else:
            assert worker.num_decoded == (2 if options is not OFF else 4)
        caller.end()


def test_items_that_start_together_go_through_the_tower_in_batches():
    """In their order, however long each takes to be decoded; clips apart."""
    with local(EncodeOptions(vision_batch_tokens=int(2 * COST) + 1)) as (caller, worker):
        worker.slow_first_s = 0.1
        visuals = [
            msgspec.structs.replace(describe(IMAGES[i]), modality="video" if i == 1 else "image") for i in range(5)
        ]
        need(caller, "a", IMAGES[:5], visuals)
        caller.run()
        assert worker.batches == [[60, 60], [61], [60, 60]]
        assert [caller.timings["a", number].batch for number in range(5)] == [1, 2, 1, 3, 3]
        for number in range(5):
            [alone] = EncodeWorker(MODEL, PROCESSOR, CONFIG).encode(
                [worker.preprocess(IMAGES[number], visuals[number])], [60]
            )
            assert isinstance(alone, EncodedItem)
            expected = torch.cat([alone.main, alone.deepstack], dim=1)
            found = rows_of(caller, "a", number)
            assert torch.linalg.vector_norm(found - expected) < 1e-6 * torch.linalg.vector_norm(expected)
        caller.end()


def test_a_bad_item_fails_for_all_who_wanted_it_and_for_nobody_else():
    damaged = IMAGES[0][:200]
    bad = msgspec.structs.replace(
        describe(IMAGES[0]), digest=hashlib.sha256(damaged).hexdigest(), num_bytes=len(damaged)
    )
    with local() as (caller, worker):
        need(caller, "a", [damaged], [bad])
        need(caller, "b", [damaged], [bad])
        need(caller, "c", [IMAGES[1]])
        caller.run()
        assert list(caller.rows) == [("c", 0)]
        assert sorted(caller.errors) == ["a", "b"]
        assert all(isinstance(error, InputError) and error.param == "messages[0]" for error in caller.errors.values())
        assert worker.batches == [[60]]
        caller.end()


def test_a_bad_item_that_takes_longest_holds_up_nobody_who_waited_for_it():
    damaged = IMAGES[0][:200]
    bad = msgspec.structs.replace(
        describe(IMAGES[0]), digest=hashlib.sha256(damaged).hexdigest(), num_bytes=len(damaged)
    )
    with local() as (caller, worker):
        worker.slow_first_s = 0.1
        need(caller, "a", [damaged], [bad])
        need(caller, "b", [IMAGES[1]])
        caller.run()
        assert (list(caller.errors), list(caller.rows)) == (["a"], [("b", 0)])
        caller.end()


def test_rows_that_are_not_finite_fail_one_item_of_a_batch(monkeypatch):
    tower, sizes = MODEL.visual.forward, []

    def broken(patches, grids):
        sizes.append(len(grids))
        main, levels = tower(patches, grids)
        main[5 if len(grids) > 1 else 0] = torch.nan  # of the second one, and whenever that comes again
        return main, levels

    monkeypatch.setattr(MODEL.visual, "forward", broken)
    with local() as (caller, _):
        need(caller, "a", IMAGES[:1])
        need(caller, "b", IMAGES[1:2])
        caller.run()
        assert sizes == [2, 1, 1]
        assert list(caller.rows) == [("a", 0)]
        assert list(caller.errors) == ["b"]
        assert isinstance(caller.errors["b"], ServerError)
        caller.end()
        assert len(caller.transfer.pipeline.cache) == 1


def test_the_cache_of_a_small_budget_forgets_what_was_used_longest_ago():
    with local() as (caller, worker):
        take_one(caller, "first")
        cache = caller.transfer.pipeline.cache
        cache.max_bytes = 2 * cache.num_bytes
        for number, image in enumerate([1, 0, 2, 1, 0]):
            take_one(caller, str(number), IMAGES[image])
        assert (cache.num_hits, cache.num_evictions) == (1, 3)
        assert worker.num_decoded == 5
