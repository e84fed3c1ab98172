"""Both roles in one thread: what `LLM` uses. The same sessions, worker, receiver and buffers as between ranks."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3vl_disagg.core.errors import DisaggError, Failure, TransferError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode.batches import plan_batch, tower_cost
from qwen3vl_disagg.encode.embedding_cache import ContentKey, EmbeddingCache, HeldItem, content_key
from qwen3vl_disagg.encode.worker import EncodedItem, EncodeWorker, Pixels, encode_error
from qwen3vl_disagg.language.receiver import Receiver
from qwen3vl_disagg.protocol.encode_sessions import EncodeSessions
from qwen3vl_disagg.protocol.language_sessions import LanguageSessions
from qwen3vl_disagg.protocol.messages import Assign, Cancel, Frame, ItemFailed, ItemLost
from qwen3vl_disagg.protocol.session_events import (
    Attempt,
    Consumed,
    EncodeAction,
    Encoded,
    EncodeEvent,
    Expect,
    FrameIn,
    LanguageAction,
    LanguageEvent,
    LinkUp,
    PayloadEnd,
    PayloadSent,
    Recall,
    Receive,
    Release,
    Returned,
    RowsReady,
    SendFrame,
    SendHeader,
    SendPayload,
    StartEncode,
    Tell,
)
from qwen3vl_disagg.transport.buffers import Delivery
from qwen3vl_disagg.transport.links import InProcessLink

_ENCODE_RANK = _LANGUAGE_RANK = 0
_EPOCH = 1
_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ItemError:
    """An item that cannot be had; its request cannot be answered."""

    request_id: str
    item: int
    error: DisaggError


Outcome = Delivery | Recall | ItemError


class LocalTransfer:
    """An encode worker and a receiver joined by an in-process link.

    `need` items, `consumed` rows, `returned` what was recalled, `forget` requests; after each of them `run` carries on
    as far as it goes and says what came of it.
    """

    def __init__(self, worker: EncodeWorker, receiver: Receiver, options: EncodeOptions | None = None) -> None:
        self.worker, self.receiver, self.options = worker, receiver, options or EncodeOptions()
        self.cache = EmbeddingCache[EncodedItem](self.options.cache_bytes)
        self.num_batches = 0
        buffers = receiver.buffers
        self.language = LanguageSessions(buffers.allocator, buffers.block_size, buffers.row_sizes)
        self.encode = EncodeSessions()
        self._link = InProcessLink()
        self._todo: deque[Callable[[], None]] = deque()
        self._outcomes: list[Outcome] = []
        self._media: dict[tuple[str, int], tuple[VisualItem, bytes]] = {}
        self._to_start: list[Attempt] = []
        self._encoded: dict[Attempt, HeldItem] = {}
        self._errors: dict[Attempt, DisaggError] = {}
        """Why items could not be encoded: of the class that they were raised as."""
        self._attempts: dict[tuple[str, int], int] = {}
        """(request, item) -> how often it was needed"""
        self._to_encode(LinkUp(_LANGUAGE_RANK, _EPOCH))
        self._to_language(LinkUp(_ENCODE_RANK, _EPOCH))

    @property
    def is_idle(self) -> bool:
        return not self._todo and self.language.is_idle and self.encode.is_idle

    @property
    def is_short_of_room(self) -> bool:
        return self.language.is_short_of_room

    def need(
        self,
        request_id: str,
        items: list[VisualItem],
        lacking: list[int],
        media: list[bytes],
        first_rows: Sequence[int] = (),
    ) -> None:
        """Encode these of a request's items and bring their rows over: those from `first_rows[k]` on of `lacking[k]`,
        all rows where it is empty. `media`: the bytes of all its items. Once more: what the request had it has no more.
        """
        self._to_language(Expect(request_id, items, lacking, math.inf, list(first_rows)))
        for index in lacking:
            self._media[request_id, index] = (items[index], media[index])
            attempt = self._attempts[request_id, index] = self._attempts.get((request_id, index), 0) + 1
            assign = Assign(request_id=request_id, item=index, attempt=attempt, encode_rank=_ENCODE_RANK)
            self._to_language(assign)

    def consumed(self, request_id: str, item: int, attempt: int, rows: int) -> None:
        self._to_language(Consumed(request_id, item, attempt, rows))

    def returned(self, recall: Recall) -> None:
        self._to_language(Returned(*recall.key))

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self._to_language(Cancel(request_id=request_id))
        self.receiver.forget(request_id)
        tables: tuple[dict[Any, Any], ...] = (self._media, self._errors, self._attempts)
        for table in tables:
            for key in [key for key in table if key[0] == request_id]:
                del table[key]

    def run(self) -> list[Outcome]:
        """Go on until nothing moves without the engine."""
        while self._todo:
            self._todo.popleft()()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _to_language(self, event: LanguageEvent) -> None:
        def handle() -> None:
            for action in self.language.handle(event, time.monotonic()):
                self._do_language(action)

        self._todo.append(handle)

    def _to_encode(self, event: EncodeEvent) -> None:
        def handle() -> None:
            for action in self.encode.handle(event, time.monotonic()):
                self._do_encode(action)

        self._todo.append(handle)

    def _do_language(self, action: LanguageAction) -> None:
        match action:
            case SendFrame():
                self._to_encode(FrameIn(_LANGUAGE_RANK, action.frame))
            case Receive():
                self._todo.append(lambda: self._receive(action))  # after the answer that makes the other end send
            case RowsReady():
                attempt = action.key
                if (delivery := self.receiver.delivery(attempt)) is not None:
                    self._outcomes.append(delivery)
            case Recall():
                self._outcomes.append(action)
            case Tell(ItemLost() as lost):
                self._outcomes.append(ItemError(lost.request_id, lost.item, TransferError(lost.reason)))

    def _do_encode(self, action: EncodeAction) -> None:
        match action:
            case SendFrame():
                self._to_language(FrameIn(_ENCODE_RANK, action.frame))
            case StartEncode():
                if not self._to_start:
                    self._todo.append(self._encode)
                self._to_start.append(action.attempt)
            case SendHeader():
                header = self._encoded[action.grant.key].header(action.grant)
                frame = Frame(epoch=action.epoch, seq=action.seq, body=header)
                self._to_language(FrameIn(_ENCODE_RANK, frame))
            case SendPayload():
                self._link.send(self._encoded[action.grant.key].item.payload(action.grant), _TIMEOUT_S)
                self._to_encode(PayloadSent(_LANGUAGE_RANK, _EPOCH, action.grant.key))
            case Release():
                self._release(action.attempt)
            case Tell(ItemFailed() as failed):
                attempt = failed.key
                error = self._errors.pop(attempt, None) or failed.failure.error()
                self._outcomes.append(ItemError(failed.request_id, failed.item, error))

    def _release(self, attempt: Attempt) -> None:
        if attempt in self._to_start:
            self._to_start.remove(attempt)
        held = self._encoded.pop(attempt, None)
        if held is not None and held.key is not None:
            self.cache.unpin(held.key)

    def _encode(self) -> None:
        """All that was to be started: each content once, from the cache or in batches."""
        attempts, self._to_start = self._to_start, []
        wanted: dict[ContentKey, list[Attempt]] = {}
        for attempt in attempts:
            visual, config = self._media[attempt[:2]][0], self.worker.config
            key = content_key(visual, config.image_token_id if visual.modality == "image" else config.video_token_id)
            item = self.cache.get(key)
            if item is None:
                wanted.setdefault(key, []).append(attempt)
            else:
                self._encoded[attempt] = HeldItem(item, key, is_cached=True)
                self._to_encode(Encoded(attempt))
        while wanted:
            costs = [tower_cost(key.grid, self.worker.config.vision) for key in wanted]
            keys = list(wanted)[: plan_batch(costs, self.options.vision_batch_tokens)]
            self._encode_batch({key: wanted.pop(key) for key in keys})

    def _encode_batch(self, wanted: dict[ContentKey, list[Attempt]]) -> None:
        pixels: dict[ContentKey, Pixels] = {}
        for key, attempts in wanted.items():
            visual, data = self._media[attempts[0][:2]]
            try:
                pixels[key] = self.worker.preprocess(data, visual)
            except Exception as error:
                self._fail(attempts, error)
        if not pixels:
            return
        self.num_batches += 1
        results = self.worker.encode(list(pixels.values()), [key.visual_token_id for key in pixels])
        for key, result in zip(pixels, results, strict=True):
            if isinstance(result, EncodedItem):
                is_kept = self.cache.put(key, result, result.num_bytes)
                for attempt in wanted[key]:
                    self._encoded[attempt] = HeldItem(
                        result, key if self.cache.pin(key) else None, batch=self.num_batches
                    )
                    self._to_encode(Encoded(attempt))
                if is_kept:
                    self.cache.unpin(key)
            else:
                self._fail(wanted[key], result)

    def _fail(self, attempts: list[Attempt], error: Exception) -> None:
        known = encode_error(error)
        for attempt in attempts:
            self._errors[attempt] = known.at(self._media[attempt[:2]][0].param)
            request_id, item, number = attempt
            self._to_encode(ItemFailed(request_id=request_id, item=item, attempt=number, failure=Failure.of(known)))

    def _receive(self, job: Receive) -> None:
        error = None
        try:
            self.receiver.receive(self._link, job, _TIMEOUT_S)
        except TransferError as failure:
            error = str(failure)
        self._to_language(PayloadEnd(*job.grant.key, job.encode_rank, job.epoch, error))
