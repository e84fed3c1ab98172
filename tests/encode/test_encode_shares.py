"""Who gets how much of an encode rank: images beside clips, and language ranks beside one that is silent."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgspec
import pytest

from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode.pipeline import MAX_PULLED_BYTES, EncodePipeline
from qwen3vl_disagg.media.decoding import MediaDecoder
from qwen3vl_disagg.protocol.encode_sessions import ENCODING, PARKED, EncodeSessions
from qwen3vl_disagg.protocol.messages import Ack, Frame, Grant, HeaderOk, NeedItems
from qwen3vl_disagg.protocol.placement import encode_work
from qwen3vl_disagg.protocol.session_events import (
    Encoded,
    FrameIn,
    LinkDown,
    LinkUp,
    PayloadSent,
    SendHeader,
    SendPayload,
    SessionLimits,
    StartEncode,
    Tick,
)
from tests.support.link_peers import VISUAL, FakeWorker
from tests.support.link_scenarios import run, until
from tests.support.media_bytes import clip
from tests.support.media_children import with_each_job
from tests.support.media_images import jpeg
from tests.support.routing import Script, admit, visual

# ---- sessions: places ----

LIMITS = SessionLimits()


class Side:
    """Sessions with several language ranks, of which some never answer a header."""

    def __init__(self, num_language: int, silent: set[int]) -> None:
        self.sessions, self.now, self.silent = EncodeSessions(LIMITS), 0.0, silent
        self.seqs = dict.fromkeys(range(num_language), 0)
        self.encoding: list[tuple[str, int, int]] = []
        self.acknowledged: list[str] = []
        for rank in self.seqs:
            self.do(LinkUp(rank, 1))

    def do(self, event) -> None:
        for action in self.sessions.handle(event, self.now):
            match action:
                case StartEncode():
                    self.encoding.append(action.attempt)
                case SendHeader() if action.peer not in self.silent:
                    self.frame(action.peer, HeaderOk(**_ids(action.grant), row_start=0))
                case SendPayload():
                    grant, peer = action.grant, action.language_rank
                    self.do(PayloadSent(peer, 1, (grant.request_id, grant.item, grant.attempt)))
                    self.acknowledged.append(grant.request_id)
                    self.frame(peer, Ack(**_ids(grant), received=grant.row_stop))

    def frame(self, rank: int, body) -> None:
        self.seqs[rank] += 1
        self.do(FrameIn(rank, Frame(epoch=1, seq=self.seqs[rank], body=body)))

    def want(self, name: str, rank: int, modality: str = "image") -> None:
        item = msgspec.structs.replace(VISUAL, modality=modality)
        rows = item.num_rows
        grant = Grant(
            request_id=name,
            item=0,
            attempt=1,
            row_start=0,
            row_stop=rows,
            deepstack_start=0,
            deepstack_stop=rows,
            row_runs=[rows],
            deepstack_runs=[rows],
            visual=item,
            timeout_s=100.0,
        )
        self.frame(rank, grant)

    def encode_all(self) -> None:
        while self.encoding:
            self.do(Encoded(self.encoding.pop(0)))


def _ids(grant: Grant) -> dict[str, object]:
    return {"request_id": grant.request_id, "item": grant.item, "attempt": grant.attempt}


@pytest.mark.parametrize("num_silent", [1, 2, 5])
def test_silent_language_ranks_hold_nobody_else_up(num_silent):
    """They grant, and never answer a header."""
    side = Side(6, set(range(num_silent)))
    for n in range(20 * num_silent):
        side.want(f"silent {n}", n % num_silent)
    side.encode_all()
    for n in range(12):
        side.want(f"good {n}", 5)
        side.encode_all()
    assert side.acknowledged == [f"good {n}" for n in range(12)]
    in_memory = side.sessions._in_memory()
    assert all(len(in_memory[rank]) <= LIMITS.max_items // 2 for rank in range(num_silent))
    assert not in_memory[5]


def test_one_language_rank_has_all_places():
    side = Side(1, set())
    for n in range(20):
        side.want(str(n), 0)
    assert len(side.encoding) == LIMITS.max_items
    side.encode_all()
    assert side.acknowledged == [str(n) for n in range(20)]
    assert side.sessions.is_idle


def test_clips_leave_places_for_images():
    side = Side(2, set())
    for n in range(10):
        side.want(f"clip {n}", n % 2, "video")
    assert len(side.encoding) == LIMITS.max_clips
    side.want("image", 0)
    assert side.encoding[-1][0] == "image"
    side.encode_all()
    assert side.acknowledged.index("image") <= LIMITS.max_clips
    assert len(side.acknowledged) == 11


def test_encodings_are_bounded_whoever_wants_them():
    side = Side(6, set())
    for n in range(60):
        side.want(str(n), n % 6, "video" if n % 3 == 0 else "image")
        states = [item.state for item in side.sessions.items.values()]
        assert states.count(ENCODING) == len(side.encoding) <= LIMITS.max_items
    side.encode_all()
    side.do(Tick())
    assert sorted(map(int, side.acknowledged)) == list(range(60))
    assert side.sessions.is_idle


def test_what_waits_does_not_begin_when_its_link_breaks():
    """Places come free, since what was on its way is parked; but the grants of what waits are void."""
    side = Side(1, {0})
    for n in range(20):
        side.want(str(n), 0)
    side.encode_all()
    assert len(side.sessions.queue) == 20 - LIMITS.max_items
    side.do(LinkDown(0, 1, "broken"))
    assert side.encoding == []
    assert {item.state for item in side.sessions.items.values()} == {PARKED}


# ---- the pipeline: lanes ----


def item_of(name: str, modality: str = "image", **changes) -> VisualItem:
    return msgspec.structs.replace(VISUAL, digest=name, modality=modality, **changes)


async def pull(digest: str, num_bytes: int) -> bytes:
    return digest.encode()


def test_an_image_is_not_behind_clips_that_are_decoded():
    async def scenario():
        worker, gate = FakeWorker(), threading.Event()
        preprocess = worker.preprocess

        def slow(data, visual, stop):
            if visual.modality == "video":
                gate.wait(10)
            return preprocess(data, visual, stop)

        worker.preprocess = slow
        pipeline = EncodePipeline(worker, pull, EncodeOptions())
        large = {"grid": (40, 40, 40), "num_bytes": MAX_PULLED_BYTES}
        clips = [asyncio.create_task(pipeline.rows(item_of(f"clip {n}", "video", **large), int)) for n in range(4)]
        await asyncio.sleep(0.05)
        held = await asyncio.wait_for(pipeline.rows(item_of("image"), int), 5)
        assert held.item is not None
        assert not any(task.done() for task in clips)
        gate.set()
        await asyncio.gather(*clips)
        pipeline.close()

    run(scenario)


@pytest.mark.parametrize("first", ["image", "video"])
def test_images_and_clips_take_turns_in_the_tower(first):
    """However many of the others wait."""

    async def scenario():
        worker = FakeWorker()
        worker.gate.clear()
        pipeline = EncodePipeline(worker, pull, EncodeOptions(vision_batch_tokens=0))
        tasks = [asyncio.create_task(pipeline.rows(item_of("first", first), int))]
        await until(lambda: len(worker.batches) == 1)
        lanes = pipeline.lanes
        for name in ("image", "video"):
            lanes[name].ahead.limit = 10**12
            tasks += [asyncio.create_task(pipeline.rows(item_of(f"{name} {n}", name), int)) for n in range(3)]
        await until(lambda: all(len(lane.waiting) == 3 for lane in lanes.values()))
        worker.gate.set()
        await asyncio.gather(*tasks)
        kinds = [batch[0].split()[0].decode() for batch in worker.batches[1:]]
        others = {"image": "video", "video": "image"}
        assert kinds == [others[first], first] * 3
        pipeline.close()

    run(scenario)


def test_bytes_that_are_pulled_and_not_decoded_are_bounded():
    async def scenario():
        worker, most, pulled = FakeWorker(), 0, 0
        worker.decode_gate.clear()

        async def counted(digest: str, num_bytes: int) -> bytes:
            nonlocal most, pulled
            pulled += num_bytes
            most = max(most, pulled)
            return digest.encode()

        preprocess = worker.preprocess

        def decode(data, visual, stop):
            nonlocal pulled
            result = preprocess(data, visual, stop)
            pulled -= visual.num_bytes
            return result

        worker.preprocess = decode
        pipeline = EncodePipeline(worker, counted, EncodeOptions())
        size = MAX_PULLED_BYTES // 3
        tasks = [asyncio.create_task(pipeline.rows(item_of(str(n), num_bytes=size), int)) for n in range(9)]
        await asyncio.sleep(0.05)
        assert most == 3 * size
        worker.decode_gate.set()
        await asyncio.gather(*tasks)
        assert most <= MAX_PULLED_BYTES
        pipeline.close()

    run(scenario)


# ---- children ----


def test_an_image_is_decoded_while_every_child_for_clips_is_busy(monkeypatch):
    with_each_job(monkeypatch, "time.sleep(60)")
    decoder = MediaDecoder(max_children=1)
    with ThreadPoolExecutor(3) as pool:
        busy = [pool.submit(decoder.probe_video, clip()) for _ in range(3)]
        while not decoder._busy:
            time.sleep(0.01)
        monkeypatch.undo()
        started = time.monotonic()
        assert decoder.image(jpeg()).shape == (64, 96, 3)
        assert time.monotonic() - started < 20
        assert not any(task.done() for task in busy)
        decoder.close()
        for task in busy:
            assert task.exception() is not None


# ---- the router: load ----


def clip_of(name: str, frames: tuple[int, ...], **changes) -> VisualItem:
    grid = (len(frames) // 2, 8, 8)
    return msgspec.structs.replace(
        visual(name), modality="video", grid=grid, frames=frames, num_rows=16 * grid[0], **changes
    )


def test_work_counts_the_frames_that_are_decoded():
    assert encode_work(visual("a", side=8)) == 2 * 64
    assert encode_work(clip_of("b", (0, 10, 20, 29))) == (2 + 30) * 64
    assert encode_work(clip_of("c", (0, 10, 20, 29), is_frame_list=True)) == (2 + 4) * 64
    assert encode_work(clip_of("d", (0, 1))) == (1 + 2) * 64


def test_a_clip_with_few_frames_far_apart_is_a_load():
    """Two frames to look at, 1,000 to decode: images go elsewhere."""
    script = Script(encode=2)
    ranks = script.router._attempts.ranks
    [send] = script.do(replace(admit("clip"), items=[clip_of("clip", (0, 999))]))
    script.language_says(send.rank, NeedItems(request_id="clip", items=[0]))
    [busy] = [rank for rank, state in ranks.items() if state.jobs]
    for n in range(20):
        script.start(f"r{n}", f"image {n}")
    assert len(ranks[busy].jobs) == 1
