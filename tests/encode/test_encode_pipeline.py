"""From content to rows: how far decoding runs ahead of the tower, and that everyone gets their rows."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import msgspec
import pytest

from qwen3vl_disagg.core import spans
from qwen3vl_disagg.core.errors import InputError, TransferError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode.embedding_cache import HeldItem
from qwen3vl_disagg.encode.pipeline import EncodePipeline
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.protocol.messages import EncodingBegun, EncodingEnded, Message
from tests.support.link_peers import VISUAL, FakeWorker
from tests.support.link_scenarios import CONFIG, run, until
from tests.support.transfer import make_encoded


def item_of(content: str, grid: tuple[int, int, int] = VISUAL.grid, modality: str = "image") -> VisualItem:
    return msgspec.structs.replace(VISUAL, digest=content, grid=grid, modality=modality)


async def pull(digest: str, num_bytes: int) -> bytes:
    return digest.encode()


def ask(pipeline: EncodePipeline, item: VisualItem, *, is_alone: bool = False) -> asyncio.Task[HeldItem]:
    return asyncio.create_task(pipeline.rows(item, lambda: None, is_alone=is_alone))


def held(pipeline: EncodePipeline) -> int:
    lanes = pipeline.lanes.values()
    return sum(lane.ahead.used + lane.pulled.used + len(lane.waiting) for lane in lanes)


async def settled(seconds: float = 0.05) -> None:
    await asyncio.sleep(seconds)


@pytest.mark.parametrize(("tokens", "ahead"), [(0, 1), (5, 1), (6, 2), (11, 3), (15, 5), (1000, 9)])
def test_decoding_runs_ahead_of_a_busy_tower_and_not_too_far(tokens, ahead):
    """By the patches of two batches: 8 patches for each token of the budget, 24 patches in each image."""

    async def scenario():
        worker = FakeWorker()
        worker.gate.clear()
        pipeline = EncodePipeline(worker, pull, EncodeOptions(vision_batch_tokens=tokens))
        tasks = [ask(pipeline, item_of(f"{number:02}")) for number in range(10)]
        await until(lambda: worker.batches == [[b"00"]] and len(worker.decoded) >= 1 + ahead)
        await settled()
        assert len(worker.decoded) == 1 + ahead, worker.decoded
        worker.gate.set()
        await asyncio.gather(*tasks)
        assert sorted(data for batch in worker.batches for data in batch) == sorted(worker.decoded)
        assert pipeline.lanes["image"].ahead.used == pipeline.lanes["image"].pulled.used == 0
        pipeline.close()

    run(scenario)


def test_an_image_larger_than_may_be_decoded_ahead_is_not_overtaken():
    async def scenario():
        worker = FakeWorker()
        worker.gate.clear()
        pipeline = EncodePipeline(worker, pull, EncodeOptions(vision_batch_tokens=20))
        large = (1, 40, 40)
        tasks = [ask(pipeline, item_of("first")), ask(pipeline, item_of("second"))]
        await until(lambda: len(worker.decoded) == 2)
        tasks.append(ask(pipeline, item_of("large", large)))
        await settled(0.01)
        tasks += [ask(pipeline, item_of(name)) for name in ("small", "smaller")]
        await settled()
        assert worker.decoded == [b"first", b"second"], "the large one waits for all the room"
        worker.gate.set()
        await asyncio.gather(*tasks)
        assert worker.decoded[2] == b"large"
        assert worker.batches[:3] == [[b"first"], [b"second"], [b"large"]]
        pipeline.close()

    run(scenario)


def test_who_gives_up_while_waiting_for_room_leaves_it_to_the_next():
    async def scenario():
        worker = FakeWorker()
        worker.gate.clear()
        pipeline = EncodePipeline(worker, pull, EncodeOptions(vision_batch_tokens=0))
        tasks = {name: ask(pipeline, item_of(name)) for name in "abcd"}
        await until(lambda: len(worker.decoded) == 2)
        for name in "bc":  # one is decoded and waits for the tower, the next waits for its room
            tasks[name].cancel()
        await until(lambda: len(worker.decoded) == 3)
        worker.gate.set()
        await tasks["a"]
        await tasks["d"]
        assert worker.batches == [[b"a"], [b"d"]]
        assert (held(pipeline), len(pipeline._encodings)) == (0, 0)
        pipeline.close()

    run(scenario)


@pytest.mark.parametrize("how", ["gives up", "close"])
def test_decoding_ends_when_nobody_wants_it_any_more(how):
    """Not before: one of two who give up leaves it going."""

    class SlowWorker(FakeWorker):
        def __init__(self) -> None:
            super().__init__()
            self.stops: list[StopSignal] = []

        def preprocess(self, data, visual, stop):
            self.stops.append(stop)
            while not stop.is_set:
                time.sleep(0.002)
            stop.check()

    async def scenario():
        worker = SlowWorker()
        pipeline = EncodePipeline(worker, pull, EncodeOptions())
        tasks = [ask(pipeline, item_of("a")) for _ in range(2)]
        await until(lambda: len(worker.stops) == 1)
        tasks[0].cancel()
        await settled()
        assert not worker.stops[0].is_set
        if how == "close":
            pipeline.close()
        else:
            tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert worker.stops[0].is_set
        assert (held(pipeline), len(pipeline._encodings)) == (0, 0)
        pipeline.close()

    run(scenario)


def test_the_same_bytes_as_an_image_and_as_a_clip_are_two_contents():
    async def scenario():
        worker = FakeWorker()
        pipeline = EncodePipeline(worker, pull, EncodeOptions())
        await asyncio.gather(ask(pipeline, item_of("x")), ask(pipeline, item_of("x", modality="video")))
        assert worker.num_encoded == 2
        assert len(pipeline.cache) == 2
        pipeline.close()

    run(scenario)


def test_closing_in_the_middle_of_everything_leaves_nothing():
    async def scenario():
        worker = FakeWorker()
        worker.gate.clear()
        pipeline = EncodePipeline(worker, pull, EncodeOptions(vision_batch_tokens=20))
        tasks = [ask(pipeline, item_of(str(number))) for number in range(8)]
        await until(lambda: worker.batches and len(worker.decoded) > 2)
        pipeline.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() for task in tasks)
        worker.gate.set()
        await settled()
        assert len(worker.batches) == 1

    run(scenario)


class ErraticWorker(FakeWorker):
    """Takes its time, fails now and then, and has an item of its own for each content."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng, self.lock = rng, threading.Lock()
        self.now: set[bytes] = set()
        """In hand."""

    def chance(self, share: float) -> bool:
        with self.lock:
            time.sleep(self.rng.random() * 0.004)
            return self.rng.random() < share

    def preprocess(self, data, visual, stop):
        if self.chance(0.1):
            raise InputError("damaged")
        return data

    def encode(self, batch, visual_token_ids):
        with self.lock:
            assert not self.now & set(batch), "twice at once"
            assert len(set(batch)) == len(batch)
            self.now |= set(batch)
        self.batches.append(list(batch))
        results = [TransferError("NaN") if self.chance(0.1) else make_encoded(CONFIG, seed=int(d)) for d in batch]
        breaks = self.chance(0.05)
        with self.lock:
            self.now -= set(batch)
        if breaks:
            raise RuntimeError("the tower broke")
        return results


@pytest.mark.parametrize("seed", [*range(10), *(pytest.param(n, marks=pytest.mark.slow) for n in range(10, 30))])
def test_whatever_happens_everyone_gets_their_rows_or_a_failure(seed):
    """Equal and different items, impatient clients, failures everywhere, a cache of two or three items, or none."""
    rng = random.Random(seed)

    async def flaky_pull(digest: str, num_bytes: int) -> bytes:
        await asyncio.sleep(rng.random() * 0.004)
        if rng.random() < 0.05:
            raise TransferError("gone")
        return digest.encode()

    async def scenario():
        worker = ErraticWorker(random.Random(seed + 1000))
        pipeline = EncodePipeline(worker, flaky_pull, EncodeOptions(vision_batch_tokens=rng.choice([0, 20, 1000])))
        pipeline.cache.max_bytes = rng.choice([0, 6000, 9000])
        outcomes = {"rows": 0, "failed": 0, "given up": 0, "cached": 0}

        async def client() -> None:
            name, told = str(rng.randrange(5)), []
            try:
                async with asyncio.timeout(rng.choice([0.003, 0.01, 5.0])):
                    held = await pipeline.rows(item_of(name), lambda: told.append(name))
            except TimeoutError:
                outcomes["given up"] += 1
                return
            except (InputError, TransferError, RuntimeError):
                outcomes["failed"] += 1
                return
            assert told == [name], "its image was good, and that was said once"
            expected = make_encoded(CONFIG, seed=int(name))
            for _ in range(2):
                assert held.item.digest == expected.digest
                assert (held.key is None) or held.key in pipeline.cache
                await asyncio.sleep(rng.random() * 0.01)
            assert (held.batch == 0) is held.is_cached
            outcomes["cached" if held.is_cached else "rows"] += 1
            pipeline.release(held)

        clients = set()
        for _ in range(60):
            clients.add(asyncio.create_task(client()))
            await asyncio.sleep(rng.random() * 0.004)
            cache = pipeline.cache
            assert cache.num_bytes <= max(cache.max_bytes, cache.num_pinned_bytes)
        await asyncio.gather(*clients)
        await until(lambda: not pipeline._encodings)
        assert sum(outcomes.values()) == 60
        assert outcomes["rows"] > 0
        assert (outcomes["cached"] > 0) is (pipeline.cache.num_hits > 0)
        assert (pipeline.cache.num_pinned_bytes, held(pipeline)) == (0, 0)
        assert pipeline.num_encodings == worker.num_encoded
        pipeline.close()

    run(scenario)


def test_what_is_to_be_alone_is_alone_from_its_bytes_to_its_rows():
    async def scenario():
        worker, said = FakeWorker(), list[Message]()
        pipeline = EncodePipeline(worker, pull, EncodeOptions(vision_batch_tokens=1000), said.append)
        await asyncio.gather(*(ask(pipeline, item_of(name), is_alone=name in "cd") for name in "abcdef"))
        under_way: set[str] = set()
        for entry in said:
            if isinstance(entry, EncodingBegun):
                under_way.add(entry.digest)
                assert len(under_way) == 1 or not under_way & {"c", "d"}
            else:
                assert isinstance(entry, EncodingEnded)
                assert entry.is_well
                under_way.remove(entry.digest)
        assert not under_way
        assert len(said) == 12
        assert [b"c"] in worker.batches
        assert pipeline._gate.num_inside == 0
        await ask(pipeline, item_of("a"))  # from the cache: nothing is under way
        assert len(said) == 12
        pipeline.close()

    run(scenario)


@pytest.mark.parametrize("where", ["pull", "decode", "tower"])
@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_nothing_is_told_to_have_ended_while_a_thread_is_at_it(where, end):
    """Not even what nobody waits for any more: it could still bring the process down."""

    async def scenario():
        worker, said, gate = FakeWorker(), list[Message](), threading.Event()
        preprocess, pulled = worker.preprocess, asyncio.Event()

        async def slow_pull(digest: str, num_bytes: int) -> bytes:
            if where == "pull":
                await pulled.wait()
            if end == "failed" and where == "pull":
                raise TransferError("no")
            return digest.encode()

        def slow_preprocess(data, visual, stop):
            if where == "decode":
                gate.wait(5)
            if end == "failed" and where == "decode":
                raise InputError("no")
            return preprocess(data, visual, stop)

        worker.preprocess = slow_preprocess
        if where == "tower":
            worker.gate.clear()
            if end == "failed":
                worker.faults[b"a"] = ValueError("no")
        pipeline = EncodePipeline(worker, slow_pull, EncodeOptions(), said.append)
        task = ask(pipeline, item_of("a"))
        await until(lambda: said and (where != "tower" or worker.batches))
        await settled(0.02)
        if end == "cancelled":
            task.cancel()
            await asyncio.wait([task])
            await settled(0.02)
        is_over = where == "pull" and end == "cancelled"  # no thread has it
        assert len(said) == 1 + is_over
        gate.set()
        pulled.set()
        worker.gate.set()
        await until(lambda: len(said) == 2)
        is_well = (where, end) == ("tower", "cancelled")
        assert said[1] == EncodingEnded(digest="a", is_well=is_well)
        assert pipeline._gate.num_inside == 0
        await asyncio.wait([task])
        task.cancelled() or task.exception()
        pipeline.close()

    run(scenario)


def test_spans_name_those_who_wait_and_an_encoding_remembers_nobody_else(monkeypatch):
    """However many come and go while it lasts."""

    async def scenario():
        monkeypatch.setattr(spans, "ring", spans.SpanRing(100, 2**20))
        worker = FakeWorker()
        worker.decode_gate.clear()
        pipeline = EncodePipeline(worker, pull, EncodeOptions())

        def wait(name: str, item: int = 0) -> asyncio.Task[HeldItem]:
            return asyncio.create_task(pipeline.rows(item_of("x"), lambda: None, reader=(name, item)))

        staying = [wait("first")]
        await until(lambda: worker.decoded == [b"x"])
        for number in range(300):
            leaving = wait(f"gone-{number}")
            await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
        [encoding] = pipeline._encodings.values()
        sizes = {name: len(value) for name, value in vars(encoding).items() if isinstance(value, (list, dict, set))}
        assert max(sizes.values()) == 1, sizes
        staying.append(wait("second", 4))
        await asyncio.sleep(0)
        worker.open()
        await asyncio.gather(*staying)
        preprocess, encode = spans.ring.after(0, 10)[0]
        assert (preprocess.name, preprocess.requests, preprocess.items) == ("preprocess", ["first"], [("first", 0)])
        assert (encode.name, encode.requests) == ("encode", ["first", "second"])
        assert encode.items == [("first", 0), ("second", 4)]
        assert encode.numbers["images"] == 1
        assert encode.lane.startswith("tower")
        pipeline.close()

    run(scenario)
