"""Images and clips on their way to rows, on one event loop: each content once at a time, decoding ahead, batches.

    cache -> pull -> decode (threads, a bounded number of bytes ahead) -> wait -> tower (one thread, batch after batch)

Images and clips have lanes of their own up to the tower, which takes from them in turn: no image waits for clips to be
decoded, and for one batch of them at most in the tower. In a lane the first is what is due first (`core/due.py`).

Whoever wants what is on its way already waits for it. An encoding belongs to none of those that wait: it goes on while
one of them is left, and to its end once it is in the tower.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from qwen3vl_disagg.core.devices import raise_if_lost
from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.errors import ENCODE_ERROR, DeviceLost, ServerError
from qwen3vl_disagg.core.faults import fault_point
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.core.spans import Item, span
from qwen3vl_disagg.encode.batches import plan_batch, tower_cost
from qwen3vl_disagg.encode.embedding_cache import ContentKey, EmbeddingCache, HeldItem, content_key
from qwen3vl_disagg.encode.gate import Budget, Gate
from qwen3vl_disagg.encode.worker import EncodedItem, EncodeResult, EncodeWorker, LeavingItem, Pixels
from qwen3vl_disagg.media.stop import StopSignal
from qwen3vl_disagg.protocol.messages import EncodingBegun, EncodingEnded, Message

DECODE_THREADS = 2
BATCHES_AHEAD = 2
"""Decoded patches that may wait for the tower, in batches, of each lane."""
MAX_PULLED_BYTES = 64 * 2**20
"""Bytes of images, and of clips, that were asked for and are not decoded yet."""
Pull = Callable[[str, int], Awaitable[bytes]]
"""(SHA-256 in hex, number of bytes) -> the bytes"""


@dataclass(eq=False)
class _Encoding:
    """One content on its way. `waiters`: those who wait now, by what to call when the bytes turn out good."""

    key: ContentKey
    visual: VisualItem
    is_alone: bool
    number: int
    """In the order in which they began."""
    due: float
    """Of those who have waited for it, the most urgent."""
    waiters: dict[object, tuple[Callable[[], None], Item | None]] = field(default_factory=dict)
    stop: StopSignal = field(default_factory=StopSignal)
    """Set when nobody wants it before it is in the tower."""
    is_decoded: bool = False
    is_well: bool = False
    """It went through the tower, and there are rows."""
    pixels: Pixels | None = None
    room: int = 0
    """Bytes of patches that it takes of what may be decoded ahead."""
    num_pulled: int = 0
    """Bytes that it takes of what may be pulled."""
    batch: int = 0
    """Number of the tower's run that it is in; 0 before."""
    is_kept: bool = False
    """In the cache, and pinned for those who wait."""
    task: asyncio.Task[EncodedItem] = field(init=False)
    rows: asyncio.Future[EncodedItem] = field(init=False)
    """What comes out of the tower."""

    @property
    def readers(self) -> list[Item]:
        """Whose items wait for it, for the spans; from any thread, as the copy of a dict's values is one step."""
        return [reader for _, reader in list(self.waiters.values()) if reader is not None]


class _Lane:
    """What images, or clips, share up to the tower."""

    def __init__(self, name: str, max_ahead: int) -> None:
        self.decoder = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix=f"decode-{name}")
        self.pulled, self.ahead = Budget(MAX_PULLED_BYTES), Budget(max_ahead)
        self.waiting: list[_Encoding] = []
        """Decoded, for the tower."""


class EncodePipeline:
    """From the content of an item to its rows. `cache` and the counts are there to be read."""

    def __init__(
        self,
        worker: EncodeWorker,
        pull: Pull,
        options: EncodeOptions,
        tell: Callable[[Message], None] = lambda _: None,
        *,
        tower: Executor | None = None,
        gathers: bool = False,
        on_lost: Callable[[DeviceLost], None] = lambda _: None,
    ) -> None:
        """`tell` gets what the router should know of contents that begin and end. `tower`: where the tower runs, if not
        on a thread of its own. With `gathers` a batch waits for what is being decoded: so it does not depend on how
        long that takes, and what is asked for together goes through the tower together. `on_lost`: there is no device
        any more."""
        self.cache = EmbeddingCache[EncodedItem](options.cache_bytes)
        self.num_encodings = self.num_batches = 0
        """What went into the tower."""
        self._worker, self._pull, self._tell, self._on_lost = worker, pull, tell, on_lost
        self._gate = Gate()
        self._vision = worker.config.vision
        self._visual_token_ids = {"image": worker.config.image_token_id, "video": worker.config.video_token_id}
        self._budget = options.vision_batch_tokens
        self._patch_bytes = 4 * self._vision.patch_dim
        max_ahead = BATCHES_AHEAD * self._budget * self._vision.merge_unit * self._patch_bytes
        self.lanes = {"image": _Lane("images", max_ahead), "video": _Lane("clips", max_ahead)}
        """In the order in which the tower looks for its next batch."""
        self._encodings: dict[ContentKey, _Encoding] = {}
        self._is_running = False
        self._tower = tower or ThreadPoolExecutor(1, thread_name_prefix="tower")
        self._leaving = ThreadPoolExecutor(1, thread_name_prefix="leaving")
        """Waits for rows from a GPU while the tower takes its next batch."""
        self._gathers, self._num_begun, self._num_decoding = gathers, 0, 0

    def close(self) -> None:
        for lane in self.lanes.values():
            lane.waiting.clear()
        for encoding in self._encodings.values():
            encoding.stop.set()
            encoding.task.cancel()
        for executor in (*(lane.decoder for lane in self.lanes.values()), self._tower, self._leaving):
            executor.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """After `close`: wait until what was being decoded has stopped."""
        for lane in self.lanes.values():
            lane.decoder.shutdown(wait=True)

    async def rows(
        self,
        visual: VisualItem,
        on_decoded: Callable[[], None],
        *,
        is_alone: bool = False,
        due: float = FIRST_COME,
        reader: Item | None = None,
    ) -> HeldItem:
        """The item's rows, until `release`. `on_decoded` is called as soon as its bytes are known to be good. `reader`:
        whose item it is, for the spans.

        Raises whatever its encoding fails with.
        """
        key = content_key(visual, self._visual_token_ids[visual.modality])
        item = self.cache.get(key)
        if item is not None:
            on_decoded()
            return HeldItem(item, key, is_cached=True)
        encoding = self._encodings.get(key) or self._start(key, visual, is_alone, due)
        if due < encoding.due:
            encoding.due, lane = due, self.lanes[visual.modality]
            lane.pulled.hasten(encoding, due)
            lane.ahead.hasten(encoding, due)
        waiter, started = object(), time.monotonic()
        encoding.waiters[waiter] = on_decoded, reader
        try:
            if encoding.is_decoded:
                on_decoded()
            await asyncio.wait([encoding.task])  # and not the task itself, which must not end with this waiter
            item = encoding.task.result()
            pinned = key if self.cache.pin(key) else None
            return HeldItem(item, pinned, batch=encoding.batch, waited_s=time.monotonic() - started)
        finally:
            del encoding.waiters[waiter]
            if not encoding.waiters:
                self._leave(encoding)

    def release(self, held: HeldItem) -> None:
        if held.key is not None:
            self.cache.unpin(held.key)

    # -- one encoding

    def _start(self, key: ContentKey, visual: VisualItem, is_alone: bool, due: float) -> _Encoding:
        self._num_begun += 1
        encoding = self._encodings[key] = _Encoding(key, visual, is_alone, self._num_begun, due)
        encoding.rows = asyncio.get_running_loop().create_future()
        encoding.task = asyncio.create_task(self._encode(encoding))
        encoding.task.add_done_callback(_look_at)
        return encoding

    def _leave(self, encoding: _Encoding) -> None:
        """The last of those who waited is gone."""
        if encoding.is_kept:
            self.cache.unpin(encoding.key)
        elif not encoding.batch and not encoding.task.done():
            encoding.stop.set()
            encoding.task.cancel()
            self._forget(encoding)  # now: the next who wants it has to start anew

    def _forget(self, encoding: _Encoding) -> None:
        if self._encodings.get(encoding.key) is encoding:
            del self._encodings[encoding.key]

    async def _encode(self, encoding: _Encoding) -> EncodedItem:
        """Ends with the rows in the cache, if they are to be kept and fit."""
        visual, lane, decoding = encoding.visual, self.lanes[encoding.visual.modality], None
        try:
            await self._gate.enter(alone=encoding.is_alone)
        except asyncio.CancelledError:
            self._forget(encoding)
            raise
        self._tell(EncodingBegun(digest=visual.digest))
        try:
            fault_point("before-encode", visual.digest)
            await lane.pulled.take(visual.num_bytes, encoding.due, encoding)
            encoding.num_pulled = visual.num_bytes
            data = await self._pull(visual.digest, visual.num_bytes)
            room = math.prod(visual.grid) * self._patch_bytes
            await lane.ahead.take(room, encoding.due, encoding)
            encoding.room = room
            decoding = lane.decoder.submit(self._decode, data, encoding)
            del data
            self._num_decoding += 1
            try:
                encoding.pixels = await asyncio.wrap_future(decoding)
            finally:
                self._num_decoding -= 1
            self._give_pulled(encoding)
            encoding.is_decoded = True
            for on_decoded, _ in list(encoding.waiters.values()):
                on_decoded()
            lane.waiting.append(encoding)
            self._feed_tower()
            item = await encoding.rows
            encoding.is_well = True
        finally:
            self._forget(encoding)
            self._end_when_done(encoding, decoding)
            self._give_pulled(encoding)
            self._give_room(encoding)
            if encoding in lane.waiting:  # a failed `remove` would write out its rows for the error's text
                lane.waiting.remove(encoding)
            self._feed_tower()  # others may have waited for it
        if self.cache.put(encoding.key, item, item.num_bytes):
            encoding.is_kept = bool(encoding.waiters)
            if not encoding.waiters:
                self.cache.unpin(encoding.key)
        return item

    def _end_when_done(self, encoding: _Encoding, decoding: Future[Pixels] | None) -> None:
        """What is cancelled may keep its thread for a moment, and could still bring this process down."""
        if decoding is None or decoding.done():
            self._ended(encoding)
        else:
            loop = asyncio.get_running_loop()
            decoding.add_done_callback(lambda _: loop.call_soon_threadsafe(self._ended, encoding))

    def _ended(self, encoding: _Encoding) -> None:
        self._tell(EncodingEnded(digest=encoding.visual.digest, is_well=encoding.is_well))
        self._gate.leave()

    def _decode(self, data: bytes, encoding: _Encoding) -> Pixels:
        with span("preprocess", items=encoding.readers):
            return self._worker.preprocess(data, encoding.visual, encoding.stop)

    def _give_pulled(self, encoding: _Encoding) -> None:
        self.lanes[encoding.visual.modality].pulled.give(encoding.num_pulled)
        encoding.num_pulled = 0

    def _give_room(self, encoding: _Encoding) -> None:
        self.lanes[encoding.visual.modality].ahead.give(encoding.room)
        encoding.room = 0

    # -- the tower

    def _feed_tower(self) -> None:
        """The next batch, unless one is running, of the lane whose turn it is."""
        name = next((name for name, lane in self.lanes.items() if lane.waiting), None)
        if self._is_running or name is None or (self._gathers and self._num_decoding):
            return
        self.lanes[name] = lane = self.lanes.pop(name)  # the last one next time
        lane.waiting.sort(key=lambda entry: (entry.due, entry.number))
        count = plan_batch((tower_cost(entry.visual.grid, self._vision) for entry in lane.waiting), self._budget)
        batch, lane.waiting = lane.waiting[:count], lane.waiting[count:]
        pixels = [entry.pixels for entry in batch if entry.pixels is not None]
        self._is_running = True
        self.num_batches += 1
        self.num_encodings += count
        for entry in batch:
            entry.batch, entry.pixels = self.num_batches, None
            self._give_room(entry)
        running = asyncio.get_running_loop().run_in_executor(self._tower, self._run_tower, pixels, batch)
        running.add_done_callback(partial(self._come_out, batch))

    def _run_tower(self, pixels: list[Pixels], batch: list[_Encoding]) -> list[EncodeResult]:
        fault_point("in-tower", *(entry.visual.digest for entry in batch))
        rows = sum(math.prod(entry.visual.grid) for entry in batch) // self._vision.merge_unit
        with span("encode", images=len(pixels), rows=rows) as readers:
            results = self._worker.encode(pixels, [entry.key.visual_token_id for entry in batch])
            for result in results:
                if isinstance(result, EncodedItem):
                    _ = result.digest  # computed here, so that no event loop has to
            readers += [reader for entry in batch for reader in entry.readers]
        return results

    def _come_out(self, batch: list[_Encoding], running: asyncio.Future[list[EncodeResult]]) -> None:
        """The tower has ended. From a GPU the rows are still on their way."""
        self._is_running = False
        if running.cancelled():
            return
        if running.exception() is None and any(isinstance(result, LeavingItem) for result in running.result()):
            leaving = asyncio.get_running_loop().run_in_executor(self._leaving, _arrived, running.result())
            leaving.add_done_callback(partial(self._settle, batch))
        else:
            self._settle(batch, running)
        self._feed_tower()

    def _settle(self, batch: list[_Encoding], ended: asyncio.Future[list[EncodeResult]]) -> None:
        if ended.cancelled():
            return
        error = ended.exception()
        if error is not None:
            try:
                raise_if_lost(error)
            except DeviceLost as lost:
                self._on_lost(lost)
                error = ServerError(str(lost), code=ENCODE_ERROR)
        results = ended.result() if error is None else [error] * len(batch)
        for encoding, result in zip(batch, results, strict=True):
            if encoding.rows.done():  # given up, with everything else
                continue
            if isinstance(result, BaseException):
                encoding.rows.set_exception(result)
            elif isinstance(result, EncodedItem):
                encoding.rows.set_result(result)


def _arrived(results: list[EncodeResult]) -> list[EncodeResult]:
    """When all are on the host, with their digests; blocks."""
    here: list[EncodeResult] = [result.arrived() if isinstance(result, LeavingItem) else result for result in results]
    for result in here:
        if isinstance(result, EncodedItem):
            _ = result.digest
    return here


def _look_at(task: asyncio.Task[EncodedItem]) -> None:
    """Nobody may be left to hear of its failure: that is not worth a warning."""
    if not task.cancelled():
        task.exception()
